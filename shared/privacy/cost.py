"""What a plan's noise is worth at least: enough to see through an epsilon that the noise does not earn.

The coordinator's accountant (dp-accounting, with SciPy) works out the epsilon that a plan promises. Devices and
gateways have neither, and no reason to believe a coordinator that noise is to protect them from; so they check the
promise with what Python has. `docs/privacy.md` ("Accounting") has the arguments.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, Protocol

from fleetfed.shared.wire.privacy import Mechanism, Privacy

FLAG_SENSITIVITY: Final = 1.0
"""What one device says of its clip is +1 or -1; without it, 0."""
ORDERS: Final = (*range(2, 513), 1024, 2048, 4096)
"""Orders of the Renyi divergence: whole ones, since the theorem on Skellam noise is stated for no others."""
_ROUNDING: Final = 2.5
"""Deviation of the rounding that makes a discrete Gaussian of a continuous one, in levels."""
COEFFICIENT: Final = 1 << 16
"""Units of the matrix' coefficients: whole numbers of them, so that correlated noise is exact."""
_FINEST: Final = 16
_WIDTH: Final = 27
"""Bits of a deviation of correlated noise: sixteen deviations fit 32 bits."""
MOST_CORRELATED: Final = float(1 << _WIDTH)
"""Widest correlated noise, in levels."""
_SLACK: Final = 1e-4
"""Part by which a promise may be off: accountants stop their root finding somewhere."""
_FAR: Final = 30.0
"""Deviations from which on the tail of a Gaussian is taken from its series."""


class Parameters(Protocol):
    """What the cost of Gaussian noise depends on: a plan's `Privacy`, or a segment of the coordinator's account."""

    @property
    def mechanism(self) -> Mechanism: ...  # noqa: D102
    @property
    def clip(self) -> float: ...  # noqa: D102
    @property
    def noise_multiplier(self) -> float: ...  # noqa: D102
    @property
    def band(self) -> int: ...  # noqa: D102
    @property
    def flag_noise(self) -> float: ...  # noqa: D102


def continuous(sigma: float) -> float:
    """The variance of the continuous Gaussian that a discrete one of parameter ``sigma`` is worth."""
    # Below that there is no such Gaussian, and the plan is refused anyway (`mechanism.LEAST_SIGMA`).
    return max(sigma * sigma - _ROUNDING * _ROUNDING, 1e-9)


@lru_cache(maxsize=8)
def coefficients(band: int) -> tuple[float, ...]:
    """The first column of the banded square-root matrix: ``band`` numbers, the first of them 1, in units of 2**-16."""
    exact, found = 1.0, [1.0]
    for j in range(1, band):
        exact *= (2 * j - 1) / (2 * j)
        found.append(round(exact * COEFFICIENT) / COEFFICIENT)
    return tuple(found)


@lru_cache(maxsize=8)
def column_square(band: int, slack: float = 0.0) -> float:
    """Squared norm of a column: what one participation adds to the squared sensitivity, for a clip of 1.

    Args:
        band: of the matrix.
        slack: what rounding adds to the norm of every element but the first.
    """
    return 1.0 + math.fsum((c + slack) ** 2 for c in coefficients(band)[1:])


def fineness(sigma: float) -> int:
    """In how many parts of a level correlated noise of a deviation of ``sigma`` levels comes: a power of two."""
    return 1 << max(0, min(_FINEST, _WIDTH - math.ceil(math.log2(sigma))))


def gaussian_precision(given: Parameters, dimension: int) -> float:
    """Squared sensitivity over variance of all that is Gaussian in one participation; 0 for none."""
    if given.mechanism is Mechanism.SKELLAM:
        return 0.0
    sigma = given.noise_multiplier * given.clip
    if given.mechanism is Mechanism.MATRIX:
        # What is taken back is rounded to the grid of the noise: in two fleets that differ by a device, by at most one
        # step more or less in each coordinate.
        fine = fineness(sigma)
        slack = math.sqrt(dimension) / (fine * given.clip)
        return (given.clip * fine) ** 2 * column_square(given.band, slack) / continuous(sigma * fine)
    each = given.clip**2 / continuous(sigma)
    if given.flag_noise:
        each += FLAG_SENSITIVITY**2 / continuous(2 * given.flag_noise)
    return each


