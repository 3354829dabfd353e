"""Sealed requests and answers, tokens, and lists that an enroller may only add to."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust import enrolment
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.enrolment import HEAD, REQUEST, format_token, parse_token
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.verifier import MAX_VERSION_STEP, Verifier
from fleetfed.shared.wire.enrolment import MAX_REQUEST, EnrolRequest, Purpose, TreeHead
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.limits import MAX_REVOKED
from fleetfed.shared.wire.messages import Revocations

AUTHORITY = SigningKey.from_seed(b"authority".ljust(32))
ENROLLER = SigningKey.from_seed(b"enroller".ljust(32))
DEVICE = SigningKey.from_seed(b"device".ljust(32))
NOW = 1_800_000_000_000
ASK = EnrolRequest(
    purpose=Purpose.ENROL,
    owner="ward-3",
    hardware="SN-1",
    tls_request=b"der",
    token=bytes(16),
    nonce=b"n" * 16,
    issued_at=NOW,
)


def identity(key: SigningKey, role: Role, issuer: SigningKey, *, serial: int = 9, name: str = "d-1") -> Identity:
    certificate = Certificate(
        serial=serial,
        role=role,
        fleet="fleet",
        id=name,
        site="north" if role is not Role.ENROLLER else "_",
        owner="ward-3",
        not_before=NOW - 1000,
        not_after=NOW + 1000,
        public_key=key.public,
    )
    return Identity(
        key=key,
        certificate=certificate,
        encoded_certificate=issue(certificate, issuer),
        authority_key=AUTHORITY.public,
        issuer_key=b"" if issuer is AUTHORITY else issuer.public,
    )


def test_a_request_comes_out_as_it_went_in_and_names_its_key() -> None:
    sealed = REQUEST.open(REQUEST.close(ASK, DEVICE))
    assert (sealed.body, sealed.key) == (ASK, DEVICE.public)


@settings(max_examples=100)
@given(position=st.integers(0, len(REQUEST.close(ASK, DEVICE)) - 1), flip=st.integers(1, 255))
def test_any_flipped_byte_of_a_request_is_refused(position: int, flip: int) -> None:
    data = bytearray(REQUEST.close(ASK, DEVICE))
    data[position] ^= flip
    with pytest.raises(RemoteProtocolError) as caught:
        REQUEST.open(bytes(data))
    assert caught.value.reason in (RejectReason.BAD_SIGNATURE, RejectReason.UNKNOWN_VERSION)


@settings(max_examples=100)
@given(data=st.binary(max_size=MAX_REQUEST + 10))
def test_rubbish_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        REQUEST.open(data)


def test_a_request_does_not_pass_for_a_head_of_the_log_nor_for_anybody_elses() -> None:
    head = TreeHead(fleet="fleet", size=1, root=bytes(32), at=NOW)
    with pytest.raises(RemoteProtocolError) as caught:
        HEAD.open(HEAD.magic + REQUEST.close(ASK, DEVICE)[4:], key=DEVICE.public)
    assert caught.value.reason is RejectReason.BAD_SIGNATURE
    with pytest.raises(RemoteProtocolError) as caught:
        HEAD.open(HEAD.close(head, DEVICE), key=ENROLLER.public)
    assert caught.value.reason is RejectReason.BAD_CERTIFICATE


def test_a_large_request_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        REQUEST.open(REQUEST.magic + bytes(MAX_REQUEST))
    assert caught.value.reason is RejectReason.TOO_LARGE


@given(owner=st.from_regex(r"[a-z0-9_-]{1,48}", fullmatch=True), secret=st.binary(min_size=16, max_size=16))
def test_a_token_survives_being_read_aloud(owner: str, secret: bytes) -> None:
    text = format_token(owner, secret)
    assert parse_token(text) == (owner, secret)
    assert parse_token(f" {text.upper()}\n") == (owner, secret)
    head, _, tail = text.rpartition(".")
    assert parse_token(f"{head}.{tail.replace('-', '').replace('0', 'o').replace('1', 'l')}") == (owner, secret)


@pytest.mark.parametrize(
    "text", ["", "ward-3", ".aaaaa", "ward-3.aaaaa-bbbbb", "ward-3." + "z" * 26, "ward-3." + "!" * 26]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ValueError, match="token"):
        parse_token(text)


def test_the_hash_of_a_token_tells_nothing_and_hardware_of_two_owners_differs() -> None:
    assert enrolment.token_hash(bytes(16)) != enrolment.token_hash(bytes(15) + b"\1")
    assert enrolment.hardware_hash("a", "SN-1") != enrolment.hardware_hash("b", "SN-1")


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.DEVICE])
def test_an_enroller_certifies_no_role_but_devices(role: Role) -> None:
    verifier = Verifier("fleet", AUTHORITY.public)
    verifier.trust([enrolment.enroller(ENROLLER.public)])
    verifier.certificate(identity(DEVICE, Role.DEVICE, ENROLLER).encoded_certificate, now=NOW)
    with pytest.raises(RemoteProtocolError) as caught:
        verifier.certificate(identity(DEVICE, role, ENROLLER).encoded_certificate, now=NOW)
    assert caught.value.reason is RejectReason.BAD_CERTIFICATE


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.COORDINATOR])
def test_neither_a_gateway_nor_the_coordinator_can_enrol_a_device(role: Role) -> None:
    member = SigningKey.from_seed(b"member".ljust(32))
    mallory = dataclasses.replace(identity(member, role, AUTHORITY), enrollers=(ENROLLER.public,))
    with pytest.raises(RemoteProtocolError) as caught:
        mallory.verifier().certificate(identity(DEVICE, Role.DEVICE, member).encoded_certificate, now=NOW)
    assert caught.value.reason is RejectReason.BAD_CERTIFICATE


def revoke(verifier: Verifier, version: int, serials: tuple[int, ...]) -> bool:
    counter = itertools.count(1)
    signer = identity(ENROLLER, Role.ENROLLER, AUTHORITY, name="enroller").signer(
        sequence=lambda: next(counter), randomness=bytes
    )
    message = signer.sign(MessageKind.REVOCATIONS, Revocations(version=version, serials=serials), now=NOW).encode()
    body, _, by = verifier.open(message, Revocations, kind=MessageKind.REVOCATIONS, now=NOW)
    return verifier.revoke(body, by=by)


def test_nobody_comes_back_by_an_enrollers_list() -> None:
    verifier = Verifier("fleet", AUTHORITY.public)
    verifier.revoke(Revocations(version=1, serials=(3, 4)))
    assert revoke(verifier, 2, (4, 7 << 32))
    assert verifier.revocations == Revocations(version=2, serials=(3, 4, 7 << 32))
    assert verifier.revoke(Revocations(version=3, serials=(4,)))
    assert verifier.revocations.serials == (4,)


def test_a_stolen_enrolment_key_cannot_count_revocation_lists_to_the_end() -> None:
    """After the highest version there is no list that shuts anybody out, the thief least of all."""
    verifier = Verifier("fleet", AUTHORITY.public)
    verifier.revoke(Revocations(version=3, serials=(4,)))
    for version in (2**63 - 1, 4 + MAX_VERSION_STEP):
        with pytest.raises(RemoteProtocolError) as caught:
            revoke(verifier, version, (4, 7 << 32))
        assert caught.value.reason is RejectReason.OUT_OF_RANGE
    assert verifier.revocations == Revocations(version=3, serials=(4,))
    assert revoke(verifier, 3 + MAX_VERSION_STEP, (4, 7 << 32)), "whoever missed lists takes the next"


def test_an_enroller_cannot_fill_the_memory_with_revocations() -> None:
    verifier = Verifier("fleet", AUTHORITY.public)
    assert revoke(verifier, 1, tuple(range(10, 10 + MAX_REVOKED // 20)))
    verifier.revoke(Revocations(version=2, serials=tuple(range(10**6, 10**6 + 2 * MAX_REVOKED))))
    with pytest.raises(RemoteProtocolError) as caught:
        revoke(verifier, 3, (5,))
    assert caught.value.reason is RejectReason.TOO_LARGE
    assert verifier.revocations.version == 2


def test_an_identity_folder_keeps_who_issued_it_and_what_is_spent(tmp_path: Path) -> None:
    enrolled = dataclasses.replace(
        identity(DEVICE, Role.DEVICE, ENROLLER), enrollers=(ENROLLER.public, DEVICE.public), spent=12
    )
    enrolled.save(tmp_path)
    assert Identity.load(tmp_path, role=Role.DEVICE) == enrolled


def test_an_identity_of_another_role_from_an_enroller_is_refused(tmp_path: Path) -> None:
    identity(DEVICE, Role.GATEWAY, ENROLLER).save(tmp_path)
    with pytest.raises(ConfigError, match="devices alone"):
        Identity.load(tmp_path)
