"""A coordinator without a broker, and gateways that do as the test says: everybody signs for real.

`World` holds one fleet: identities, a small model, and packets that the coordinator sent, by topic. A `ScriptedGateway`
makes real updates of its devices, proposes their heads, and reveals the sum over whatever it was committed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fleetfed.cloud_coordinator.config import CoordinatorConfig, ModelConfig, RoundSettings
from fleetfed.cloud_coordinator.control.handler import Control
from fleetfed.cloud_coordinator.inbox import Inbox
from fleetfed.cloud_coordinator.publish import Outgoing
from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.step import ring_of
from fleetfed.shared.aggregate.accumulator import Accumulator, Ring, encode_words
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.model.card import Initializer, InitializerKind, ModelCard
from fleetfed.shared.model.table import TensorSlot, WeightTable
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import (
    Census,
    Command,
    Commit,
    Life,
    Manifest,
    MemberSummary,
    Plan,
    Presence,
    Proposal,
    Receipt,
    Request,
    Response,
    Reveal,
    RoundEnd,
)
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb
from fleetfed.shared.wire.update import UpdateExtension
from fleetfed_testing.lone_gateway import FLEET, Authority

START = 1_800_000_000_000
"""The tests' first millisecond, inside every certificate's validity."""

T = TypeVar("T")


def small_model(seed: int = 1, *, name: str = "small", width: int = 12) -> tuple[bytes, ModelCard]:
    """A file that is no model but has a weight table: enough for everything but evaluation."""
    shapes = (("dense/kernel", (width, 5)), ("dense/bias", (5,)))
    slots, offset = [], 16
    for slot_name, shape in shapes:
        slots.append(TensorSlot(name=slot_name, shape=shape, dtype="float32", offset=offset))
        offset = slots[-1].end + 8
    table = WeightTable(tensors=tuple(slots))
    file = bytearray(b"\x1c\0\0\0TFL3" + bytes(offset))
    rng = np.random.default_rng(seed)
    for slot in slots:
        file[slot.offset : slot.end] = rng.normal(size=slot.size).astype("<f4").tobytes()
    card = ModelCard(
        name=name,
        builder="test",
        file_bytes=len(file),
        input_shape=(width,),
        classes=5,
        softmax=True,
        batch=4,
        tensors=table.tensors,
        initializers=(Initializer(kind=InitializerKind.NONE, fan_in=1, fan_out=1),) * len(slots),
        layout=table.layout_hash(),
    )
    return bytes(file), card


def write_model(directory: Path, seed: int = 1, *, name: str = "small", width: int = 12) -> Path:
    """The same as files; returns the model's."""
    file, card = small_model(seed, name=name, width=width)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.tflite"
    path.write_bytes(file)
    path.with_suffix(".card").write_bytes(card.encode())
    return path


@dataclass(frozen=True)
class Update:
    """A device's signed update, and the integers in it."""

    device: str
    message: Message
    values: Values
    meta: Words


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


