"""The device dies at every single step that its disk takes during two rounds, and goes on after a restart.

A broker in memory keeps what is retained and hands it over when the device subscribes; gateway and coordinator sign for
real. The rounds are plain, or masked and noisy.

Failure: two different updates for one plan; a restart that cannot go on; a model that is not the published one; an
update that the privacy ledger on disk does not know.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.fragile_disk import FragileDisk, PowerCutError
from fleetfed_testing.lone_gateway import Authority, manifest_of, plan_for, signer_of
from fleetfed_testing.split_site import SplitSite
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator import zoo
from fleetfed.device import runtime as device_runtime
from fleetfed.device.config import DeviceConfig, DeviceEndpoint
from fleetfed.device.disk import Disk
from fleetfed.device.ledger import Account, Ledger
from fleetfed.device.mqtt import Connected, PublishDone, Received
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.device.store import Store
from fleetfed.device.trainer import Task, Trained
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RemoteProtocolError
from fleetfed.shared.model.patch import make_patch
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.blobs import publishable
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Outcome, PatchRef, Plan, Quantization, Receipt, RoundEnd, Weighting
from fleetfed.shared.wire.privacy import Mechanism, Privacy
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

MODEL = zoo.load("digits", seed=1)
CARD = MODEL.card
AUTHORITY = Authority()
DEVICE = AUTHORITY.member(Role.DEVICE, "d-1")
COORDINATOR = signer_of(AUTHORITY.member(Role.COORDINATOR, "coordinator", "_"))
GATEWAY = signer_of(AUTHORITY.member(Role.GATEWAY, "g-north"))
MASKED = SplitSite(AUTHORITY)
UNIFORM = Quantization(bits=4, lane_bits=16, clips=(0.05,) * len(CARD.tensors), weight_cap=1)
NOISY = Privacy(
    mechanism=Mechanism.CENTRAL, clip=100.0, noise_multiplier=1.0, max_participations=2, epsilon=10.0, delta=1e-6
)
TOPICS = SiteTopics(fleet="demo", site="north")


class Noise:
    """Never twice the same: a second training of one plan would show."""

    def prepare(self, card: Any) -> str:
        return ""

    def train(self, task: Task) -> Trained:
        delta = task.rng.normal(0, 0.01, task.card.parameters).astype(np.float32)
        return Trained(delta=delta, examples=10, seen=10, steps=1, training_loss=1.0)


class World:
    """What outlives the device: retained messages, and every update that was ever seen."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.updates: dict[int, list[bytes]] = {}
        self.session: FakeSession | None = None
        self.ledger: Callable[[], Account] | None = None
        self.known: list[tuple[int, Account]] = []

    def publish(self, topic: str, payload: bytes) -> None:
        self.retained[topic] = payload
        if self.session is not None and topic in self.session.filters:
            self.session.deliver(topic, payload)

    def receive(self, topic: str, frame: bytes, assembler: Assembler) -> None:
        if topic != TOPICS.up(Kind.DEVICE, "d-1", Verb.UPDATE):
            return
        whole = assembler.feed(frame)
        if whole is None or self.session is None:
            return
        head, body = whole
        if self.ledger is not None:
            self.known.append((head.header.round, self.ledger()))
        self.updates.setdefault(head.header.round, []).append(head.encode() + bytes(body))
        receipt = Receipt(message_id=head.header.message_id, head=head.hash)
        message = GATEWAY.sign(MessageKind.RECEIPT, receipt, now=unix_ms())
        self.session.deliver(TOPICS.down(Kind.DEVICE, "d-1", Verb.RECEIPT), message.encode())


class FakeSession:
    """In the place of `DeviceSession`: connected from the first moment, to a `World`."""

    world: World

    def __init__(self, _config: Any, *, inbox: queue.Queue[Any], subscriptions: list[str], **_: Any) -> None:
        self.meter = ByteMeter()
        self.filters = set(subscriptions)
        self._inbox = inbox
        self._tokens = itertools.count(1)
        self._assembler = Assembler(lambda _head: None)
        self.world.session = self

    def begin(self) -> None:
        self._inbox.put(Connected(False))
        for topic in sorted(self.filters & set(self.world.retained)):
            self.deliver(topic, self.world.retained[topic])

    def deliver(self, topic: str, payload: bytes) -> None:
        self._inbox.put(Received(topic, payload, retained=False))

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        token = next(self._tokens)
        self.world.receive(topic, payload, self._assembler)
        self._inbox.put(PublishDone(token))
        return token

    def subscribe(self, *filters: str) -> None:
        self.filters.update(filters)
        for topic in filters:
            if topic in self.world.retained:
                self.deliver(topic, self.world.retained[topic])

    def unsubscribe(self, *filters: str) -> None:
        self.filters.difference_update(filters)

    def ack(self, message: Received) -> None:
        """The world needs none."""


@functools.cache
def versions() -> tuple[Any, ...]:
    """Two versions with their objects, and the patch between them."""
    one, blobs = manifest_of(MODEL.data, CARD, version=1, sha256=hashlib.sha256(MODEL.data).digest())
    made = make_patch(MODEL.data, np.full(CARD.parameters, 0.01), CARD.table)
    blob = publishable(made.patch)
    patch = PatchRef(
        base_version=1,
        base_sha256=one.sha256,
        target_version=2,
        target_sha256=made.target_sha256,
        blob=blob.ref,
    )
    two, more = manifest_of(made.file, CARD, version=2, sha256=made.target_sha256, patches=((patch, blob),))
    return one, blobs, two, more


