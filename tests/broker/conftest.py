from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.broker.config import BrokerConfig, Limits
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.mosquitto import MosquittoProcess, find_mosquitto
from tests.broker.certificates import Authority
from tests.broker.rawclient import RawClient
from tests.broker.world import World, check

T = TypeVar("T")

PROBE_LIMITS = Limits(max_packet=2 * 2**20, max_queued_messages=20_000, max_inflight=20)


class LoopThread:
    """An event loop of its own, so that one broker can serve the tests of a module."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


@pytest.fixture(autouse=True)
async def no_client_is_left_open() -> AsyncIterator[None]:
    yield
    for client in RawClient.everyone:
        client.abort()
    if RawClient.everyone:
        RawClient.everyone.clear()
        # Two turns of the loop: one for the TLS layer, one for the socket below it.
        for _ in range(2):
            await asyncio.sleep(0)


@dataclass
class Running:
    """A broker under test, and how to connect to it."""

    kind: str
    broker: EmbeddedBroker | MosquittoProcess
    authority: Authority
    loop: LoopThread

    @property
    def port(self) -> int:
        return self.broker.port

    def tls(self, name: str) -> ssl.SSLContext:
        return self.authority.client_context(name)

    async def client(self, name: str, **options: Any) -> RawClient:
        """Connect over TLS with the certificate of ``name``."""
        return await RawClient.connect(self.port, name, tls=self.tls(name), **options)

    def reload(self) -> None:
        self.loop.run(self.broker.reload())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


KINDS = [pytest.param("embedded"), pytest.param("mosquitto", marks=pytest.mark.mosquitto)]


@contextlib.contextmanager
def serve(kind: str, config: BrokerConfig, authority: Authority, folder: Path) -> Iterator[Running]:
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (Debian package `mosquitto`)")
    loop = LoopThread()
    broker = EmbeddedBroker(config) if kind == "embedded" else MosquittoProcess(config, folder)
    try:
        loop.run(broker.start())
        yield Running(kind, broker, authority, loop)
    finally:
        loop.run(broker.stop())
        loop.close()


@pytest.fixture(scope="module", params=KINDS)
def probed(
    request: pytest.FixtureRequest, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Either broker, over TLS, without an ACL."""
    config = BrokerConfig(tls=authority.server_files(), limits=PROBE_LIMITS, sys_interval=1)
    with serve(request.param, config, authority, tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    check(world)
