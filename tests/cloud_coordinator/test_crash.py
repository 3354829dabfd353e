"""The coordinator dies at every durable write, once before it and once after it, and comes back on the same disk.

Whatever happens, the versions that come out are byte for byte those of an undisturbed run, with the same contributors;
and no gateway ever gets two commits for one round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, World
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper

from fleetfed.cloud_coordinator.config import RoundSettings, StorageConfig
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, OptimizerName
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest, MessageKind, parse_head
from fleetfed.shared.wire.messages import Mode
from fleetfed.shared.wire.topics import Broadcast, Verb


class Crash(Exception):
    """The process is gone."""


class Fuse:
    """Blows at the n-th durable write, before it or after it."""

    def __init__(self, at: int | None, *, after: bool = False) -> None:
        self.left = at
        self.after = after
        self.writes = 0

    def write(self, perform: object) -> object:
        assert callable(perform)
        self.writes += 1
        blows = self.left is not None and self.writes == self.left
        if blows and not self.after:
            raise Crash
        result = perform()
        if blows:
            raise Crash
        return result


def fused(fuse: Fuse) -> tuple[type[Store], type[BlobStore]]:
    class FusedStore(Store):
        def _commit(self) -> None:
            fuse.write(super()._commit)

        def wipe(self) -> bool:
            return bool(fuse.write(super().wipe))

    class FusedBlobs(BlobStore):
        def put(self, *objects: bytes | memoryview) -> list[Digest]:
            put = super().put
            return fuse.write(lambda: put(*objects))  # type: ignore[return-value]

    return FusedStore, FusedBlobs


class Stubborn:
    """A gateway that sends the same bytes again until it is answered."""

    def __init__(self, gateway: ScriptedGateway) -> None:
        self.gateway = gateway
        self._proposals: dict[bytes, Message] = {}
        self._reveals: dict[bytes, Message] = {}

    async def propose(self, world: World) -> None:
        plan, plan_hash, ring = world.plan()
        if plan_hash not in self._proposals:
            updates = self.gateway.train(plan, plan_hash, ring, seed=plan.round)
            heads = [update.message.head.encode() for update in updates]
            self._proposals[plan_hash] = self.gateway.propose(plan, plan_hash, heads)
        await world.deliver(self.gateway.name, Verb.PROPOSE, self._proposals[plan_hash])

    async def reveal(self, world: World) -> None:
        plan, plan_hash, ring = world.plan()
        for commit, commit_hash, _ in world.commits(self.gateway.name):
            if commit.plan == plan_hash:
                if commit_hash not in self._reveals:
                    self._reveals[commit_hash] = self.gateway.reveal(plan, ring, commit, commit_hash)
                await world.deliver(self.gateway.name, Verb.REVEAL, self._reveals[commit_hash])


def round_is_open(world: World) -> bool:
    message = world.sent.retained.get(world.topics.broadcast(Broadcast.PLAN))
    return message is not None and parse_head(message).header.kind is MessageKind.PLAN


PLAIN = {"rounds": 2}
MASKED = {"rounds": 1, "mode": Mode.SPLIT, "minimum_cohort": 2, "bucket": 2, "seed_holders": 2}


async def drive(directory: Path, fuse: Fuse, settings: dict[str, Any]) -> tuple[list[tuple[bytes, int]], int]:
    """Run all rounds; returns each version's hash with its contributors, and how often the coordinator died."""
    store, blobs = fused(fuse)
    fleet = Fleet()
    rounds, masked = settings["rounds"], "mode" in settings
    helper = ScriptedHelper(fleet) if masked else None
    kind = MaskedGateway if masked else ScriptedGateway
    gateways = [
        Stubborn(kind(fleet, "north", ["a", "b", "c", "f"])),
        Stubborn(kind(fleet, "south", ["d", "e"])),
    ]
    world = World(
        directory,
        fleet=fleet,
        start=False,
        store=store,
        blobs=blobs,
        rounds=RoundSettings(weight_cap=50, start_when=6, **settings),
        optimizer=OptimizerConfig(name=OptimizerName.ADAM, learning_rate=0.01),
        storage=StorageConfig(full_every=2, keep_versions=3),
    )
    deaths = 0
    running = False
    for _ in range(40):
        try:
            if not running:
                world.open()
                running = True
                if helper is not None:
                    await helper.join(world, session=deaths)
                await world.join(*(each.gateway for each in gateways))
            if world.store.made_since(1) == rounds:
                break
            for act in ("propose", "reveal"):
                for gateway in gateways:
                    if round_is_open(world):
                        await getattr(gateway, act)(world)
            if helper is not None and round_is_open(world):
                await helper.answer_all(world)
        except Crash:
            deaths += 1
            running = False
            await world.close()
    world.coordinator.machine.validate()
    found = [(v.sha256, v.contributors) for v in world.store.versions(limit=100)]
    patches = [v.patch_ref.digest for v in world.store.versions(limit=100) if v.patch_ref is not None]
    assert len(patches) == rounds
    assert [record.participants for record in world.store.rounds(limit=100) if record.version] == [6] * rounds
    assert [record.contributions for record in world.store.devices()] == [rounds] * 6
    for each in gateways:
        commits = world.commits(each.gateway.name)
        assert len({message for _, _, message in commits}) == len({commit.plan for commit, _, _ in commits}) == rounds
    assert world.store.seal(rounds) is None
    manifest = world.manifest()
    assert manifest.version == found_version(world)
    await world.close()
    return found, deaths


def found_version(world: World) -> int:
    newest = world.store.newest_version()
    assert newest is not None
    return newest.version


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        pytest.param(PLAIN, 3, id="plain"),
        pytest.param(MASKED, 2, id="split"),
        pytest.param(PLAIN, 1, id="plain, all", marks=pytest.mark.slow),
        pytest.param(MASKED, 1, id="split, all", marks=pytest.mark.slow),
    ],
)
async def test_every_write_may_be_the_last(tmp_path: Path, settings: dict[str, Any], every: int) -> None:
    quiet = Fuse(None)
    expected, deaths = await drive(tmp_path / "quiet", quiet, settings)
    assert deaths == 0
    assert len(expected) == settings["rounds"] + 1
    assert quiet.writes > 10 * settings["rounds"]
    for after in (False, True):
        for at in range(1 + after, quiet.writes + 1, every):
            fuse = Fuse(at, after=after)
            found, deaths = await drive(tmp_path / f"{at}-{after}", fuse, settings)
            assert deaths == 1, (at, after)
            assert found == expected, (at, after)
