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
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.gateway.config import GatewayConfig, LimitsConfig, UpstreamConfig
from fleetfed.gateway.runtime import Gateway
from fleetfed.shared.aggregate.accumulator import decode_words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import Census, Life, Need, Presence, Proposal, Receipt, Reveal
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

    def gateway(self, name: str, site: str, *, upstream: str = "_", upstream_port: int = 0) -> Gateway:
        identity = self.fleet.identity(name, Role.GATEWAY, site)
        other = Endpoint(host="127.0.0.1", port=upstream_port or self.port, tls=False, reconnect_cap=0.1)
        config = GatewayConfig(
            identity=self.directory / name / "identity",
            state=self.directory / name / "state",
            broker=Endpoint(host="127.0.0.1", port=self.port, tls=False, reconnect_cap=0.1),
            upstream=UpstreamConfig(site=upstream, broker=other),
            limits=LimitsConfig(settle=0.1),
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
    said = codec.decode(Presence, coordinator.last(state), limit=65536)
    own = gateway.certificate
    assert (said.life, said.serial, said.until) == (Life.READY, own.serial, own.not_after)
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


async def run_round(
    site: Site,
    coordinator: Peer,
    gateway: str,
    senders: dict[str, tuple[Peer, str]],
    *,
    tiers: int = 1,
    between: Callable[[], Any] | None = None,
) -> Any:
    """One whole round over whatever tree there is; returns the partial that reaches the coordinator."""
    fleet = site.fleet
    plan, message = fleet.plan(1, tiers=tiers)
    await coordinator.session.publish(site.up.broadcast(Broadcast.PLAN), message.encode(), retain=True)
    for number, (name, (peer, where)) in enumerate(senders.items()):
        topics = SiteTopics("demo", where)
        await eventually(lambda peer=peer, topics=topics: peer.heard[topics.broadcast(Broadcast.PLAN)])
        assert peer.last(topics.broadcast(Broadcast.PLAN)) == message.encode()
        update = fleet.update(name, plan, message.head.hash, number=number, site=where)
        await site.send(peer, topics.up(Kind.DEVICE, name, Verb.UPDATE), update)
    for name, (peer, where) in senders.items():
        topic = SiteTopics("demo", where).down(Kind.DEVICE, name, Verb.RECEIPT)
        await eventually(lambda peer=peer, topic=topic: peer.heard[topic])
        assert receipt_of(peer, topic).reason is None
    proposed = site.up.up(Kind.GATEWAY, gateway, Verb.PROPOSE)
    await eventually(lambda: coordinator.heard[proposed])
    if between is not None:
        await between()
    head, body = assemble(coordinator.heard[proposed])
    proposal = codec.decode(Proposal, body, limit=len(body))
    members = [parse_head(each).header.message_id for each in proposal.heads]
    commit = fleet.commit(message.head.hash, head.hash, members, gateway=gateway)
    await site.send(coordinator, site.up.down(Kind.GATEWAY, gateway, Verb.COMMIT), commit)
    revealed = site.up.up(Kind.GATEWAY, gateway, Verb.REVEAL)
    await eventually(lambda: coordinator.heard[revealed])
    head, body = assemble(coordinator.heard[revealed])
    reveal = codec.decode(Reveal, body, limit=len(body))
    await coordinator.session.publish(site.up.down(Kind.GATEWAY, gateway, Verb.RECEIPT), fleet.receipt(head))
    return decode_words(reveal.words, fleet.ring, count=reveal.count)


def ready_devices(coordinator: Peer, topic: str) -> int:
    return census(coordinator.last(topic)).ready if coordinator.heard[topic] else 0


async def test_two_gateways_of_one_site_both_say_so_until_one_stops(site: Site) -> None:
    first = site.gateway("g-north", "north")
    await site.start(first.run())
    await eventually(lambda: first.status().obstacle == "")
    second = site.gateway("g-other", "north")
    await site.start(second.run())
    for gateway, other in ((first, second), (second, first)):
        await eventually(lambda gateway=gateway: gateway.rivals.serials)
        serial = other.certificate.serial
        assert gateway.rivals.serials == (serial,)
        assert f"another gateway serves site north, too (certificate {serial};" in gateway.status().obstacle
    second.stop()
    await eventually(lambda: first.status().obstacle == "")


async def test_who_was_there_before_and_left_without_a_goodbye_is_no_rival(site: Site) -> None:
    before = codec.encode(Presence(life=Life.READY, session=7, since=1, serial=99))
    peer = await site.peer("g-before", [])
    await peer.session.publish(SiteTopics("demo", "north").broadcast(Broadcast.NODE), before, retain=True)
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())
    await eventually(lambda: gateway.status().obstacle == "")
    # Whatever the broker had kept has come by the time that something later has.
    await site.device("d-0")
    await eventually(lambda: list(gateway.machine.members.lives(Kind.DEVICE)))
    assert gateway.status().obstacle == ""


