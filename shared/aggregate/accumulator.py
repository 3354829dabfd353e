"""The sum that a tier holds: accumulate, subtract, merge, report.

Laws, bit for bit and for any contributions that the capacity admits (the tests state them as properties):

- order: accumulating in any order gives the same words;
- tree: merging the reports of any partition of the contributions, at any depth, gives the words of the flat sum;
- inverse: accumulate followed by subtract of the same contribution changes nothing, nor does merge followed by unmerge;
- ends: `report` consumes; whatever comes after raises, so one sum cannot be counted twice.

They hold because a word is an integer modulo 2**64 and nothing is ever divided before the end. Memory is the one vector
of words, whatever the number of contributors, which may be a memory map; and, where values are bytes, one of 16 bits
that some hundred contributions go through.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleetfed.shared.aggregate.body import decode_body, encode_body, max_body
from fleetfed.shared.aggregate.lanes import LaneLayout, Values, Words, levels
from fleetfed.shared.aggregate.meta import MetaLayout, MetaSum, PrivateMeta
from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError, StorageError

_SNAPSHOT: Final = struct.Struct("<4sBBHIIQQ")
_MAGIC: Final = b"FFA1"
_DIGEST: Final = 32
_NARROW_MAX: Final = (1 << 15) - 1
_WORTHWHILE: Final = 16
"""Contributions that must fit 16 bits: to add one of bytes to such a sum takes a tenth of the time that lanes take."""
_NARROW_SIZE: Final = 8 << 20
"""Bytes that this may take beside the words."""
_HEADROOM: Final = 8
"""Standard deviations of noise that a lane has room for: one coordinate in 10**15 exceeds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingNoise:
    """The noise that sums of a round carry when they travel; what the coordinator adds at the end is no part of it.

    Attributes:
        each: standard deviation of what every contribution brings along.
        released: of what a leaf gateway adds to each sum that it reveals.
        sums: how many such sums a round has at most.
        adaptive: whether contributions say if they were beyond the clip.
        each_flag, released_flag: the same deviations for the sum of what they say.
    """

    each: float = 0.0
    released: float = 0.0
    sums: int = 1
    adaptive: bool = False
    each_flag: float = 0.0
    released_flag: float = 0.0

    def slack(self, count: int) -> int:
        """How far the noise in ``count`` contributions' sum may carry a lane."""
        return self._room(self.each, self.released, count)

    def meta(self, count: int) -> PrivateMeta:
        """The meta words of up to ``count`` contributions."""
        return PrivateMeta(adaptive=self.adaptive, slack=self._room(self.each_flag, self.released_flag, count))

    def _room(self, each: float, released: float, count: int) -> int:
        return math.ceil(_HEADROOM * math.sqrt(each**2 * count + released**2 * self.sums))


@dataclass(frozen=True, slots=True)
class Ring:
    """The arithmetic of one round, as its plan fixes it.

    Attributes:
        layout: lanes and meta words.
        meta: what the meta words may say.
        bits: signed bits of one contribution's values.
        noise: what noise the lanes have to hold beside them; None for a round without differential privacy.
    """

    layout: LaneLayout
    meta: MetaLayout
    bits: int
    noise: RingNoise | None = None

    def __post_init__(self) -> None:
        if self.layout.meta_words != self.meta.words or self.layout.dimension != sum(self.meta.sizes):
            raise ValueError(f"layout {self.layout} does not fit tensors {self.meta.sizes}")
        levels(self.bits)

    @classmethod
    def of(
        cls,
        sizes: tuple[int, ...],
        *,
        bits: int,
        lane_bits: int,
        weight_cap: int,
        noise: RingNoise | None = None,
        most: int = 1,
    ) -> Ring:
        """Return the ring of a plan; ``sizes`` come from the model card, ``most`` is its cohort's limit."""
        meta = MetaLayout(sizes, weight_cap, None if noise is None else noise.meta(most))
        return cls(LaneLayout(sum(sizes), lane_bits, meta.words), meta, bits, noise)

    @property
    def capacity(self) -> int:
        """Most contributions of which no lane can overflow."""
        most = self.layout.lane_max // levels(self.bits)
        if self.noise is None or self.limit(most) <= self.layout.lane_max:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.limit(middle) <= self.layout.lane_max else (low, middle)
        return low

    @property
    def own_limit(self) -> int:
        """Largest magnitude of a value as its device sends it."""
        if self.noise is None:
            return levels(self.bits)
        return levels(self.bits) + RingNoise(each=self.noise.each).slack(1)

    def limit(self, count: int) -> int:
        """Largest magnitude that a lane's sum of ``count`` contributions can have when it travels."""
        return count * levels(self.bits) + (0 if self.noise is None else self.noise.slack(count))


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """What one tier reports upwards.

    Attributes:
        ring: the arithmetic it was made in.
        words: uint64, shape (ring.layout.n_words,); not to be changed.
        count: contributions in it.
    """

    ring: Ring
    words: Words
    count: int

    def values(self) -> Values:
        """Return the lanes' sums, shape (dimension,)."""
        return self.ring.layout.unpack(self.words)[0]

    def meta(self) -> MetaSum:
        """Return what the meta words say.

        Raises:
            RemoteProtocolError: BELOW_MINIMUM or OUT_OF_RANGE.
        """
        return self.ring.meta.decode(self.words[self.ring.layout.value_words :], count=self.count)


