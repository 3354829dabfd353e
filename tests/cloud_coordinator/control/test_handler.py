"""Every command of an operator, what it refuses, and that it is carried out once."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import ScriptedGateway, World, facts, small_model, write_model
from fleetfed_testing.masked_cloud import MaskedGateway

from fleetfed.cloud_coordinator.cli.round import line
from fleetfed.cloud_coordinator.config import RoundSettings, StorageConfig
from fleetfed.cloud_coordinator.publish import Outgoing, refs_of
from fleetfed.cloud_coordinator.state import State
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.shared.errors import StorageError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.patch import apply_patch
from fleetfed.shared.trust.certificates import SERIALS, Role
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.signer import Signer
from fleetfed.shared.wire.blobs import part_count, unwrap
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import BlobRef, Command, Mode, Outcome, Request, Revocations, Status
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path, autostart=False, rounds=RoundSettings(weight_cap=50, start_when=3))
    yield world
    world.coordinator.machine.validate()
    await world.close()


@pytest.fixture
async def north(world: World) -> ScriptedGateway:
    gateway = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(gateway)
    return gateway


def state(world: World) -> State:
    return world.coordinator.machine.state


def fetch(world: World, ref: BlobRef) -> bytes:
    """An object from the retained chunks."""
    topics = (world.topics.blob(ref.digest, index) for index in range(part_count(ref)))
    return unwrap(ref, b"".join(world.sent.retained[topic] for topic in topics))


def download(world: World) -> bytes:
    """What a device without any model makes of the retained topics."""
    manifest = world.manifest()
    file, version = fetch(world, manifest.full), manifest.full_version
    assert hashlib.sha256(file).digest() == manifest.full_sha256
    for patch in manifest.patches:
        if patch.base_version == version:
            file = bytes(apply_patch(file, small_model()[1].table, fetch(world, patch.blob)))
            version = patch.target_version
    assert hashlib.sha256(file).digest() == manifest.sha256
    assert version == manifest.version
    return file


async def test_nothing_runs_before_somebody_starts_it(world: World, north: ScriptedGateway) -> None:
    assert state(world) is State.IDLE
    answer = await world.ask(Command.ROUND_START, rounds=1)
    assert answer.error == ""
    assert answer.result["rounds"] == 1
    assert state(world) is State.COLLECTING
    await world.run_round(north)
    assert state(world) is State.FINISHED


async def test_a_start_changes_settings_for_its_own_rounds(world: World, north: ScriptedGateway) -> None:
    arguments = {"fraction": 0.5, "training": {"epochs": 4}, "deadline": 5.0, "expires": 6.0}
    assert (await world.ask(Command.ROUND_START, **arguments)).error == ""
    plan, _, _ = world.plan()
    assert (plan.eligibility.fraction, plan.training.epochs) == (0.5, 4)
    assert (plan.deadline - plan.opened, plan.expires - plan.opened) == (5_000, 6_000)
    await world.restart()
    assert world.coordinator.machine.run.settings.training.epochs == 4
    assert north.name == "north"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frction": 0.5}, "did you mean 'fraction'"),
        ({"fraction": 1.5}, "not between 0 and 1"),
        ({"fraction": "all"}, "expected float, found str"),
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"deadline": 10.0, "expires": 5.0}, "must be later than deadline"),
        ({"rounds": True}, "expected int, found bool"),
    ],
)
async def test_wrong_arguments_are_refused_by_name(world: World, arguments: dict[str, Any], words: str) -> None:
    before = facts(world)
    answer = await world.ask(Command.ROUND_START, **arguments)
    assert answer.error == "invalid"
    assert words in answer.detail
    assert facts(world) == before


async def test_pause_lets_the_open_round_end(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START)
    assert (await world.ask(Command.ROUND_PAUSE)).error == ""
    assert state(world) is State.COLLECTING
    await world.run_round(north)
    assert state(world) is State.PAUSED
    await world.restart()
    assert state(world) is State.PAUSED
    await world.join(north)
    assert (await world.ask(Command.ROUND_RESUME)).error == ""
    assert state(world) is State.COLLECTING


async def test_abort_ends_the_round_without_a_version(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START)
    answer = await world.ask(Command.ROUND_ABORT, reason="wrong rate")
    assert answer.error == ""
    assert state(world) is State.PAUSED
    assert (world.end().outcome, world.end().reason) == (Outcome.ABORTED, "wrong rate")
    assert world.manifest().version == 1
    assert north.name == "north"


async def test_commands_out_of_place_say_what_to_do(world: World, north: ScriptedGateway) -> None:
    assert (await world.ask(Command.ROUND_PAUSE)).error == "not_running"
    assert (await world.ask(Command.ROUND_RESUME)).error == "not_paused"
    assert (await world.ask(Command.ROUND_ABORT)).error == "no_round"
    await world.ask(Command.ROUND_START)
    refused = await world.ask(Command.ROUND_START)
    assert refused.error == "round_open"
    assert "fleetfed round pause" in refused.detail
    assert (await world.ask(Command.MODEL_ROLLBACK, version=1)).error == "round_open"
    assert north.name == "north"


async def test_a_command_is_carried_out_once(world: World, north: ScriptedGateway) -> None:
    signer = world.fleet.signer(Role.OPERATOR, "op", "_")
    body = Request(command=Command.ROUND_START, arguments={"rounds": 2})
    message = signer.sign(MessageKind.REQUEST, body, now=world.clock.now, lifetime=60_000)
    first = await world.ask_again(message)
    await world.ask(Command.ROUND_ABORT)
    before = facts(world)
    assert await world.ask_again(message) == first
    await world.restart()
    assert await world.ask_again(message) == first
    assert facts(world) == before
    responses = world.topics.down(Kind.OPERATOR, "op", Verb.RESPONSE)
    packets = [payload for topic, payload, _ in world.sent.packets if topic == responses]
    assert packets[0] == packets[-1]
    assert north.name == "north"


async def test_an_old_or_eternal_command_is_refused(world: World) -> None:
    assert (await world.ask(Command.ROUND_START, lifetime=0)).error == "no_expiry"
    assert (await world.ask(Command.ROUND_STATUS, lifetime=0)).error == ""
    signer = world.fleet.signer(Role.OPERATOR, "op", "_")
    old = signer.sign(MessageKind.REQUEST, Request(command=Command.ROUND_START), now=world.clock.now, lifetime=1)
    world.clock.now += 10
    await world.ask_again(old)
    assert world.coordinator.rejected.snapshot() == {"expired": 1}
    assert state(world) is State.IDLE


async def test_only_operators_command(world: World) -> None:
    signer = world.fleet.signer(Role.GATEWAY, "north", "north")
    message = signer.sign(
        MessageKind.REQUEST, Request(command=Command.ROUND_START), now=world.clock.now, lifetime=60_000
    )
    await world.inbox.message(world.topics.up(Kind.OPERATOR, "north", Verb.REQUEST), message.encode())
    assert world.coordinator.rejected.snapshot() == {"wrong_role": 1}
    assert state(world) is State.IDLE


async def test_a_rollback_is_a_new_version_with_the_old_file(world: World, north: ScriptedGateway) -> None:
    first = download(world)
    await world.ask(Command.ROUND_START, rounds=2)
    for number in range(2):
        await world.run_round(north, seed=number)
        download(world)
    answer = await world.ask(Command.MODEL_ROLLBACK, version=1)
    assert answer.result["version"] == 4
    assert answer.result["parent"] == 3
    assert answer.result["source"] == 1
    assert world.manifest().patches == ()
    assert download(world) == first
    assert (await world.ask(Command.MODEL_ROLLBACK, version=1)).error == "same_model"
    assert (await world.ask(Command.MODEL_ROLLBACK, version=99)).error == "no_such_version"
    await world.ask(Command.ROUND_START, rounds=1)
    await world.run_round(north, seed=0)
    assert world.manifest().version == 5
    download(world)


async def test_a_model_is_published_from_a_file(world: World, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=2)
    answer = await world.ask(Command.MODEL_PUBLISH, file=str(other))
    assert answer.error == ""
    assert answer.result["version"] == 2
    assert download(world) == other.read_bytes()
    missing = await world.ask(Command.MODEL_PUBLISH, file=str(tmp_path / "nothing.tflite"))
    assert "nothing.tflite" in missing.detail
    other.write_bytes(other.read_bytes()[:-1])
    assert "its card says" in (await world.ask(Command.MODEL_PUBLISH, file=str(other))).detail
    assert world.manifest().version == 2


async def test_versions_are_listed_and_shown(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START, rounds=1)
    await world.run_round(north)
    listed = (await world.ask(Command.MODEL_LIST, limit=5)).result["versions"]
    assert [row["version"] for row in listed] == [2, 1]
    assert listed[0]["sha256"] == world.manifest().sha256.hex()
    assert listed[0]["contributors"] == 3
    shown = (await world.ask(Command.MODEL_SHOW)).result
    assert shown["parameters"] == 65
    assert hashlib.sha256(download(world)).hexdigest() == shown["sha256"]
    assert world.store.newest_version() is not None
    assert shown["file"].startswith(str(world.directory))
    assert (await world.ask(Command.MODEL_SHOW, version=7)).error == "no_such_version"


async def test_the_fleet_is_listed_and_shown(world: World, north: ScriptedGateway) -> None:
    listed = (await world.ask(Command.FLEET_LIST)).result
    assert (listed["devices"], listed["gateways"][0]["id"]) == (3, "north")
    gateway = (await world.ask(Command.FLEET_SHOW, id="north")).result
    assert [member["id"] for member in gateway["members"]] == ["a", "b", "c"]
    await world.ask(Command.ROUND_START, rounds=1)
    await world.run_round(north)
    device = (await world.ask(Command.FLEET_SHOW, id="b")).result
    assert (device["contributions"], device["life"], device["last_round"]) == (1, "ready", 1)
    assert (await world.ask(Command.FLEET_SHOW, id="zz")).error == "no_such_member"


async def test_the_status_says_how_rounds_went(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START, rounds=1)
    await world.run_round(north)
    status = (await world.ask(Command.ROUND_STATUS)).result
    (row,) = status["history"]
    assert (row["outcome"], row["version"], row["contributors"]) == ("committed", 2, 3)
    assert row["update_bytes"] > 300
    assert 0 <= row["holdout_accuracy"] <= 1
    assert status["settings"]["start_when"] == 3


async def test_a_revocation_list_is_published_and_survives(world: World) -> None:
    authority = world.fleet.signer(Role.AUTHORITY, "authority", "_")

    def signed(version: int) -> bytes:
        body = Revocations(version=version, serials=(77,))
        return authority.sign(MessageKind.REVOCATIONS, body, now=world.clock.now).encode()

    assert (await world.ask(Command.KEYS_REVOKE, revocations=signed(5))).result == {"version": 5, "revoked": 1}
    assert world.topics.broadcast(Broadcast.REVOKED) in world.sent.retained
    assert (await world.ask(Command.KEYS_REVOKE, revocations=signed(4))).error == "older_list"
    by_operator = world.fleet.signer(Role.OPERATOR, "op", "_").sign(
        MessageKind.REVOCATIONS, Revocations(version=9), now=world.clock.now
    )
    assert (await world.ask(Command.KEYS_REVOKE, revocations=by_operator.encode())).error == "not_the_authoritys"
    await world.restart()
    assert world.coordinator.verifier.revocations.version == 5


async def test_rounds_for_all_devices_go_on_without_one_that_is_revoked_also_after_a_restart(
    world: World, north: ScriptedGateway
) -> None:
    await world.hear("north", Verb.CENSUS, north.census(now=world.clock.now, ready=2))
    await world.ask(Command.ROUND_START)
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert (status["state"], status["devices_ready"], status["devices_needed"]) == ("waiting", 2, 3)
    assert status["waiting_for"] == "devices: 2 of 3 are ready or asleep (start_when = 3)"
    body = Revocations(version=1, serials=(77,))
    revoked = world.fleet.signer(Role.AUTHORITY, "authority", "_").sign(
        MessageKind.REVOCATIONS, body, now=world.clock.now
    )
    await world.ask(Command.KEYS_REVOKE, revocations=revoked.encode())
    # The same list once more takes nobody away.
    await world.ask(Command.KEYS_REVOKE, revocations=revoked.encode())
    assert state(world) is State.WAITING
    await world.restart()
    await world.hear("north", Verb.STATE, north.presence())
    left = north.devices[:2]
    await world.hear("north", Verb.CENSUS, north.census(now=world.clock.now, ready=1, devices=2))
    await world.pass_time(1_000)
    published, _ = world.opened(Status, world.sent.retained[world.topics.broadcast(Broadcast.STATUS)])
    assert published.waiting_for == "devices: 1 of 2 are ready or asleep (start_when = 3, less 1 revoked)"
    assert line(published).endswith(f"; waits for {published.waiting_for}")
    await world.join(ScriptedGateway(world.fleet, "north", left))
    assert state(world) is State.COLLECTING
    assert (await world.ask(Command.ROUND_STATUS)).result["waiting_for"] == ""


async def test_the_status_says_that_no_gateway_is_there(world: World) -> None:
    await world.ask(Command.ROUND_START)
    assert (await world.ask(Command.ROUND_STATUS)).result["waiting_for"] == "a gateway: none is ready"


async def test_an_enrollers_list_adds_its_own_devices_and_nothing_else(world: World) -> None:
    authority = world.fleet.signer(Role.AUTHORITY, "authority", "_")
    service = world.fleet.signer(Role.ENROLLER, "enroller", "_")
    own = service.certificate.serial * SERIALS + 1

    async def put(signer: Signer, version: int, *serials: int) -> str:
        message = signer.sign(
            MessageKind.REVOCATIONS, Revocations(version=version, serials=serials), now=world.clock.now
        )
        return (await world.ask(Command.KEYS_REVOKE, revocations=message.encode())).error

    assert await put(authority, 1, 77) == ""
    assert await put(service, 2, own) == "unrevokes"
    assert await put(service, 2, 77, 78) == "not_its_devices"
    assert await put(service, 2, 77, own + SERIALS) == "not_its_devices"
    assert await put(service, 1, 77, own) == "older_list"
    assert await put(service, 2**63 - 1, 77, own) == "too_far"
    assert world.coordinator.verifier.revocations == Revocations(version=1, serials=(77,))
    assert await put(service, 2, 77, own) == ""
    assert await put(service, 2, 77, own) == ""
    assert world.coordinator.verifier.revocations.serials == (77, own)


async def test_obsolete_chunks_are_cleared_and_a_newcomer_always_gets_the_model(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        rounds=RoundSettings(weight_cap=50, start_when=3),
        storage=StorageConfig(full_every=3, keep_versions=4),
    )
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(north)
    fulls = set()
    before = world.manifest()
    for number in range(12):
        await world.run_round(north, seed=number)
        download(world)
        manifest = world.manifest()
        fulls.add(manifest.full_version)
        named = {ref.digest[:16].hex() for each in (before, manifest) for ref in refs_of(each)}
        assert {topic.split("/")[-2] for topic in world.sent.retained if "/blob/" in topic} == named
        assert {digest[:16].hex() for digest in world.store.published()} == named
        before = manifest
    assert 1 < len(fulls) < 12
    assert (await world.ask(Command.ROUND_PAUSE)).error == ""
    await world.run_round(north, seed=99)
    refused = await world.ask(Command.MODEL_ROLLBACK, version=2)
    assert "no longer kept" in refused.detail
    await world.close()


async def test_a_rollback_over_another_architecture_brings_its_card_back(world: World, tmp_path: Path) -> None:
    for seed, name in enumerate(("second", "third", "fourth")):
        await world.ask(Command.MODEL_PUBLISH, file=str(write_model(tmp_path / "other", seed, name=name)))
    # A start collects what nothing refers to any more.
    await world.restart()
    assert (await world.ask(Command.MODEL_ROLLBACK, version=1)).error == ""
    download(world)
    assert ModelCard.decode(fetch(world, world.manifest().card)) == small_model()[1]


async def test_what_a_rollback_names_again_stays_although_its_clearing_is_confirmed_late(
    world: World, tmp_path: Path
) -> None:
    await world.ask(Command.MODEL_PUBLISH, file=str(write_model(tmp_path / "other", 2, name="second")))
    late: list[Callable[[], None]] = []

    def take(packet: Outgoing) -> None:
        if packet.done is not None:
            late.append(packet.done)
        world.sent.take(replace(packet, done=None))

    world.coordinator._transport = take
    await world.ask(Command.MODEL_PUBLISH, file=str(write_model(tmp_path / "other", 3, name="third")))
    await world.ask(Command.MODEL_ROLLBACK, version=1)
    assert late
    for confirmed in late:
        confirmed()
    assert {ref.digest for ref in refs_of(world.manifest())} <= set(world.store.published())
    await world.restart()
    download(world)


async def test_a_full_disk_refuses_a_model_and_stops_nothing(tmp_path: Path) -> None:
    class Full(BlobStore):
        full = False

        def put(self, *objects: bytes) -> list[bytes]:
            if Full.full:
                raise StorageError("no space left on device")
            return super().put(*objects)

    world = World(tmp_path, autostart=False, blobs=Full)
    other = write_model(tmp_path / "other", seed=2)
    Full.full = True
    answer = await world.ask(Command.MODEL_PUBLISH, file=str(other))
    assert (answer.error, answer.detail) == ("storage", "no space left on device")
    Full.full = False
    assert (await world.ask(Command.MODEL_PUBLISH, file=str(other))).result["version"] == 2
    await world.close()


async def test_a_start_below_the_policy_is_refused_to_the_operator(world: World, north: ScriptedGateway) -> None:
    world.coordinator.verifier.policy = Policy(version=7, modes=(Mode.SPLIT,), minimum_cohort=20)
    for arguments, words in (({}, "mode plain is not allowed"), ({"mode": "split"}, "cohorts from 5")):
        before = facts(world)
        answer = await world.ask(Command.ROUND_START, **arguments)
        assert answer.error == "below_policy"
        assert words in answer.detail
        assert "no device would obey" in answer.detail
        assert facts(world) == before
    answer = await world.ask(Command.ROUND_START, mode="split", minimum_cohort=20)
    assert answer.error == ""
    assert world.plan()[0].policy == 7
    assert north.name == "north"


async def test_a_policy_that_is_raised_while_rounds_run_pauses_them_and_says_why(
    world: World, north: ScriptedGateway
) -> None:
    await world.ask(Command.ROUND_START)
    world.coordinator.verifier.policy = Policy(version=8, modes=(Mode.SPLIT,))
    await world.run_round(north)
    assert state(world) is State.PAUSED
    assert world.store.rounds(limit=1)[0].number == 1
    await world.restart()
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert status["state"] == "paused"
    assert "mode plain is not allowed" in status["waiting_for"]
    assert status["round"] == 1
    world.coordinator.verifier.policy = Policy(version=9)
    await world.join(north)
    assert (await world.ask(Command.ROUND_RESUME)).error == ""
    assert state(world) is State.COLLECTING
    assert (await world.ask(Command.ROUND_STATUS)).result["waiting_for"] == ""


async def test_a_cohort_for_which_no_lane_is_wide_enough_is_refused(world: World, north: ScriptedGateway) -> None:
    answer = await world.ask(Command.ROUND_START, mode="split", minimum_cohort=6, cohort_cap=5)
    assert answer.error == "invalid"
    assert "raise cohort_cap" in answer.detail
    assert state(world) is State.IDLE
    assert north.name == "north"


async def test_the_status_tells_of_a_masked_round(world: World) -> None:
    gateway = MaskedGateway(world.fleet, "north", [f"d{i}" for i in range(6)])
    await world.join(gateway)
    settings = {"mode": "split", "minimum_cohort": 3, "bucket": 3, "rounds": 1}
    assert (await world.ask(Command.ROUND_START, **settings)).error == ""
    await world.run_round(gateway)
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert (status["settings"]["mode"], status["settings"]["bucket"]) == ("split", 3)
    row = status["history"][-1]
    assert (row["mode"], row["committed"], row["contributors"], row["buckets"], row["bucket_lost"]) == (
        "split", 6, 6, 2, 0,
    )  # fmt: skip


async def test_a_step_that_devices_would_refuse_is_not_published(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START)
    await world.run_round(north)
    step = (await world.ask(Command.MODEL_LIST, limit=1)).result["versions"][0]["metrics"]["step"]
    manifest = world.manifest()
    world.coordinator.verifier.policy = Policy(version=1, largest_step=step / 100)
    await world.run_round(north, seed=7)
    assert state(world) is State.PAUSED
    assert world.manifest() == manifest
    ended = world.store.rounds(limit=1)[0]
    assert (ended.outcome, "large_step" in ended.reason) == (Outcome.ABORTED, True)
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert "have the policy's owners raise largest_step" in status["waiting_for"]
    world.coordinator.verifier.policy = Policy(version=2, largest_step=step * 100)
    assert (await world.ask(Command.ROUND_RESUME)).error == ""
    await world.pass_time(120_000)
    await world.run_round(north, seed=8)
    assert world.manifest().version == manifest.version + 1


async def test_a_model_from_elsewhere_needs_the_owners_word(world: World, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=2)
    named = hashlib.sha256(other.read_bytes()).digest()
    world.coordinator.verifier.policy = Policy(version=1, largest_step=0.01)
    before = facts(world)
    answer = await world.ask(Command.MODEL_PUBLISH, file=str(other))
    assert (answer.error, "keys policy set --model" in answer.detail) == ("large_step", True)
    assert facts(world) == before
    world.coordinator.verifier.policy = Policy(version=2, largest_step=0.01, models=(named,))
    assert (await world.ask(Command.MODEL_PUBLISH, file=str(other))).result["version"] == 2
    # Back to the first is as far.
    back = await world.ask(Command.MODEL_ROLLBACK, version=1)
    assert back.error == "large_step"
    first = world.store.version(1)
    assert first is not None
    world.coordinator.verifier.policy = Policy(version=3, largest_step=0.01, models=(named, first.sha256))
    assert (await world.ask(Command.MODEL_ROLLBACK, version=1)).result["version"] == 3
