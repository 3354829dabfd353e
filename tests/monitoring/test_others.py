"""The helper, the enrolment service and the embedded broker as Prometheus, systemd and containers see them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import ssl
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.brokers import Embedded
from fleetfed_testing.enrolment import Bench
from fleetfed_testing.scraping import Scrape, get, scrape
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import eventually

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.monitoring import BrokerView
from fleetfed.cloud_coordinator.enroll.config import BrokerFiles
from fleetfed.cloud_coordinator.enroll.monitoring import EnrolView
from fleetfed.cloud_coordinator.enroll.service import EnrolService
from fleetfed.cloud_coordinator.helper import cli
from fleetfed.cloud_coordinator.helper.config import load
from fleetfed.cloud_coordinator.helper.runtime import Helper
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RejectReason
from fleetfed.shared.monitoring.catalog import Role, of_role
from fleetfed.shared.monitoring.config import MonitoringConfig
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust import certificates


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where roles answer that were told to choose a port."""
    found: list[int] = []

    class Noted(MonitoringServer):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            found.append(self.port)

    for module in ("cloud_coordinator.helper.runtime", "cloud_coordinator.enroll.service", "broker.service"):
        monkeypatch.setattr(f"fleetfed.{module}.MonitoringServer", Noted)
    return found


def missing(seen: Scrape, role: Role) -> set[str]:
    return {name for name in of_role(role) if name not in seen.kinds and not name.startswith("fleetfed_trust_")}


async def test_a_helper(
    embedded_broker: Callable[..., Embedded], tmp_path: Path, ports: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    broker = embedded_broker(tls=False)
    path = tmp_path / "helper.toml"
    path.write_text(
        'identity = "identity"\nstate = "state"\n[monitoring]\nlisten = "127.0.0.1:0"\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\nreconnect_cap = 0.1\n'
    )

    async def healthy() -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, ["status", "--config", str(path), "--healthy"])
        return code, capsys.readouterr().out

    def obstacle() -> str:
        status = tmp_path / "state" / "status.json"
        return str(json.loads(status.read_text())["obstacle"]) if status.exists() else "not yet"

    assert (await healthy())[0] == 1
    helper = Helper(load(path), SignedFleet(now=unix_ms()).identity("h-main", certificates.Role.HELPER, "_"))
    running = asyncio.create_task(helper.run())
    await eventually(lambda: ports and not obstacle())
    assert await healthy() == (0, "")
    helper.counters.add("bad_box")
    seen = await asyncio.to_thread(scrape, ports[0])
    assert missing(seen, Role.HELPER) == set()
    assert seen.value("fleetfed_helper_keys") == 1
    assert seen.value("fleetfed_rejected_total", reason="bad_box", failure="poisoning") == 1
    assert seen.value("fleetfed_failures_total", failure="poisoning") == 1
    await asyncio.to_thread(broker.stop)
    await eventually(obstacle)
    assert await healthy() == (1, "not healthy: not connected to the broker\n")
    assert await asyncio.to_thread(get, ports[0], "/readyz") == (503, "not connected to the broker\n")
    helper.stop()
    await running


async def test_the_enrolment_service(tmp_path: Path, ports: list[int]) -> None:
    bench = Bench(tmp_path)
    settings = dataclasses.replace(
        bench.settings, broker=BrokerFiles(out=tmp_path / "broker"), monitoring=MonitoringConfig(listen="127.0.0.1:0")
    )
    bench.enroller.settings = settings
    bench.enrol("d-0")
    bench.enroller.refused[RejectReason.SPENT_TOKEN] += 2
    service = EnrolService(bench.enroller, settings)
    await service.start()
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        await eventually(lambda: ports)
        context = ssl.create_default_context(cafile=bench.ca)
        health = f"https://localhost:{service.http.port}/v1/health"
        with await asyncio.to_thread(urllib.request.urlopen, health, context=context) as answer:
            assert answer.status == 200
        seen = await asyncio.to_thread(scrape, ports[0])
        assert missing(seen, Role.ENROLLER) == set()
        assert seen.value("fleetfed_enrolments_total") == 1
        assert seen.value("fleetfed_rejected_total", reason="spent_token", failure="poisoning") == 2
        assert (seen.value("fleetfed_revocations_expiry_timestamp_seconds") or 0) > 1e9
        assert seen.labelled("fleetfed_certificate_expiry_timestamp_seconds", "certificate") == {"identity", "tls"}
        assert await asyncio.to_thread(get, ports[0], "/readyz") == (200, "ok\n")
    finally:
        stop.set()
        await running
        bench.enroller.close()