class Accumulator:
    """The sum of one round at one tier.

    Args:
        ring: the plan's arithmetic.
        capacity: most contributions that may ever be in it; the plan's cohort limit.
        words: uint64, shape (ring.layout.n_words,), zeros or what an earlier run left: used in place (a memory map of a
            large model). A fresh vector by default.
        count: contributions already in ``words``.

    Raises:
        ValueError: the capacity would let a lane overflow.
    """

    def __init__(self, ring: Ring, *, capacity: int, words: Words | None = None, count: int = 0) -> None:
        if not 1 <= capacity <= ring.capacity:
            raise ValueError(f"capacity {capacity} on a ring for at most {ring.capacity}")
        if not 0 <= count <= capacity:
            raise ValueError(f"{count} contributions in an accumulator for {capacity}")
        self.ring = ring
        self.capacity = capacity
        self._words: Words | None = ring.layout.zeros() if words is None else words
        ring.layout.check_words(self._words)
        self._count = count
        # What is in the sum and not yet in the words, and the largest magnitude that it can have.
        self._narrow: Values | None = None
        self._reach = 0

    @property
    def count(self) -> int:
        """Contributions in the sum."""
        return self._count

    def accumulate(self, values: Values, meta: Words, *, count: int = 1, checked: bool = False) -> None:
        """Add one contribution, or the decoded sum of ``count`` of them.

        Args:
            values: signed integers, shape (dimension,).
            meta: uint64, shape (ring.meta.words,).
            count: contributions in it, as the signed list says.
            checked: whether values and meta are known to be in this ring's range; their shapes are checked anyway.

        Raises:
            RemoteProtocolError: COHORT_FULL, WRONG_SHAPE or OUT_OF_RANGE (a value, or a meta word); the sum is
                unchanged.
            LocalProtocolError: already reported.
        """
        words = self._open()
        if self._count + count > self.capacity:
            raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{self._count} + {count} of {self.capacity}")
        if not checked:
            self._check(values, meta, count)
        self._add(words, values, meta, count, negate=False)
        self._count += count

    def subtract(self, values: Values, meta: Words, *, count: int = 1) -> None:
        """Take out what `accumulate` added: a commit may leave contributors out.

        The caller answers for its having been added; the sum itself cannot tell.

        Raises:
            RemoteProtocolError: WRONG_SHAPE or OUT_OF_RANGE; the sum is unchanged.
            LocalProtocolError: already reported, or fewer contributions are in the sum.
        """
        words = self._open()
        if count > self._count:
            raise LocalProtocolError(f"cannot take {count} contributions out of {self._count}")
        self._check(values, meta, count)
        self._add(words, values, meta, count, negate=True)
        self._count -= count

    def merge(self, other: Partial) -> None:
        """Add a partial word by word.

        The words may be masked, so only their number is checked here; `check_partial` looks inside plain ones.

        Raises:
            RemoteProtocolError: COHORT_FULL, or WRONG_SHAPE for another ring; the sum is unchanged.
            LocalProtocolError: already reported.
        """
        words = self._open()
        self._check_partial(other)
        if other.count < 0 or self._count + other.count > self.capacity:
            raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{self._count} + {other.count} of {self.capacity}")
        words += other.words
        self._count += other.count

    def unmerge(self, other: Partial) -> None:
        """Take out what `merge` added.

        The caller answers for its having been added; the sum itself cannot tell.

        Raises:
            RemoteProtocolError: WRONG_SHAPE for another ring; the sum is unchanged.
            LocalProtocolError: already reported, or fewer contributions are in the sum.
        """
        words = self._open()
        self._check_partial(other)
        if not 0 <= other.count <= self._count:
            raise LocalProtocolError(f"cannot take {other.count} contributions out of {self._count}")
        words -= other.words
        self._count -= other.count

    def can_report(self, minimum: int) -> bool:
        """Whether at least ``minimum`` contributions are in, and the sum has not been reported."""
        return self._words is not None and self._count >= minimum

    def report(self) -> Partial:
        """Hand the sum over; this object refuses everything from now on.

        Raises:
            LocalProtocolError: already reported.
        """
        words = self._whole()
        self._words = None
        return Partial(self.ring, words, self._count)

    def snapshot(self) -> bytes:
        """Return bytes that `restore` turns back into an equal accumulator.

        Raises:
            LocalProtocolError: already reported.
        """
        words, layout = self._whole(), self.ring.layout
        head = _SNAPSHOT.pack(
            _MAGIC,
            self.ring.bits,
            layout.lane_bits,
            0,
            layout.meta_words,
            layout.dimension,
            self.capacity,
            self._count,
        )
        content = head + words.astype("<u8").tobytes()
        return content + hashlib.blake2b(content, digest_size=_DIGEST).digest()

    @classmethod
    def restore(cls, snapshot: bytes, ring: Ring) -> Accumulator:
        """Return the accumulator that a snapshot was taken of.

        Raises:
            StorageError: damaged, or of another ring.
        """
        body, digest = snapshot[:-_DIGEST], snapshot[-_DIGEST:]
        if len(body) < _SNAPSHOT.size or hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest:
            raise StorageError("the accumulator's snapshot is damaged")
        magic, bits, lane_bits, _, meta_words, dimension, capacity, count = _SNAPSHOT.unpack_from(body)
        layout = ring.layout
        if (magic, bits, lane_bits, meta_words, dimension, len(body)) != (
            _MAGIC,
            ring.bits,
            layout.lane_bits,
            layout.meta_words,
            layout.dimension,
            _SNAPSHOT.size + 8 * layout.n_words,
        ):
            raise StorageError("the accumulator's snapshot is of another round")
        words = np.frombuffer(body, dtype="<u8", offset=_SNAPSHOT.size).astype(np.uint64)
        return cls(ring, capacity=capacity, words=words, count=count)

    def _open(self) -> Words:
        if self._words is None:
            raise LocalProtocolError("this sum has been reported")
        return self._words

    def _whole(self) -> Words:
        """The words, with everything in them."""
        words = self._open()
        if self._reach:
            assert self._narrow is not None
            # Wrapped: it is what changed since the last time, which may reach further than any sum.
            self.ring.layout.add(words, self._narrow, np.zeros(self.ring.meta.words, dtype=np.uint64), wrap=True)
            self._narrow.fill(0)
            self._reach = 0
        return words

    def _add(self, words: Words, values: Values, meta: Words, count: int, *, negate: bool) -> None:
        limit, layout = self.ring.limit(count), self.ring.layout
        small = limit * _WORTHWHILE <= _NARROW_MAX and 2 * layout.dimension <= _NARROW_SIZE
        fits = values.shape == (layout.dimension,) and meta.shape == (layout.meta_words,) and meta.dtype == np.uint64
        if not (small and fits and values.dtype == np.int8):
            layout.add(words, values, meta, negate=negate)
            return
        if self._narrow is None:
            self._narrow = np.zeros(layout.dimension, dtype=np.int16)
        if self._reach + limit > _NARROW_MAX:
            self._whole()
        combine = np.subtract if negate else np.add
        combine(self._narrow, values, out=self._narrow)
        tail = words[layout.value_words :]
        combine(tail, meta, out=tail)
        self._reach += limit

    def _check_partial(self, other: Partial) -> None:
        if other.ring != self.ring:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"a partial of {other.ring}, not of {self.ring}")
        self.ring.layout.check_words(other.words)

    def _check(self, values: Values, meta: Words, count: int) -> None:
        if count < 1:
            raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, f"a sum of {count} contributions")
        self.ring.meta.decode(meta, count=count)
        check_range(values, self.ring.limit(count))


