"""The coordinator dies at every durable write of private rounds: no sum ever gets two different noises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import Fleet, World
from fleetfed_testing.private_cloud import PrivateGateway

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.store import NOISE, Store
from fleetfed.cloud_coordinator.training import step
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest, MessageKind, parse_head
from fleetfed.shared.wire.messages import Weighting
from fleetfed.shared.wire.privacy import Mechanism
from fleetfed.shared.wire.topics import Broadcast, Verb

pytest.importorskip("dp_accounting")

ROUNDS = 2
PRIVACY = PrivacySettings(
    mechanism=Mechanism.MATRIX, band=2, separation=2, participations=4, noise_multiplier=9.0, epsilon=8.0
)


class Crash(Exception):
    """The process is gone."""


class Fuse:
    """Blows at the n-th durable write, before it or after it."""

    def __init__(self, at: int | None, *, after: bool = False) -> None:
        self.left, self.after, self.writes = at, after, 0

    def write(self, perform: Callable[[], Any]) -> Any:
        self.writes += 1
        blows = self.writes == self.left
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
            return fuse.write(lambda: put(*objects))  # type: ignore[no-any-return]

        def remove(self, name: bytes) -> None:
            remove = super().remove
            fuse.write(lambda: remove(name))

    return FusedStore, FusedBlobs


def is_open(world: World) -> bool:
    message = world.sent.retained.get(world.topics.broadcast(Broadcast.PLAN))
    return message is not None and parse_head(message).header.kind is MessageKind.PLAN


async def drive(directory: Path, fuse: Fuse) -> int:
    """Run all rounds over however many deaths; return how many there were."""
    store, blobs = fused(fuse)
    fleet = Fleet()
    gateway = PrivateGateway(fleet, "north", ["a", "b", "c"])
    settings = RoundSettings(rounds=ROUNDS, weighting=Weighting.UNIFORM, cohort_cap=20, start_when=3, privacy=PRIVACY)
    world = World(directory, fleet=fleet, start=False, store=store, blobs=blobs, rounds=settings)
    proposals: dict[bytes, Message] = {}
    reveals: dict[bytes, Message] = {}
    deaths, running = 0, False
    for _ in range(40):
        try:
            if not running:
                world.open()
                running = True
                await world.join(gateway)
            if world.store.made_since(1) == ROUNDS:
                break
            if not is_open(world):
                continue
            plan, plan_hash, ring = world.plan()
            if plan_hash not in proposals:
                heads = [update.message.head.encode() for update in gateway.train(plan, plan_hash, ring)]
                proposals[plan_hash] = gateway.propose(plan, plan_hash, heads)
            await world.deliver("north", Verb.PROPOSE, proposals[plan_hash])
            for commit, commit_hash, _ in world.commits("north"):
                if commit.plan == plan_hash:
                    reveals.setdefault(commit_hash, gateway.reveal(plan, ring, commit, commit_hash))
                    await world.deliver("north", Verb.REVEAL, reveals[commit_hash])
        except Crash:
            deaths += 1
            running = False
            await world.close()
    assert world.store.made_since(1) == ROUNDS
    # Every plan that was published is in the account, once.
    (segment,) = world.coordinator.book.privacy.account().segments
    assert (segment.rounds, segment.last) == (ROUNDS, ROUNDS)
    assert [world.store.seal(number) for number in range(1, ROUNDS + 1)] == [None] * ROUNDS
    name = world.store.document(NOISE)
    assert name is not None
    assert MatrixState.decode(world.coordinator.blobs.get(name)).round == ROUNDS
    await world.close()
    return deaths


async def test_whenever_it_dies_a_round_has_one_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[tuple[int, int], set[bytes]] = {}
    real = step.add_coordinator_noise
    run = 0

    def watched(total: Any, privacy: Any, noise: Any) -> Any:
        noised = real(total, privacy, noise)
        drawn.setdefault((run, noise.round), set()).add(noised.values.tobytes())
        return noised

    monkeypatch.setattr(step, "add_coordinator_noise", watched)
    counted = Fuse(None)
    assert await drive(tmp_path / "whole", counted) == 0
    # After one write is before the next: every second is enough.
    for at in range(1, counted.writes + 1, 2):
        run += 1
        assert await drive(tmp_path / str(run), Fuse(at, after=True)) == 1
    assert all(len(values) == 1 for values in drawn.values())
    assert len({next(iter(values)) for values in drawn.values()}) == len(drawn)
