"""Jobs are done in order, in few trips to the thread, and never more wait than there is room for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fleetfed.gateway.worker import ROOM, Worker
from fleetfed.shared.errors import RejectReason, RemoteProtocolError


class Counting(ThreadPoolExecutor):
    """Counts the trips."""

    trips = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self.trips += 1
        return super().submit(*args, **kwargs)


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        task.cancel()


async def rest(worker: Worker) -> None:
    """Return when the last job was done: the worker goes by their order."""
    done = asyncio.Event()
    worker.do(lambda: None, lambda _: done.set(), small=True)
    await done.wait()


async def test_a_small_job_alone_stays_on_the_loop() -> None:
    executor, where = Counting(1), list[str]()
    worker = Worker(executor)
    async with working(worker):
        for small in (True, False):
            done = asyncio.Event()
            worker.do(lambda: where.append(threading.current_thread().name), lambda _, e=done: e.set(), small=small)  # type: ignore[misc]
            await done.wait()
    assert where[0] == threading.main_thread().name != where[1]
    assert executor.trips == 1


async def test_many_jobs_share_a_trip_and_keep_their_order() -> None:
    executor, done = Counting(1), list[int]()
    worker = Worker(executor)
    async with working(worker):
        for number in range(100):
            worker.do(lambda number=number: number, done.append, small=True)  # type: ignore[misc]
        await rest(worker)
    assert done == list(range(100))
    assert executor.trips <= 4


async def test_a_refusal_is_handed_on_and_concerns_no_other_job() -> None:
    def refuse() -> None:
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE)

    worker, done = Worker(Counting(1)), list[Any]()
    async with working(worker):
        worker.do(lambda: 1, done.append, small=True)
        worker.do(refuse, done.append, small=True)
        worker.do(lambda: 3, done.append, small=True)
        await rest(worker)
    assert (done[0], done[2]) == (1, 3)
    assert done[1].reason is RejectReason.OUT_OF_RANGE


async def test_whatever_else_goes_wrong_ends_it() -> None:
    worker = Worker(Counting(1))
    async with working(worker) as task:
        worker.do(lambda: 1 / 0, small=True)
        with pytest.raises(ZeroDivisionError):
            await task


async def test_senders_wait_while_too_much_waits() -> None:
    worker, gate = Worker(Counting(1)), threading.Event()
    async with working(worker):
        worker.do(gate.wait, small=False, size=ROOM)
        held = asyncio.create_task(worker.room())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not held.done()
        gate.set()
        await asyncio.wait_for(held, 10)
        await worker.room()