async def test_a_gateway_that_is_revoked_says_so(site: Site) -> None:
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())
    coordinator = await site.coordinator()
    listed = site.fleet.revocations(1, (gateway.certificate.serial,))
    await coordinator.session.publish(site.up.broadcast(Broadcast.REVOKED), listed, retain=True)
    await eventually(lambda: "own certificate was revoked" in gateway.status().obstacle)


async def test_two_tiers_give_the_sum_that_one_tier_gives(site: Site) -> None:
    fleet = site.fleet
    coordinator = await site.coordinator()
    await site.publish_model(coordinator, 1)
    upper = site.gateway("g-region", "region")
    lower = site.gateway("g-low", "low", upstream="region")
    await site.start(upper.run())
    await site.start(lower.run())
    senders = {
        "d-0": (await site.device("d-0", "region"), "region"),
        "d-1": (await site.device("d-1", "low"), "low"),
        "d-2": (await site.device("d-2", "low"), "low"),
    }
    topic = site.up.up(Kind.GATEWAY, "g-region", Verb.CENSUS)
    await eventually(lambda: ready_devices(coordinator, topic) == 3)
    assert census(coordinator.last(topic)).level == 1
    total = await run_round(site, coordinator, "g-region", senders, tiers=2)
    assert total.count == 3
    assert np.array_equal(total.values(), sum(fleet.values(number) for number in range(3)))
    assert lower.machine.round is not None
    await eventually(lambda: lower.machine.round is not None and lower.machine.round.state == "closed")


async def test_two_brokers_and_the_presence_of_a_gateway_that_dies(
    start_any_broker: Callable[..., Any], tmp_path: Path
) -> None:
    cloud, local = start_any_broker(tls=False), start_any_broker(tls=False)
    async with site_on(local.port, tmp_path) as north, site_on(cloud.port, tmp_path) as above:
        above.fleet = north.fleet
        coordinator = await above.coordinator()
        await above.publish_model(coordinator, 1)
        device = await north.device("d-0")
        node = SiteTopics("demo", "north").broadcast(Broadcast.NODE)
        watcher = await north.peer("watcher", [node])
        gateway = north.gateway("g-north", "north", upstream_port=cloud.port)
        running = await north.start(gateway.run())
        topic = above.up.up(Kind.GATEWAY, "g-north", Verb.CENSUS)
        await eventually(lambda: ready_devices(coordinator, topic) == 1)
        total = await run_round(above, coordinator, "g-north", {"d-0": (device, "north")})
        assert np.array_equal(total.values(), north.fleet.values(0))

        for side in (gateway._above, gateway._below):
            assert side._link is not None
            side._link._client._sock_close()
        running.cancel()
        state = above.up.up(Kind.GATEWAY, "g-north", Verb.STATE)
        await eventually(lambda: life(coordinator.last(state)) is Life.LOST)
        await eventually(lambda: life(watcher.last(node)) is Life.LOST)


def life(raw: bytes) -> Life:
    return codec.decode(Presence, raw, limit=65536).life


async def test_a_restart_in_mid_round_clears_orphans_and_finishes_the_round(site: Site) -> None:
    fleet, north = site.fleet, SiteTopics("demo", "north")
    coordinator = await site.coordinator()
    await site.publish_model(coordinator, 1)
    device = await site.device("d-0")
    first = site.gateway("g-north", "north")
    running = await site.start(first.run())
    topic = site.up.up(Kind.GATEWAY, "g-north", Verb.CENSUS)
    await eventually(lambda: ready_devices(coordinator, topic) == 1)
    orphan = bytes(range(16))

    async def restart() -> None:
        await first._below.publish(north.blob(orphan, 0), b"left over", retain=True)
        first.relay._published[orphan.hex()] = 1
        first.relay._save_published()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await site.start(site.gateway("g-north", "north").run())

    total = await run_round(site, coordinator, "g-north", {"d-0": (device, "north")}, between=restart)
    assert np.array_equal(total.values(), fleet.values(0))
    proposals = set(coordinator.heard[site.up.up(Kind.GATEWAY, "g-north", Verb.PROPOSE)])
    assert len(proposals) == 1, "the same bytes before and after"
    watcher = await site.peer("watcher", [])

    async def cleared() -> bool:
        await watcher.session.unsubscribe([north.blob(orphan, 0)])
        watcher.heard.clear()
        await watcher.session.subscribe([north.blob(orphan, 0)])
        await asyncio.sleep(0.05)
        return not watcher.heard[north.blob(orphan, 0)]

    async with asyncio.timeout(PATIENCE):
        while not await cleared():
            pass


