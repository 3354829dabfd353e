"""A gateway as Prometheus, systemd and containers see it: on a real broker, with devices that are scripts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.brokers import Embedded
from fleetfed_testing.scraping import Scrape, get, scrape
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import eventually

from fleetfed.gateway import cli
from fleetfed.gateway.config import load
from fleetfed.gateway.monitoring import GatewayView
from fleetfed.gateway.runtime import Gateway
from fleetfed.gateway.telemetry import Tales
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.monitoring import catalog
from fleetfed.shared.monitoring.catalog import of_role
from fleetfed.shared.monitoring.failures import MODES
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.telemetry import JsonFormatter
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Life, Presence
from fleetfed.shared.wire.telemetry import Telemetry
from fleetfed.shared.wire.topics import CLOUD_SITE, Broadcast, Kind, SiteTopics, Verb

NORTH = SiteTopics("demo", "north")


class World:
    """A broker, a gateway that is scraped, and somebody who speaks for the site's devices."""

    def __init__(self, broker: Embedded, directory: Path) -> None:
        self.broker = broker
        self.path = directory / "gateway.toml"
        self.path.write_text(
            'identity = "identity"\nstate = "state"\n[limits]\nsettle = 0.1\n[monitoring]\nlisten = "127.0.0.1:0"\n'
            f'devices = 2\n[broker]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\nreconnect_cap = 0.1\n'
        )
        self.fleet = SignedFleet(now=unix_ms())
        identity = self.fleet.identity("g-north", Role.GATEWAY, "north")
        self.gateway = Gateway(load(self.path), identity)
        self.devices = Session(
            ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="devices", reconnect_cap=0.1)
        )
        self.port = 0

    async def presence(self, device: str, life: Life, *, serial: int = 0) -> None:
        payload = codec.encode(Presence(life=life, session=1, since=unix_ms(), serial=serial))
        await self.devices.publish(NORTH.up(Kind.DEVICE, device, Verb.STATE), payload, retain=True)

    async def tell(self, device: str, payload: bytes) -> None:
        await self.devices.publish(NORTH.up(Kind.DEVICE, device, Verb.TELEMETRY), payload, qos=0)

    async def scrape(self) -> Scrape:
        return await asyncio.to_thread(scrape, self.port)

    async def healthy(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, ["status", "--config", str(self.path), "--healthy"])
        return code, capsys.readouterr().out


