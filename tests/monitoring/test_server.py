"""The port that Prometheus, containers and load balancers ask."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fleetfed_testing.scraping import get, parsed

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.monitoring.catalog import Role
from fleetfed.shared.monitoring.config import MonitoringConfig, address
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.monitoring.server import MonitoringServer


class Somebody:
    """A role to look at."""

    def __init__(self) -> None:
        self.reason = ""
        self.slow = 0
        self.broken = False

    def ready(self) -> str:
        return self.reason

    def look(self) -> Samples:
        # Only on the loop's thread is the state whole.
        asyncio.get_running_loop()
        if self.broken:
            raise RuntimeError("a secret of the inside")
        samples = Samples(Role.HELPER)
        samples.set("fleetfed_helper_keys", 2)
        return samples

    def look_slowly(self, samples: Samples) -> None:
        self.slow += 1
        samples.set("fleetfed_disk_free_bytes", 1000)


@contextmanager
def serving(role: Somebody, *, patience: float = 30.0) -> Iterator[MonitoringServer]:
    server = MonitoringServer(MonitoringConfig(listen="127.0.0.1:0"), role, patience=patience)
    try:
        yield server
    finally:
        server.close()


async def ask(server: MonitoringServer, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(get, server.port, path)


async def test_what_each_path_says() -> None:
    role = Somebody()
    with serving(role) as server:
        assert await ask(server, "/healthz") == (200, "ok\n")
        assert await ask(server, "/readyz") == (200, "ok\n")
        assert (await ask(server, "/"))[0] == 404
        role.reason = "not connected to the broker"
        assert await ask(server, "/readyz") == (503, "not connected to the broker\n")
        assert await ask(server, "/healthz") == (200, "ok\n")
        status, body = await ask(server, "/metrics?x=1")
        assert status == 200
        read = parsed(body)
        assert read.value("fleetfed_helper_keys") == 2
        assert read.value("fleetfed_disk_free_bytes") == 1000
        assert (read.value("process_open_fds") or 0) > 0


async def test_the_disk_is_not_read_for_every_scrape() -> None:
    role = Somebody()
    with serving(role) as server:
        for _ in range(3):
            await ask(server, "/metrics")
        assert role.slow == 1


async def test_a_loop_that_hangs_is_not_healthy() -> None:
    with serving(Somebody(), patience=0.05) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        for path in ("/healthz", "/readyz", "/metrics"):
            # Waits where the loop would turn.
            status, body = threads.submit(get, server.port, path).result()
            assert (status, body) == (503, "the loop has not turned for 0.05 s\n")


async def test_a_failure_inside_is_told_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    role = Somebody()
    role.broken = True
    with serving(role) as server:
        assert await ask(server, "/metrics") == (500, "failed: look into the log\n")
        assert "a secret of the inside" in caplog.text
        assert (await ask(server, "/healthz"))[0] == 200


async def test_no_more_than_so_many_at_once() -> None:
    with serving(Somebody()) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(8)]
        try:
            # In the order of the connections, so that the eight are taken before the ninth.
            ninth = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            with ninth:
                assert await asyncio.to_thread(ninth.recv, 1) == b""
        finally:
            for each in silent:
                each.close()


async def test_without_an_address_nothing_listens() -> None:
    server = MonitoringServer(MonitoringConfig(), Somebody())
    assert server.port == 0
    server.close()


async def test_an_address_that_is_taken_is_a_setting_to_mend() -> None:
    with serving(Somebody()) as server, pytest.raises(ConfigError, match="cannot listen on"):
        MonitoringServer(MonitoringConfig(listen=f"127.0.0.1:{server.port}"), Somebody())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:9465", ("127.0.0.1", 9465)), ("[::1]:0", ("::1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert address(text) == expected


@pytest.mark.parametrize("text", ["9465", ":9465", "::1:9465", "host", "host:", "host:x", "host:65536", "a b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        MonitoringConfig(listen=text)
