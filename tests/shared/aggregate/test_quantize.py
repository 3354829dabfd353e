from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.aggregate.quantize import Grid, NonFiniteDeltaError, mean_delta, quantize


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def deltas(grid: Grid, seed: int, scale: float = 0.5) -> np.ndarray:
    clips = np.repeat(grid.clips, grid.sizes)
    return (rng(seed).standard_normal(grid.dimension) * clips * scale).astype(np.float32)


GRID = Grid(sizes=(40_000, 3, 70_000), clips=(0.01, 2.0, 1e-4), bits=4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9, 16])
def test_values_never_leave_the_range_whatever_the_delta(bits: int) -> None:
    grid = Grid((6,), (1.0,), bits)
    delta = np.array([1e30, -1e30, 1.0, -1.0, np.nextafter(1, 2), 0.0], dtype=np.float32)
    for seed in range(200):
        values = quantize(delta, grid, weight=1, rng=rng(seed)).values
        assert values.tolist() == [grid.limit, -grid.limit, grid.limit, -grid.limit, grid.limit, 0]
    assert values.dtype == (np.int8 if bits <= 8 else np.int16)


@pytest.mark.parametrize(("bits", "kind"), [(2, np.float32), (4, np.float32), (8, np.float64), (12, np.float32)])
def test_rounding_is_unbiased(bits: int, kind: type) -> None:
    grid = Grid((400,), (1.0,), bits)
    delta = rng(1).uniform(-1, 1, 400).astype(kind)
    draws, source = 2000, rng(2)
    total = np.zeros(400)
    for _ in range(draws):
        total += quantize(delta, grid, weight=1, rng=source).values
    exact = delta.astype(np.float64) * grid.limit
    # One draw is a Bernoulli variable between two levels: its standard deviation is at most one half.
    error = total / draws - exact
    assert np.abs(error).max() < 5 * 0.5 / math.sqrt(draws)
    assert abs(error.mean()) < 5 * 0.5 / math.sqrt(draws * 400)


def test_the_sum_of_many_devices_gives_the_weighted_mean_within_the_rounding_bound() -> None:
    grid = Grid(GRID.sizes, GRID.clips, bits=6, weight_cap=8)
    total = np.zeros(grid.dimension, dtype=np.int64)
    exact = np.zeros(grid.dimension)
    weights = [1, 8, 3, 5, 8, 2]
    for i, weight in enumerate(weights):
        delta = deltas(grid, i, scale=0.1)
        total += quantize(delta, grid, weight=weight, rng=rng(i)).values
        exact += weight * delta.astype(np.float64)
    mean = mean_delta(total, grid, weight=sum(weights))
    step = np.repeat(np.array(grid.clips) / grid.limit, grid.sizes)
    # Each contribution is off by less than one level of its *scaled* delta.
    bound = len(weights) * step / (sum(weights) / grid.weight_cap)
    assert (np.abs(mean - exact / sum(weights)) < bound).all()
    assert np.abs(mean - exact / sum(weights)).max() > 0


def test_a_device_with_little_weight_moves_the_sum_in_proportion() -> None:
    grid = Grid((10_000,), (1.0,), bits=8, weight_cap=10)
    delta = np.full(10_000, 0.5, dtype=np.float32)
    q = quantize(delta, grid, weight=1, rng=rng())
    assert q.values.mean() == pytest.approx(127 * 0.5 / 10, abs=0.05)
    assert q.log2_rms[0] == pytest.approx(math.log2(0.05), abs=1e-5)


def test_a_delta_too_large_for_its_square_is_still_clipped_and_counted() -> None:
    q = quantize(np.full(5, 1e30, dtype=np.float32), Grid((5,), (1.0,), bits=4), weight=1, rng=rng())
    assert q.values.tolist() == [7] * 5
    assert q.clipped == (5,)
    assert q.log2_rms == (math.inf,)


def test_a_hostile_weight_cannot_exceed_the_cap() -> None:
    for weight in (0, -1, 9):
        with pytest.raises(ValueError, match="weight"):
            quantize(deltas(GRID, 0), Grid(GRID.sizes, GRID.clips, 4, weight_cap=8), weight=weight, rng=rng())


def test_clip_counts_and_rms_are_reported_per_tensor() -> None:
    grid = Grid((4, 2, 3), (1.0, 1.0, 1.0), bits=4)
    delta = np.array([2.0, -2.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0])
    q = quantize(delta, grid, weight=1, rng=rng())
    assert q.clipped == (2, 0, 0)
    assert q.log2_rms[:2] == pytest.approx((0.5, 0.0))
    assert q.log2_rms[2] == pytest.approx(math.log2(1 / 7 / 8))
    assert q.residual is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 40_001, 109_999])
