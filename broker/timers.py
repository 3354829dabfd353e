"""What is to be done later, on the caller's clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timers:
    """Actions in the order of their time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def call_at(self, when: float, action: Callable[[], None]) -> None:
        """Have `run` call ``action`` at ``when``; it cannot be taken back, so it checks whether it still applies."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, action))

    def next_deadline(self) -> float | None:
        """When `run` is to be called at the latest."""
        return self._heap[0][0] if self._heap else None

    def run(self, now: float) -> None:
        """Do what is due."""
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2]()