async def test_whose_port_is_taken_does_not_start(embedded_broker: Callable[..., Embedded], tmp_path: Path) -> None:
    broker = embedded_broker(tls=False)
    taken = f'[monitoring]\nlisten = "127.0.0.1:{broker.port}"\n'
    rest = f'{taken}[broker]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\n'
    fleet = SignedFleet(now=unix_ms())
    for name, role, site, module in (
        ("helper", certificates.Role.HELPER, "_", "fleetfed.cloud_coordinator.helper"),
        ("gateway", certificates.Role.GATEWAY, "north", "fleetfed.gateway"),
    ):
        fleet.identity(f"x-{name}", role, site).save(tmp_path / name)
        path = tmp_path / f"{name}.toml"
        path.write_text(f'identity = "{name}"\nstate = "state-{name}"\n{rest}')
        process = [sys.executable, "-m", module, "run", "--config", str(path)]
        made = await asyncio.create_subprocess_exec(*process, stderr=asyncio.subprocess.PIPE)
        _, errors = await made.communicate()
        assert made.returncode == 2
        assert f"cannot listen on 127.0.0.1:{broker.port}" in errors.decode()
    bench = Bench(tmp_path / "enrol")
    settings = dataclasses.replace(bench.settings, monitoring=MonitoringConfig(listen=f"127.0.0.1:{broker.port}"))
    service = EnrolService(bench.enroller, settings)
    await service.start()
    with pytest.raises(ConfigError, match="cannot listen on"):
        await service.run(asyncio.Event())
    bench.enroller.close()


def test_a_service_that_writes_no_lists_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    samples = Samples(Role.ENROLLER)
    EnrolView(EnrolService(bench.enroller, bench.settings)).look_slowly(samples)
    bench.enroller.close()
    assert samples.value("fleetfed_revocations_expiry_timestamp_seconds") == 0


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Session]:
    session = Session(ConnectionConfig(host="127.0.0.1", port=port, client_id="d-0"), subscriptions=["a/#"])
    task = asyncio.create_task(session.run())
    await session.wait_connected()
    try:
        yield session
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_the_embedded_broker(tmp_path: Path) -> None:
    config = BrokerConfig(persistence_dir=tmp_path / "state", sys_interval=0)
    broker = EmbeddedBroker(config)
    await broker.start()
    try:
        async with connected(broker.port) as session:
            await session.publish("a/b", b"x" * 100, retain=True)
            view = BrokerView(broker, config)
            seen = view.look()
            view.look_slowly(seen)
    finally:
        await broker.stop()
    assert seen.value("fleetfed_broker_clients") == 1
    assert seen.value("fleetfed_broker_subscriptions") == 1
    assert seen.value("fleetfed_broker_retained_messages") == 1
    assert (seen.value("fleetfed_broker_network_bytes_total", "received") or 0) > 100
    assert seen.value("fleetfed_broker_messages_total", "received") == 1
    assert seen.value("fleetfed_broker_events_total", "denied_publish", "poisoning") == 0
    assert view.ready() == ""
    shown = {metric.name for metric, _ in seen.metrics()}
    without_tls = {"fleetfed_certificate_expiry_timestamp_seconds"}
    assert {name for name in of_role(Role.BROKER) if not name.startswith("process_")} - shown == without_tls


async def test_the_brokers_program_answers_and_logs_json(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text('port = 0\n[monitoring]\nlisten = "127.0.0.1:0"\n')
    arguments = ["-m", "fleetfed.broker", "run", "--config", str(path), "--log-format", "json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        line = json.loads(await process.stderr.readline())
        assert (line["level"], line["role"]) == ("info", "broker")
        port = int(line["message"].rpartition("/metrics")[0].rpartition(":")[2])
        assert (await asyncio.to_thread(scrape, port)).value("fleetfed_broker_clients") == 0
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0
