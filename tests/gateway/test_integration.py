"""A real gateway on a real broker, with devices and a coordinator that are scripts and sign for real."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import eventually

from fleetfed.gateway.config import BrokerConfig, GatewayConfig, LimitsConfig, UpstreamConfig
from fleetfed.gateway.runtime import Gateway
from fleetfed.shared.aggregate.accumulator import decode_words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import Census, Life, Presence, Proposal, Receipt, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb


class Peer:
    """A scripted member or node: a session, and everything it heard."""

    def __init__(self, name: str, port: int, filters: list[str]) -> None:
        self.heard: dict[str, list[bytes]] = defaultdict(list)
        config = ConnectionConfig(host="127.0.0.1", port=port, client_id=name, reconnect_cap=0.1)
        self.session = Session(config, subscriptions=filters, on_message=self._on_message)

    async def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        self.heard[topic].append(payload)

    def last(self, topic: str) -> bytes:
        return self.heard[topic][-1]


def assemble(frames: list[bytes]) -> tuple[Head, bytes]:
    """The last whole message in chunks."""
    found: tuple[Head, bytes] | None = None
    assembler = Assembler(lambda head: None)
    for frame in frames:
        complete = assembler.feed(frame)
        if complete is not None:
            head, body = complete
            found = head, open_body(head.header, body)
    assert found is not None
    return found


class Site:
    """A broker, a fleet, and whoever runs on it."""

    def __init__(self, port: int, directory: Path, stack: AsyncExitStack) -> None:
        self.port = port
        self.directory = directory
        self.fleet = SignedFleet(now=unix_ms())
        self._stack = stack

    async def peer(self, name: str, filters: list[str]) -> Peer:
        peer = Peer(name, self.port, filters)
        await self.start(peer.session.run())
        await peer.session.wait_connected()
        return peer

    async def start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)
        return task

    def gateway(self, name: str, site: str, *, upstream: str = "_", settle: float = 0.0) -> Gateway:
        identity = self.fleet.identity(name, Role.GATEWAY, site)
        config = GatewayConfig(
            identity=self.directory / name / "identity",
            state=self.directory / name / "state",
            broker=BrokerConfig(host="127.0.0.1", port=self.port, tls=False, reconnect_cap=0.1),
            upstream=UpstreamConfig(site=upstream),
            limits=LimitsConfig(settle=settle),
        )
        return Gateway(config, identity)

    async def coordinator(self) -> Peer:
        topics = self.up
        filters = [topics.all_up(Kind.GATEWAY, verb) for verb in (Verb.STATE, Verb.CENSUS, Verb.PROPOSE, Verb.REVEAL)]
        return await self.peer("c-main", filters)

    async def device(self, name: str, site: str = "north") -> Peer:
        topics = SiteTopics("demo", site)
        filters = [topics.broadcast(Broadcast.PLAN), topics.broadcast(Broadcast.MODEL)]
        peer = await self.peer(name, [*filters, topics.all_down(Kind.DEVICE, name)])
        birth = codec.encode(Presence(life=Life.READY, session=1, since=unix_ms()))
        await peer.session.publish(topics.up(Kind.DEVICE, name, Verb.STATE), birth, retain=True)
        return peer

    @property
    def up(self) -> SiteTopics:
        return SiteTopics("demo", "_")

    async def publish_model(self, coordinator: Peer, version: int) -> None:
        _, objects = self.fleet.model(version)
        for item in objects:
            for index in range(len(item.ref.parts) // 16):
                await coordinator.session.publish(self.up.blob(item.ref.digest, index), item.chunk(index), retain=True)
        await coordinator.session.publish(self.up.broadcast(Broadcast.MODEL), self.fleet.manifest(version), retain=True)

    async def send(self, peer: Peer, topic: str, message: Any) -> None:
        for frame in split(message.id, message.encode()):
            await peer.session.publish(topic, frame)


@asynccontextmanager
async def site_on(port: int, directory: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(port, directory, stack)


@pytest.fixture
async def site(start_any_broker: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Site]:
    broker = start_any_broker(tls=False)
    async with site_on(broker.port, tmp_path) as made:
        yield made


def receipt_of(peer: Peer, topic: str) -> Receipt:
    raw = peer.last(topic)
    head = parse_head(raw)
    return codec.decode(Receipt, open_body(head.header, raw[head.size :]), limit=65536)


async def test_a_round_from_the_manifest_to_the_receipt(site: Site) -> None:
    fleet, north = site.fleet, SiteTopics("demo", "north")
    coordinator = await site.coordinator()
    devices = [await site.device(f"d-{number}") for number in range(3)]
    await site.publish_model(coordinator, 1)
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())

    state = site.up.up(Kind.GATEWAY, "g-north", Verb.STATE)
    await eventually(lambda: coordinator.heard[state])
    assert codec.decode(Presence, coordinator.last(state), limit=65536).life is Life.READY
    await eventually(lambda: all(device.heard[north.broadcast(Broadcast.MODEL)] for device in devices))
    census_topic = site.up.up(Kind.GATEWAY, "g-north", Verb.CENSUS)
    await eventually(
        lambda: (
            coordinator.heard[census_topic]
            and parse_head(coordinator.last(census_topic)).header.kind is MessageKind.CENSUS
            and census(coordinator.last(census_topic)).ready == 3
        )
    )

    plan, message = fleet.plan(1)
    await coordinator.session.publish(site.up.broadcast(Broadcast.PLAN), message.encode(), retain=True)
    await eventually(lambda: all(device.heard[north.broadcast(Broadcast.PLAN)] for device in devices))
    assert devices[0].last(north.broadcast(Broadcast.PLAN)) == message.encode()

    updates = []
    for number, device in enumerate(devices):
        update = fleet.update(f"d-{number}", plan, message.head.hash, number=number)
        updates.append(update)
        await site.send(device, north.up(Kind.DEVICE, f"d-{number}", Verb.UPDATE), update)
    for number, device in enumerate(devices):
        topic = north.down(Kind.DEVICE, f"d-{number}", Verb.RECEIPT)
        await eventually(lambda device=device, topic=topic: device.heard[topic])
        assert receipt_of(device, topic).reason is None

    proposed = site.up.up(Kind.GATEWAY, "g-north", Verb.PROPOSE)
    await eventually(lambda: coordinator.heard[proposed])
    head, body = assemble(coordinator.heard[proposed])
    proposal = codec.decode(Proposal, body, limit=len(body))
    assert sorted(proposal.heads) == sorted(update.head.encode() for update in updates)

    kept = [update.id for update in updates[:2]]
    commit = fleet.commit(message.head.hash, head.hash, kept, gateway="g-north")
    await site.send(coordinator, site.up.down(Kind.GATEWAY, "g-north", Verb.COMMIT), commit)
    revealed = site.up.up(Kind.GATEWAY, "g-north", Verb.REVEAL)
    await eventually(lambda: coordinator.heard[revealed])
    head, body = assemble(coordinator.heard[revealed])
    reveal = codec.decode(Reveal, body, limit=len(body))
    assert reveal.count == 2
    assert reveal.commit == commit.head.hash
    total = decode_words(reveal.words, fleet.ring, count=2)
    assert np.array_equal(total.values(), fleet.values(0) + fleet.values(1))

    receipt = fleet.receipt(head)
    await coordinator.session.publish(site.up.down(Kind.GATEWAY, "g-north", Verb.RECEIPT), receipt)
    end = fleet.end(1, message.head.hash)
    await coordinator.session.publish(site.up.broadcast(Broadcast.PLAN), end, retain=True)
    await eventually(lambda: devices[0].last(north.broadcast(Broadcast.PLAN)) == end)
    await eventually(lambda: (site.directory / "g-north/state/status.json").exists())
    gateway.stop()
    await eventually(lambda: codec.decode(Presence, coordinator.last(state), limit=65536).life is Life.DISCONNECTED)


def census(raw: bytes) -> Census:
    head = parse_head(raw)
    body = open_body(head.header, raw[head.size :])
    return codec.decode(Census, body, limit=len(body))
