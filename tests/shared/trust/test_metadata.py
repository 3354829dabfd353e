"""Every rule of the update workflow (TUF specification, section 5), each named for what an attacker would try."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fleetfed_testing.trust_repository import DAY, NOW, Owners, key, keys
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.metadata import TrustSet
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import key_id
from fleetfed.shared.wire.messages import Mode
from fleetfed.shared.wire.trust import MAX_BUNDLE, Directory, TrustBundle

BAD, STALE = RejectReason.BAD_METADATA, RejectReason.STALE_TRUST


def member(owners: Owners) -> TrustSet:
    """A member that was enrolled with the first root and has seen what is current."""
    trust = TrustSet(owners.roots[0])
    assert trust.update(owners.bundle(), now=NOW)
    return trust


def refused(trust: TrustSet, data: bytes, reason: RejectReason = BAD, *, now: int = NOW) -> None:
    """Refused, with nothing changed, and an honest bundle is still welcome after it."""
    before = trust.root, trust.bundle, trust.trust
    with pytest.raises(RemoteProtocolError) as error:
        trust.update(data, now=now)
    assert error.value.reason is reason, error.value
    assert (trust.root, trust.bundle, trust.trust) == before


def test_a_bundle_says_who_may_say_what_and_until_when() -> None:
    owners = Owners(policy=Policy(version=4, modes=(Mode.SPLIT,), cards=(b"c" * 32,)))
    trust = member(owners).trust
    assert trust is not None
    assert trust.policy == owners.policy
    assert trust.coordinators == {key("coordinator").id}
    assert [each.public_key for each in trust.authorities] == [owners.authority.public]
    assert trust.expires == NOW + DAY
    assert trust.issued == NOW
    assert trust.versions == {"root": 1, "targets": 1, "snapshot": 1, "timestamp": 1}


# --- Root -------------------------------------------------------------------------------------------------------------


def test_the_chain_of_roots_is_followed_to_its_end() -> None:
    owners = Owners()
    trust = member(owners)
    owners.root_keys = keys("root", generation=2)
    owners.root_()
    owners.root_keys = keys("root", generation=3)
    owners.root_()
    owners.next()
    assert trust.update(owners.bundle(), now=NOW)
    assert trust.root == owners.roots[-1]


def test_root_n_plus_2_before_root_n_plus_1() -> None:
    owners = Owners()
    trust = member(owners)
    owners.root_()
    third = owners.root_(version=3, keep=False)
    owners.roots.pop()
    owners.next()
    refused(trust, owners.bundle(roots=(owners.roots[0], third)))


def test_a_root_without_enough_of_the_old_keys() -> None:
    owners = Owners()
    trust = member(owners)
    old = owners.root_keys
    owners.root_keys = keys("stolen")
    owners.next()
    hostile = owners.root_(signers=[*owners.root_keys, old[0]], keep=False)
    refused(trust, owners.bundle(roots=(owners.roots[0], hostile)))


def test_a_root_without_enough_of_its_own_keys() -> None:
    owners = Owners()
    trust = member(owners)
    old, owners.root_keys = owners.root_keys, keys("root", generation=2)
    owners.next()
    hostile = owners.root_(signers=[*old, owners.root_keys[0]], keep=False)
    refused(trust, owners.bundle(roots=(owners.roots[0], hostile)))


def test_one_key_under_two_names() -> None:
    owners = Owners()
    root = json.loads(owners.roots[0])
    stolen = owners.root_keys[0]
    second = "f" * 32
    root["signed"]["keys"][second] = root["signed"]["keys"][stolen.id.hex()]
    root["signed"]["roles"]["root"]["keyids"] = [stolen.id.hex(), second]
    with pytest.raises(RemoteProtocolError, match="is not the id of its key"):
        TrustSet(json.dumps(root).encode())


def test_the_same_signature_twice() -> None:
    owners = Owners()
    trust = member(owners)
    owners.next("targets")
    targets = json.loads(owners.targets(owners.files(), owners.targets_keys[:1]))
    targets["signatures"] *= 2
    data = json.dumps(targets).encode()
    snapshot = owners.snapshot(data, b"", [owners.snapshot_key])
    timestamp = owners.timestamp(snapshot, [owners.timestamp_key])
    refused(trust, owners.bundle(targets=data, snapshot=snapshot, timestamp=timestamp))


def test_a_key_that_is_no_ed25519_key() -> None:
    root = json.loads(Owners().roots[0])
    for each in root["signed"]["keys"].values():
        each |= {"keytype": "rsa", "scheme": "rsassa-pss-sha256", "keyval": {"public": "pem"}}
    with pytest.raises(RemoteProtocolError, match="no Ed25519 key"):
        TrustSet(json.dumps(root).encode())


def test_only_the_last_root_of_the_chain_must_not_have_expired() -> None:
    owners = Owners()
    trust = member(owners)
    owners.days["root"] = -1
    owners.root_()
    owners.next()
    with pytest.raises(RemoteProtocolError) as error:
        trust.update(owners.bundle(), now=NOW)
    assert error.value.reason is STALE
    owners.days["root"] = 365
    owners.root_()
    assert trust.update(owners.bundle(), now=NOW)


def test_a_newer_root_counts_at_once_though_the_rest_is_withheld() -> None:
    owners = Owners()
    trust = member(owners)
    old = owners.parts()
    owners.targets_keys = keys("targets", generation=2)
    owners.root_()
    with pytest.raises(RemoteProtocolError) as error:
        trust.update(codec.encode(replace(old, roots=tuple(owners.roots))), now=NOW)
    assert error.value.reason is BAD
    assert trust.root == owners.roots[-1]
    # What keys that are gone have signed is kept to infer by, and is not current.
    assert trust.trust is not None
    assert trust.trust.expires == 0
    owners.next("targets")
    assert trust.update(owners.bundle(), now=NOW)
    assert trust.trust.expires > 0


# --- Timestamp --------------------------------------------------------------------------------------------------------


def test_an_older_timestamp() -> None:
    owners = Owners()
    old = owners.bundle()
    owners.next()
    refused(member(owners), old)


def test_the_same_timestamp_again_is_neither_news_nor_an_error() -> None:
    owners = Owners()
    trust = member(owners)
    before = trust.trust
    assert not trust.update(owners.bundle(), now=NOW)
    assert not trust.update(owners.bundle(), now=NOW + 30 * DAY)
    assert trust.trust == before


def test_an_expired_timestamp() -> None:
    owners = Owners()
    trust = member(owners)
    owners.next()
    refused(trust, owners.bundle(), STALE, now=NOW + DAY)


def test_a_timestamp_of_another_key() -> None:
    owners = Owners()
    trust = member(owners)
    owners.next()
    refused(trust, owners.bundle(signers={"timestamp": [owners.snapshot_key]}))


def test_a_newer_timestamp_of_an_older_snapshot() -> None:
    owners = Owners()
    owners.versions["snapshot"] = 5
    trust = member(owners)
    owners.versions |= {"timestamp": 2, "snapshot": 4}
    refused(trust, owners.bundle())


# --- Snapshot ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_the_timestamp_does_not_name() -> None:
    owners = Owners()
    trust = member(owners)
    owners.next("targets")
    other = owners.parts().snapshot
    owners.next()
    refused(trust, owners.bundle(snapshot=other))


def test_a_snapshot_of_another_version_than_the_timestamp_names() -> None:
    owners = Owners()
    trust = member(owners)
    owners.next()
    parts = owners.parts()
    owners.versions["snapshot"] += 1
    refused(trust, codec.encode(replace(parts, timestamp=owners.timestamp(parts.snapshot, [owners.timestamp_key]))))


def test_a_snapshot_that_drops_a_file() -> None:
    owners = Owners(extra_meta={"more.json": 1})
    trust = member(owners)
    owners.extra_meta = {}
    owners.next()
    refused(trust, owners.bundle())


def test_a_snapshot_with_an_older_version_of_a_file() -> None:
    owners = Owners(extra_meta={"more.json": 2})
    trust = member(owners)
    owners.extra_meta = {"more.json": 1}
    owners.next()
    refused(trust, owners.bundle())


def test_an_expired_snapshot() -> None:
    owners = Owners()
    trust = member(owners)
    owners.days["snapshot"] = 0
    owners.next()
    refused(trust, owners.bundle(), STALE)


# --- Targets, devices, files ------------------------------------------------------------------------------------------


def test_an_old_policy_under_a_new_timestamp() -> None:
    owners = Owners(policy=Policy(version=1))
    weak = owners.parts()
    owners.policy = Policy(version=2, modes=(Mode.SPLIT,))
    owners.next("targets")
    trust = member(owners)
    owners.next()
    owners.versions["targets"] = 1
    snapshot = owners.snapshot(weak.targets, b"", [owners.snapshot_key])
    timestamp = owners.timestamp(snapshot, [owners.timestamp_key])
    refused(trust, codec.encode(replace(weak, snapshot=snapshot, timestamp=timestamp)))


def test_a_weaker_policy_of_whoever_holds_the_online_keys() -> None:
    owners = Owners(policy=Policy(version=1, modes=(Mode.SPLIT,)))
    trust = member(owners)
    owners.policy = Policy(version=2)
    owners.next("targets")
    refused(trust, owners.bundle(signers={"targets": [owners.timestamp_key, owners.snapshot_key]}))
    refused(trust, owners.bundle(signers={"targets": owners.targets_keys[:1]}))


def test_a_policy_that_targets_does_not_name() -> None:
    owners = Owners(policy=Policy(version=1, modes=(Mode.SPLIT,)))
    trust = member(owners)
    owners.next()
    good = owners.files()
    weaker = files.render_policy(Policy(version=1)).encode()
    assert len(weaker) != len(good[files.POLICY])
    refused(trust, owners.bundle(files={**good, files.POLICY: weaker}))
    same_length = good[files.POLICY].replace(b'"split"', b'"plain"')
    refused(trust, owners.bundle(files={**good, files.POLICY: same_length}))
    del good[files.POLICY]
    refused(trust, owners.bundle(files=good))


def test_a_policy_with_a_rule_that_this_program_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = Owners()
    trust = member(owners)
    owners.next("targets")
    plain = files.render_policy
    monkeypatch.setattr(files, "render_policy", lambda policy: plain(policy) + "forbid_everything = true\n")
    refused(trust, owners.bundle())


def test_expired_targets() -> None:
    owners = Owners()
    trust = member(owners)
    owners.days["targets"] = 0
    owners.next("targets")
    refused(trust, owners.bundle(), STALE)


def test_the_enrolment_service_speaks_for_itself_alone() -> None:
    owners = Owners(enroller=key("enroller"), directory=Directory(size=3, root=b"r" * 32, revocations=2))
    trust = member(owners)
    assert trust.trust is not None
    assert trust.trust.directory == owners.directory
    owners.directory = Directory(size=4, root=b"s" * 32, revocations=2)
    owners.next("devices")
    refused(trust, owners.bundle(signers={"devices": [owners.timestamp_key]}))
    owners.days["devices"] = 0
    refused(trust, owners.bundle(), STALE)
    owners.days["devices"] = 7
    assert trust.update(owners.bundle(), now=NOW)
    assert trust.trust.directory == owners.directory


def test_the_trust_expires_with_the_first_of_its_parts() -> None:
    owners = Owners(days={"root": 365, "targets": 2, "snapshot": 7, "timestamp": 3, "devices": 7})
    trust = member(owners).trust
    assert trust is not None
    assert trust.expires == NOW + 2 * DAY


# --- Recovery ---------------------------------------------------------------------------------------------------------


def test_versions_that_a_thief_pushed_up_fall_when_the_keys_are_rotated() -> None:
    owners = Owners()
    trust = member(owners)
    honest = dict(owners.versions)
    owners.versions |= {"timestamp": 2**62, "snapshot": 2**62}
    owners.extra_meta = {"more.json": 2**62}
    assert trust.update(owners.bundle(), now=NOW)
    owners.versions, owners.extra_meta = honest, {}
    owners.next()
    refused(trust, owners.bundle())
    owners.timestamp_key, owners.snapshot_key = key("timestamp-2"), key("snapshot-2")
    owners.root_()
    assert trust.update(owners.bundle(), now=NOW)
    assert trust.trust is not None
    assert trust.trust.versions["timestamp"] == owners.versions["timestamp"]


def test_a_root_that_leaves_the_online_keys_alone_lets_no_version_fall() -> None:
    owners = Owners()
    old = dict(owners.versions)
    owners.next()
    trust = member(owners)
    owners.root_()
    owners.versions = old
    with pytest.raises(RemoteProtocolError, match="version 1 after 2"):
        trust.update(owners.bundle(), now=NOW)
    assert trust.trust is not None
    assert trust.trust.expires > 0, "the new root stands for all that is in force"


def test_a_kept_bundle_is_taken_up_after_a_restart_whatever_the_time() -> None:
    owners = Owners()
    trust = member(owners)
    again = TrustSet(trust.root)
    again.load(trust.bundle)
    assert again.trust == trust.trust
    # And what it says is a floor, as before.
    owners.versions["timestamp"] = 1
    assert not again.update(owners.bundle(), now=NOW)


def test_the_owners_word_alone_is_enough_to_begin_with_but_never_current() -> None:
    owners = Owners(policy=Policy(version=3))
    trust = TrustSet(owners.roots[0])
    trust.load(owners.bundle(snapshot=b"", timestamp=b""))
    assert trust.trust is not None
    assert trust.trust.policy == owners.policy
    assert trust.trust.expires == 0
    with pytest.raises(RemoteProtocolError):
        trust.update(owners.bundle(snapshot=b"", timestamp=b""), now=NOW)
    assert trust.update(owners.bundle(), now=NOW)


# --- Bytes ------------------------------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_unread() -> None:
    trust = member(Owners())
    refused(trust, b"\xff" * (MAX_BUNDLE + 1), RejectReason.TOO_LARGE)
    with pytest.raises(RemoteProtocolError, match="too_large"):
        TrustSet(b" " * (32 * 1024 + 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"version":2', '"version":2.5', 1),
        lambda text: text.replace('"version":2', '"version":' + "9" * 30, 1),
        lambda text: text.replace('"version":2', '"version":true', 1),
        lambda text: text.replace('"_type":"timestamp"', '"_type":"snapshot"'),
        lambda text: "[" * 50_000,
        lambda text: "{}",
        lambda text: text.replace('"sig":"', '"sig":"zz'),
        lambda text: text.replace('"sig":"', '"sig":["').replace('"}],"signed"', '"]}],"signed"'),
    ],
)
def test_json_that_is_no_timestamp(spoil: Callable[[str], str]) -> None:
    owners = Owners()
    trust = member(owners)
    owners.next()
    parts = owners.parts()
    spoiled = spoil(parts.timestamp.decode()).encode()
    assert spoiled != parts.timestamp
    refused(trust, codec.encode(replace(parts, timestamp=spoiled)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_gets_in(data: Any) -> None:
    owners = Owners()
    trust = member(owners)
    owners.policy = Policy(version=2, modes=(Mode.SPLIT,))
    owners.next("targets")
    good = owners.bundle()
    at = data.draw(st.integers(0, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    spoiled = bytearray(good)
    spoiled[at] ^= 1 << bit
    before = trust.trust
    try:
        news = trust.update(bytes(spoiled), now=NOW)
    except RemoteProtocolError:
        assert trust.trust == before
    else:
        # A changed byte in what nobody signs (a key's order in JSON, an old root) may pass; what counts is untouched.
        assert news
        assert trust.trust is not None
        assert trust.trust.policy == owners.policy
        assert trust.trust.coordinators == {key_id(each) for each in owners.coordinators}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bundle_or_a_documented_error(data: bytes) -> None:
    trust = member(Owners())
    with pytest.raises(RemoteProtocolError):
        trust.update(data, now=NOW)


def test_a_bundle_of_ten_years_of_roots_still_fits() -> None:
    owners = Owners(enroller=key("enroller"))
    for generation in range(2, 12):
        owners.root_keys = keys("root", generation=generation)
        owners.root_()
    size = len(owners.bundle())
    assert size < MAX_BUNDLE / 2, size
    assert TrustSet(owners.roots[0]).update(owners.bundle(), now=NOW)


def test_a_bundle_survives_its_encoding() -> None:
    parts = Owners().parts()
    assert codec.decode(TrustBundle, codec.encode(parts), limit=MAX_BUNDLE) == parts
    assert tuf.parse(tuf.Root, parts.roots[0]).signed.version == 1
