"""Simulated devices for `bench/load.py`, some hundreds in one process.

Each has its own identity, MQTT session over TLS, keys and values. What it is told it verifies, and what it says it
signs, with the functions that a device uses; it fetches no model, trains nothing and keeps nothing on disk. Its update
is random on the plan's grid.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from load_client import KEEPALIVE, Line, cpu_seconds

from fleetfed.broker.packets import Will
from fleetfed.device import update as updates
from fleetfed.device.events import CosignArrived, PlanArrived, ReceiptArrived
from fleetfed.device.inbound import Inbound
from fleetfed.device.state import FIRST_RESEND, LONGEST_RESEND
from fleetfed.device.update import Prepared, Seals
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.version import software
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.messages import Life, Mode, Presence
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

# In the order in which a device does it, so that a plan meets its cosignature.
HEARD = (Broadcast.REVOKED, Broadcast.TRUST, Broadcast.NODE, Broadcast.MODEL, Broadcast.COSIGN, Broadcast.PLAN)
_AT_ONCE = 16
"""Sessions that a process opens at a time."""


@dataclass(frozen=True)
class Crew:
    """What one process simulates.

    Attributes:
        members: id and weight of each device.
        identities: folder of all identity folders.
        sizes: values of each tensor of the model.
        state: a folder for the trust that all of them share.
    """

    fleet: str
    site: str
    members: tuple[tuple[str, int], ...]
    identities: Path
    sizes: tuple[int, ...]
    state: Path


@dataclass
class Sending:
    """One device's update on its way."""

    frames: list[bytes]
    message_id: bytes
    head: bytes
    sent: float = 0.0
    answered: float = 0.0
    resend_at: float = 0.0
    resend_after: float = FIRST_RESEND / 1000
    resent: int = 0
    refused: list[str] = field(default_factory=list)


