"""A contribution's norm is bounded in integers, whatever the delta."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.quantize import Grid, NonFiniteDeltaError
from fleetfed.shared.privacy import clipping
from fleetfed.shared.privacy.clipping import clip_and_round, rounded_norm, squared_norm, unrounded_norm


@given(
    dimension=st.integers(1, 2000),
    per_root=st.floats(1.2, 20),
    length=st.floats(0.01, 100),
    seed=st.integers(0, 2**32),
    sparse=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_vector_is_longer_than_the_clip(
    dimension: int, per_root: float, length: float, seed: int, sparse: bool
) -> None:
    rng = np.random.default_rng(seed)
    clip = max(4.0, per_root * math.sqrt(dimension))
    grid = Grid((dimension,), (1.0,), 12)
    delta = rng.normal(size=dimension)
    if sparse:
        delta[rng.random(dimension) < 0.95] = 0
    delta *= length * clip / grid.limit / max(float(np.linalg.norm(delta)), 1e-9)
    made = clip_and_round(delta, grid, clip=clip, rng=rng)
    assert squared_norm(made.values) <= Fraction(clip) ** 2
    assert int(np.abs(made.values).max()) <= grid.limit
    assert made.beyond == (float(np.linalg.norm(delta)) * grid.limit > unrounded_norm(clip, dimension))


@given(dimension=st.integers(1, 10**8), per_root=st.floats(1.0, 1000))
def test_the_two_bounds_are_inverse(dimension: int, per_root: float) -> None:
    norm = max(1.0, per_root * math.sqrt(dimension))
    assert unrounded_norm(rounded_norm(norm, dimension), dimension) == pytest.approx(norm, rel=1e-6)


def test_the_published_inflations() -> None:
    """Section 7.2 of the specification: 2**20 values, 200 devices, z = 5."""
    dimension = 2**20
    for inflation, per_root in ((1.6, 0.4), (1.048, 1.6), (1.0001, 45.0)):
        norm = per_root * math.sqrt(dimension)
        assert rounded_norm(norm, dimension) / norm == pytest.approx(inflation, rel=0.005)


def test_a_clip_that_rounding_would_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding alone"):
        unrounded_norm(10.0, 2**20)


def test_rounding_is_unbiased_and_keeps_short_deltas_as_they_are() -> None:
    grid = Grid((300, 200), (1.0, 0.5), 10)
    rng = np.random.default_rng(3)
    delta = rng.normal(size=500) * 1e-2
    total, runs = np.zeros(500), 300
    for _ in range(runs):
        made = clip_and_round(delta, grid, clip=1000.0, rng=rng)
        assert not made.beyond
        total += made.values
    expected = delta * np.repeat([511 / 1.0, 511 / 0.5], [300, 200])
    assert np.abs(total / runs - expected).max() < 5 * 0.5 / math.sqrt(runs)


def test_a_long_delta_keeps_its_direction() -> None:
    grid = Grid((1000,), (1.0,), 12)
    delta = np.random.default_rng(4).normal(size=1000).astype(np.float32) * 50
    made = clip_and_round(delta, grid, clip=800.0, rng=np.random.default_rng(5))
    assert made.beyond
    cosine = np.dot(made.values, delta) / np.linalg.norm(made.values) / np.linalg.norm(delta)
    assert cosine > 0.999
    assert 0.99 * 800 < math.sqrt(squared_norm(made.values)) <= 800


def test_after_all_retries_it_rounds_towards_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlucky(np.random.Generator):
        def random(self, *_: object, **__: object) -> float:  # type: ignore[override]
            return 0.999999

    monkeypatch.setattr(clipping, "_RETRIES", 3)
    grid = Grid((400,), (1.0,), 8)
    delta = np.full(400, 0.5)
    made = clip_and_round(delta, grid, clip=24.0, rng=Unlucky(np.random.PCG64(1)))
    assert squared_norm(made.values) <= 24**2


_UNLUCKY = """
import numpy as np
from fleetfed.shared.aggregate.quantize import Grid
from fleetfed.shared.privacy import clipping

clipping._RETRIES = 0
grid = Grid((400,), (1.0,), 8)
made = clipping.clip_and_round(np.full(400, 0.5), grid, clip=24.0, rng=np.random.default_rng(1))
print(clipping.squared_norm(made.values), int(made.values.min()), int(made.values.max()))
"""


def test_the_bound_holds_where_python_leaves_assertions_out() -> None:
    """`python -O` removes assertions with all that they call: nothing that privacy rests on may be in one."""
    told = subprocess.run([sys.executable, "-O", "-c", _UNLUCKY], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["400", "1", "1"]


def test_infinity_is_refused() -> None:
    grid = Grid((3,), (1.0,), 8)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteDeltaError):
            clip_and_round(np.array([1.0, bad, 0.0]), grid, clip=50.0, rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match="floats of"):
        clip_and_round(np.zeros(2), grid, clip=50.0, rng=np.random.default_rng(1))
