"""A split round on a real gateway and a real broker; the devices and the coordinator are scripts that sign for real."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.waiting import eventually

from fleetfed.gateway import cli
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.masking import Cosign
from fleetfed.shared.wire.messages import Proposal, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb
from tests.gateway.test_integration import Peer, Site, assemble, receipt_of, site_on

NORTH = SiteTopics("demo", "north")
COSIGN = NORTH.broadcast(Broadcast.COSIGN)
DEVICES = 3


@pytest.fixture
async def site(start_any_broker: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Site]:
    broker = start_any_broker(tls=False)
    async with site_on(broker.port, tmp_path) as made:
        yield made


async def _answered(site: Site, coordinator: Peer, **split: Any) -> tuple[Any, Any, list[Any], Any]:
    """Gateway and devices are there, the round is open, all have sent; returns plan, hash, updates and the proposal."""
    fleet = site.fleet
    names = [f"d-{number}" for number in range(DEVICES)]
    devices = [await site.device(name) for name in names]
    await site.publish_model(coordinator, 1)
    census = site.up.up(Kind.GATEWAY, "g-north", Verb.CENSUS)
    await eventually(lambda: coordinator.heard[census])
    plan, message = fleet.plan(1, split=fleet.split(**split))
    await coordinator.session.publish(site.up.broadcast(Broadcast.PLAN), message.encode(), retain=True)
    late = await site.peer("d-late", [COSIGN])
    await eventually(lambda: late.heard[COSIGN])
    verifier = fleet.identity("g-north", Role.GATEWAY, "north").verifier()
    cosign, _, certificate = verifier.open(late.last(COSIGN), Cosign, kind=MessageKind.COSIGN, now=fleet.now)
    assert (certificate.id, cosign.plan) == ("g-north", message.head.hash)
    updates = []
    for number, (name, peer) in enumerate(zip(names, devices, strict=True)):
        update = fleet.split_update(name, plan, message.head.hash, gateway_key=cosign.seal_key, number=number)
        updates.append(update)
        await site.send(peer, NORTH.up(Kind.DEVICE, name, Verb.UPDATE), update)
        topic = NORTH.down(Kind.DEVICE, name, Verb.RECEIPT)
        await eventually(lambda peer=peer, topic=topic: peer.heard[topic])
        assert receipt_of(peer, topic).reason is None
    proposed = site.up.up(Kind.GATEWAY, "g-north", Verb.PROPOSE)
    await eventually(lambda: coordinator.heard[proposed])
    head, body = assemble(coordinator.heard[proposed])
    assert len(codec.decode(Proposal, body, limit=len(body)).heads) == DEVICES
    return plan, message.head.hash, updates, head


async def test_a_split_round_whose_gateway_is_killed_before_the_commit(site: Site) -> None:
    fleet = site.fleet
    coordinator = await site.coordinator()
    task = await site.start(site.gateway("g-north", "north").run())
    _, hash, updates, head = await _answered(site, coordinator)
    task.cancel()
    await eventually(task.done)
    watcher = await site.peer("watcher", [COSIGN])
    again = site.gateway("g-north", "north")
    await site.start(again.run())
    await eventually(lambda: len(watcher.heard[COSIGN]) == 2)
    assert len(set(watcher.heard[COSIGN])) == 1, "the stored one, byte for byte"
    commit = fleet.commit(hash, head.hash, [update.id for update in updates[1:]], gateway="g-north")
    await site.send(coordinator, site.up.down(Kind.GATEWAY, "g-north", Verb.COMMIT), commit)
    revealed = site.up.up(Kind.GATEWAY, "g-north", Verb.REVEAL)
    await eventually(lambda: coordinator.heard[revealed])
    reveal_head, body = assemble(coordinator.heard[revealed])
    reveal = codec.decode(Reveal, body, limit=len(body))
    values, meta = fleet.unmask([update.head for update in updates[1:]], reveal.words)
    assert (int(meta[0]), reveal.count) == (2, 2)
    assert np.array_equal(values, fleet.values(1) + fleet.values(2))
    receipt = fleet.receipt(reveal_head)
    await coordinator.session.publish(site.up.down(Kind.GATEWAY, "g-north", Verb.RECEIPT), receipt)
    await coordinator.session.publish(site.up.broadcast(Broadcast.PLAN), fleet.end(1, hash), retain=True)
    path = site.directory / "g-north/state/status.json"
    await eventually(path.exists)
    status = json.loads(path.read_text())
    assert (status["mode"], status["aborted"]) == ("split", "")


async def test_a_refused_commit_shows_in_the_status(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = site.fleet
    coordinator = await site.coordinator()
    gateway = site.gateway("g-north", "north")
    task = await site.start(gateway.run())
    _, hash, updates, head = await _answered(site, coordinator, bucket=2)
    commit = fleet.commit(hash, head.hash, [updates[0].id], gateway="g-north")
    await site.send(coordinator, site.up.down(Kind.GATEWAY, "g-north", Verb.COMMIT), commit)
    await eventually(lambda: gateway.status().aborted)
    gateway.stop()
    await eventually(task.done)
    config = site.directory / "gateway.toml"
    config.write_text('identity = "i"\nstate = "g-north/state"\n[broker]\nhost = "127.0.0.1"\nport = 1\ntls = false\n')
    assert cli.main(["status", "--config", str(config)]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line)
    assert (lines["mode"], lines["aborted"].strip()) == ("split", "below_minimum")
    assert lines["rejected"].strip() == "below_minimum 1"
