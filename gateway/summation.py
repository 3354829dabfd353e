"""The sum of the open round: one vector, whatever the number of devices; built again from the journal after a crash."""

from __future__ import annotations

from collections.abc import Iterable

from fleetfed.gateway.intake import decode_reveal, decode_values
from fleetfed.shared.aggregate.accumulator import Accumulator, Partial, Ring, encode_words
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.wire.envelope import parse_head
from fleetfed.shared.wire.messages import Reveal

REVEAL_LEVEL = 3
"""zstd level of a partial: sums hardly compress further, and the coordinator waits for it."""


class Summation:
    """The sum and what it may hold.

    Args:
        ring: the plan's arithmetic.
        capacity: the plan's cohort limit.
    """

    def __init__(self, ring: Ring, *, capacity: int) -> None:
        self.ring = ring
        self._sum = Accumulator(ring, capacity=capacity)

    @property
    def count(self) -> int:
        """Contributors in the sum."""
        return self._sum.count

    def add(self, values: Values, meta: Words) -> None:
        """Add one decoded update."""
        self._sum.accumulate(values, meta)

    def merge(self, partial: Partial) -> None:
        """Add a decoded partial."""
        self._sum.merge(partial)

    def drop(self, bodies: Iterable[bytes]) -> None:
        """Take out updates, given their stored bodies."""
        for body in bodies:
            values, meta = decode_values(body, self.ring)
            self._sum.subtract(values, meta)

    def rebuild(self, bodies: Iterable[bytes], reveals: Iterable[bytes]) -> None:
        """Add what the journal holds: bodies of updates, whole reveal messages."""
        for body in bodies:
            self.add(*decode_values(body, self.ring))
        for raw in reveals:
            head = parse_head(raw)
            _, partial = decode_reveal(head.header, memoryview(raw)[head.size :], self.ring)
            self.merge(partial)

    def reveal(self, *, plan: bytes, commit: bytes) -> Reveal:
        """Hand the sum over; it is gone afterwards."""
        partial = self._sum.report()
        words = encode_words(partial, level=REVEAL_LEVEL)
        return Reveal(plan=plan, commit=commit, count=partial.count, words=words)