def check_range(values: Values, limit: int, *, secret: bool = False) -> None:
    """Raise RemoteProtocolError (OUT_OF_RANGE) if a value's magnitude exceeds ``limit``.

    The error says how far the values reach, unless they are ``secret``: errors end in logs and messages.
    """
    if values.size and (int(values.min()) < -limit or int(values.max()) > limit):
        span = "values" if secret else f"values span {values.min()}..{values.max()},"
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"{span} beyond ±{limit}")


def check_partial(partial: Partial) -> MetaSum:
    """Check a plain (or unmasked) partial's lanes and meta words against what its count allows; return the meta.

    Raises:
        RemoteProtocolError: OUT_OF_RANGE or BELOW_MINIMUM.
    """
    meta = partial.meta()
    check_range(partial.values(), partial.ring.limit(partial.count), secret=partial.ring.noise is not None)
    return meta


def encode_words(partial: Partial, *, level: int | None = None) -> bytes:
    """Return a plain partial's words as a body: unpacked sums compress, words do not.

    Raises:
        ValueError: a lane's sum exceeds what the count allows.
    """
    values, meta = partial.ring.layout.unpack(partial.words)
    return encode_body(values, meta, limit=partial.ring.limit(partial.count), level=level)


def decode_words(body: bytes | bytearray | memoryview, ring: Ring, *, count: int) -> Partial:
    """Return the partial that a peer encoded, fully checked.

    Args:
        body: what `encode_words` returned.
        ring: the plan's arithmetic.
        count: contributors that the signed list names, 1..ring.capacity.

    Raises:
        RemoteProtocolError: COHORT_FULL, BELOW_MINIMUM, or whatever `body.decode_body` and `MetaLayout.decode` raise.
    """
    if count > ring.capacity:
        raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{count} of {ring.capacity}")
    if count < 1:
        raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, f"a sum of {count} contributions")
    layout = ring.layout
    values, meta = decode_body(body, dimension=layout.dimension, limit=ring.limit(count), meta_words=layout.meta_words)
    ring.meta.decode(meta, count=count)
    return Partial(ring, layout.pack(values, meta), count)


