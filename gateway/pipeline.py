"""Keeps the order between the disk and the network: nothing leaves before what was decided earlier is durable.

Journal rows and sends are queued as the machine asks for them. One task takes all that is queued, writes its rows in
one transaction, and then lets its sends go, in order: while one fsync runs the next group gathers, so many updates
share one, and a lonely one waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from fleetfed.gateway.journal import Journal, Rows

Send = Callable[[], object]

ROOM: Final = 16 << 20
"""Bytes that may wait for the disk before nothing more is taken in."""


class Pipeline:
    """See the module.

    Args:
        journal: where rows go.
        executor: one thread, in which the journal is written.
    """

    def __init__(self, journal: Journal, executor: Executor) -> None:
        self._journal = journal
        self._executor = executor
        self._queue: list[Rows | Send] = []
        self._wake = asyncio.Event()
        self._writing = False
        self._waiting = 0
        self._written = asyncio.Event()
        self.commits = 0
        self.rows = 0

    def store(self, rows: Rows, durable: Send | None = None) -> None:
        """Queue rows; ``durable`` is called when they are on disk."""
        self._queue.append(rows)
        self._waiting += _size(rows)
        if durable is not None:
            self._queue.append(durable)
        self._wake.set()

    def send(self, send: Send) -> None:
        """Call ``send`` once everything queued before is durable, at once if nothing is."""
        if not self._queue and not self._writing:
            send()
            return
        self._queue.append(send)
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or being written."""
        return not self._queue and not self._writing

    async def room(self) -> None:
        """Return once less than `ROOM` bytes wait: a slow disk holds senders back, in place of filling the memory."""
        while self._waiting >= ROOM:
            self._written.clear()
            await self._written.wait()

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            StorageError: the disk is full or broken; nothing that depended on it has left.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._queue = self._queue, []
            statements = [statement for item in batch if isinstance(item, list) for statement in item]
            if statements:
                # All that waits: whatever comes from now on is another batch's.
                size = self._waiting
                self._writing = True
                try:
                    await loop.run_in_executor(self._executor, self._journal.write, statements)
                finally:
                    self._writing = False
                    self._waiting -= size
                    self._written.set()
                self.commits += 1
                self.rows += len(statements)
            for item in batch:
                if not isinstance(item, list):
                    item()


def _size(rows: Rows) -> int:
    return sum(len(value) for _, values in rows for value in values if isinstance(value, bytes | memoryview))
