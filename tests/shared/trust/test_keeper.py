"""What a member keeps over restarts, and what it does with damaged files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.trust_repository import DAY, NOW, Owners, key

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper, warnings
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Manifest, Mode, Outcome, Plan, RoundEnd
from fleetfed.shared.wire.trust import Directory


def member(owners: Owners, name: str, role: Role = Role.DEVICE, *, bundle: bytes = b"") -> Identity:
    own = key(name)
    certificate = Certificate(
        serial=7,
        role=role,
        fleet="fleet",
        id=name,
        site="_" if role is Role.COORDINATOR else "north",
        not_before=NOW - DAY,
        not_after=NOW + 1000 * DAY,
        public_key=own.public,
    )
    return Identity(
        key=own,
        certificate=certificate,
        encoded_certificate=issue(certificate, owners.authority),
        authority_key=owners.authority.public,
        root=owners.roots[0],
        bundle=bundle,
    )


def opened(path: Path, identity: Identity) -> tuple[TrustKeeper, Verifier]:
    verifier = identity.verifier()
    return TrustKeeper(path, identity, verifier), verifier


def round_end(identity: Identity, *, number: int = 1) -> bytes:
    signer = identity.signer(sequence=lambda: 1, randomness=lambda size: b"r" * size)
    end = RoundEnd(round=number, plan=b"p" * 32, outcome=Outcome.ABORTED)
    message: Message = signer.sign(MessageKind.ROUND_END, end, now=NOW, round=number)
    return message.encode()


def test_with_a_pinned_root_and_nothing_else_no_coordinator_is_believed(tmp_path: Path) -> None:
    owners = Owners()
    _, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    with pytest.raises(RemoteProtocolError) as error:
        verifier.open(
            round_end(member(owners, "coordinator", Role.COORDINATOR)), RoundEnd, kind=MessageKind.ROUND_END, now=NOW
        )
    assert error.value.reason is RejectReason.WRONG_ROLE


def test_only_a_listed_key_speaks_as_coordinator(tmp_path: Path) -> None:
    owners = Owners()
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    good = round_end(member(owners, "coordinator", Role.COORDINATOR))
    assert verifier.open(good, RoundEnd, kind=MessageKind.ROUND_END, now=NOW)[0].round == 1
    # Certified by the same authority, and not named by the owners.
    other = round_end(member(owners, "coordinator-2", Role.COORDINATOR))
    with pytest.raises(RemoteProtocolError) as error:
        verifier.open(other, RoundEnd, kind=MessageKind.ROUND_END, now=NOW)
    assert error.value.reason is RejectReason.WRONG_ROLE


def test_an_authority_that_metadata_does_not_name_certifies_nobody(tmp_path: Path) -> None:
    owners = Owners()
    identity = member(owners, "coordinator", Role.COORDINATOR)
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    owners.authority = key("authority-2")
    owners.next("targets")
    keeper.take(owners.bundle(), now=NOW)
    with pytest.raises(RemoteProtocolError) as error:
        verifier.certificate(identity.encoded_certificate, now=NOW)
    assert error.value.reason is RejectReason.BAD_CERTIFICATE


def plan(**changes: object) -> Plan:
    return replace(SignedFleet().plan()[0], **{"policy": 1, **changes})


def test_a_broker_that_withholds_is_noticed_when_the_timestamp_expires(tmp_path: Path) -> None:
    owners = Owners()
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    verifier.check_plan(plan(), now=NOW + DAY - 1)
    with pytest.raises(RemoteProtocolError) as error:
        verifier.check_plan(plan(), now=NOW + DAY)
    assert error.value.reason is RejectReason.STALE_TRUST
    owners.now += 2 * DAY
    owners.next()
    keeper.take(owners.bundle(), now=owners.now)
    verifier.check_plan(plan(), now=owners.now)


def test_a_revocation_list_that_is_withheld_is_noticed(tmp_path: Path) -> None:
    owners = Owners(enroller=key("enroller"), directory=Directory(revocations=4))
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    with pytest.raises(RemoteProtocolError) as error:
        verifier.check_plan(plan(), now=NOW)
    assert error.value.reason is RejectReason.STALE_TRUST


def test_a_plan_below_the_policy_that_came_last(tmp_path: Path) -> None:
    owners = Owners()
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    verifier.check_plan(plan(), now=NOW)
    owners.policy = Policy(version=2, modes=(Mode.SPLIT,))
    owners.next("targets")
    keeper.take(owners.bundle(), now=NOW)
    for weak in (plan(), plan(policy=2)):
        with pytest.raises(RemoteProtocolError) as error:
            verifier.check_plan(weak, now=NOW)
        assert error.value.reason is RejectReason.BELOW_POLICY


def test_only_cards_that_the_policy_names(tmp_path: Path) -> None:
    manifest: Manifest = SignedFleet().model(1)[0]
    owners = Owners(policy=Policy(version=1, cards=(b"c" * 32,)))
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    with pytest.raises(RemoteProtocolError) as error:
        verifier.check_manifest(manifest)
    assert error.value.reason is RejectReason.BELOW_POLICY
    owners.policy = Policy(version=2, cards=(b"c" * 32, manifest.card.digest))
    owners.next("targets")
    keeper.take(owners.bundle(), now=NOW)
    verifier.check_manifest(manifest)


def test_what_was_taken_is_there_after_a_restart(tmp_path: Path) -> None:
    owners = Owners(policy=Policy(version=3))
    identity = member(owners, "d-1")
    keeper, _ = opened(tmp_path / "t", identity)
    assert keeper.bundle == b""
    keeper.take(owners.bundle(), now=NOW)
    again, verifier = opened(tmp_path / "t", identity)
    assert again.bundle == owners.bundle()
    assert verifier.policy == owners.policy
    assert not again.take(owners.bundle(), now=NOW)


def test_a_newer_root_is_kept_though_the_rest_was_refused(tmp_path: Path) -> None:
    owners = Owners()
    identity = member(owners, "d-1")
    keeper, _ = opened(tmp_path / "t", identity)
    old = owners.parts()
    owners.targets_keys = [key("new-1"), key("new-2")]
    owners.root_()
    with pytest.raises(RemoteProtocolError):
        keeper.take(owners.bundle(targets=old.targets), now=NOW)
    again, _ = opened(tmp_path / "t", identity)
    with pytest.raises(RemoteProtocolError, match="bad_metadata"):
        again.take(owners.bundle(roots=(owners.roots[0],), targets=old.targets), now=NOW)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x83"])
def test_a_damaged_file_is_passed_over_and_the_identity_counts_again(tmp_path: Path, content: bytes) -> None:
    owners = Owners(policy=Policy(version=3))
    (tmp_path / "t").write_bytes(content)
    keeper, verifier = opened(tmp_path / "t", member(owners, "d-1", bundle=owners.bundle(snapshot=b"", timestamp=b"")))
    assert verifier.policy.version == 3
    assert keeper.take(owners.bundle(), now=NOW)


def test_an_identity_of_another_fleet_makes_what_was_kept_void(tmp_path: Path) -> None:
    owners = Owners()
    keeper, _ = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    others = Owners(root_keys=[key("o-1"), key("o-2")], policy=Policy(version=9))
    anew, _ = opened(tmp_path / "t", member(others, "d-1"))
    assert anew.trust is None
    assert anew.take(others.bundle(), now=NOW)


def test_an_identity_that_was_issued_again_brings_its_newer_root_and_loses_nothing(tmp_path: Path) -> None:
    owners = Owners(enroller=key("enroller"), directory=Directory(size=5))
    keeper, _ = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    owners.root_()
    owners.next()
    newer = owners.bundle(snapshot=b"", timestamp=b"", devices=b"")
    anew, _ = opened(tmp_path / "t", replace(member(owners, "d-1", bundle=newer), root=owners.roots[-1]))
    assert anew.trust is not None
    assert anew.trust.directory == owners.directory
    assert anew.trust.versions["root"] == 2
    assert anew.trust.expires == NOW + DAY
    # And one from a backup changes nothing.
    again, _ = opened(tmp_path / "t", member(owners, "d-1"))
    assert again.trust == keeper.trust


def test_a_damaged_pinned_root_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="issue it again"):
        opened(tmp_path / "t", replace(member(Owners(), "d-1"), root=b"{}"))


def test_a_clock_that_starts_in_the_past_is_never_behind_what_was_verified(tmp_path: Path) -> None:
    owners = Owners()
    keeper, _ = opened(tmp_path / "t", member(owners, "d-1"))
    clock = keeper.clock(lambda: 5)
    assert clock() == 5
    keeper.take(owners.bundle(), now=5)
    assert clock() == NOW
    assert keeper.clock(lambda: NOW + 7)() == NOW + 7


def test_a_timestamp_cannot_say_that_it_was_signed_after_its_own_end(tmp_path: Path) -> None:
    owners = Owners(issued=2**60)
    keeper, _ = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    assert keeper.clock(lambda: 5)() == 5


def test_what_expires_soon_is_said_before_it_bites(tmp_path: Path) -> None:
    owners = Owners()
    keeper, _ = opened(tmp_path / "t", member(owners, "d-1"))
    keeper.take(owners.bundle(), now=NOW)
    trust = keeper.trust
    assert trust is not None
    assert warnings(trust, NOW) == []
    (timestamp,) = warnings(trust, NOW + DAY)
    assert "timestamp expired" in timestamp
    assert any("keys renew targets" in each for each in warnings(trust, NOW + 80 * DAY))
    assert any("keys renew root" in each for each in warnings(trust, NOW + 340 * DAY))
    assert keeper.status(NOW + DAY)["stale"]
    assert not keeper.status(NOW)["stale"]


def test_a_device_loads_no_more_than_it_needs() -> None:
    program = """
import sys
from fleetfed.shared.trust import keeper, lean
assert not [name for name in sys.modules if name.split(".")[0] in ("tuf", "securesystemslib")]
lean.load()
from fleetfed.shared.trust import metadata, tuf
heavy = {"cryptography", "urllib3", "requests", "asn1crypto"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
import securesystemslib.signer as signer
assert signer.KEY_FOR_TYPE_AND_SCHEME["ed25519", "ed25519"] is tuf.Ed25519Key
import cryptography
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
