"""Runs what costs time in one thread, in order; a job alone that is small runs on the loop, where it is done sooner.

What gathers while one batch runs is the next one: one trip to the thread and back serves many updates, and hashing
and adding, which let go of the interpreter, have another processor meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final

from fleetfed.shared.errors import RemoteProtocolError

Then = Callable[[Any], None]

ROOM: Final = 16 << 20
"""Bytes that may wait before nothing more is taken in."""
_TOGETHER: Final = 32
"""Jobs in one trip: what comes of them keeps the loop busy for a few milliseconds."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], Any]
    then: Then | None
    small: bool
    size: int


class Worker:
    """See the module.

    Args:
        executor: one thread.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._queue: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._running = 0
        self._waiting = 0
        self._less = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._queue and not self._running

    def do(self, work: Callable[[], Any], then: Then | None = None, *, small: bool, size: int = 0) -> None:
        """Run ``work`` soon and hand what it returns, or the `RemoteProtocolError` that it raises, to ``then``.

        Args:
            work: what to run, perhaps in the thread.
            then: called on the loop, in the order of the calls.
            small: whether the loop may wait for it.
            size: bytes that it holds on to.
        """
        self._queue.append(_Job(work, then, small, size))
        self._waiting += size
        self._wake.set()

    async def room(self) -> None:
        """Return once less than `ROOM` bytes wait: senders are held back, in place of filling the memory."""
        while self._waiting >= ROOM:
            self._less.clear()
            await self._less.wait()

    async def run(self) -> None:
        """Work until cancelled. Whatever else ``work`` or ``then`` raises ends it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(_TOGETHER, len(self._queue)))]
                self._running = len(batch)
                if len(batch) == 1 and batch[0].small:
                    results = _outcomes(batch)
                else:
                    results = await loop.run_in_executor(self._executor, _outcomes, batch)
                for job, result in zip(batch, results, strict=True):
                    self._running -= 1
                    self._waiting -= job.size
                    if job.then is not None:
                        job.then(result)
                self._less.set()


def _outcomes(batch: Sequence[_Job]) -> list[Any]:
    return [_outcome(job.work) for job in batch]


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RemoteProtocolError as error:
        return error
