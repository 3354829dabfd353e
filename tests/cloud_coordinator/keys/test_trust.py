"""The owners' folder, the coordinator's signatures and what members make of both."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fleetfed.cloud_coordinator.keys import signing
from fleetfed.cloud_coordinator.keys.authoring import DAY, devices
from fleetfed.cloud_coordinator.keys.equip import follow, make_trust, owners_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.online import OnlineTrust
from fleetfed.cloud_coordinator.keys.owners import Owners
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import key_id
from fleetfed.shared.wire.messages import Mode
from fleetfed.shared.wire.trust import MAX_BUNDLE, Directory, TrustBundle

NOW = 1_800_000_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key folder; making one takes a while, so each test gets a copy."""
    folder = tmp_path_factory.mktemp("fleet") / "keys"
    keyring = Keyring.create(folder, "demo", now=NOW)
    keyring.issue(
        [
            NewMember(id="coordinator", role=MemberRole.COORDINATOR),
            NewMember(id="d-01", role=MemberRole.DEVICE, site="north"),
        ],
        now=NOW,
    )
    make_trust(keyring, now=NOW, policy=Policy(version=1, modes=(Mode.SPLIT,)))
    return folder


@pytest.fixture
def keyring(made: Path, tmp_path: Path) -> Keyring:
    shutil.copytree(made, tmp_path / "keys")
    return Keyring.load(tmp_path / "keys")


def owners(keyring: Keyring) -> Owners:
    found = owners_of(keyring)
    assert found is not None
    return found


def online(keyring: Keyring, tmp_path: Path) -> OnlineTrust:
    folder = keyring.identity_folder("coordinator")
    identity = Identity.load(folder)
    return OnlineTrust(tmp_path / "state", identity, folder, identity.verifier())


def keeper(keyring: Keyring, tmp_path: Path, member: str = "d-01") -> TrustKeeper:
    identity = Identity.load(keyring.identity_folder(member))
    return TrustKeeper(tmp_path / f"{member}.bin", identity, identity.verifier())


def move_away(keyring: Keyring, tmp_path: Path) -> dict[str, Path]:
    """What the owners do: no offline key stays in the folder."""
    vault = tmp_path / "vault"
    vault.mkdir()
    return {path.stem: path.rename(vault / path.name) for path in owners(keyring).offline_keys}


def test_a_member_begins_with_the_owners_word_and_waits_for_the_coordinators(keyring: Keyring, tmp_path: Path) -> None:
    device = keeper(keyring, tmp_path)
    assert device.trust is not None
    assert device.trust.policy.modes == (Mode.SPLIT,)
    assert device.trust.expires == 0
    coordinator = online(keyring, tmp_path)
    assert coordinator.start(now=NOW)
    assert device.take(coordinator.bundle, now=NOW)
    assert device.trust.expires == NOW + DAY
    # And after a restart it needs nobody.
    again = keeper(keyring, tmp_path)
    assert again.trust == device.trust
    assert again.bundle == coordinator.bundle