async def test_it_serves_its_site_while_the_cloud_is_away_and_catches_up(
    start_any_broker: Callable[..., Any], tmp_path: Path
) -> None:
    cloud, local = start_any_broker(tls=False), start_any_broker(tls=False)
    async with site_on(local.port, tmp_path) as north, site_on(cloud.port, tmp_path) as above:
        fleet = above.fleet = north.fleet
        coordinator = await above.coordinator()
        await above.publish_model(coordinator, 1)
        device = await north.device("d-0")
        gateway = north.gateway("g-north", "north", upstream_port=cloud.port)
        await north.start(gateway.run())
        topics = SiteTopics("demo", "north")
        plan, message = fleet.plan(1)
        await coordinator.session.publish(above.up.broadcast(Broadcast.PLAN), message.encode(), retain=True)
        await eventually(lambda: device.heard[topics.broadcast(Broadcast.PLAN)])
        cloud.stop()
        await eventually(lambda: not gateway._above.connected)
        update = fleet.update("d-0", plan, message.head.hash)
        await north.send(device, topics.up(Kind.DEVICE, "d-0", Verb.UPDATE), update)
        receipts = topics.down(Kind.DEVICE, "d-0", Verb.RECEIPT)
        await eventually(lambda: device.heard[receipts])
        assert receipt_of(device, receipts).reason is None
        await eventually(lambda: gateway.machine.round is not None and gateway.machine.round.state == "proposed")
        cloud.start()
        await coordinator.session.wait_connected()
        birth = codec.encode(Presence(life=Life.READY, session=7, since=unix_ms()))
        await coordinator.session.publish(above.up.broadcast(Broadcast.NODE), birth, retain=True)
        await gateway._above.wait_connected()
        birth = codec.encode(Presence(life=Life.READY, session=8, since=unix_ms()))
        await coordinator.session.publish(above.up.broadcast(Broadcast.NODE), birth, retain=True)
        proposed = above.up.up(Kind.GATEWAY, "g-north", Verb.PROPOSE)
        await eventually(lambda: coordinator.heard[proposed])
        _, body = assemble(coordinator.heard[proposed])
        assert codec.decode(Proposal, body, limit=len(body)).heads == (update.head.encode(),)


async def test_a_coordinator_that_begins_to_listen_hears_again_what_was_retained(site: Site) -> None:
    """Not every broker hands that out to who listens with a wildcard: whoever is born live is told anew."""
    await site.device("d-0")
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())
    census, state = (site.up.up(Kind.GATEWAY, "g-north", verb) for verb in (Verb.CENSUS, Verb.STATE))
    witness = await site.peer("c-main", [census, state])
    await eventually(lambda: witness.heard[census] and witness.heard[state])
    before = len(witness.heard[census]), len(witness.heard[state])
    birth = codec.encode(Presence(life=Life.READY, session=7, since=unix_ms()))
    await witness.session.publish(site.up.broadcast(Broadcast.NODE), birth)
    await eventually(lambda: len(witness.heard[census]) > before[0] and len(witness.heard[state]) > before[1])
    assert codec.decode(Presence, witness.heard[state][-1], limit=500).life is Life.READY


async def test_a_chunk_that_the_broker_lost_is_published_again_on_need(site: Site) -> None:
    fleet, north = site.fleet, SiteTopics("demo", "north")
    coordinator = await site.coordinator()
    await site.publish_model(coordinator, 1)
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())
    manifest, _ = fleet.model(1)
    chunk = north.blob(manifest.full.digest, 1)
    watcher = await site.peer("watcher", [chunk])
    await eventually(lambda: watcher.heard[chunk])
    need = codec.encode(Need(digest=manifest.full.digest, missing=(1, 7000)))
    await watcher.session.publish(north.up(Kind.DEVICE, "watcher", Verb.NEED), need)
    await eventually(lambda: len(watcher.heard[chunk]) == 2)
    assert watcher.heard[chunk][0] == watcher.heard[chunk][1]


async def test_a_new_model_replaces_the_old_ones_chunks(site: Site) -> None:
    fleet, north = site.fleet, SiteTopics("demo", "north")
    coordinator = await site.coordinator()
    await site.publish_model(coordinator, 1)
    gateway = site.gateway("g-north", "north")
    await site.start(gateway.run())
    old, new = (fleet.model(version)[0].full.digest for version in (1, 2))
    topics = [north.blob(old, 0), north.blob(new, 0), north.broadcast(Broadcast.MODEL)]
    watcher = await site.peer("watcher", topics)
    await eventually(lambda: watcher.heard[topics[0]])
    await site.publish_model(coordinator, 2)
    await eventually(lambda: watcher.heard[topics[1]])
    await eventually(lambda: watcher.last(topics[0]) == b"")
    assert parse_head(watcher.last(topics[2])).header.kind is MessageKind.MANIFEST
    stale = fleet.manifest(1)
    await coordinator.session.publish(site.up.broadcast(Broadcast.MODEL), stale)
    await eventually(lambda: gateway.counters.snapshot() == {"replayed": 1})
    assert watcher.last(topics[2]) != stale
