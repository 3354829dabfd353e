"""Runs what costs time in one thread, in order; what is small runs at once, unless something is waiting before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from fleetfed.shared.errors import RemoteProtocolError

Then = Callable[[Any], None]


class Worker:
    """See the module.

    Args:
        executor: one thread.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._queue: deque[tuple[Callable[[], Any], Then | None]] = deque()
        self._wake = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._queue

    def do(self, work: Callable[[], Any], then: Then | None = None, *, small: bool) -> None:
        """Run ``work`` and hand what it returns, or the `RemoteProtocolError` that it raises, to ``then``."""
        if small and not self._queue:
            result = _outcome(work)
            if then is not None:
                then(result)
            return
        self._queue.append((work, then))
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. Whatever else ``work`` or ``then`` raises ends it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                work, then = self._queue[0]
                result = await loop.run_in_executor(self._executor, _outcome, work)
                # Only now: what comes in meanwhile must not overtake it.
                self._queue.popleft()
                if then is not None:
                    then(result)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RemoteProtocolError as error:
        return error