def plans(masked: bool) -> tuple[Plan, Plan]:
    """One for each version; made for each life, whose deadlines they have."""
    changes = MASKED.changes(privacy=NOISY, weighting=Weighting.UNIFORM, quantization=UNIFORM) if masked else {}
    one, _, two, _ = versions()
    return plan_for(CARD, one, round_=1, **changes), plan_for(CARD, two, round_=2, **changes)


def announce(world: World, blobs: Any, manifest: Any, plan: Any) -> Any:
    for blob in blobs:
        for index in range(len(blob.ref.parts) // 16):
            world.publish(TOPICS.blob(blob.ref.digest, index), blob.chunk(index))
    signed = COORDINATOR.sign(MessageKind.MANIFEST, manifest, now=unix_ms())
    world.publish(TOPICS.broadcast(Broadcast.MODEL), signed.encode())
    message = COORDINATOR.sign(MessageKind.PLAN, plan, now=unix_ms(), round=plan.round, lifetime=60_000)
    world.publish(TOPICS.broadcast(Broadcast.PLAN), message.encode())
    if plan.split is not None:
        cosign = MASKED.cosign(plan, message.head.hash, GATEWAY)
        world.publish(TOPICS.broadcast(Broadcast.COSIGN), cosign.encode())
    return message.head.hash


class Life:
    """One device folder and the processes that live in it, one after the other."""

    def __init__(self, directory: Path, world: World) -> None:
        self.directory = directory
        self.world = world
        self.deaths = 0
        self.disk = FragileDisk()
        self.runtime: DeviceRuntime | None = None

    def start(self, disk: FragileDisk) -> None:
        self.disk = disk
        settings = DeviceConfig(
            identity=self.directory / "identity",
            state=self.directory / "state",
            broker=DeviceEndpoint(host="localhost", tls=False),
        )
        store = Store(self.directory / "state", disk=disk)
        self.runtime = DeviceRuntime(settings, DEVICE, store, Noise(), software="test")
        self._store = store
        assert self.world.session is not None
        self.world.session.begin()

    def die(self) -> None:
        """As SIGKILL: nothing of the process is left but its files."""
        self.deaths += 1
        self.world.session = None
        if self.runtime is not None:
            self.runtime._worker.cancel()
            self.runtime._worker.join(PATIENCE)
            self._store.close()
            self.runtime = None

    def until(self, condition: Any, cut: int = -1, *, lossy: bool = False) -> None:
        """Run until ``condition(runtime)``; after a death with a sound disk."""
        for turn in itertools.count():
            assert turn < 2000, "it does not go on"
            try:
                if self.runtime is None:
                    self.start(FragileDisk(cut, lossy=lossy) if not self.deaths else FragileDisk())
                assert self.runtime is not None
                if condition(self.runtime):
                    return
                self.runtime._turn()
            except PowerCutError:
                self.die()


def accepted(round_: int) -> Any:
    def condition(runtime: DeviceRuntime) -> bool:
        answer = runtime._machine.answer
        return answer is not None and answer.round == round_ and answer.fate == "accepted"

    return condition


def live(directory: Path, cut: int, *, lossy: bool, masked: bool) -> Life:
    """Two rounds, with the death at step ``cut``; everything that must hold is checked."""
    one, blobs, two, more = versions()
    first, second = plans(masked)
    world = FakeSession.world = World()
    # Read anew for every update that arrives: from the disk, as a restart would.
    world.ledger = lambda: Ledger(directory / "state" / "ledger", disk=Disk(), spent=0).account("demo")
    life = Life(directory, world)
    plan_hash = announce(world, blobs, one, first)
    life.until(accepted(1), cut, lossy=lossy)
    end = RoundEnd(round=1, plan=plan_hash, outcome=Outcome.COMMITTED, version=2)
    message = COORDINATOR.sign(MessageKind.ROUND_END, end, now=unix_ms(), round=1)
    world.publish(TOPICS.broadcast(Broadcast.PLAN), message.encode())
    announce(world, more, two, second)
    life.until(accepted(2), cut, lossy=lossy)
    assert life.runtime is not None
    held = life.runtime._machine.sync.models[0]
    assert held.version == 2
    assert hashlib.sha256(life._store.model_path(held).read_bytes()).digest() == two.sha256
    assert masked or life._store.residual(CARD.layout) is not None
    for round_, seen in world.updates.items():
        assert len(set(seen)) == 1, f"{len(set(seen))} different updates in round {round_}"
    assert set(world.updates) == {1, 2}
    account = life._store.account("demo")
    assert account.participations == (2 if masked else 0)
    for round_, known in world.known:
        assert known.last_round == (round_ if masked else 0), "an update was sent before it was debited"
        assert known.participations == (round_ if masked else 0)
    assert (life._store.directory / "hedge").exists() is masked
    status = life.runtime._status._rejected.snapshot()
    assert status == {}, status
    steps = life.disk.steps
    life.die()
    life.disk.steps = steps
    return life


@pytest.fixture(autouse=True)
def world_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_runtime, "DeviceSession", FakeSession)


@pytest.mark.parametrize(
    ("lossy", "masked"),
    [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.slow), (True, True)],
    ids=["plain", "plain, names lost", "masked", "masked, names lost"],
)
def test_death_at_every_step(tmp_path: Path, lossy: bool, masked: bool) -> None:
    whole = live(tmp_path / "whole", -1, lossy=lossy, masked=masked)
    assert whole.deaths == 1
    steps = whole.disk.steps
    assert steps > 60
    for cut in range(steps):
        life = live(tmp_path / str(cut), cut, lossy=lossy, masked=masked)
        assert life.deaths == 2, f"step {cut} was not reached"


def test_the_fake_broker_refuses_nothing_silently() -> None:
    """The assembler in the fake would hide a malformed chunk if it swallowed errors."""
    with pytest.raises(RemoteProtocolError):
        Assembler(lambda _head: None).feed(b"x")
