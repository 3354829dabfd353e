"""Whole rounds in split mode: what the coordinator makes of masked sums, with and without buckets and helper."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, World, contribution_of, small_model
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper, seal_key_of

from fleetfed.cloud_coordinator import inbox
from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.secure import reveals
from fleetfed.cloud_coordinator.state import State
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.robust import Robust
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.wire.messages import Command, Life, Mode, Outcome
from fleetfed.shared.wire.topics import Verb

DEVICES = [f"d{i}" for i in range(12)]


def split_settings(**changes: Any) -> RoundSettings:
    values: dict[str, Any] = {"mode": Mode.SPLIT, "minimum_cohort": 3, "weight_cap": 50, "start_when": len(DEVICES)}
    return RoundSettings(**{**values, **changes})


class RandomFleet(Fleet):
    """Whose coordinator makes seal secrets that can be looked for."""

    def randomness(self, size: int) -> bytes:
        return os.urandom(size)


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[World] = []

    def make(**settings: Any) -> World:
        settings.setdefault("rounds", split_settings())
        made.append(World(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield make
    for world in made:
        world.coordinator.machine.validate()
        await world.close()


def last_round(world: World) -> dict[str, Any]:
    return dict(world.coordinator.history[-1])


async def test_masked_sums_give_the_version_that_plain_ones_give_bit_for_bit(worlds: Any) -> None:
    found = []
    for mode, split, bucket in (
        (Mode.PLAIN, [DEVICES], 0),
        (Mode.SPLIT, [DEVICES], 0),
        (Mode.SPLIT, [DEVICES[:5], DEVICES[5:]], 0),
        (Mode.SPLIT, [DEVICES[:4], DEVICES[4:]], 3),
    ):
        world = worlds(rounds=split_settings(mode=mode, bucket=bucket, rounds=2))
        kind = ScriptedGateway if mode is Mode.PLAIN else MaskedGateway
        gateways = [kind(world.fleet, f"g{i}", devices) for i, devices in enumerate(split)]
        await world.join(*gateways)
        for number in range(2):
            await world.run_round(*gateways, seed=number)
        assert world.coordinator.machine.state is State.FINISHED
        found.append([(record.sha256, record.contributors) for record in world.store.versions(limit=10)])
    assert len(found[0]) == 3
    assert found == [found[0]] * 4


async def test_a_gateway_may_reveal_for_leaves_below_it(worlds: Any) -> None:
    for bucket in (0, 3):
        world = worlds(rounds=split_settings(bucket=bucket))
        top = MaskedGateway(world.fleet, "top", DEVICES[:4], below={"west": DEVICES[4:8], "east": DEVICES[8:]})
        await world.join(top)
        await world.run_round(top)
        assert world.manifest().version == 2
        assert last_round(world)["contributors"] == 12


async def test_the_plan_says_how_updates_are_masked(worlds: Any) -> None:
    world = worlds(rounds=split_settings(bucket=4, minimum_owners=1))
    await world.join(MaskedGateway(world.fleet, "g", DEVICES))
    plan, _, _ = world.plan()
    current = world.coordinator.current
    assert plan.mode is Mode.SPLIT
    assert plan.split is not None
    assert plan.split.seal_key == current.secret.public
    assert (plan.split.minimum_cohort, plan.split.minimum_owners, plan.split.bucket) == (3, 1, 4)
    assert plan.split.helper == b""


async def test_every_commit_has_a_fresh_nonce(worlds: Any) -> None:
    world = worlds()
    gateways = [MaskedGateway(world.fleet, "a", DEVICES[:6]), MaskedGateway(world.fleet, "b", DEVICES[6:])]
    await world.join(*gateways)
    await world.run_round(*gateways)
    nonces = [world.commits(gateway.name)[-1][0].nonce for gateway in gateways]
    assert len({*nonces, bytes(16)}) == 3


# --- The seal secret --------------------------------------------------------------------------------------------------


def traces(directory: Path, secret: bytes) -> list[str]:
    """Files of the state folder that hold the secret."""
    return [path.name for path in directory.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.parametrize("outcome", [Outcome.COMMITTED, Outcome.ABORTED])
async def test_when_a_round_is_over_no_byte_of_its_secret_is_on_the_disk(worlds: Any, outcome: Outcome) -> None:
    world = worlds(fleet=RandomFleet(), rounds=split_settings(rounds=1))
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await world.join(gateway)
    assert world.coordinator.current is not None
    assert world.coordinator.current.secret is not None
    secret = world.coordinator.current.secret.encode()
    assert traces(world.directory, secret)
    if outcome is Outcome.COMMITTED:
        await world.run_round(gateway)
    else:
        await world.ask(Command.ROUND_ABORT, reason="test")
    assert world.end().outcome is outcome
    assert traces(world.directory, secret) == []
    assert world.coordinator.current.secret is None


class _Interrupted(Store):
    """Dies between the end of a round and the emptying of the log."""

    armed = False

    def wipe(self) -> bool:
        if self.armed:
            raise KeyboardInterrupt
        return super().wipe()


async def test_a_crash_before_the_log_is_emptied_leaves_nothing_after_the_next_start(
    worlds: Any, tmp_path: Path
) -> None:
    world = worlds(fleet=RandomFleet(), store=_Interrupted)
    await world.join(MaskedGateway(world.fleet, "g", DEVICES))
    secret = world.coordinator.current.secret.encode()
    _Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        await world.ask(Command.ROUND_ABORT, reason="test")
    _Interrupted.armed = False
    assert traces(world.directory, secret)
    # A copy, as closing this connection would empty the log.
    shutil.copytree(world.directory, tmp_path / "after")
    after = World(tmp_path / "after", fleet=world.fleet, rounds=split_settings())
    assert after.store.round(1).outcome == "aborted"
    assert traces(after.directory, secret) == []
    await after.close()


# --- Wrong sums -------------------------------------------------------------------------------------------------------


async def garbage(world: World, gateway: MaskedGateway, *devices: str) -> None:
    """The gateway proposes all its devices, of which these have masked noise; it reveals rightly."""
    plan, plan_hash, ring = world.plan()
    rng = np.random.default_rng(7)
    updates = [
        gateway.update(
            device,
            plan,
            plan_hash,
            ring,
            words=rng.integers(0, 2**63, size=ring.layout.n_words, dtype=np.uint64) if device in devices else None,
        )
        for device in gateway.devices
    ]
    heads = [update.message.head.encode() for update in updates]
    await world.deliver(gateway.name, Verb.PROPOSE, gateway.propose(plan, plan_hash, heads))
    commit, commit_hash, _ = world.commits(gateway.name)[-1]
    await world.deliver(gateway.name, Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))


async def test_garbage_without_buckets_costs_its_gateway_and_not_the_round(worlds: Any) -> None:
    world = worlds()
    bad = MaskedGateway(world.fleet, "bad", DEVICES[:4])
    good = MaskedGateway(world.fleet, "good", DEVICES[4:])
    await world.join(bad, good)
    await garbage(world, bad, "d0")
    assert world.receipts("bad")[-1].reason is RejectReason.OUT_OF_RANGE
    await world.run_round(good)
    assert world.manifest().version == 2
    row = last_round(world)
    assert row["contributors"] == 8
    assert row["committed"] == 12
    assert row["failed_reveals"] == {"out_of_range": 1}
    assert [record.id for record in world.store.devices()] == sorted(DEVICES[4:])
    assert world.coordinator.rejected.snapshot()[RejectReason.OUT_OF_RANGE] == 1


async def test_garbage_without_buckets_and_nobody_else_aborts_the_round(worlds: Any) -> None:
    world = worlds(rounds=split_settings(rounds=1))
    bad = MaskedGateway(world.fleet, "bad", DEVICES)
    await world.join(bad)
    await garbage(world, bad, "d0")
    assert world.end().outcome is Outcome.ABORTED
    assert world.end().reason.startswith("below_minimum: 0 of")
    assert last_round(world)["mode"] == "split"


async def test_garbage_costs_its_bucket_alone_and_its_members_did_not_contribute(worlds: Any) -> None:
    world = worlds(rounds=split_settings(bucket=4))
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await world.join(gateway)
    await garbage(world, gateway, "d5")
    assert world.receipts("g")[-1].reason is None
    row = last_round(world)
    assert (row["buckets"], row["bucket_lost"], row["devices_lost"], row["contributors"]) == (3, 1, 4, 8)
    devices = {record.id for record in world.store.devices()}
    assert len(devices) == 8
    assert "d5" not in devices
    assert world.store.versions(limit=1)[0].contributors == 8


async def test_what_a_lost_bucket_leaves_is_judged_by_the_minimum(worlds: Any) -> None:
    world = worlds(rounds=split_settings(bucket=4, quorum_minimum=9))
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await world.join(gateway)
    await garbage(world, gateway, "d5")
    assert world.end().outcome is Outcome.ABORTED
    assert world.end().reason == "below_minimum: 8 of at least 9 contributors"


@pytest.mark.parametrize("rule", [Robust.TRIMMED_MEAN, Robust.GEOMETRIC_MEDIAN])
async def test_a_lie_within_the_range_moves_a_robust_step_much_less_than_the_sum(worlds: Any, rule: Robust) -> None:
    async def step(robust: Robust, *, liars: int) -> Any:
        world = worlds(rounds=split_settings(bucket=3, robust=robust, rounds=1))
        gateway = MaskedGateway(world.fleet, "g", DEVICES)
        await world.join(gateway)
        plan, plan_hash, ring = world.plan()
        _, meta = contribution_of("any", ring)
        # All agree but for the last bit, which the dealing makes different every time.
        agreed = np.arange(ring.layout.dimension) % 2
        heads = []
        for number, device in enumerate(DEVICES):
            said = np.where(np.arange(agreed.size) % 12 == number, 1 - agreed, agreed)
            values = np.full_like(said, ring.limit(1)) if number < liars else said
            words = ring.layout.pack(values.astype(np.int8), meta)
            heads.append(gateway.update(device, plan, plan_hash, ring, words=words).message.head.encode())
        await world.deliver("g", Verb.PROPOSE, gateway.propose(plan, plan_hash, heads))
        commit, commit_hash, _ = world.commits("g")[-1]
        await world.deliver("g", Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
        file = world.store.versions(limit=1)[0].file
        return read_weights(world.coordinator.blobs.get(file), small_model()[1].table)

    moved = {}
    for robust in (Robust.NONE, rule):
        moved[robust] = np.linalg.norm(await step(robust, liars=1) - await step(robust, liars=0))
    assert moved[rule] < moved[Robust.NONE] / 2


# --- While a thread works ---------------------------------------------------------------------------------------------


async def test_threads_give_what_one_thread_gives(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (False, True):
        if threads:
            monkeypatch.setattr(inbox, "THREAD_FROM", 1)
            monkeypatch.setattr(reveals, "_THREAD_FROM", 0)
        world = worlds(rounds=split_settings(seed_holders=2, bucket=3, rounds=1))
        helper = ScriptedHelper(world.fleet)
        gateway = MaskedGateway(world.fleet, "g", DEVICES)
        await helper.join(world)
        await world.join(gateway)
        await world.run_round(gateway)
        await helper.answer_all(world)
        found.append(world.store.newest_version())
    assert found[0].version == 2
    assert found[0].sha256 == found[1].sha256


class Gate:
    """Holds the work that a thread would do until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = asyncio.Event()
        self.calls = 0
        monkeypatch.setattr(reveals, "_work", self._work)

    async def _work(self, size: int, function: Any, *arguments: Any) -> Any:
        del size
        self.calls += 1
        await self.open.wait()
        return function(*arguments)


