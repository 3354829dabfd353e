"""A leaf gateway's noise: in every sum that leaves it, in no other, and another one for another secret or sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from fleetfed.gateway.plain import PlainSum
from fleetfed.shared.aggregate.accumulator import Ring, RingNoise
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.wire.envelope import MessageId

NOISE = RingNoise(released=40.0, sums=4, adaptive=True, released_flag=6.0)


class Nothing:
    """A journal that is not asked."""

    def updates(self, message_ids: Iterable[MessageId]) -> Iterator[tuple[bytes, bytes]]:
        raise AssertionError

    def reveals(self) -> Iterator[bytes]:
        raise AssertionError


class Leaf(PlainSum):
    """Values that can be read, with the secret that only rounds of masked updates have."""

    def __init__(self, ring: Ring, secret: bytes) -> None:
        super().__init__(ring, capacity=20)
        self._secret = secret

    @property
    def noise_secret(self) -> bytes:
        """The round's."""
        return self._secret


def ring(noise: RingNoise | None) -> Ring:
    lane_bits = choose_lane_bits(8, 20, noise=0 if noise is None else noise.slack(20))
    return Ring.of((900, 100), bits=8, lane_bits=lane_bits, weight_cap=1, noise=noise, most=20)


def total_of(  # type: ignore[type-arg]
    noise: RingNoise, *, own: int, below: int = 0, secret: bytes = b"s" * 32
) -> tuple[np.ndarray, int]:
    arithmetic = ring(noise)
    leaf = Leaf(arithmetic, secret)
    for _ in range(own):
        leaf.add((np.full(1000, 3, dtype=np.int8), arithmetic.meta.encode_private(beyond=True)))
    if below:
        other = Leaf(arithmetic, b"o" * 32)
        for _ in range(below):
            other.add((np.full(1000, 3, dtype=np.int8), arithmetic.meta.encode_private(beyond=True)))
        leaf.merge(other.total((), Nothing()))
    partial = leaf.total((), Nothing())
    values = partial.values()
    assert partial.count == own + below
    return values - 3 * partial.count, int(partial.words[-1].astype(np.int64)) - partial.count


def test_a_revealed_sum_holds_the_noise() -> None:
    first, said = total_of(NOISE, own=5)
    assert first.std() == pytest.approx(40.0, rel=0.15)
    another, other = total_of(NOISE, own=5, secret=b"t" * 32)
    assert abs(np.corrcoef(first, another)[0, 1]) < 0.2
    assert abs(said) < 48
    assert abs(other) < 48
    again, _ = total_of(NOISE, own=5)
    assert np.array_equal(first, again), "two noised copies of one sum would average out"
    larger, _ = total_of(NOISE, own=6)
    assert abs(np.corrcoef(first, larger)[0, 1]) < 0.2


def test_every_leaf_adds_its_own_and_a_gateway_above_adds_none() -> None:
    both, _ = total_of(NOISE, own=3, below=4)
    assert both.std() == pytest.approx(40.0 * 2**0.5, rel=0.15)
    passed_on, _ = total_of(NOISE, own=0, below=4)
    assert passed_on.std() == pytest.approx(40.0, rel=0.15)


def test_other_rounds_stay_exact() -> None:
    exact, said = total_of(RingNoise(adaptive=True), own=4)
    assert not exact.any()
    assert said == 0