def test_key_files_are_for_their_owner_alone(keyring: Keyring) -> None:
    found = owners(keyring)
    assert [path.stem for path in found.offline_keys] == [f"{r}-{n}" for r in ("root", "targets") for n in (1, 2, 3)]
    trust = keyring.identity_folder("coordinator") / "trust"
    private = [*found.offline_keys, *found.online_keys, *trust.glob("*.key")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert sorted(path.name for path in trust.glob("*.key")) == ["snapshot.key", "timestamp.key"]
    assert not list((keyring.identity_folder("d-01") / "trust").glob("*.key"))


def test_a_fleet_without_metadata_trusts_certificates_alone(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keys", "plain", now=NOW)
    issued = keyring.issue([NewMember(id="d-01", role=MemberRole.DEVICE, site="north")], now=NOW)
    assert follow(keyring, issued, now=NOW) == []
    device = keeper(keyring, tmp_path)
    assert device.trust is None
    assert not device.take(b"anything", now=NOW)
    assert device.status(NOW) == {}


# --- The coordinator --------------------------------------------------------------------------------------------------


def test_the_coordinator_signs_again_at_half_life_and_no_sooner(keyring: Keyring, tmp_path: Path) -> None:
    coordinator = online(keyring, tmp_path)
    coordinator.start(now=NOW)
    first = coordinator.bundle
    assert not coordinator.renew(now=NOW + DAY // 2 - 1)
    assert coordinator.next_deadline() == NOW + DAY // 2
    assert coordinator.renew(now=NOW + DAY // 2)
    assert coordinator.bundle != first
    device = keeper(keyring, tmp_path)
    assert device.take(first, now=NOW)
    assert device.take(coordinator.bundle, now=NOW + DAY // 2)


def test_a_coordinator_that_lost_its_state_is_still_believed(keyring: Keyring, tmp_path: Path) -> None:
    coordinator, device = online(keyring, tmp_path), keeper(keyring, tmp_path)
    for step in range(5):
        coordinator.offer(owners(keyring).bundle(), now=NOW + step)
    device.take(coordinator.bundle, now=NOW)
    shutil.rmtree(tmp_path / "state")
    anew = online(keyring, tmp_path)
    anew.start(now=NOW + DAY // 4)
    assert device.take(anew.bundle, now=NOW + DAY // 4)


def test_a_coordinator_without_the_keys_says_which_are_missing(keyring: Keyring, tmp_path: Path) -> None:
    (keyring.identity_folder("coordinator") / "trust" / "timestamp.key").unlink()
    with pytest.raises(ConfigError, match=r"timestamp\.key"):
        online(keyring, tmp_path).start(now=NOW)


def test_expired_targets_cannot_be_called_current(keyring: Keyring, tmp_path: Path) -> None:
    coordinator = online(keyring, tmp_path)
    coordinator.start(now=NOW)
    with pytest.raises(RemoteProtocolError) as error:
        coordinator.renew(now=NOW + 91 * DAY)
    assert error.value.reason is RejectReason.STALE_TRUST
    assert coordinator.status(NOW + 80 * DAY)["warnings"] != []


def test_what_owners_did_not_sign_is_not_published(keyring: Keyring, tmp_path: Path) -> None:
    coordinator = online(keyring, tmp_path)
    coordinator.start(now=NOW)
    before = coordinator.bundle
    offered = codec.decode(TrustBundle, owners(keyring).bundle(), limit=MAX_BUNDLE)
    weak = {**offered.files, files.POLICY: files.render_policy(Policy(version=2)).encode()}
    for hostile in (
        replace(offered, files=weak),
        replace(offered, targets=offered.targets.replace(b'"version":1', b'"version":2')),
        replace(offered, roots=(offered.roots[0] + b" ",)),
    ):
        with pytest.raises(RemoteProtocolError) as error:
            coordinator.offer(codec.encode(hostile), now=NOW)
        assert error.value.reason is RejectReason.BAD_METADATA
        assert coordinator.bundle == before


def test_the_enrolment_services_word_joins_without_the_owners(keyring: Keyring, tmp_path: Path) -> None:
    issued = keyring.issue([NewMember(id="enrol", role=MemberRole.ENROLLER, hosts=("localhost",))], now=NOW)
    assert follow(keyring, issued, now=NOW) == []
    coordinator = online(keyring, tmp_path)
    coordinator.offer(owners(keyring).bundle(), now=NOW)
    word, data = devices(1, NOW + 7 * DAY, Directory(size=9, root=b"r" * 32, revocations=0))
    tuf.sign(word, SigningKey.load(keyring.identity_folder("enrol") / "signing.key"))
    parts = codec.decode(TrustBundle, coordinator.bundle, limit=MAX_BUNDLE)
    offer = replace(parts, devices=word.to_bytes(), files={**parts.files, files.DIRECTORY: data})
    assert coordinator.offer(codec.encode(offer), now=NOW)
    device = keeper(keyring, tmp_path)
    device.take(coordinator.bundle, now=NOW)
    assert device.trust is not None
    assert device.trust.directory is not None
    assert device.trust.directory.size == 9
    # What the owners say next does not lose it.
    assert coordinator.offer(owners(keyring).bundle(), now=NOW)
    assert coordinator.keeper.trust is not None
    assert coordinator.keeper.trust.directory == device.trust.directory


# --- The owners -------------------------------------------------------------------------------------------------------


def test_a_policy_takes_effect_once_enough_owners_signed(keyring: Keyring, tmp_path: Path) -> None:
    vault = move_away(keyring, tmp_path)
    coordinator, device = online(keyring, tmp_path), keeper(keyring, tmp_path)
    coordinator.start(now=NOW)
    device.take(coordinator.bundle, now=NOW)

    mine = owners(keyring)
    mine.stage_targets(now=NOW, policy=Policy(minimum_cohort=20))
    (missing,) = mine.sign()
    assert (missing.role, missing.needs) == ("targets", 2)
    request = tmp_path / "request.json"
    signing.export(mine, request)
    assert "minimum_cohort = 20" in signing.policy_in(request)
    assert signing.sign_file(request, [SigningKey.load(vault["targets-1"])]) == [
        "targets 2, which expires on 2027-04-15"
    ]
    (missing,) = signing.take_back(owners(keyring), request)
    assert missing.needs == 1
    assert "targets-1" not in missing.by
    signing.sign_file(request, [SigningKey.load(vault["targets-3"])])
    assert signing.take_back(owners(keyring), request) == []

    assert owners(keyring).policy == Policy(version=2, minimum_cohort=20)
    assert coordinator.offer(owners(keyring).bundle(), now=NOW)
    assert device.take(coordinator.bundle, now=NOW)
    assert device.trust is not None
    assert device.trust.policy.minimum_cohort == 20


def test_a_request_that_shows_another_policy_than_it_asks_to_sign(keyring: Keyring, tmp_path: Path) -> None:
    vault = move_away(keyring, tmp_path)
    mine = owners(keyring)
    mine.stage_targets(now=NOW, policy=Policy())
    request = tmp_path / "request.json"
    signing.export(mine, request)
    table = json.loads(request.read_text())
    table["files"][files.POLICY] = files.render_policy(Policy(version=2, modes=(Mode.SPLIT,)))
    request.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="not what would be signed"):
        signing.sign_file(request, [SigningKey.load(vault["targets-1"])])


def test_a_key_without_a_say_signs_nothing(keyring: Keyring, tmp_path: Path) -> None:
    vault = move_away(keyring, tmp_path)
    mine = owners(keyring)
    mine.stage_targets(now=NOW)
    request = tmp_path / "request.json"
    signing.export(mine, request)
    with pytest.raises(ConfigError, match="has no say"):
        signing.sign_file(request, [SigningKey.load(vault["root-1"])])


def test_what_comes_back_must_be_what_was_sent(keyring: Keyring, tmp_path: Path) -> None:
    vault = move_away(keyring, tmp_path)
    mine = owners(keyring)
    mine.stage_targets(now=NOW)
    request = tmp_path / "request.json"
    signing.export(mine, request)
    signing.sign_file(request, [SigningKey.load(vault["targets-1"]), SigningKey.load(vault["targets-2"])])
    owners(keyring).stage_targets(now=NOW, policy=Policy(minimum_owners=3))
    with pytest.raises(ConfigError, match="not what is staged"):
        signing.take_back(owners(keyring), request)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_keys_of_every_role_can_be_replaced(keyring: Keyring, tmp_path: Path, role: str) -> None:
    coordinator, device = online(keyring, tmp_path), keeper(keyring, tmp_path)
    coordinator.start(now=NOW)
    device.take(coordinator.bundle, now=NOW)
    mine = owners(keyring)
    before = set(tuf.keys_of(mine.root.signed, role))
    mine.stage_root(now=NOW, rotate=role)
    if role == "targets":
        mine.stage_targets(now=NOW)
    assert mine.sign() == []
    assert not before & set(tuf.keys_of(owners(keyring).root.signed, role))
    follow(keyring, keyring.members, now=NOW)
    coordinator.offer(owners(keyring).bundle(), now=NOW)
    assert device.take(coordinator.bundle, now=NOW)
    assert device.trust is not None
    assert device.trust.versions["root"] == 2


def test_root_and_targets_may_need_signatures_of_old_and_new_keys(keyring: Keyring, tmp_path: Path) -> None:
    vault = move_away(keyring, tmp_path)
    mine = owners(keyring)
    assert mine.stage_root(now=NOW, rotate="targets", remove=["targets-2"]) == ["targets-2.2"]
    # The other two keys had signed what is in force, so only the root is missing.
    assert {each.role for each in mine.sign()} == {"root"}
    assert mine.sign([SigningKey.load(vault["root-1"]), SigningKey.load(vault["root-2"])]) == []
    assert owners(keyring).root.signed.version == 2


def test_a_coordinator_that_is_revoked_is_listed_no_more(keyring: Keyring, tmp_path: Path) -> None:
    issued = keyring.issue([NewMember(id="second", role=MemberRole.COORDINATOR)], now=NOW)
    follow(keyring, issued, now=NOW)
    old, new = (Identity.load(keyring.identity_folder(name)) for name in ("coordinator", "second"))
    device = keeper(keyring, tmp_path)
    coordinator = online(keyring, tmp_path)
    coordinator.offer(owners(keyring).bundle(), now=NOW)
    device.take(coordinator.bundle, now=NOW)
    assert device.coordinators == {key_id(each.key.public) for each in (old, new)}
    follow(keyring, keyring.revoke(["coordinator"], now=NOW), now=NOW)
    coordinator.offer(owners(keyring).bundle(), now=NOW)
    device.take(coordinator.bundle, now=NOW)
    assert device.coordinators == {key_id(new.key.public)}


def test_a_damaged_folder_says_so(keyring: Keyring) -> None:
    trust = keyring.directory / "trust"
    (trust / "targets.json").write_bytes(b"{")
    with pytest.raises(StorageError, match="backup"):
        owners(keyring)
    with pytest.raises(ConfigError, match="keys init"):
        Owners(trust / "nowhere")


def test_metadata_is_never_overwritten(keyring: Keyring) -> None:
    with pytest.raises(ConfigError, match="already"):
        make_trust(keyring, now=NOW)


def test_the_enrolment_services_word_joins_beside_newer_targets_than_it_knows(keyring: Keyring, tmp_path: Path) -> None:
    issued = keyring.issue([NewMember(id="enrol", role=MemberRole.ENROLLER, hosts=("localhost",))], now=NOW)
    follow(keyring, issued, now=NOW)
    known = codec.decode(TrustBundle, owners(keyring).bundle(), limit=MAX_BUNDLE)
    mine = owners(keyring)
    mine.stage_targets(now=NOW, policy=Policy(minimum_cohort=9))
    mine.sign()
    coordinator = online(keyring, tmp_path)
    coordinator.offer(mine.bundle(), now=NOW)
    with pytest.raises(RemoteProtocolError, match="targets 2 after 3"):
        coordinator.offer(codec.encode(known), now=NOW)
    word, data = devices(1, NOW + 7 * DAY, Directory(size=9, root=b"r" * 32, revocations=0))
    tuf.sign(word, SigningKey.load(keyring.identity_folder("enrol") / "signing.key"))
    offer = replace(known, devices=word.to_bytes(), files={**known.files, files.DIRECTORY: data})
    assert coordinator.offer(codec.encode(offer), now=NOW)
    trust = coordinator.keeper.trust
    assert trust is not None
    assert trust.directory is not None
    assert (trust.policy.minimum_cohort, trust.directory.size) == (9, 9)