def encode_masked(partial: Partial) -> memoryview:
    """Return a masked partial's words as they travel, little-endian: they are uniform, and nothing compresses them.

    The bytes are the partial's own wherever the processor has the same order: a large sum is not copied.
    """
    return partial.words.astype("<u8", copy=False).data.cast("B")


def decode_masked(body: bytes | bytearray | memoryview, ring: Ring, *, count: int) -> Partial:
    """Return the masked partial that `encode_masked` wrote; nothing but its size can be checked. Not copied, read-only.

    Args:
        body: the bytes.
        ring: the plan's arithmetic.
        count: contributors that the signed list names, 1..ring.capacity.

    Raises:
        RemoteProtocolError: COHORT_FULL, BELOW_MINIMUM or WRONG_SHAPE.
    """
    if count > ring.capacity:
        raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{count} of {ring.capacity}")
    if count < 1:
        raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, f"a sum of {count} contributions")
    if len(body) != masked_size(ring):
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{len(body)} bytes where {masked_size(ring)} are due")
    return Partial(ring, np.frombuffer(body, dtype="<u8").astype(np.uint64, copy=False), count)


def masked_size(ring: Ring) -> int:
    """Return the bytes of every masked partial."""
    return 8 * ring.layout.n_words


def max_words_body(ring: Ring, count: int) -> int:
    """Return more bytes than any valid partial of ``count`` contributors needs."""
    return max_body(ring.layout.dimension, ring.limit(count), ring.layout.meta_words)
