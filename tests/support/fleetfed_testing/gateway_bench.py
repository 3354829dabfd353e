"""A gateway without brokers: its own machines, journal, intake and threads; what it would publish is written down."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.gateway import events as ev
from fleetfed.gateway.inbound import Inbound
from fleetfed.gateway.journal import Journal
from fleetfed.gateway.perform import Performer
from fleetfed.gateway.pipeline import Pipeline
from fleetfed.gateway.record import Place
from fleetfed.gateway.relay import Relay
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.worker import Worker
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import Head, open_body, parse_head
from fleetfed.shared.wire.masking import Cosign
from fleetfed.shared.wire.messages import Life, Plan, Presence, Proposal, Receipt, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb
from fleetfed_testing.signed_fleet import SignedFleet


class Recorder:
    """Takes what would be published, and keeps it by topic."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, bool]] = []

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self.sent.append((topic, payload, retain))

    async def subscribe(self, filters: list[str]) -> None:
        pass

    async def unsubscribe(self, filters: list[str]) -> None:
        pass

    def on(self, topic: str) -> list[bytes]:
        """Payloads on one topic, oldest first."""
        return [payload for name, payload, _ in self.sent if name == topic]


class Bench:
    """See the module; `crash` and `start` are a kill -9 and a restart on the same disk."""

    def __init__(
        self, fleet: SignedFleet, state: Path, *, name: str = "g-north", site: str = "north", upstream: str = "_"
    ) -> None:
        self.fleet = fleet
        self.state = state
        self.name = name
        self.site = SiteTopics(fleet.name, site)
        self.upstream = SiteTopics(fleet.name, upstream)
        self.budget = 1 << 20
        self.settled = 0
        self.place = Place(gateway=name, direct=upstream == "_")
        self.make_journal: Callable[[Path], Journal] = Journal
        self.randomness: Callable[[int], bytes] = secrets.token_bytes
        self.below, self.above = Recorder(), Recorder()
        fleet.identity(name, Role.GATEWAY, site)

    async def start(self, *, connected: bool = True) -> None:
        """Start on whatever the disk holds."""
        fleet = self.fleet
        identity = fleet.identity(self.name, Role.GATEWAY, self.site.site)
        self.verifier = identity.verifier()
        self.counters = Counters()
        self._threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.journal = self.make_journal(self.state / "journal.db")
        self.pipeline = Pipeline(self.journal, self._threads[0])
        self.worker = Worker(self._threads[1])
        stored = self.journal.load()
        self.machine = GatewayMachine(
            self.site.site, self.place, last_round=stored.last_round, previous=stored.previous
        )
        self.performer = Performer(
            gateway=self.name,
            machine=self.machine,
            journal=self.journal,
            pipeline=self.pipeline,
            worker=self.worker,
            signer=fleet.signer(self.name, Role.GATEWAY, self.site.site),
            below=self.below,
            above=self.above,
            site=self.site,
            upstream=self.upstream,
            counters=self.counters,
            randomness=self.randomness,
            clock=lambda: fleet.now,
            round_over=lambda number: self.inbound.round_over(),
        )
        self.relay = Relay(
            self.state / "relay",
            above=self.above,
            below=self.below,
            upstream=self.upstream,
            site=self.site,
            ask=self._ask,
            served=self.performer.feed,
        )
        self.inbound = Inbound(
            verifier=self.verifier,
            machine=self.machine,
            performer=self.performer,
            relay=self.relay,
            worker=self.worker,
            site=self.site,
            upstream=self.upstream,
            gateway=self.name,
            counters=self.counters,
            budget=self.budget,
            fed=self.performer.feed,
            revoked=self._revoked,
            reborn=lambda: None,
            clock=lambda: fleet.now,
        )
        manifest = fleet.model(1)[0]
        self.performer.feed(ev.ModelServed(version=1, sha256=manifest.sha256, sizes=fleet.sizes))
        if stored.record is not None:
            rnd = self.machine.restore(stored.record, scheme_of(stored.record.plan, stored.sizes).ring, fleet.now)
            self.performer.restore(rnd, stored)
        self._tasks = [asyncio.create_task(self.pipeline.run()), asyncio.create_task(self.worker.run())]
        self.performer.perform(self.machine.resume(fleet.now))
        for what, raw in self.performer.retained():
            if raw:
                await self.below.publish(self.site.broadcast(what), raw, retain=True)
        self.performer.feed(ev.SiteConnected(self.settled))
        if connected:
            self.performer.feed(ev.UpstreamConnected())

    async def close(self) -> None:
        """End in good order."""
        await self.quiet()
        await self.crash()

    async def crash(self) -> None:
        """Stop without finishing anything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in self._threads:
            thread.shutdown()
        self.journal.close()

    async def quiet(self) -> None:
        """Return when nothing is left to do."""
        while True:
            for task in self._tasks:
                if task.done():
                    task.result()
            if self.pipeline.idle and self.worker.idle and all(task.done() for task in self.performer._tasks):
                return
            await asyncio.sleep(0.001)

    async def _ask(self, need: Any) -> None:
        raise AssertionError("nothing is to be asked for")

    def _revoked(self, raw: bytes) -> None:
        self.performer.feed(ev.Revoked(serials=frozenset(self.verifier.revocations.serials)))

    # --- What members and the tier above say ---------------------------------------------------------------------

    def present(
        self, *names: str, life: Life = Life.READY, kind: Kind = Kind.DEVICE, serial: int = 0, until: int = 0
    ) -> None:
        """Members say that they are there, and with what certificate."""
        for name in names:
            payload = codec.encode(Presence(life=life, session=1, serial=serial, until=until))
            self.inbound.receive(self.site.up(kind, name, Verb.STATE), payload)

    def open_round(self, round: int = 1, **changes: Any) -> tuple[Plan, Any]:
        """The coordinator's plan arrives; returns it and its hash."""
        plan, message = self.fleet.plan(round, **changes)
        self.inbound.receive(self.upstream.broadcast(Broadcast.PLAN), message.encode())
        return plan, message.head.hash

    def end_round(self, round: int, hash: bytes) -> None:
        """The coordinator says that the round is over."""
        self.inbound.receive(self.upstream.broadcast(Broadcast.PLAN), self.fleet.end(round, hash))

    def say(self, kind: Kind, name: str, verb: Verb, message: Any) -> None:
        """A member's signed message, in chunks."""
        for frame in split(message.id, message.encode()):
            self.inbound.receive(self.site.up(kind, name, verb), frame)

    def masked(self, device: str, plan: Plan, hash: Any, **arguments: Any) -> Any:
        """A masked update of a device of this site, sealed to the key in the last cosignature."""
        key = arguments.pop("gateway_key", None) or self.cosigns()[-1].seal_key
        site = arguments.pop("site", self.site.site)
        return self.fleet.split_update(device, plan, hash, gateway_key=key, site=site, **arguments)

    def update(self, device: str, message: Any) -> None:
        """A device's update."""
        self.say(Kind.DEVICE, device, Verb.UPDATE, message)

    def commit(self, message: Any) -> None:
        """The commit from above."""
        for frame in split(message.id, message.encode()):
            self.inbound.receive(self.upstream.down(Kind.GATEWAY, self.name, Verb.COMMIT), frame)

    def timer(self, milliseconds: int) -> None:
        """Time passes, and the machine is told."""
        self.fleet.now += milliseconds
        self.performer.feed(TimerFired())

    # --- What the gateway says -----------------------------------------------------------------------------------

    def receipts(self, name: str, kind: Kind = Kind.DEVICE) -> list[Receipt]:
        """Receipts sent to a member."""
        return [opened(raw, Receipt) for raw in self.below.on(self.site.down(kind, name, Verb.RECEIPT))]

    def cosigns(self) -> list[Cosign]:
        """Cosignatures published below, oldest first."""
        return [opened(raw, Cosign) for raw in self.below.on(self.site.broadcast(Broadcast.COSIGN))]

    def proposals(self) -> list[tuple[Head, Proposal]]:
        """Proposals sent up."""
        return [
            (head, codec.decode(Proposal, body, limit=len(body)))
            for head, body in messages(self.above.on(self.upstream.up(Kind.GATEWAY, self.name, Verb.PROPOSE)))
        ]

    def reveals(self) -> list[tuple[Head, Reveal]]:
        """Reveals of sums sent up."""
        return [(head, reveal) for head, reveal in self._reveals() if reveal.reason is None]

    def refusals(self) -> list[tuple[Head, Reveal]]:
        """Refusals sent up: reveals that say why there is no sum."""
        return [(head, reveal) for head, reveal in self._reveals() if reveal.reason is not None]

    def _reveals(self) -> list[tuple[Head, Reveal]]:
        return [
            (head, codec.decode(Reveal, body, limit=len(body)))
            for head, body in messages(self.above.on(self.upstream.up(Kind.GATEWAY, self.name, Verb.REVEAL)))
        ]

    def facts(self) -> tuple[Any, ...]:
        """All that a refused message must not change: the round, what is on disk, and the sum."""
        rnd = self.machine.round
        record = None if rnd is None else replace(rnd.record)
        total = self.performer._sum
        words = None if total is None else total._own._whole().tobytes() + total._below._whole().tobytes()
        rows = tuple(self.journal._reader.execute("SELECT message_id FROM updates").fetchall())
        state = None if rnd is None else (rnd.state, dict(rnd.record.accepted), dict(rnd.record.children))
        return (record is None, state, words, rows, self.journal.load().last_round)

    def total(self) -> Any:
        """The values of the plain sum as it stands."""
        return self.fleet.ring.layout.unpack(self.words())[0]

    def words(self) -> Any:
        """The words of the sum as it stands, masked or not."""
        total = self.performer._sum
        assert total is not None
        return np.copy(total._own._whole()) + total._below._whole()


def messages(frames: list[bytes]) -> list[tuple[Head, bytes]]:
    """Whole messages in single-chunk or many-chunk frames."""
    from fleetfed.shared.wire.chunks import Assembler

    found = []
    assembler = Assembler(lambda head: None)
    for frame in frames:
        complete = assembler.feed(frame)
        if complete is not None:
            head, body = complete
            found.append((head, open_body(head.header, body)))
    return found


def opened(raw: bytes, cls: Any) -> Any:
    """The body of a signed message."""
    head = parse_head(raw)
    body = open_body(head.header, raw[head.size :])
    return codec.decode(cls, body, limit=len(body))