@pytest.fixture
async def world(
    embedded_broker: Callable[..., Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    made = World(embedded_broker(tls=False), tmp_path)
    ports: list[int] = []

    class Noted(MonitoringServer):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            ports.append(self.port)

    monkeypatch.setattr("fleetfed.gateway.runtime.MonitoringServer", Noted)
    tasks = [asyncio.create_task(made.gateway.run()), asyncio.create_task(made.devices.run())]
    await eventually(lambda: ports)
    made.port = ports[0]
    await eventually(lambda: not made.gateway.obstacle())
    await made.devices.wait_connected()
    yield made
    made.gateway.stop()
    await tasks[0]
    tasks[1].cancel()
    with suppress(asyncio.CancelledError):
        await tasks[1]


async def test_what_devices_tell_is_on_the_gateways_page(world: World) -> None:
    told = Telemetry(
        started=1_700_000_000_000,
        sent=1000,
        received=2000,
        cpu=1500,
        memory=60_000_000,
        memory_peak=70_000_000,
        trained=250,
        rounds={"accepted": 3, "declined": 1, "made_up": 7},
        reasons={"busy": 1},
        refused={"bad_signature": 2},
        participations=4,
        most=10,
    )
    for device in ("d-0", "d-1", "d-2", "d-3"):
        await world.presence(device, Life.READY)
        await world.tell(device, codec.encode(told))
    await eventually(lambda: len(world.gateway.tales) == 4)
    seen = await world.scrape()
    assert seen.value("fleetfed_device_network_bytes_total", device="d-0", direction="sent") == 1000
    assert seen.value("fleetfed_device_network_bytes_total", device="d-0", direction="received") == 2000
    assert seen.value("fleetfed_device_cpu_seconds_total", device="d-0") == 1.5
    assert seen.value("fleetfed_device_training_seconds_total", device="d-0") == 0.25
    assert seen.value("fleetfed_device_resident_memory_bytes", device="d-0") == 60_000_000
    assert seen.value("fleetfed_device_rounds_total", device="d-0", outcome="accepted") == 3
    assert seen.value("fleetfed_device_rounds_total", device="d-0", outcome="other") == 7
    assert seen.value("fleetfed_device_reasons_total", device="d-0", reason="busy", failure="overload") == 1
    assert seen.value("fleetfed_device_reasons_total", device="d-0", reason="bad_signature", failure="poisoning") == 2
    assert seen.value("fleetfed_device_participations_left", device="d-0") == 6
    assert seen.value("fleetfed_device_connected", device="d-0") == 1
    shown = {name for name in of_role(catalog.Role.GATEWAY) if name.startswith("fleetfed_device_")}
    assert shown <= seen.kinds.keys()
    # Two have series of their own; the counters of the others are one.
    assert seen.value("fleetfed_device_network_bytes_total", device="other", direction="sent") == 2000
    assert seen.labelled("fleetfed_device_resident_memory_bytes", "device") == {"d-0", "d-1"}
    assert seen.labelled("fleetfed_device_connected", "device") == {"d-0", "d-1"}
    assert seen.value("fleetfed_devices_telling") == 4
    assert seen.value("fleetfed_devices_unlisted") == 2
    assert seen.value("fleetfed_site_devices", life="ready") == 4
    assert seen.value("fleetfed_site_rivals") == 0


async def test_lost_devices_and_nonsense_are_counted(world: World) -> None:
    await world.presence("d-0", Life.READY)
    await world.presence("d-0", Life.LOST)
    await world.tell("d-0", b"\xc1")
    await eventually(lambda: world.gateway.counters.snapshot())
    seen = await world.scrape()
    assert seen.value("fleetfed_dropouts_total") == 1
    assert seen.value("fleetfed_failures_total", failure="dropout") == 1
    assert seen.value("fleetfed_rejected_total", reason="malformed", failure="corruption") == 1
    assert seen.value("fleetfed_failures_total", failure="corruption") == 1
    assert seen.labelled("fleetfed_failures_total", "failure") == {str(mode) for mode in MODES}


async def test_of_a_revoked_device_nothing_is_shown(world: World) -> None:
    for serial, device in enumerate(("d-0", "d-1"), 7):
        await world.presence(device, Life.READY, serial=serial)
        await world.tell(device, codec.encode(Telemetry(started=1)))
    await eventually(lambda: len(world.gateway.tales) == 2)
    revoked = SiteTopics("demo", CLOUD_SITE).broadcast(Broadcast.REVOKED)
    await world.devices.publish(revoked, world.fleet.revocations(1, (7,)), retain=True)
    await eventually(lambda: len(world.gateway.tales) == 1)
    seen = await world.scrape()
    assert seen.labelled("fleetfed_device_connected", "device") == {"d-1"}
    assert seen.value("fleetfed_site_devices", life="ready") == 1
    assert seen.value("fleetfed_dropouts_total") == 0


async def test_a_refusal_is_logged_with_whose_message_it_was(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await world.tell("d-0", b"\xc1")
    await eventually(lambda: world.gateway.counters.snapshot())
    formatter = JsonFormatter("gateway")
    formatter.id, formatter.site = "g-north", "north"
    (line,) = (json.loads(formatter.format(each)) for each in caplog.records if "refused" in each.getMessage())
    assert (line["device"], line["reason"], line["id"], line["site"]) == ("d-0", "malformed", "g-north", "north")
    assert "gateway" not in line
    assert "round" not in line


async def test_everything_that_a_gateway_always_knows_is_there(world: World) -> None:
    seen = await world.scrape()
    # Of a gateway without devices, trust metadata and TLS, that has refused nothing.
    missing = {
        name
        for name in of_role(GatewayView(world.gateway).look().role)
        if name not in seen.kinds and not name.startswith(("fleetfed_device_", "fleetfed_trust_"))
    }
    assert missing == {"fleetfed_rejected_total"}
    assert seen.value("fleetfed_ready") == 1
    assert seen.value("fleetfed_connected", side="site") == 1
    assert (seen.value("fleetfed_network_bytes_total", side="site", direction="sent") or 0) > 0
    assert (seen.value("fleetfed_storage_bytes", store="database") or 0) > 0
    assert seen.value("fleetfed_journal_bytes") == 0
    # Prometheus sees no increase from nothing to one.
    assert seen.value("fleetfed_commits_refused_total", reason="below_owners", failure="privacy") == 0


async def test_it_is_well_while_it_is_connected(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    status = world.path.parent / "state" / "status.json"
    await eventually(lambda: status.exists() and not json.loads(status.read_text())["obstacle"])
    assert await world.healthy(capsys) == (0, "")
    await asyncio.to_thread(world.broker.stop)
    await eventually(lambda: json.loads(status.read_text())["obstacle"])
    why = "not connected to the site's broker"
    assert await world.healthy(capsys) == (1, f"not healthy: {why}\n")
    assert await asyncio.to_thread(get, world.port, "/readyz") == (503, f"{why}\n")
    assert (await asyncio.to_thread(get, world.port, "/healthz"))[0] == 200
    await asyncio.to_thread(world.broker.start)
    await eventually(lambda: not json.loads(status.read_text())["obstacle"])
    assert await world.healthy(capsys) == (0, "")


def test_who_never_ran_is_not_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gateway.toml").write_text('identity = "i"\nstate = "s"\n[broker]\nhost = "127.0.0.1"\ntls = false\n')
    assert cli.main(["status", "--config", str(tmp_path / "gateway.toml"), "--healthy"]) == 1
    assert "written when the gateway starts" in capsys.readouterr().out


def test_no_more_devices_are_remembered_than_a_site_may_have() -> None:
    tales = Tales(limit=1)
    tales.take("d-0", codec.encode(Telemetry(sent=1)), now=1)
    tales.take("d-0", codec.encode(Telemetry(sent=2)), now=2)
    with pytest.raises(RemoteProtocolError) as refused:
        tales.take("d-1", codec.encode(Telemetry()), now=3)
    assert refused.value.reason is RejectReason.OVERLOADED
    tales.forget("d-0")
    tales.take("d-1", codec.encode(Telemetry()), now=4)
    with pytest.raises(RemoteProtocolError) as refused:
        tales.take("d-1", b"\x00" * 5000, now=5)
    assert refused.value.reason is RejectReason.TOO_LARGE