class SimulatedDevice:
    """See the module."""

    def __init__(self, crew: Crew, name: str, weight: int, verifier: Verifier, take_trust: Callable[[bytes], None]):
        self.id, self.weight, self.sizes = name, weight, crew.sizes
        self.folder = crew.identities / name
        identity = Identity.load(self.folder)
        self._signer = identity.signer(sequence=itertools.count(1).__next__, randomness=secrets.token_bytes)
        self._inbound = Inbound(verifier, identity.certificate, keep_revocations=lambda _: None, take_trust=take_trust)
        self._topics = SiteTopics(crew.fleet, crew.site)
        self._rng = np.random.default_rng(secrets.randbits(64))
        self._hedge = secrets.token_bytes(32)
        self._cosigns: dict[bytes, bytes] = {}
        self.plan: PlanArrived | None = None
        self.sending: Sending | None = None
        self.signed = b""
        self.line: Line
        self.settled: Callable[[], None] = lambda: None
        self._receipt_topic = self._topics.down(Kind.DEVICE, self.id, Verb.RECEIPT)
        self._receipts: list[tuple[float, bytes]] = []

    @property
    def topic(self) -> str:
        return self._topics.up(Kind.DEVICE, self.id, Verb.UPDATE)

    async def connect(self, port: int, *, silent: bool) -> Line:
        """A session like a device's; a silent one, on the broker that is measured alone, only sends."""
        if silent:
            line = Line(self.id, [self._topics.all_down(Kind.DEVICE, self.id)], lambda *_: self.settled())
            await line.connect(port, self.folder)
            return line
        state = self._topics.up(Kind.DEVICE, self.id, Verb.STATE)
        session = secrets.randbits(62)

        def presence(life: Life, since: int) -> bytes:
            return codec.encode(Presence(life=life, session=session, since=since, software=software("device")))

        filters = [*map(self._topics.broadcast, HEARD), self._topics.all_down(Kind.DEVICE, self.id)]
        will = Will(topic=state, payload=presence(Life.LOST, 0), qos=1, retain=True)
        self.line = line = Line(self.id, filters, self.hear, will=will)
        await line.connect(port, self.folder)
        line.publish(state, presence(Life.READY, unix_ms()), retain=True)
        return line

    def hear(self, topic: str, payload: memoryview) -> None:
        if topic == self._receipt_topic:
            self._receipts.append((time.monotonic(), bytes(payload)))
            self.settled()
            return
        match self._inbound.event(topic, bytes(payload), unix_ms()):
            case PlanArrived() as event:
                assert event.verdict.reason is None, event.verdict
                self.plan = event
            case CosignArrived() as event:
                self._cosigns = {event.plan: event.seal_key}

    def read_receipts(self) -> bool:
        """Verify what came; whether the update was accepted.

        Not on arrival: a fleet's devices have processors of their own, and these here share the gateway's.
        """
        receipts, self._receipts = self._receipts, []
        for at, payload in receipts:
            match self._inbound.event(self._receipt_topic, payload, unix_ms()):
                case ReceiptArrived() as event:
                    self._receipt(event, at)
        return self.sending is not None and bool(self.sending.answered)

    def _receipt(self, event: ReceiptArrived, at: float) -> None:
        sending, receipt = self.sending, event.receipt
        if sending is None or receipt.message_id != sending.message_id or sending.answered:
            return
        assert receipt.head == sending.head, f"{self.id}: a receipt for another message"
        if receipt.reason is RejectReason.OVERLOADED:
            sending.refused.append(str(receipt.reason))
            self._put_off(sending)
            return
        assert receipt.reason is None, f"{self.id}: {receipt.reason} {receipt.detail}"
        sending.answered = at

    @property
    def can_sign(self) -> bool:
        plan = self.plan
        if plan is None or self.signed == plan.plan_hash:
            return False
        return plan.plan.mode is Mode.PLAIN or plan.plan_hash in self._cosigns

    def sign(self) -> int:
        """Answer the plan at hand; return the bytes of the signed body."""
        assert self.plan is not None
        plan, plan_hash = self.plan.plan, self.plan.plan_hash
        scheme = scheme_of(plan, self.sizes)
        ring, limit = scheme.ring, scheme.grid.limit
        values = self._rng.integers(-limit, limit + 1, size=scheme.grid.dimension, dtype=np.int8)
        tensors = len(self.sizes)
        meta = ring.meta.encode(
            Contribution(
                weight=self.weight,
                examples=self.weight,
                training_loss=1.0,
                clipped=(0,) * tensors,
                log2_rms=(-4.0,) * tensors,
            )
        )
        seals = None
        body, words = b"", None
        if plan.split is None:
            body = encode_body(values, meta, limit=limit)
        else:
            words = ring.layout.pack(values, meta)
            seals = Seals(gateway=self._cosigns[plan_hash], coordinator=plan.split.seal_key, hedge=self._hedge)
        prepared = Prepared(
            body=body,
            words=words,
            dimension=scheme.grid.dimension,
            meta_words=ring.meta.words,
            residual=None,
            weight=self.weight,
            clipped=0.0,
        )
        message = updates.sign(prepared, plan, plan_hash, signer=self._signer, now=unix_ms(), seals=seals)
        frames = split(message.id, message.encode())
        self.sending = Sending(frames, message.id, message.head.hash)
        self.signed = plan_hash
        return len(message.body)

    def send(self) -> None:
        sending = self.sending
        assert sending is not None
        now = time.monotonic()
        sending.sent = sending.sent or now
        self._put_off(sending)
        for each in sending.frames:
            self.line.publish(self.topic, each)

    def _put_off(self, sending: Sending) -> None:
        sending.resend_at = time.monotonic() + sending.resend_after
        sending.resend_after = min(2 * sending.resend_after, LONGEST_RESEND / 1000)

    def check(self, now: float) -> None:
        """Send again what has no receipt, when a device would."""
        sending = self.sending
        if sending is not None and sending.sent and now >= sending.resend_at and not self.read_receipts():
            sending.resent += 1
            self.send()


