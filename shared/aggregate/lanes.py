"""The ring that every round adds in: uint64 words that each carry several signed lanes.

A word holds ``L = 64 // k`` signed lanes of ``k`` bits, ``word = sum(v_l * 2**(k*l)) mod 2**64``. The layout is planar:
with ``n_w = ceil(D / L)`` words, coordinate ``j`` sits in word ``j mod n_w``, lane ``j div n_w``, so that packing
works on contiguous slices. After the ``n_w`` value words come the meta words, each a whole word.

Adding two packed vectors word by word modulo 2**64 adds every lane and every meta word, whether the words are plain or
masked. Unpacking is exact if and only if every lane's sum lies in ``[-2**(k-1), 2**(k-1) - 1]``; a lane that overflows
wraps modulo ``2**k`` and moves only the next lane, by one. `choose_lane_bits` rules that out from the plan alone::

    layout = LaneLayout(dimension=10, lane_bits=16, meta_words=1)
    total = layout.pack(first, meta_a) + layout.pack(second, meta_b)
    values, meta = layout.unpack(total)  # first + second, meta_a + meta_b
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import RejectReason, RemoteProtocolError

WORD_BITS: Final = 64
MIN_LANE_BITS: Final = 4
MAX_BITS: Final = 16
"""Widest signed quantization that a device may send."""

_CHUNK: Final = 1 << 14
"""Words per step: the scratch (128 KiB) stays in the second-level cache of a small processor."""

Words = NDArray[np.uint64]
Values = NDArray[np.signedinteger[Any]]


def levels(bits: int) -> int:
    """Return the largest magnitude of a signed ``bits``-bit symbol: symmetric, so that minus it is one too.

    Raises:
        ValueError: ``bits`` is not in 2..16.
    """
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in 2..{MAX_BITS}, not {bits}")
    return (1 << (bits - 1)) - 1


def choose_lane_bits(bits: int, cohort_cap: int, guard_bits: int = 1, *, noise: int = 0) -> int:
    """Return the widest lane of the cheapest layout in which a full cohort cannot overflow.

    The rule is ``cohort_cap * (2**(bits-1) - 1) + noise <= 2**(k-1-guard_bits) - 1``. Among the widths with the same
    number of lanes per word the widest costs nothing more, so that one is taken.

    Args:
        bits: signed quantization bits, 2..16.
        cohort_cap: most contributions that will ever be added.
        guard_bits: bits kept free, so that a wrong sum fails the range check instead of passing for a right one.
        noise: how far noise may carry a lane beside the contributions (`accumulator.RingNoise.slack`).

    Raises:
        ValueError: an argument is out of range, or no lane of 64 bits is wide enough.
    """
    if cohort_cap < 1 or guard_bits < 0:
        raise ValueError(f"need cohort_cap >= 1 and guard_bits >= 0, not {cohort_cap} and {guard_bits}")
    needed = (cohort_cap * levels(bits) + noise).bit_length() + 1 + guard_bits
    if needed > WORD_BITS:
        noised = f" with noise up to {noise}" if noise else ""
        raise ValueError(
            f"{cohort_cap} contributions of {bits} bits{noised} need lanes of {needed} bits; a word has 64"
        )
    lanes = WORD_BITS // max(needed, MIN_LANE_BITS)
    return WORD_BITS // lanes


@dataclass(frozen=True, slots=True)
class LaneLayout:
    """Where every coordinate and meta word of a vector sits.

    Attributes:
        dimension: number of coordinates D.
        lane_bits: k, width of a lane in bits, 4..64.
        meta_words: whole words after the value words.
    """

    dimension: int
    lane_bits: int
    meta_words: int = 0

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.meta_words < 0 or not MIN_LANE_BITS <= self.lane_bits <= WORD_BITS:
            raise ValueError(f"not a layout: {self}")

    @property
    def lanes(self) -> int:
        """L, lanes per word."""
        return WORD_BITS // self.lane_bits

    @property
    def value_words(self) -> int:
        """n_w, words that carry coordinates."""
        return -(-self.dimension // self.lanes)

    @property
    def n_words(self) -> int:
        """W, words in all."""
        return self.value_words + self.meta_words

    @property
    def lane_max(self) -> int:
        """Largest sum that a lane can hold."""
        return (1 << (self.lane_bits - 1)) - 1

    @property
    def lane_min(self) -> int:
        """Smallest sum that a lane can hold."""
        return -(1 << (self.lane_bits - 1))

    def zeros(self) -> Words:
        """Return the sum of nothing: uint64 of shape (n_words,)."""
        return np.zeros(self.n_words, dtype=np.uint64)

    def pack(self, values: Values, meta: Words, *, wrap: bool = False) -> Words:
        """Return one contribution as words.

        Args:
            values: signed integers, shape (dimension,).
            meta: uint64, shape (meta_words,).
            wrap: as for `add`.

        Returns:
            uint64, shape (n_words,).

        Raises:
            RemoteProtocolError: WRONG_SHAPE, or OUT_OF_RANGE if a value does not fit a lane.
        """
        words = self.zeros()
        self.add(words, values, meta, wrap=wrap)
        return words

    def add(self, words: Words, values: Values, meta: Words, *, negate: bool = False, wrap: bool = False) -> None:
        """Add one contribution to ``words`` in place (or subtract it), with scratch of 128 KiB whatever the size.

        Args:
            words: uint64, shape (n_words,); changed only if nothing is raised.
            values: signed integers, shape (dimension,).
            meta: uint64, shape (meta_words,).
            negate: subtract instead.
            wrap: take values of any size, as the ring takes sums: the words of a sum are the sum of the words for them
                too. For noise, which must be added as it was drawn.

        Raises:
            RemoteProtocolError: WRONG_SHAPE, or OUT_OF_RANGE if a value does not fit a lane.
        """
        self.check_words(words)
        if values.shape != (self.dimension,) or values.dtype.kind != "i":
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"values are {values.dtype} of {values.shape}, not ({self.dimension},)"
            )
        if meta.shape != (self.meta_words,) or meta.dtype != np.uint64:
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"meta is {meta.dtype} of {meta.shape}, not uint64 of ({self.meta_words},)"
            )
        if not wrap and (int(values.min()) < self.lane_min or int(values.max()) > self.lane_max):
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"a value does not fit {self.lane_bits} bits")
        n, combine = self.value_words, np.subtract if negate else np.add
        scratch = np.empty(min(_CHUNK, n), dtype=np.int64)
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            for i in range(self.lanes):
                part = values[i * n + start : min(i * n + stop, self.dimension)]
                # The sign of a lane borrows from the one above it, which is exactly what unpacking undoes.
                lane = scratch[: part.size]
                lane[:] = part
                if i:
                    np.left_shift(lane, np.int64(i * self.lane_bits), out=lane)
                target = words[start : start + part.size]
                combine(target, lane.view(np.uint64), out=target)
        tail = words[n:]
        combine(tail, meta, out=tail)

    def unpack(self, words: Words) -> tuple[Values, Words]:
        """Return the lanes' sums and the meta words.

        Args:
            words: uint64, shape (n_words,); not changed.

        Returns:
            The sums, shape (dimension,), int32 for lanes of up to 32 bits, int64 for wider ones; and a copy of the
            meta words, uint64 of shape (meta_words,).

        Raises:
            RemoteProtocolError: WRONG_SHAPE.
        """
        self.check_words(words)
        n, k = self.value_words, self.lane_bits
        out: Values = np.empty(self.dimension, dtype=np.int32 if k <= 32 else np.int64)
        up, down = np.int64(WORD_BITS - k), np.uint64(k % WORD_BITS)
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            rest = words[start:stop].copy()
            for i in range(self.lanes):
                # Shift left, then right with the sign: the lowest k bits, sign-extended.
                lane = (rest.view(np.int64) << up) >> up
                part = out[i * n + start : min(i * n + stop, self.dimension)]
                part[:] = lane[: part.size]
                rest -= lane.view(np.uint64)
                rest >>= down
        return out, words[n:].copy()

    def check_words(self, words: Words) -> None:
        """Raise RemoteProtocolError (WRONG_SHAPE) unless ``words`` is uint64 of shape (n_words,)."""
        if words.shape != (self.n_words,) or words.dtype != np.uint64:
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"words are {words.dtype} of {words.shape}, not uint64 of ({self.n_words},)"
            )
