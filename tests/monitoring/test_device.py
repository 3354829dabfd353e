"""What a device tells: when, what, through a real broker to its gateway's page, and to whoever asks for it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from fleetfed_testing.brokers import Embedded
from fleetfed_testing.lone_gateway import write_settings
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.device import cli, config
from fleetfed.device.ledger import Account
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.device.status import EVERY, StatusFile
from fleetfed.device.store import Store
from fleetfed.device.telemetry import HOUR, MINUTE, Teller
from fleetfed.device.trainer import Trainer
from fleetfed.gateway.config import GatewayConfig, LimitsConfig
from fleetfed.gateway.monitoring import GatewayView
from fleetfed.gateway.runtime import Gateway
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.monitoring.config import GatewayMonitoringConfig
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.telemetry import MAX_TELEMETRY, Telemetry

NOW = 1_700_000_000_000


def tell(teller: Teller, now: int = NOW, account: Account | None = None) -> Telemetry:
    return teller.tell(
        now,
        wire=ByteCount(10, 20),
        model_version=3,
        account=account or Account(),
        cpu=100,
        memory=50_000_000,
        peak=60_000_000,
    )


# --- When, and what ---------------------------------------------------------------------------------------------------


def test_at_rest_it_tells_once_an_hour_and_of_a_change_within_a_minute() -> None:
    teller = Teller(started=NOW)
    assert teller.next_deadline(NOW) == NOW
    tell(teller)
    assert teller.next_deadline(NOW) == NOW + HOUR
    teller.outcome("accepted")
    assert teller.next_deadline(NOW + 5) == NOW + MINUTE
    tell(teller, NOW + MINUTE)
    assert teller.next_deadline(NOW + MINUTE) == NOW + MINUTE + HOUR


def test_a_clock_that_was_put_back_does_not_silence_it() -> None:
    teller = Teller(started=NOW)
    tell(teller)
    assert teller.next_deadline(NOW - HOUR) == NOW - HOUR


def test_a_gateway_that_began_anew_is_told_at_once() -> None:
    teller = Teller(started=NOW)
    tell(teller)
    teller.again()
    assert teller.next_deadline(NOW + 1) == NOW + 1


def test_who_was_told_not_to_says_nothing() -> None:
    assert Teller(started=NOW, enabled=False).next_deadline(NOW) is None


def test_rounds_and_reasons_are_counted() -> None:
    teller = Teller(started=NOW)
    for outcome in ("accepted", "accepted", "declined:busy", "refused:late", "unanswered"):
        teller.outcome(outcome)
    teller.refused("bad_signature")
    teller.training(NOW)
    teller.trained(NOW + 1500)
    teller.trained(NOW + 9000)
    told = tell(teller)
    assert told.rounds == {"accepted": 2, "declined": 1, "refused": 1, "unanswered": 1}
    assert told.reasons == {"busy": 1, "late": 1}
    assert told.refused == {"bad_signature": 1}
    assert told.trained == 1500
    assert (told.sent, told.received, told.model_version) == (10, 20, 3)


def test_with_a_privacy_ledger_nothing_of_its_work_is_told() -> None:
    teller = Teller(started=NOW)
    teller.training(NOW)
    teller.trained(NOW + 1500)
    told = tell(teller, account=Account(participations=2, most=10))
    assert (told.cpu, told.memory, told.memory_peak, told.trained) == (0, 0, 0, 0)
    assert (told.participations, told.most) == (2, 10)


def test_the_longest_message_fits() -> None:
    teller = Teller(started=NOW)
    for number in range(100):
        teller.outcome(f"declined:a_reason_of_common_length_{number}")
        teller.refused(f"a_reason_of_common_length_{number}")
    encoded = codec.encode(tell(teller))
    assert len(encoded) <= MAX_TELEMETRY
    assert codec.decode(Telemetry, encoded, limit=MAX_TELEMETRY).rounds == {"declined": 100}
    assert len(codec.encode(tell(Teller(started=NOW)))) < 250


def test_the_status_is_touched_where_it_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("{}")
    status = StatusFile(path, device="d-0", software="test")
    os.utime(path, (0, 0))
    assert status.alive(NOW) == NOW + EVERY * 1000
    assert path.stat().st_mtime > 0
    os.utime(path, (0, 0))
    status.alive(NOW + 1000)
    assert path.stat().st_mtime == 0
    status.alive(NOW - 1000)
    assert path.stat().st_mtime > 0


# --- A device, a broker, a gateway ------------------------------------------------------------------------------------


class World:
    def __init__(self, broker: Embedded, directory: Path) -> None:
        self.broker = broker
        self.directory = directory
        fleet = SignedFleet(now=unix_ms())
        self.path = write_settings(
            directory,
            fleet.identity("d-0", Role.DEVICE, "north"),
            ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-0"),
            "",
        )
        self.endpoint = Endpoint(host="127.0.0.1", port=broker.port, tls=False, reconnect_cap=0.1)
        self.identity = fleet.identity("g-north", Role.GATEWAY, "north")

    async def start_gateway(self) -> None:
        settings = GatewayConfig(
            identity=self.directory / "gateway" / "identity",
            state=self.directory / "gateway" / "state",
            broker=self.endpoint,
            limits=LimitsConfig(settle=0.1),
            monitoring=GatewayMonitoringConfig(listen="127.0.0.1:0"),
        )
        self.gateway = Gateway(settings, self.identity)
        self._running = asyncio.create_task(self.gateway.run())
        await eventually(lambda: not self.gateway.obstacle())

    async def stop_gateway(self) -> None:
        self.gateway.stop()
        await self._running

    async def restart_gateway(self) -> None:
        await self.stop_gateway()
        await self.start_gateway()

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.directory / "state" / "status.json").read_text())
        return status

    @asynccontextmanager
    async def device(self) -> AsyncIterator[None]:
        settings = config.load(self.path)
        identity = cli._load(cli._parser().parse_args(["run", "--config", str(self.path)]))[1]
        # It has no plan to train for.
        runtime = DeviceRuntime(settings, identity, Store(settings.state), cast("Trainer", None), software="test")
        thread = threading.Thread(target=runtime.run, name="device")
        thread.start()
        try:
            yield
        finally:
            runtime.request_stop()
            await asyncio.to_thread(thread.join, PATIENCE)

    async def healthy(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, ["status", "--config", str(self.path), "--healthy"])
        return code, capsys.readouterr().out


@pytest.fixture
async def world(
    embedded_broker: Callable[..., Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = World(embedded_broker(tls=False), tmp_path)
    await made.start_gateway()
    yield made
    await made.stop_gateway()


async def test_a_devices_word_reaches_its_gateways_page(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    async with world.device():
        await eventually(lambda: len(world.gateway.tales))
        seen = GatewayView(world.gateway).look().complete()
        assert (seen.value("fleetfed_device_network_bytes_total", "d-0", "sent") or 0) > 0
        assert (seen.value("fleetfed_device_resident_memory_bytes", "d-0") or 0) > 1e7
        assert (seen.value("fleetfed_device_cpu_seconds_total", "d-0") or 0) > 0
        await eventually(lambda: seen_connected(world))
        await eventually(lambda: not world.status["obstacle"])
        assert await world.healthy(capsys) == (0, "")
        await world.restart_gateway()
        await eventually(lambda: len(world.gateway.tales))
        await asyncio.to_thread(world.broker.stop)
        await eventually(lambda: world.status["obstacle"])
        assert await world.healthy(capsys) == (1, "not healthy: not connected to the broker\n")
        await asyncio.to_thread(world.broker.start)
        await eventually(lambda: not world.status["obstacle"])
    code, why = await world.healthy(capsys)
    assert (code, why) == (1, "not healthy: not connected to the broker\n")


def seen_connected(world: World) -> bool:
    return GatewayView(world.gateway).look().complete().value("fleetfed_device_connected", "d-0") == 1


async def test_a_device_that_hangs_is_not_well(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.directory / "state" / "status.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"updated": unix_ms() - 500_000, "obstacle": ""}))
    assert await world.healthy(capsys) == (0, "")
    os.utime(path, (0, 0))
    code, why = await world.healthy(capsys)
    assert code == 1
    assert "the program does not run, or hangs" in why


def test_what_tells_costs_a_device_no_library() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, fleetfed.device.runtime; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "fleetfed.device.telemetry" in loaded
    assert not {"fleetfed.shared.monitoring", "http.server", "socketserver", "asyncio"} & set(loaded)