class Workers:
    """All devices of one process, and what the main process asks of them."""

    def __init__(self, crew: Crew, pipe: Connection) -> None:
        self._pipe = pipe
        # What is verified is verified by each device; whom to believe is the same for all of them.
        identity = Identity.load(crew.identities / crew.members[0][0])
        verifier = identity.verifier()
        crew.state.mkdir(parents=True)
        keeper = TrustKeeper(crew.state / "trust.bin", identity, verifier)
        last = b""

        def take(data: bytes) -> None:
            nonlocal last
            if data != last:
                last = data
                keeper.take(data, now=unix_ms())

        self.devices = [SimulatedDevice(crew, name, weight, verifier, take) for name, weight in crew.members]
        self._lines: list[Line] = []
        self._silent: list[Line] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        pinging = loop.create_task(self._ping())
        while (command := await loop.run_in_executor(None, self._pipe.recv)) is not None:
            name, *arguments = command
            self._pipe.send(await getattr(self, name)(*arguments))
        pinging.cancel()
        for line in (*self._lines, *self._silent):
            line.close()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE / 2)
            for line in (*self._lines, *self._silent):
                line.ping()

    async def connect(self, port: int, silent: bool) -> float:
        """Open all sessions; seconds that it took, handshakes included."""
        began, room = time.monotonic(), asyncio.Semaphore(_AT_ONCE)

        async def one(device: SimulatedDevice) -> Line:
            async with room:
                return await device.connect(port, silent=silent)

        lines = await asyncio.gather(*map(one, self.devices))
        if silent:
            self._silent = lines
        else:
            self._lines = lines
        return time.monotonic() - began

    async def prepare(self) -> dict[str, Any]:
        """Wait for the next plan and sign an answer of each device to it."""
        began, size, left = time.monotonic(), 0, list(self.devices)
        while left:
            await asyncio.sleep(0.02)
            for device in [each for each in left if each.can_sign]:
                size += device.sign()
                left.remove(device)
                await asyncio.sleep(0)
        plan = self.devices[0].plan
        assert plan is not None
        frames = sum(len(each.sending.frames) for each in self.devices if each.sending)
        return {"round": plan.plan.round, "bytes": size, "frames": frames, "seconds": time.monotonic() - began}

    async def ours(self, start: float) -> dict[str, Any]:
        """Send all updates and wait for all receipts."""
        done, came = asyncio.Event(), 0

        def settled() -> None:
            nonlocal came
            came += 1
            if came >= len(self.devices):
                done.set()

        for device in self.devices:
            device.settled = settled
        await _until(start)
        cpu = cpu_seconds(os.getpid())
        for device in self.devices:
            device.send()
        while True:
            try:
                await asyncio.wait_for(done.wait(), 0.5)
            except TimeoutError:
                now = time.monotonic()
                for device in self.devices:
                    device.check(now)
            else:
                cpu = cpu_seconds(os.getpid()) - cpu
                # Some came twice, or said that the gateway had no room: those are waited for.
                came = sum([device.read_receipts() for device in self.devices])
                if came == len(self.devices):
                    break
                cpu = cpu_seconds(os.getpid()) - cpu
                done.clear()
        sent = [each.sending for each in self.devices if each.sending]
        return {
            "cpu": cpu,
            "first": min(each.sent for each in sent),
            "last": max(each.answered for each in sent),
            "delays": [each.answered - each.sent for each in sent],
            "resent": sum(each.resent for each in sent),
            "overloaded": sum(len(each.refused) for each in sent),
            "ids": [each.message_id for each in sent],
        }

    async def alone(self, start: float) -> dict[str, Any]:
        """Publish the very same frames to the other broker and wait for its confirmations."""
        wanted = []
        await _until(start)
        cpu, first = cpu_seconds(os.getpid()), time.monotonic()
        for device, line in zip(self.devices, self._silent, strict=True):
            assert device.sending is not None
            wanted.append(line.acknowledged + len(device.sending.frames))
            for each in device.sending.frames:
                line.publish(device.topic, each)
        for line, count in zip(self._silent, wanted, strict=True):
            await line.confirmed(count)
        assert not any(line.refused for line in self._silent)
        return {"cpu": cpu_seconds(os.getpid()) - cpu, "first": first}

    async def answered(self, start: float) -> dict[str, Any]:
        """The same, to a peer that answers each; wait for the answers."""
        done, came, last = asyncio.Event(), 0, 0.0

        def settled() -> None:
            nonlocal came, last
            came += 1
            if came == len(self.devices):
                last = time.monotonic()
                done.set()

        for device in self.devices:
            device.settled = settled
        before = cpu_seconds(os.getpid())
        found = await self.alone(start)
        await done.wait()
        return found | {"cpu": cpu_seconds(os.getpid()) - before, "last": last}


async def _until(start: float) -> None:
    await asyncio.sleep(max(0.0, start - time.monotonic()))


def simulate(crew: Crew, pipe: Connection) -> None:
    """The process of a crew."""

    async def main() -> None:
        await Workers(crew, pipe).run()

    asyncio.run(main())