class Fleet:
    """Identities of one fleet and the bytes that its random numbers are."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.identities: dict[str, Identity] = {}
        self.signers: dict[str, Signer] = {}
        self.owners: dict[str, str] = {}
        self._random = itertools.count(1)

    def member(self, role: Role, name: str, site: str) -> Identity:
        """The identity of ``name``, always the same."""
        if name not in self.identities:
            self.identities[name] = self.authority.member(role, name, site, owner=self.owners.get(name, ""))
        return self.identities[name]

    def randomness(self, size: int) -> bytes:
        """Bytes that never repeat."""
        return next(self._random).to_bytes(size, "big")

    def signer(self, role: Role, name: str, site: str) -> Signer:
        """The signer of ``name``."""
        if name not in self.signers:
            identity = self.member(role, name, site)
            self.signers[name] = identity.signer(sequence=itertools.count(1).__next__, randomness=self.randomness)
        return self.signers[name]


def contribution_of(device: str, ring: Ring, *, seed: int = 0) -> tuple[Values, Words]:
    """What a device has to say, drawn from its name and ``seed``: values and meta words."""
    rng = np.random.default_rng([seed, *device.encode()])
    limit = ring.limit(1)
    values: Values = rng.integers(-limit, limit + 1, size=ring.layout.dimension).astype(np.int8)
    weight = int(rng.integers(1, ring.meta.weight_cap + 1))
    meta = ring.meta.encode(
        Contribution(
            weight=weight,
            examples=weight,
            training_loss=float(rng.uniform(0, 2)),
            holdout_examples=10,
            holdout_correct=int(rng.integers(0, 11)),
            holdout_loss=0.5,
            clipped=(0,) * len(ring.meta.sizes),
            log2_rms=(-6.0,) * len(ring.meta.sizes),
        )
    )
    return values, meta


def extension_of(plan: Plan, plan_hash: Digest, ring: Ring, /, **changes: Any) -> UpdateExtension:
    """The extension of a right update, less what ``changes`` say."""
    fields: dict[str, Any] = {
        "bits": plan.quantization.bits,
        "lane_bits": plan.quantization.lane_bits,
        "dimension": plan.dimension,
        "meta_words": ring.layout.meta_words,
        "plan": plan_hash,
        "model_sha256": plan.model_sha256,
    }
    return UpdateExtension(**{**fields, **changes})


def update_of(
    fleet: Fleet, device: str, site: str, plan: Plan, plan_hash: Digest, ring: Ring, /, *, seed: int = 0, **changes: Any
) -> Update:
    """A device's update for a plan, drawn from its name and ``seed``; ``changes`` are of the extension."""
    values, meta = contribution_of(device, ring, seed=seed)
    message = fleet.signer(Role.DEVICE, device, site).sign_raw(
        MessageKind.UPDATE,
        encode_body(values, meta, limit=ring.limit(1)),
        raw_size=ring.layout.dimension,
        compressed=True,
        now=plan.opened,
        round=changes.pop("round", plan.round),
        extension=extension_of(plan, plan_hash, ring, **changes).encode(),
    )
    return Update(device, message, values, meta)


class ScriptedGateway:
    """One direct gateway: says what the test wants it to say.

    Args:
        fleet: identities.
        name: of the gateway; it serves the site of the same name.
        devices: below it.
    """

    def __init__(self, fleet: Fleet, name: str, devices: Sequence[str]) -> None:
        self.fleet = fleet
        self.name = name
        self.devices = list(devices)
        self.signer = fleet.signer(Role.GATEWAY, name, name)
        self.updates: dict[bytes, Update] = {}

    def presence(self, life: Life = Life.READY, *, session: int = 1) -> bytes:
        """Its presence."""
        return codec.encode(Presence(life=life, session=session, since=START, software="test"))

    def census(self, *, now: int = START, ready: int | None = None, **changes: Any) -> bytes:
        """Its census, signed."""
        count = len(self.devices) if ready is None else ready
        members = tuple(MemberSummary(id=device, site=self.name, life=Life.READY) for device in self.devices)
        body = Census(
            **{
                "site": self.name,
                "level": 0,
                "devices": len(self.devices),
                "ready": count,
                "sleeping": 0,
                "lost": 0,
                "members": members,
                **changes,
            }
        )
        return self.signer.sign(MessageKind.CENSUS, body, now=now).encode()

    def train(self, plan: Plan, plan_hash: Digest, ring: Ring, *, seed: int = 0) -> list[Update]:
        """An update of each device."""
        made = [update_of(self.fleet, device, self.name, plan, plan_hash, ring, seed=seed) for device in self.devices]
        self.updates |= {update.message.id: update for update in made}
        return made

    def propose(self, plan: Plan, plan_hash: Digest, heads: Iterable[bytes], /, **changes: Any) -> Message:
        """A signed proposal of these heads."""
        body = Proposal(**{"plan": plan_hash, "heads": tuple(heads), **changes})
        return self.signer.sign(MessageKind.PROPOSE, body, now=plan.opened, round=plan.round)

    def reveal(self, plan: Plan, ring: Ring, commit: Commit, commit_hash: Digest, /, **changes: Any) -> Message:
        """A signed partial over the committed members."""
        ids = [commit.members[i : i + 16] for i in range(0, len(commit.members), 16)]
        total = Accumulator(ring, capacity=plan.quorum.cohort_cap)
        for message_id in ids:
            total.accumulate(self.updates[message_id].values, self.updates[message_id].meta)
        body = Reveal(
            **{
                "plan": commit.plan,
                "commit": commit_hash,
                "count": len(ids),
                "words": encode_words(total.report()),
                **changes,
            }
        )
        return self.signer.sign(MessageKind.REVEAL, body, now=plan.opened, round=plan.round)


