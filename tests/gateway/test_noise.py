"""A leaf gateway's noise: in every sum that leaves it, in no other, and another one each time it is drawn."""

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


def ring(noise: RingNoise | None) -> Ring:
    lane_bits = choose_lane_bits(8, 20, noise=0 if noise is None else noise.slack(20))
    return Ring.of((900, 100), bits=8, lane_bits=lane_bits, weight_cap=1, noise=noise, most=20)


def total_of(noise: RingNoise, *, own: int, below: int = 0) -> tuple[np.ndarray, int]:  # type: ignore[type-arg]
    arithmetic = ring(noise)
    leaf = PlainSum(arithmetic, capacity=20)
    for _ in range(own):
        leaf.add((np.full(1000, 3, dtype=np.int8), arithmetic.meta.encode_private(beyond=True)))
    if below:
        other = PlainSum(arithmetic, capacity=20)
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
    again, other = total_of(NOISE, own=5)
    assert abs(np.corrcoef(first, again)[0, 1]) < 0.2
    assert abs(said) < 48
    assert abs(other) < 48


def test_every_leaf_adds_its_own_and_a_gateway_above_adds_none() -> None:
    both, _ = total_of(NOISE, own=3, below=4)
    assert both.std() == pytest.approx(40.0 * 2**0.5, rel=0.15)
    passed_on, _ = total_of(NOISE, own=0, below=4)
    assert passed_on.std() == pytest.approx(40.0, rel=0.15)


def test_other_rounds_stay_exact() -> None:
    exact, said = total_of(RingNoise(adaptive=True), own=4)
    assert not exact.any()
    assert said == 0
