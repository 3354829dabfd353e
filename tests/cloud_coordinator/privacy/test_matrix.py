"""Correlated noise: what the band takes back, and that its state is kept and read as it was."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from fleetfed.cloud_coordinator.privacy.matrix import (
    MatrixState,
    Vector,
    add_noise,
    next_noise,
    prefix_rmse,
)
from fleetfed.shared.errors import StorageError
from fleetfed.shared.privacy import mechanism
from fleetfed.shared.privacy.cost import (
    COEFFICIENT,
    coefficients,
    column_square,
    continuous,
    fineness,
    gaussian_precision,
)
from fleetfed.shared.wire.privacy import Mechanism, Privacy


def run(rounds: int, *, band: int, sigma: float = 100.0, dimension: int = 4000) -> list[Vector]:
    """The noise of so many rounds in parts of a level, each from the state that the one before left."""
    state, made = MatrixState(mechanism="m"), []
    for t in range(rounds):
        state = MatrixState.decode(state.encode())
        noise = next_noise(state.history, dimension=dimension, sigma=sigma, band=band, key=t.to_bytes(32, "big"))
        state = MatrixState(mechanism="m", history=(noise, *state.history)[: band - 1])
        made.append(noise)
    return made


def test_the_matrix_times_the_noise_is_fresh_noise() -> None:
    band, noise = 4, run(12, band=4)
    c = coefficients(band)
    fresh = [sum(c[j] * noise[t - j] for j in range(min(band, t + 1))) for t in range(12)]
    for t, vector in enumerate(fresh):
        assert vector.std() == pytest.approx(100.0 * fineness(100.0), rel=0.05)
        for other in fresh[:t]:
            assert abs(np.corrcoef(vector, other)[0, 1]) < 0.08


@pytest.mark.parametrize("band", [1, 2, 8])
def test_prefix_sums_deviate_as_the_formula_says(band: int) -> None:
    prefix = np.cumsum(np.stack(run(16, band=band)).astype(np.int64), axis=0) / fineness(100.0)
    assert np.sqrt((prefix**2).mean()) == pytest.approx(100 * prefix_rmse(16, band), rel=0.05)


def test_a_column_is_what_a_participation_costs() -> None:
    assert coefficients(4) == (1.0, 0.5, 0.375, 0.3125)
    assert column_square(1) == column_square(1, slack=0.1) == 1.0
    assert column_square(3) == 1 + 0.25 + 0.375**2
    assert column_square(3, slack=0.1) == pytest.approx(1 + 0.6**2 + 0.475**2)
    assert all((c * COEFFICIENT).is_integer() for c in coefficients(200))


@pytest.mark.parametrize("sigma", [4.0, 300.0, 1e6])
def test_in_two_fleets_that_differ_by_a_device_the_fresh_noise_differs_by_no_more_than_is_accounted(
    sigma: float,
) -> None:
    """What somebody who knows all but one device can tell, exactly, with every rounding.

    The released sums fix the noise under either fleet, and with it each round's fresh noise; the length of the
    difference over all rounds, in deviations, is what a Gaussian release of that sensitivity shows.
    """
    rng = np.random.default_rng(7)
    rounds, band, dimension, fine = 12, 4, 600, fineness(sigma)
    private = Privacy(
        mechanism=Mechanism.MATRIX,
        clip=200.0,
        noise_multiplier=sigma / 200.0,
        max_participations=3,
        min_separation=band,
        band=band,
        epsilon=1.0,
        delta=1e-6,
    )
    x = np.zeros((rounds, dimension), dtype=np.int64)
    for t in (0, 4, 9):
        direction = rng.normal(size=dimension)
        x[t] = np.trunc(200.0 * direction / np.linalg.norm(direction))
    released = [x[t] * fine + noise for t, noise in enumerate(run(rounds, band=band, sigma=sigma, dimension=dimension))]

    def fresh(content: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
        noise = [each - content[t] * fine for t, each in enumerate(released)]
        found = []
        for t in range(rounds):
            history = [each.astype(np.int32) for each in noise[max(t - band + 1, 0) : t][::-1]]
            found.append(noise[t] - _taken(history, dimension, band))
        return found

    with_it, without = fresh(x), fresh(np.zeros_like(x))
    for t in range(rounds):
        assert np.array_equal(with_it[t], mechanism.gaussian(dimension, sigma * fine, t.to_bytes(32, "big")))
    square = sum(float(((a - b) ** 2).sum()) for a, b in zip(with_it, without, strict=True)) / continuous(sigma * fine)
    accounted = 3 * gaussian_precision(private, dimension)
    assert 0.8 * accounted < square <= accounted


def _taken(history: list[Vector], dimension: int, band: int) -> np.ndarray:  # type: ignore[type-arg]
    key, sigma = bytes(32), 4.0
    drawn = mechanism.gaussian(dimension, sigma * fineness(sigma), key)
    return next_noise(history, dimension=dimension, sigma=sigma, band=band, key=key).astype(np.int64) - drawn


def test_two_participations_a_band_apart_meet_disjoint_rows() -> None:
    """The sensitivity: the true matrix, any pattern that keeps the separation, never more than the formula."""
    rounds, band = 24, 5
    c = np.zeros((rounds, rounds))
    for j, value in enumerate(coefficients(band)):
        c += value * np.eye(rounds, k=-j)
    rng = np.random.default_rng(1)
    for _ in range(200):
        at, pattern = int(rng.integers(0, 6)), []
        while at < rounds:
            pattern.append(at)
            at += band + int(rng.integers(0, 4))
        directions = rng.normal(size=(len(pattern), 7))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        x = np.zeros((rounds, 7))
        x[pattern] = directions
        assert np.linalg.norm(c @ x) ** 2 <= len(pattern) * column_square(band) + 1e-9


def test_the_same_key_and_history_give_the_same_noise() -> None:
    assert all(np.array_equal(a, b) for a, b in zip(run(6, band=3), run(6, band=3), strict=True))


def test_noised_sums_are_whole_levels() -> None:
    noise = run(1, band=2, dimension=50)[0]
    noised = add_noise(np.arange(50), noise, sigma=100.0)
    assert noised.dtype == np.int64
    assert np.abs(noised - np.arange(50) - noise / fineness(100.0)).max() <= 0.5


def test_a_state_of_the_format_before_begins_anew() -> None:
    old = msgpack.packb([1, "m", 7, [np.zeros(5, dtype="<f4").tobytes()]])
    assert MatrixState.decode(old).history == ()
    assert MatrixState.decode(old).mechanism != "m"


def test_a_damaged_state_is_refused() -> None:
    for data in (b"", b"\x93\x01\x02", b"\x94\x03\xa1m\x01\x90", MatrixState(mechanism="m").encode()[:-1]):
        with pytest.raises(StorageError):
            MatrixState.decode(data)
