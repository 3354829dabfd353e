"""How long to wait before the next attempt to connect."""

from __future__ import annotations

import random
from typing import Final

FIRST: Final = 0.2
"""Seconds: the longest wait before the first retry, so that a blip costs nothing."""

STABLE: Final = 10.0
"""Seconds that a connection must last before the next loss counts as a first one."""


class Backoff:
    """Full jitter: uniform between zero and a bound that doubles.

    A thousand clients that lose their broker together come back spread out. Two clients that fight over one
    identity throw each other out ever more slowly, because only a connection that lasted resets the bound.

    >>> backoff = Backoff(random.Random(1), cap=8.0)
    >>> [bound for _ in range(6) for bound in [backoff.bound] if backoff.delay() <= bound]
    [0.2, 1.0, 2.0, 4.0, 8.0, 8.0]
    """

    def __init__(self, rng: random.Random, *, cap: float = 60.0) -> None:
        self._rng = rng
        self._cap = cap
        self._attempt = 0

    @property
    def bound(self) -> float:
        """The longest that the next delay can be, in seconds."""
        # The exponent stops growing where every cap is reached, or it would overflow after a month offline.
        wide = FIRST if self._attempt == 0 else float(2 ** min(self._attempt - 1, 16))
        return min(wide, self._cap)

    def delay(self) -> float:
        """The seconds to wait before the next attempt."""
        delay = self._rng.uniform(0.0, self.bound)
        self._attempt += 1
        return delay

    def connected_for(self, seconds: float) -> None:
        """A connection ended that lasted ``seconds``."""
        if seconds >= STABLE:
            self._attempt = 0
