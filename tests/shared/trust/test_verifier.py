"""Each check of `Verifier`, named for what an attacker would try."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate, Role, claimed_site, issue
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Signer
from fleetfed.shared.trust.verifier import SPEAKERS, Verifier
from fleetfed.shared.wire.envelope import MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import Decline, DeclineReason, Revocations

AUTHORITY = SigningKey.from_seed(b"authority".ljust(32))
YEAR = 365 * 24 * 3600 * 1000
NOW = 50 * YEAR
BODY = Decline(plan=b"p" * 32, reason=DeclineReason.BUSY)


def identity(
    name: str = "d-1",
    *,
    role: Role = Role.DEVICE,
    fleet: str = "fleet",
    serial: int = 7,
    authority: SigningKey = AUTHORITY,
    not_after: int = NOW + YEAR,
) -> Identity:
    key = SigningKey.from_seed(name.encode().ljust(32))
    certificate = Certificate(
        serial=serial,
        role=role,
        fleet=fleet,
        id=name,
        site="north",
        owner="someone",
        not_before=NOW - YEAR,
        not_after=not_after,
        public_key=key.public,
    )
    return Identity(
        key=key,
        certificate=certificate,
        encoded_certificate=issue(certificate, authority),
        authority_key=AUTHORITY.public,
    )


def signer(who: Identity) -> Signer:
    counter = itertools.count(1)
    return who.signer(sequence=lambda: next(counter), randomness=lambda size: b"r" * size)


def decline(who: Identity | None = None, *, lifetime: int = 0) -> bytes:
    return signer(who or identity()).sign(MessageKind.DECLINE, BODY, now=NOW, round=3, lifetime=lifetime).encode()


def refused(data: bytes, *, verifier: Verifier | None = None, now: int = NOW, sender: str = "d-1") -> RejectReason:
    with pytest.raises(RemoteProtocolError) as caught:
        (verifier or Verifier("fleet", AUTHORITY.public)).open(
            data, Decline, kind=MessageKind.DECLINE, now=now, sender=sender
        )
    return caught.value.reason


def test_an_honest_message_is_believed() -> None:
    body, head, certificate = Verifier("fleet", AUTHORITY.public).open(
        decline(), Decline, kind=MessageKind.DECLINE, now=NOW, sender="d-1"
    )
    assert body == BODY
    assert (head.header.round, certificate.id, certificate.owner) == (3, "d-1", "someone")


@settings(max_examples=150)
@given(position=st.integers(0, len(decline()) - 1), flip=st.integers(1, 255))
def test_any_flipped_byte_is_refused(position: int, flip: int) -> None:
    data = bytearray(decline())
    data[position] ^= flip
    refused(bytes(data))


@settings(max_examples=50)
@given(cut=st.integers(0, len(decline()) - 1))
def test_a_truncated_message_is_refused(cut: int) -> None:
    assert refused(decline()[:cut]) is RejectReason.TRUNCATED


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param(lambda: decline() + b"x", RejectReason.MALFORMED, id="bytes after the body"),
        pytest.param(lambda: decline(identity("d-2")), RejectReason.WRONG_SENDER, id="on another's topic"),
        pytest.param(lambda: decline(identity(fleet="other")), RejectReason.WRONG_FLEET, id="of another fleet"),
        pytest.param(lambda: decline(identity(role=Role.GATEWAY)), RejectReason.WRONG_ROLE, id="a gateway as device"),
        pytest.param(
            lambda: decline(identity(authority=SigningKey.from_seed(b"m" * 32))),
            RejectReason.BAD_CERTIFICATE,
            id="a self-made authority",
        ),
        pytest.param(
            lambda: decline(identity(not_after=NOW - 1)), RejectReason.EXPIRED_CERTIFICATE, id="an old certificate"
        ),
        pytest.param(
            lambda: signer(identity()).sign(MessageKind.UPDATE, BODY, now=NOW).encode(),
            RejectReason.MALFORMED,
            id="another kind on this topic",
        ),
        pytest.param(
            lambda: signer(identity("c", role=Role.COORDINATOR)).sign(MessageKind.PLAN, BODY, now=NOW).encode(),
            RejectReason.MALFORMED,
            id="a coordinator's plan on this topic",
        ),
    ],
)
def test_an_impostor_is_refused(message: Callable[[], bytes], reason: RejectReason) -> None:
    assert refused(message()) is reason


def test_a_stolen_certificate_without_its_key_is_refused() -> None:
    thief, victim = identity("thief"), identity("d-1")
    stolen = Signer(
        thief.key,
        dataclasses.replace(victim.certificate, public_key=thief.key.public),
        victim.encoded_certificate,
        sequence=lambda: 1,
        randomness=lambda size: b"r" * size,
    )
    assert refused(stolen.sign(MessageKind.DECLINE, BODY, now=NOW).encode()) is RejectReason.BAD_CERTIFICATE


def test_a_signature_does_not_pass_for_another_kind() -> None:
    data = bytearray(decline())
    data[5] = MessageKind.UPDATE
    with pytest.raises(RemoteProtocolError) as caught:
        Verifier("fleet", AUTHORITY.public).open(bytes(data), Decline, kind=MessageKind.UPDATE, now=NOW)
    assert caught.value.reason is RejectReason.BAD_SIGNATURE


def test_an_expired_message_is_refused() -> None:
    data = decline(lifetime=1000)
    assert refused(data, now=NOW + 1001) is RejectReason.EXPIRED


def test_a_revoked_member_is_refused_at_once_even_if_it_was_believed_before() -> None:
    verifier = Verifier("fleet", AUTHORITY.public)
    verifier.open(decline(), Decline, kind=MessageKind.DECLINE, now=NOW, sender="d-1")
    assert verifier.revoke(Revocations(version=2, serials=(7,)))
    assert refused(decline(), verifier=verifier) is RejectReason.REVOKED


def test_revocations_cannot_be_rolled_back() -> None:
    verifier = Verifier("fleet", AUTHORITY.public)
    assert verifier.revoke(Revocations(version=5, serials=(7,)))
    assert not verifier.revoke(Revocations(version=5, serials=()))
    with pytest.raises(RemoteProtocolError) as caught:
        verifier.revoke(Revocations(version=4, serials=()))
    assert caught.value.reason is RejectReason.REPLAYED
    assert refused(decline(), verifier=verifier) is RejectReason.REVOKED


def test_every_kind_has_speakers_and_no_device_may_speak_for_the_coordinator() -> None:
    assert set(SPEAKERS) == set(MessageKind)
    for kind in (MessageKind.PLAN, MessageKind.MANIFEST, MessageKind.COMMIT, MessageKind.ROUND_END):
        assert SPEAKERS[kind] == {Role.COORDINATOR}
    assert {kind for kind, roles in SPEAKERS.items() if Role.DEVICE in roles} == {
        MessageKind.UPDATE,
        MessageKind.DECLINE,
    }


def test_a_large_body_is_compressed_and_opens_to_what_was_signed() -> None:
    body = dataclasses.replace(BODY, detail="again and again " * 100)
    data = signer(identity()).sign(MessageKind.DECLINE, body, now=NOW).encode()
    head = parse_head(data)
    assert head.header.compressed
    assert head.header.body_size < head.header.raw_size / 5
    assert len(open_body(head.header, data[head.size :])) == head.header.raw_size


@given(st.binary(max_size=600))
def test_the_site_that_a_certificate_claims_is_read_whatever_the_bytes(data: bytes) -> None:
    assert claimed_site(identity().encoded_certificate) == "north"
    site = claimed_site(data)
    assert site is None or len(site) <= 255
