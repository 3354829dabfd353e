"""The samplers: against the exact distributions, with fixed keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fleetfed.shared.privacy import noise, tables
from fleetfed.shared.privacy.tables import Table

KEY = bytes(range(32))
N = 1 << 17


def gaussian_pmf(k: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    span = np.arange(-int(20 * sigma) - 5, int(20 * sigma) + 6)
    total = np.exp(-(span**2) / (2 * sigma**2)).sum()
    weights: NDArray[np.float64] = np.exp(-(k**2) / (2 * sigma**2)) / total
    return weights


def skellam_pmf(k: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    """By summing over Poisson pairs, which is nothing that the table does."""
    mean = sigma**2 / 2
    most = int(mean + 30 * math.sqrt(mean) + 40)
    counts = np.arange(most)
    poisson = np.exp(-mean + counts * math.log(mean) - np.array([math.lgamma(c + 1) for c in counts]))
    both = np.convolve(poisson, poisson[::-1])
    found: NDArray[np.float64] = both[k + most - 1]
    return found


def chi_square(
    samples: NDArray[np.int64], pmf: Callable[[NDArray[np.int64]], NDArray[np.float64]], sigma: float
) -> float:
    """Standard deviations by which the statistic misses its mean."""
    bins = np.arange(-int(4 * sigma) - 1, int(4 * sigma) + 2)
    expected = pmf(bins) * samples.size
    observed = np.bincount(np.clip(samples - bins[0] + 1, 0, bins.size + 1), minlength=bins.size + 2)[1:-1]
    use = expected > 20
    rest_expected, rest_observed = samples.size - expected[use].sum(), samples.size - observed[use].sum()
    statistic = ((observed[use] - expected[use]) ** 2 / expected[use]).sum()
    if rest_expected > 5:
        statistic += (rest_observed - rest_expected) ** 2 / rest_expected
    freedom = int(use.sum())
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 8.0, 64.0])
def test_discrete_gaussians_are_distributed_as_they_should(sigma: float) -> None:
    samples = noise.discrete_gaussian(N, sigma, KEY)
    assert abs(chi_square(samples, lambda k: gaussian_pmf(k, sigma), sigma)) < 4


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 8.0, 30.0])
def test_skellam_noise_is_distributed_as_it_should(sigma: float) -> None:
    samples = noise.skellam(N, sigma, KEY)
    assert abs(chi_square(samples, lambda k: skellam_pmf(k, sigma), sigma)) < 4


@pytest.mark.parametrize("sample", [noise.discrete_gaussian, noise.skellam])
@pytest.mark.parametrize("sigma", [3.0, 100.0, 8192.0, 20_000.0])
def test_mean_and_variance(sample: Callable[[int, float, bytes], NDArray[np.int64]], sigma: float) -> None:
    samples = sample(N, sigma, KEY).astype(np.float64)
    assert abs(samples.mean()) < 5 * sigma / math.sqrt(N)
    assert samples.var() == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / N))


def test_wide_noise_is_no_coarser_than_narrow_noise() -> None:
    samples = noise.discrete_gaussian(N, 5e6, KEY)
    assert samples.std() == pytest.approx(5e6, rel=0.02)
    # The sum x + 1024 y must fill the gaps: every residue occurs, equally often.
    residues = np.bincount(samples % 1024, minlength=1024)
    assert abs(((residues - N / 1024) ** 2 / (N / 1024)).sum() - 1023) < 5 * math.sqrt(2 * 1023)


def test_a_sum_of_shares_is_one_skellam() -> None:
    total = sum(noise.skellam(N, 4.0, bytes([i] * 32)) for i in range(9))
    assert isinstance(total, np.ndarray)
    assert abs(chi_square(total, lambda k: skellam_pmf(k, 12.0), 12.0)) < 4


def test_the_same_key_gives_the_same_noise_and_another_another() -> None:
    for sample in (noise.discrete_gaussian, noise.skellam):
        once = sample(1000, 50.0, KEY)
        assert np.array_equal(once, sample(1000, 50.0, KEY))
        # A longer vector begins with the shorter one: chunks change nothing.
        assert np.array_equal(once, sample(40_000, 50.0, KEY)[:1000])
        other = sample(1000, 50.0, bytes(32))
        assert abs(np.corrcoef(once, other)[0, 1]) < 0.2


def test_what_cannot_be_drawn_is_refused() -> None:
    for sample in (noise.discrete_gaussian, noise.skellam):
        for sigma in (0.0, 1e-3, 1e13, math.nan, math.inf):
            with pytest.raises(ValueError, match="sigma"):
                sample(1, sigma, KEY)


@pytest.mark.parametrize("build", [tables.discrete_gaussian, tables.skellam])
def test_a_table_reaches_as_far_as_128_bits_do(build: Callable[[float], Table]) -> None:
    table = build(8.0)
    thresholds = [int(high) << 64 | int(low) for high, low in zip(table.high, table.low, strict=True)][:-1]
    assert thresholds == sorted(thresholds)
    # The last threshold leaves a tail of less than 2**-120, which a 64-bit table could not see.
    assert 0 < (1 << 128) - thresholds[-1] < 1 << 8
    assert table.length > 8.0 * 12.5


def test_ties_are_decided_by_the_lower_half() -> None:
    table = tables.discrete_gaussian(8.0)
    for place in (0, 5, table.length - 1):
        high, low = int(table.high[place]), int(table.low[place])
        _, ties = noise.magnitudes(table, np.array([high, 1], dtype=np.uint64))
        assert list(ties) == [0]
        below = sum(1 for h, x in zip(table.high, table.low, strict=True) if (int(h), int(x)) <= (high, low))
        assert table.magnitude(high << 64 | low) == below
        if low:
            assert table.magnitude(high << 64 | (low - 1)) == below - 1


def test_the_fast_count_is_the_plain_one() -> None:
    rng = np.random.default_rng(1)
    uniform = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    uniform[:500] = np.uint64(2**64 - 1) - rng.integers(0, 2**40, 500, dtype=np.uint64)
    for sigma in (0.3, 3.0, 700.0, 8192.0):
        table = tables.discrete_gaussian(sigma)
        found, _ = noise.magnitudes(table, uniform)
        assert np.array_equal(found, np.searchsorted(table.high[:-1], uniform, side="right"))
    assert noise.magnitudes(table, np.array([2**64 - 1], dtype=np.uint64))[1].tolist() == [0]


def test_a_tie_in_a_vector_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.discrete_gaussian(8.0)

    def rigged(words: NDArray[np.uint64], key: bytes) -> None:
        words[:] = table.high[3]

    monkeypatch.setattr(noise, "add_mask", rigged)
    exact = table.magnitude(int(table.high[3]) << 64 | int(table.high[3]))
    assert set(np.abs(noise.discrete_gaussian(100, 8.0, KEY))) == {exact}