@dataclass
class Sent:
    """What the coordinator sent."""

    packets: list[tuple[str, bytes, bool]] = field(default_factory=list)
    retained: dict[str, bytes] = field(default_factory=dict)

    def take(self, packet: Outgoing) -> None:
        """Be the transport."""
        payload = packet.payload if isinstance(packet.payload, bytes) else packet.payload()
        self.packets.append((packet.topic, payload, packet.retain))
        if packet.retain:
            self.retained.pop(packet.topic, None)
            if payload:
                self.retained[packet.topic] = payload
        if packet.done is not None:
            packet.done()


class World:
    """One coordinator, its disk, and what it sent; `restart` is a crash and a new start on the same disk."""

    def __init__(
        self,
        directory: Path,
        *,
        fleet: Fleet | None = None,
        store: type[Store] = Store,
        blobs: type[BlobStore] = BlobStore,
        autostart: bool = True,
        start: bool = True,
        rounds: RoundSettings | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.fleet = fleet or Fleet()
        self.clock = Clock()
        self.sent = Sent()
        self.topics = SiteTopics(FLEET, "_")
        model = None if settings.pop("no_model", False) else ModelConfig(file=write_model(directory / "model"))
        self.config = CoordinatorConfig(
            identity=directory / "identity",
            state=directory / "state",
            broker=Endpoint(host="localhost", tls=False),
            rounds=rounds or RoundSettings(weight_cap=50),
            autostart=autostart,
            model=model,
            **settings,
        )
        self.identity = self.fleet.member(Role.COORDINATOR, "coordinator", "_")
        self._store, self._blobs = store, blobs
        self._signer = self.fleet.signer(Role.COORDINATOR, "coordinator", "_")
        self._open = False
        if start:
            self.open()

    def open(self) -> None:
        """Start the coordinator on the disk as it is."""
        blobs = self._blobs(self.directory / "state" / "blobs")
        self.store = self._store(self.config.database_url, blobs)
        try:
            self.coordinator = Coordinator(
                self.config,
                identity=self.identity,
                store=self.store,
                blobs=blobs,
                clock=self.clock,
                signer=self._signer,
                randomness=self.fleet.randomness,
                send=self.sent.take,
            )
            self.inbox = Inbox(self.coordinator, Control(self.coordinator).request)
            self.coordinator.start()
            self.coordinator.publish_everything()
            self._open = True
        except BaseException:
            self.store.close()
            raise

    async def close(self) -> None:
        """Stop as a crash does: nothing more is written."""
        if self._open:
            self._open = False
            await self.coordinator.stop()
            self.store.close()

    async def restart(self) -> None:
        """Crash and start again."""
        await self.close()
        self.open()

    def site_of(self, head: Head) -> str:
        """The site of whoever signed a head."""
        return self.coordinator.verifier.certificate(head.certificate, now=self.clock.now).site

    # --- What gateways do ---------------------------------------------------------------------------------------------

    async def hear(self, gateway: str, verb: Verb, payload: bytes) -> None:
        """A packet of a gateway arrives."""
        await self.inbox.message(self.topics.up(Kind.GATEWAY, gateway, verb), payload)
        await self.settle()

    async def deliver(self, gateway: str, verb: Verb, message: Message) -> None:
        """A signed message of a gateway arrives, in chunks."""
        for frame in split(message.id, message.encode()):
            await self.hear(gateway, verb, frame)

    async def join(self, *gateways: ScriptedGateway) -> None:
        """Gateways come up with their devices; time passes until the coordinator stops waiting for more of them."""
        for gateway in gateways:
            await self.hear(gateway.name, Verb.STATE, gateway.presence())
        for gateway in gateways:
            await self.hear(gateway.name, Verb.CENSUS, gateway.census(now=self.clock.now))
        await self.pass_time(1_000)

    async def pass_time(self, milliseconds: int) -> None:
        """Time passes; timers fire."""
        end = self.clock.now + milliseconds
        while (at := self.coordinator.next_deadline()) is not None and at <= end:
            self.clock.now = max(self.clock.now, at)
            self.coordinator.timer()
            await self.settle()
        self.clock.now = end

    async def settle(self) -> None:
        """A step in progress ends; whatever failed is raised."""
        await self.coordinator.idle()
        failed = self.coordinator.failed
        if failed is not None and failed.done():
            failed.result()

    # --- What gateways hear -------------------------------------------------------------------------------------------

    def opened(self, cls: type[T], message: bytes) -> tuple[T, Head]:
        """A message of the coordinator, its body decoded."""
        head = parse_head(message)
        raw = open_body(head.header, message[head.size :])
        return codec.decode(cls, raw, limit=len(raw)), head

    def plan(self) -> tuple[Plan, Digest, Ring]:
        """The plan that is published now."""
        plan, head = self.opened(Plan, self.sent.retained[self.topics.broadcast(Broadcast.PLAN)])
        return plan, head.hash, ring_of(plan, small_model()[1])

    def end(self) -> RoundEnd:
        """The last round end that was published."""
        topic = self.topics.broadcast(Broadcast.PLAN)
        for sent, payload, _ in reversed(self.sent.packets):
            if sent == topic and parse_head(payload).header.kind is MessageKind.ROUND_END:
                return self.opened(RoundEnd, payload)[0]
        raise AssertionError("no round has ended")

    def manifest(self) -> Manifest:
        """The manifest that is published now."""
        return self.opened(Manifest, self.sent.retained[self.topics.broadcast(Broadcast.MODEL)])[0]

    def commits(self, gateway: str) -> list[tuple[Commit, Digest, bytes]]:
        """All commits that a gateway was sent."""
        assembler = Assembler(lambda head: None)
        found = []
        for topic, payload, _ in self.sent.packets:
            if topic == self.topics.down(Kind.GATEWAY, gateway, Verb.COMMIT):
                whole = assembler.feed(payload)
                if whole is not None:
                    head, body = whole
                    message = head.encode() + bytes(body)
                    found.append((self.opened(Commit, message)[0], head.hash, message))
        return found

    def receipts(self, gateway: str) -> list[Receipt]:
        """All receipts that a gateway was sent."""
        wanted = self.topics.down(Kind.GATEWAY, gateway, Verb.RECEIPT)
        return [self.opened(Receipt, payload)[0] for topic, payload, _ in self.sent.packets if topic == wanted]

    # --- Whole rounds -------------------------------------------------------------------------------------------------

    async def run_round(self, *gateways: ScriptedGateway, seed: int = 0) -> None:
        """All gateways propose, then reveal."""
        plan, plan_hash, ring = self.plan()
        for gateway in gateways:
            updates = gateway.train(plan, plan_hash, ring, seed=seed)
            proposal = gateway.propose(plan, plan_hash, [update.message.head.encode() for update in updates])
            await self.deliver(gateway.name, Verb.PROPOSE, proposal)
        for gateway in gateways:
            commit, commit_hash, _ = self.commits(gateway.name)[-1]
            await self.deliver(gateway.name, Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))

    # --- Operators ----------------------------------------------------------------------------------------------------

    async def ask(self, command: Command, *, lifetime: int = 60_000, **arguments: Any) -> Response:
        """An operator asks; returns the answer."""
        signer = self.fleet.signer(Role.OPERATOR, "op", "_")
        body = Request(command=command, arguments=arguments)
        message = signer.sign(MessageKind.REQUEST, body, now=self.clock.now, lifetime=lifetime)
        return await self.ask_again(message)

    async def ask_again(self, message: Message) -> Response:
        """The same request once more."""
        await self.inbox.message(self.topics.up(Kind.OPERATOR, "op", Verb.REQUEST), message.encode())
        await self.settle()
        topic = self.topics.down(Kind.OPERATOR, "op", Verb.RESPONSE)
        return self.opened(Response, next(p for t, p, _ in reversed(self.sent.packets) if t == topic))[0]


def facts(world: World) -> Any:
    """All that a refused message must not change."""
    round_ = world.coordinator.machine.round
    exchanges = () if round_ is None else tuple(sorted((g, replace(e)) for g, e in round_.exchanges.items()))
    store = world.store
    return (
        world.coordinator.machine.state,
        exchanges,
        () if round_ is None else tuple(sorted(round_.holder.items())),
        store.rounds(limit=10),
        store.versions(limit=10),
        [store.exchanges(record.number) for record in store.rounds(limit=10)],
    )


__all__ = ["Fleet", "ScriptedGateway", "World", "facts", "update_of", "write_model"]