async def proposed(world: World, gateway: MaskedGateway) -> Any:
    """The reveal that the gateway owes."""
    plan, plan_hash, ring = world.plan()
    heads = [update.message.head.encode() for update in gateway.train(plan, plan_hash, ring)]
    await world.deliver(gateway.name, Verb.PROPOSE, gateway.propose(plan, plan_hash, heads))
    commit, commit_hash, _ = world.commits(gateway.name)[-1]
    return gateway.reveal(plan, ring, commit, commit_hash)


async def test_a_reveal_that_is_unmasked_when_its_round_ends_is_late(
    worlds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    world = worlds()
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await world.join(gateway)
    task = asyncio.create_task(world.deliver("g", Verb.REVEAL, await proposed(world, gateway)))
    await asyncio.sleep(0)
    await world.ask(Command.ROUND_ABORT, reason="test")
    gate.open.set()
    await task
    assert world.receipts("g")[-1].reason is RejectReason.LATE
    assert world.store.newest_version().version == 1


async def test_a_reveal_that_comes_again_while_it_is_unmasked_is_unmasked_once(
    worlds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    world = worlds(rounds=split_settings(rounds=1))
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await world.join(gateway)
    message = await proposed(world, gateway)
    tasks = [asyncio.create_task(world.deliver("g", Verb.REVEAL, message)) for _ in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert gate.calls == 1
    gate.open.set()
    await asyncio.gather(*tasks)
    assert [receipt.reason for receipt in world.receipts("g")] == [None]
    assert world.store.newest_version().contributors == len(DEVICES)


# --- The helper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, 3])
async def test_with_a_helper_its_masks_are_taken_away_too(worlds: Any, bucket: int) -> None:
    plain = worlds(rounds=split_settings(mode=Mode.PLAIN, rounds=1))
    flat = ScriptedGateway(plain.fleet, "g", DEVICES)
    await plain.join(flat)
    await plain.run_round(flat)
    world = worlds(rounds=split_settings(seed_holders=2, rounds=1, bucket=bucket))
    helper = ScriptedHelper(world.fleet)
    top = MaskedGateway(world.fleet, "top", DEVICES[:6], below={"a-west": DEVICES[6:]})
    await helper.join(world)
    await world.join(top)
    assert seal_key_of(world.plan()[0].split.helper).seal_key == helper.seal.public
    await world.run_round(top)
    assert world.receipts("top") == []
    await helper.answer_all(world)
    assert world.receipts("top")[-1].reason is None
    assert world.store.versions(limit=1)[0].sha256 == plain.store.versions(limit=1)[0].sha256


async def test_rounds_wait_for_a_helper_with_a_key(worlds: Any) -> None:
    world = worlds(rounds=split_settings(seed_holders=2))
    helper = ScriptedHelper(world.fleet)
    await world.join(MaskedGateway(world.fleet, "g", DEVICES))
    await world.pass_time(60_000)
    assert world.coordinator.machine.state is State.WAITING
    status = await world.ask(Command.ROUND_STATUS)
    assert "fleetfed-helper run" in status.result["waiting_for"]
    await helper.join(world)
    await world.pass_time(1_000)
    assert world.coordinator.machine.state is State.COLLECTING
    assert (await world.ask(Command.ROUND_STATUS)).result["waiting_for"] == ""


async def test_a_key_that_ends_before_the_round_would_opens_none_until_a_fresh_one_comes(worlds: Any) -> None:
    world = worlds(rounds=split_settings(seed_holders=2))
    helper = ScriptedHelper(world.fleet)
    await helper.join(world)
    await helper.hear(world, Verb.KEY, helper.key(now=world.clock.now + 1, lifetime=60_000))
    await world.join(MaskedGateway(world.fleet, "g", DEVICES))
    await world.pass_time(10_000)
    assert world.coordinator.machine.state is State.WAITING
    assert world.store.rounds(limit=5) == []
    assert "helper" in world.coordinator.machine.run.problem
    await helper.hear(world, Verb.KEY, helper.key(now=world.clock.now))
    await world.pass_time(61_000)
    assert world.coordinator.machine.state is State.COLLECTING
    assert world.coordinator.machine.last_round == 1
    assert world.coordinator.machine.run.problem == ""


async def test_the_helper_is_asked_again_until_it_answers_and_at_once_when_it_comes_back(worlds: Any) -> None:
    world = worlds(rounds=split_settings(seed_holders=2))
    helper = ScriptedHelper(world.fleet)
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await helper.join(world)
    await world.join(gateway)
    await world.run_round(gateway)
    assert len(helper.asked(world)) == 1
    await world.pass_time(10_000)
    assert len(helper.asked(world)) == 3
    await helper.join(world, session=2)
    assert len(helper.asked(world)) == 4
    assert len({head.hash for _, head in helper.asked(world)}) == 1
    await helper.answer_all(world)
    await world.pass_time(100)
    assert world.manifest().version == 2
    assert world.coordinator.reveals.next_deadline() is None


async def test_a_round_ends_at_its_time_although_the_helper_never_answers(worlds: Any) -> None:
    world = worlds(rounds=split_settings(seed_holders=2))
    helper = ScriptedHelper(world.fleet)
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await helper.join(world)
    await world.join(gateway)
    await world.run_round(gateway)
    await helper.hear(world, Verb.STATE, b"")
    await world.pass_time(900_000)
    assert world.end().outcome is Outcome.ABORTED
    late = helper.answer(world, helper.asked(world)[0][0])
    await helper.say(world, late)
    assert world.coordinator.rejected.snapshot()[RejectReason.LATE] == 1


async def test_after_a_restart_the_helper_is_asked_again_and_its_first_answer_serves(worlds: Any) -> None:
    world = worlds(rounds=split_settings(seed_holders=2))
    helper = ScriptedHelper(world.fleet)
    gateway = MaskedGateway(world.fleet, "g", DEVICES)
    await helper.join(world)
    await world.join(gateway)
    await world.run_round(gateway)
    request, _ = helper.asked(world)[0]
    answer = helper.answer(world, request)
    await world.restart()
    await helper.say(world, answer)
    assert world.store.newest_version().version == 1
    plan, _, ring = world.plan()
    commit, commit_hash, _ = world.commits("g")[-1]
    await world.deliver("g", Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
    again, _ = helper.asked(world)[-1]
    assert again == request
    await helper.say(world, answer)
    assert world.store.newest_version().version == 2
    await helper.join(world, Life.READY, session=3)