def skellam_bounds(l2: float, dimension: int, variance: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two bounds of the Renyi divergence of one Skellam release (Agarwal et al. 2021, "The Skellam Mechanism").

    Theorem 3.5, for integer vectors.

    Args:
        l2: sensitivity, in levels.
        dimension: coordinates.
        variance: of the noise that is certain, in squared levels.

    Returns:
        Twice ``(rho, xi)``: the divergence of the whole order ``a`` is at most ``rho * a + xi``.
    """
    l1 = min(math.sqrt(dimension) * l2, l2 * l2)
    rho, square = l2 * l2 / (2 * variance), variance * variance
    return (
        (rho + l2 * l2 / (2 * square), max(0.0, (6 * l1 - l2 * l2) / (4 * square))),
        (rho, 1.5 * l1 / variance),
    )


Cost = tuple[float, ...]
"""What participations cost, in numbers that add up; empty for nothing.

The precision of all Gaussian noise, then ``rho`` and ``xi`` of either bound of all Skellam noise.
"""


def participation(privacy: Privacy, dimension: int) -> Cost:
    """The cost of one participation.

    Args:
        privacy: of the plan.
        dimension: coordinates of a contribution.
    """
    if privacy.mechanism is not Mechanism.SKELLAM:
        return gaussian_precision(privacy, dimension), 0.0, 0.0, 0.0, 0.0
    values = skellam_bounds(privacy.clip, dimension, (privacy.noise_multiplier * privacy.clip) ** 2)
    flags = skellam_bounds(FLAG_SENSITIVITY, 1, (2 * privacy.flag_noise) ** 2) if privacy.flag_noise else ((0, 0),) * 2
    bounds = [value + flag for both in zip(values, flags, strict=True) for value, flag in zip(*both, strict=True)]
    return 0.0, *bounds


def together(*costs: Cost) -> Cost:
    """The cost of all of these."""
    return tuple(math.fsum(each) for each in zip(*(cost for cost in costs if cost), strict=True))


def within(cost: Cost, epsilon: float, delta: float) -> bool:
    """Whether a cost is within a budget, as far as the theorems tell."""
    if not cost:
        return True
    epsilon = epsilon * (1 + _SLACK) + 1e-6
    precision, *bounds = cost
    if not any(bounds):
        return gaussian_delta(math.sqrt(precision), epsilon) <= delta
    return min(_renyi(precision / 2 + bounds[i], bounds[i + 1], delta) for i in (0, 2)) <= epsilon


def check_promise(privacy: Privacy, dimension: int) -> None:
    """Refuse a plan whose noise does not earn the epsilon that it promises.

    Args:
        privacy: of the plan.
        dimension: coordinates of a contribution.

    Raises:
        ValueError: the promise is better than any theorem that this program knows.
    """
    cost = tuple(privacy.max_participations * each for each in participation(privacy, dimension))
    if not within(cost, privacy.epsilon, privacy.delta):
        raise ValueError(
            f"noise of {privacy.noise_multiplier:g} clips over {privacy.max_participations} participations does not "
            f"earn epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
        )


def gaussian_delta(ratio: float, epsilon: float) -> float:
    """The delta of a Gaussian of such a ratio of sensitivity to deviation: exact (Balle and Wang 2018, theorem 8)."""
    near, far = epsilon / ratio - ratio / 2, epsilon / ratio + ratio / 2
    return math.exp(_log_tail(near)) - math.exp(epsilon + _log_tail(far))


def _log_tail(x: float) -> float:
    """Logarithm of the chance that a standard Gaussian exceeds ``x``."""
    if x < _FAR:
        return math.log(math.erfc(x / math.sqrt(2)) / 2)
    square = x * x
    return -square / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log1p(-1 / square + 3 / square**2)


def _renyi(rho: float, xi: float, delta: float) -> float:
    """The least epsilon of a divergence of ``rho * a + xi`` (Canonne, Kamath and Steinke 2020, proposition 12)."""
    if not delta:
        return math.inf
    found = math.inf
    for order in ORDERS:
        divergence = rho * order + xi
        if delta**2 + math.expm1(-divergence) > 0:
            return 0.0
        found = min(found, divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return max(found, 0.0)
