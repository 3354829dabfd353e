"""The embedded broker as a process under load: nothing lost, memory bounded. Slow, except for a small burst."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.broker.certificates import Authority
from tests.broker.rawclient import RawClient
from tests.broker.test_persistence import EmbeddedProcess

MB = 2**20


class PlainProcess(EmbeddedProcess):
    def write(self) -> None:
        self.path.write_text(f"port = {self.port}\nsys_interval = 0\n{self.extra}\n")

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes resident now, or with ``VmHWM`` at the most so far."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
        raise AssertionError


@asynccontextmanager
async def running(folder: Path, authority: Authority, extra: str = "") -> AsyncIterator[PlainProcess]:
    broker = PlainProcess(folder, authority, extra)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


def need_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard < count:
            pytest.skip(f"needs {count} open files, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
async def test_a_burst_of_publishers_loses_nothing_and_costs_bounded_memory(
    tmp_path: Path, authority: Authority, count: int
) -> None:
    need_files(count + 100)
    async with running(tmp_path, authority, "[limits]\nhigh_water = 2097152\nmemory_high_water = 16777216") as broker:
        taker = await RawClient.connect(broker.port, "taker")
        await taker.subscribe("up/+")
        givers = [await RawClient.connect(broker.port, f"p-{number}") for number in range(count)]
        before = broker.memory()
        work = [
            asyncio.create_task(giver.publish(f"up/{number}", bytes(100_000))) for number, giver in enumerate(givers)
        ]
        await asyncio.sleep(0.5)  # the subscriber is slow to begin with
        topics = {(await taker.message()).topic for _ in range(count)}
        assert len(topics) == count
        assert set(await asyncio.gather(*work)) == {0}
        # The mark, what was being read when it was reached, and the allocator's leftovers.
        assert broker.memory("VmHWM") - before < 64 * MB


@pytest.mark.slow
async def test_slow_subscribers_share_what_they_wait_for(tmp_path: Path, authority: Authority) -> None:
    need_files(300)
    async with running(tmp_path, authority) as broker:
        giver = await RawClient.connect(broker.port, "giver")
        for number in range(160):
            await giver.publish(f"blob/{number}", bytes(125_000), retain=True)
        before = broker.memory()
        stalled = [await RawClient.connect(broker.port, f"s-{number}") for number in range(100)]
        for client in stalled:
            await client.subscribe("blob/+")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(2)
        # 20 MB for each of a hundred subscribers is one copy, and what stands in their write buffers.
        assert broker.memory() - before < 100 * MB
        await giver.ping()


@pytest.mark.slow
async def test_reconnecting_clients_do_not_pile_up(tmp_path: Path, authority: Authority) -> None:
    async with running(tmp_path, authority) as broker:

        async def churn(name: str, times: int) -> None:
            for turn in range(times):
                client = await RawClient.connect(broker.port, name, clean=turn % 2 == 0)
                await client.subscribe(f"t/{name}")
                for _ in range(3):
                    await client.publish(f"t/{name}", bytes(2000))
                client.abort()

        await asyncio.gather(*(churn(f"c-{number}", 20) for number in range(50)))
        before = broker.memory()
        await asyncio.gather(*(churn(f"c-{number}", 60) for number in range(50)))
        assert broker.memory() - before < 8 * MB