@pytest.mark.parametrize("bits", [4, 16])
def test_nan_and_infinity_are_refused_wherever_they_are(bad: float, at: int, bits: int) -> None:
    grid = Grid(GRID.sizes, GRID.clips, bits)
    delta = deltas(grid, 0)
    delta[at] = bad
    with pytest.raises(NonFiniteDeltaError):
        quantize(delta, grid, weight=1, rng=rng())
    residual = np.zeros(grid.dimension, dtype=np.float32)
    residual[at] = bad
    with pytest.raises(NonFiniteDeltaError):
        quantize(deltas(grid, 0), grid, weight=1, rng=rng(), residual=residual)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_is_sent_and_what_is_carried_add_up_to_the_delta(bits: int, stochastic: bool) -> None:
    grid = Grid(GRID.sizes, GRID.clips, bits)
    step = np.repeat(np.array(grid.clips) / grid.limit, grid.sizes)
    residual = np.zeros(grid.dimension, dtype=np.float32)
    sent, wanted = np.zeros(grid.dimension), np.zeros(grid.dimension)
    for i in range(5):
        delta = deltas(grid, i)
        q = quantize(delta, grid, weight=1, rng=rng(i), residual=residual, stochastic=stochastic)
        assert q.residual is not None
        residual = q.residual
        sent += q.values * step
        wanted += delta
    clips = np.repeat(grid.clips, grid.sizes)
    assert np.abs(sent + residual - wanted).max() < 1e-5 * clips.max()
    assert (np.abs(sent + residual - wanted) < 1e-5 * clips).all()


def test_inputs_are_left_alone_and_the_generator_alone_decides() -> None:
    delta, residual = deltas(GRID, 0), deltas(GRID, 1, 0.05)
    before = delta.copy(), residual.copy()
    first = quantize(delta, GRID, weight=1, rng=rng(7), residual=residual)
    again = quantize(delta, GRID, weight=1, rng=rng(7), residual=residual)
    other = quantize(delta, GRID, weight=1, rng=rng(8), residual=residual)
    assert np.array_equal(delta, before[0])
    assert np.array_equal(residual, before[1])
    assert np.array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)


def test_nearest_rounding_is_within_half_a_level() -> None:
    grid = Grid((1000,), (1.0,), bits=5)
    delta = rng(3).uniform(-1, 1, 1000)
    q = quantize(delta, grid, weight=1, rng=rng(), stochastic=False)
    assert np.abs(q.values - delta * grid.limit).max() <= 0.5 + 1e-5


@given(st.integers(2, 16), st.floats(1e-8, 1e8), st.integers(0, 2**32))
def test_scale_does_not_matter(bits: int, clip: float, seed: int) -> None:
    unit = Grid((50,), (1.0,), bits)
    scaled = Grid((50,), (clip,), bits)
    delta = rng(seed).standard_normal(50)
    a = quantize(delta, unit, weight=1, rng=rng(seed)).values.astype(int)
    b = quantize(delta * scaled.clips[0], scaled, weight=1, rng=rng(seed)).values.astype(int)
    assert np.abs(a - b).max() <= 1  # a product may round across a level
    assert np.count_nonzero(a - b) <= 2


def test_memory_stays_near_the_results() -> None:
    grid = Grid((500_000,), (0.01,), bits=4)
    delta, residual = deltas(grid, 0), np.zeros(500_000, dtype=np.float32)
    tracemalloc.start()
    q = quantize(delta, grid, weight=1, rng=rng(), residual=residual)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert q.residual is not None
    assert peak < q.values.nbytes + q.residual.nbytes + 1_000_000


@pytest.mark.parametrize(
    "arguments",
    [
        {"sizes": (), "clips": ()},
        {"sizes": (3,), "clips": (1.0, 2.0)},
        {"sizes": (0,), "clips": (1.0,)},
        {"sizes": (3,), "clips": (0.0,)},
        {"sizes": (3,), "clips": (math.nan,)},
        {"sizes": (3,), "clips": (1e-45,)},
        {"sizes": (3,), "clips": (1.0,), "bits": 1},
        {"sizes": (3,), "clips": (1.0,), "bits": 17},
        {"sizes": (3,), "clips": (1.0,), "weight_cap": 0},
    ],
)
def test_impossible_grids_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError):
        Grid(**{"bits": 4, **arguments})


def test_wrong_shapes_are_refused() -> None:
    grid = Grid((3,), (1.0,), bits=4)
    with pytest.raises(ValueError, match="delta"):
        quantize(np.zeros(4), grid, weight=1, rng=rng())
    with pytest.raises(ValueError, match="delta"):
        quantize(np.zeros(3, dtype=np.int64), grid, weight=1, rng=rng())
    with pytest.raises(ValueError, match="residual"):
        quantize(np.zeros(3), grid, weight=1, rng=rng(), residual=np.zeros(3))
    with pytest.raises(ValueError, match="average"):
        mean_delta(np.zeros(3, dtype=np.int64), grid, weight=0)
