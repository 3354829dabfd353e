"""Robust means over buckets: what bad buckets can do stays bounded, and the same buckets give the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.training.robust import Robust, RobustRule, geometric_median, trimmed_mean
from fleetfed.cloud_coordinator.training.sums import RoundSum, decode_parts, encode_parts
from fleetfed.shared.aggregate.accumulator import Partial, Ring
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.quantize import Grid, mean_delta
from fleetfed.shared.errors import StorageError

SIZES = (40_000, 3)
RING = Ring.of(SIZES, bits=8, lane_bits=choose_lane_bits(8, 100), weight_cap=10)
GRID = Grid(SIZES, (0.5, 0.25), 8, 10)
RULES: Any = [lambda vectors: trimmed_mean(vectors, trim=0.3), lambda vectors: geometric_median(vectors, iterations=50)]


def honest(count: int, size: int = 20_000) -> list[Any]:
    rng = np.random.default_rng(1)
    centre = rng.normal(size=size)
    return [centre + 0.1 * rng.normal(size=size) for _ in range(count)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "bad",
    [
        lambda vector: np.full_like(vector, 1e9),
        lambda vector: np.random.default_rng(2).normal(size=vector.size) * 1e3,
        lambda vector: vector * 1000,
        lambda vector: -vector,
    ],
    ids=["constant", "garbage", "scaled", "flipped"],
)
def test_a_third_of_bad_buckets_does_not_move_the_mean_far(rule: Any, bad: Any) -> None:
    good = honest(7)
    attacked = rule([*good, *(bad(vector) for vector in honest(3))])
    mean = np.mean(good, axis=0)
    # As far as one honest bucket is from the others, on average.
    spread = np.mean([np.linalg.norm(vector - mean) for vector in good])
    assert np.linalg.norm(attacked - mean) < spread
    plain = np.mean([*good, *(bad(vector) for vector in honest(3))], axis=0)
    assert np.linalg.norm(attacked - mean) < np.linalg.norm(plain - mean) / 5


@pytest.mark.parametrize("rule", RULES)
def test_buckets_that_agree_give_what_they_agree_on(rule: Any) -> None:
    (vector,) = honest(1)
    assert np.allclose(rule([vector] * 5), vector, rtol=0, atol=1e-12)
    assert np.allclose(rule([vector]), vector, rtol=0, atol=1e-12)


@given(st.permutations(range(6)), st.floats(0, 0.5))
def test_a_trimmed_mean_lies_between_the_middle_values_whatever_the_order(order: list[int], trim: float) -> None:
    rows = np.random.default_rng(3).normal(size=(6, 50))
    found = trimmed_mean([rows[i] for i in order], trim=trim)
    assert np.array_equal(found, trimmed_mean(list(rows), trim=trim))
    ordered = np.sort(rows, axis=0)
    assert (found >= ordered[1] - 1e-12).all()
    assert (found <= ordered[-2] + 1e-12).all()


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    vectors = [np.array(point, dtype=float) for point in [(0, 0), (4, 0), (0, 3), (10, 10), (1, 1)]]

    def cost(point: Any) -> float:
        return sum(float(np.linalg.norm(vector - point)) for vector in vectors)

    best = cost(geometric_median(vectors, iterations=200))
    around = np.random.default_rng(4).normal(size=(500, 2)) + geometric_median(vectors, iterations=200)
    assert best <= min(cost(point) for point in around) + 1e-6


def test_one_bucket_and_two_are_simply_averaged_by_the_trimmed_mean() -> None:
    a, b = honest(2)
    assert np.array_equal(trimmed_mean([a], trim=0.4), a)
    assert np.allclose(trimmed_mean([a, b], trim=0.4), (a + b) / 2, rtol=0, atol=1e-15)


def partial(seed: int, count: int) -> Partial:
    words = RING.layout.zeros()
    rng = np.random.default_rng(seed)
    for _ in range(count):
        values = rng.integers(-127, 128, size=sum(SIZES)).astype(np.int8)
        weight = int(rng.integers(1, 11))
        meta = RING.meta.encode(
            Contribution(weight=weight, examples=5, training_loss=0.5, clipped=(0, 0), log2_rms=(-3.0, -3.0))
        )
        words += RING.layout.pack(values, meta)
    return Partial(RING, words, count)


def test_the_rules_see_bucket_means_in_the_units_of_the_model() -> None:
    parts = tuple(partial(seed, 4) for seed in range(5))
    total = RoundSum(RING, capacity=100, apart=True)
    total.add("b", parts[3:])
    total.add("a", parts[:3])
    summed, apart = total.report()
    assert [part.words.tobytes() for part in apart] == [part.words.tobytes() for part in parts]
    weight = summed.meta().weight
    none = RobustRule().mean(summed, GRID, weight=weight)
    assert np.array_equal(none, mean_delta(summed.values(), GRID, weight=weight))
    means = [mean_delta(part.values(), GRID, weight=part.meta().weight) for part in parts]
    for rule, expected in (
        (Robust.TRIMMED_MEAN, trimmed_mean(means, trim=0.2)),
        (Robust.GEOMETRIC_MEDIAN, geometric_median(means, iterations=9)),
    ):
        found = RobustRule(rule=rule, trim=0.2, iterations=9, parts=apart).mean(summed, GRID, weight=weight)
        assert np.array_equal(found, expected)


def test_sums_come_back_from_the_database_as_they_were() -> None:
    parts = (partial(1, 3), partial(2, 5))
    found = decode_parts(encode_parts(parts), RING)
    assert [(part.count, part.words.tobytes()) for part in found] == [
        (part.count, part.words.tobytes()) for part in parts
    ]
    assert decode_parts(encode_parts(()), RING) == ()
    for damaged in (b"", b"\xc1", encode_parts(parts)[:-9], b"\x91\x91\x01"):
        with pytest.raises(StorageError, match="damaged"):
            decode_parts(damaged, RING)
