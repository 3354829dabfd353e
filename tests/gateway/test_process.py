"""The program as an operator runs it: started, killed, started again, stopped."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.shared.aggregate.accumulator import decode_words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import open_body
from fleetfed.shared.wire.messages import Life, Presence, Proposal, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

NORTH, UP = SiteTopics("demo", "north"), SiteTopics("demo", "_")


class Everybody:
    """One session that hears all and speaks for all, so that the test is about the gateway."""

    def __init__(self, port: int) -> None:
        self.heard: dict[str, list[bytes]] = {}
        config = ConnectionConfig(host="127.0.0.1", port=port, client_id="everybody", reconnect_cap=0.1)
        filters = [f"{UP.root}/g/+/up/+", f"{NORTH.root}/d/+/dn/+", f"{NORTH.root}/b/+"]
        self.session = Session(config, subscriptions=filters, on_message=self._take)

    async def _take(self, topic: str, payload: bytes, retained: bool) -> None:
        self.heard.setdefault(topic, []).append(payload)

    async def say(self, topic: str, message: Any) -> None:
        for frame in split(message.id, message.encode()):
            await self.session.publish(topic, frame)

    async def hears(self, topic: str, count: int = 1) -> list[bytes]:
        await eventually(lambda: len(self.heard.get(topic, [])) >= count)
        return self.heard[topic]


def whole(frames: list[bytes]) -> list[Any]:
    assembler = Assembler(lambda head: None)
    return [complete for frame in frames if (complete := assembler.feed(frame)) is not None]


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetfed.gateway", "run", "--config", str(config), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def world(mosquitto_broker: Callable[..., Any], tmp_path: Path) -> AsyncIterator[tuple[Everybody, Path]]:
    broker = mosquitto_broker(tls=False)
    everybody = Everybody(broker.port)
    task = asyncio.create_task(everybody.session.run())
    await everybody.session.wait_connected()
    config = tmp_path / "gateway.toml"
    config.write_text(
        'identity = "identity"\nstate = "state"\n[limits]\nsettle = 0.1\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\n'
    )
    yield everybody, config
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.mosquitto
async def test_killed_in_mid_round_twice_it_ends_the_round_with_everything_it_promised(
    world: tuple[Everybody, Path],
) -> None:
    everybody, config = world
    fleet = SignedFleet(now=unix_ms())
    fleet.identity("g-north", Role.GATEWAY, "north").save(config.parent / "identity")
    manifest, objects = fleet.model(1)
    for item in objects:
        for index in range(len(item.ref.parts) // 16):
            await everybody.session.publish(UP.blob(item.ref.digest, index), item.chunk(index), retain=True)
    await everybody.session.publish(UP.broadcast(Broadcast.MODEL), fleet.manifest(1), retain=True)
    names = ("d-0", "d-1", "d-2")
    for name in names:
        birth = codec.encode(Presence(life=Life.READY, session=1))
        await everybody.session.publish(NORTH.up(Kind.DEVICE, name, Verb.STATE), birth, retain=True)
    plan, message = fleet.plan(1)
    await everybody.session.publish(UP.broadcast(Broadcast.PLAN), message.encode(), retain=True)
    updates = [fleet.update(name, plan, message.head.hash, number=number) for number, name in enumerate(names)]

    def receipts(name: str) -> str:
        return NORTH.down(Kind.DEVICE, name, Verb.RECEIPT)

    async with running(config) as first:
        await everybody.hears(NORTH.broadcast(Broadcast.PLAN))
        for name, update in zip(names[:2], updates, strict=False):
            await everybody.say(NORTH.up(Kind.DEVICE, name, Verb.UPDATE), update)
            await everybody.hears(receipts(name))
        first.send_signal(signal.SIGKILL)
        await first.wait()

    proposed = UP.up(Kind.GATEWAY, "g-north", Verb.PROPOSE)
    async with running(config) as second:
        await everybody.say(NORTH.up(Kind.DEVICE, "d-0", Verb.UPDATE), updates[0])
        await everybody.hears(receipts("d-0"), 2)
        assert len(set(everybody.heard[receipts("d-0")])) == 1
        await everybody.say(NORTH.up(Kind.DEVICE, "d-2", Verb.UPDATE), updates[2])
        await everybody.hears(proposed)
        second.send_signal(signal.SIGKILL)
        await second.wait()
    ((head, body),) = whole(everybody.heard[proposed][:1])
    proposal = codec.decode(Proposal, open_body(head.header, body), limit=1 << 20)
    assert sorted(proposal.heads) == sorted(update.head.encode() for update in updates)

    async with running(config) as third:
        await everybody.hears(proposed, 2)
        assert len(set(everybody.heard[proposed])) == 1
        commit = fleet.commit(message.head.hash, head.hash, [update.id for update in updates], gateway="g-north")
        await everybody.say(UP.down(Kind.GATEWAY, "g-north", Verb.COMMIT), commit)
        frames = await everybody.hears(UP.up(Kind.GATEWAY, "g-north", Verb.REVEAL))
        ((head, body),) = whole(frames[:1])
        reveal = codec.decode(Reveal, open_body(head.header, body), limit=1 << 20)
        total = decode_words(reveal.words, fleet.ring, count=3)
        assert np.array_equal(total.values(), sum(fleet.values(number) for number in range(3)))
        third.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(third.wait(), PATIENCE) == 0

    status = json.loads((config.parent / "state/status.json").read_text())
    assert status["role"] == "gateway"
    assert status["model_sha256"] == manifest.sha256.hex()
    assert status["wire"]["sent"] > 0
    assert status["shared_connection"] is True
    state = everybody.heard[UP.up(Kind.GATEWAY, "g-north", Verb.STATE)][-1]
    assert codec.decode(Presence, state, limit=65536).life is Life.DISCONNECTED
