"""What the reveals of one round add up to, and those sums as bytes for the database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgpack
import numpy as np

from fleetfed.shared.aggregate.accumulator import Accumulator, Partial, Ring
from fleetfed.shared.errors import StorageError


class RoundSum:
    """The sum of one round.

    Args:
        ring: of the plan.
        capacity: the plan's cohort limit.
        apart: whether a robust rule needs the sums apart as well; costs a vector each.
    """

    def __init__(self, ring: Ring, *, capacity: int, apart: bool = False) -> None:
        self._total = Accumulator(ring, capacity=capacity)
        self._apart = apart
        self._parts: dict[str, tuple[Partial, ...]] = {}

    def add(self, gateway: str, parts: Sequence[Partial]) -> None:
        """Add what a gateway revealed, checked."""
        for part in parts:
            self._total.merge(part)
        if self._apart:
            self._parts[gateway] = tuple(parts)

    def report(self) -> tuple[Partial, tuple[Partial, ...]]:
        """The whole sum and, where they are wanted, its parts, by gateway: arrival does not change their order."""
        parts = (part for _, parts in sorted(self._parts.items()) for part in parts)
        return self._total.report(), tuple(parts)


def encode_parts(parts: Iterable[Partial]) -> bytes:
    """Unmasked sums for the database, as they are: noise may carry lanes beyond what devices can say."""
    packed = msgpack.packb([[part.count, part.words.astype("<u8", copy=False).tobytes()] for part in parts])
    assert isinstance(packed, bytes)
    return packed


def decode_parts(data: bytes, ring: Ring) -> tuple[Partial, ...]:
    """Read what `encode_parts` wrote.

    Raises:
        StorageError: damaged, or of another ring.
    """
    try:
        return tuple(
            Partial(ring, np.frombuffer(words, dtype="<u8", count=ring.layout.n_words).astype(np.uint64), int(count))
            for count, words in msgpack.unpackb(data, max_bin_len=len(data))
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StorageError(f"stored sums are damaged: {error}") from error
