"""Cumulative tables of integer distributions to 128 bits, by integer arithmetic alone.

A table holds, for each magnitude ``m``, the threshold ``round(2**128 * P(|X| <= m))``. Sampling is counting the
thresholds that a uniform 128-bit number reaches (`noise`); the sign is one more fair bit. So a sample's distribution is
within ``length * 2**-129`` of the exact one in total variation: for a vector of 2**20 coordinates about 2**-95, which
no delta in use can see. 64 bits would not do: 5e-11 per vector, multiplied by ``1 + exp(epsilon)`` and the number of
devices, exceeds a delta of 1e-6 within the first round.

Both distributions come from recurrences on scaled integers, which need nothing but Python: a device has no mpmath.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

UNIFORM_BITS: Final = 128
GUIDE_BITS: Final = 16
LEAST_SIGMA: Final = 0.05
MOST_SIGMA: Final = 8192.0
"""Widest distribution that gets a table: 1.2e5 thresholds, 2 MB."""
_SCALE: Final = 256
_TAIL: Final = 140
"""Bits below the largest probability at which a tail is cut: beneath what 128 bits can say."""
_CONTEXT: Final = Context(prec=110)
_LOW: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Thresholds of one distribution's magnitudes.

    Attributes:
        high: upper 64 bits of each threshold in ascending order, uint64, with a last one that is never passed.
        low: lower 64 bits, uint64, as long.
        guide: how many thresholds lie wholly below each number of `GUIDE_BITS` bits, int32.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.int32]

    @property
    def length(self) -> int:
        """Thresholds."""
        return len(self.high) - 1

    def magnitude(self, uniform: int) -> int:
        """The magnitude that one 128-bit number means."""
        high = np.uint64(uniform >> 64)
        first = int(np.searchsorted(self.high[:-1], high, side="left"))
        last = int(np.searchsorted(self.high[:-1], high, side="right"))
        return first + int(np.searchsorted(self.low[first:last], np.uint64(uniform & _LOW), side="right"))


def _table(weights: list[int]) -> Table:
    """The table of magnitudes with these weights."""
    total, reached, thresholds = sum(weights), 0, []
    for weight in weights:
        reached += weight
        threshold = ((reached << UNIFORM_BITS) + total // 2) // total
        if threshold >> UNIFORM_BITS:
            break
        thresholds.append(threshold)
    high = np.array([threshold >> 64 for threshold in thresholds] + [_LOW], dtype=np.uint64)
    low = np.array([threshold & _LOW for threshold in thresholds] + [_LOW], dtype=np.uint64)
    bins = np.arange(1 << GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - GUIDE_BITS)
    guide: Any = np.searchsorted(high[:-1], bins, side="left").astype(np.int32)
    return Table(high=high, low=low, guide=guide)


def _check(sigma: float) -> None:
    if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
        raise ValueError(f"sigma must be in {LEAST_SIGMA:g}..{MOST_SIGMA:g} for a table, not {sigma}")


@lru_cache(maxsize=8)
def discrete_gaussian(sigma: float) -> Table:
    """The table of ``P(k) ~ exp(-k**2 / (2 sigma**2))`` (Canonne, Kamath, Steinke 2020).

    Raises:
        ValueError: sigma is beyond what a table is made for.
    """
    _check(sigma)
    exact = Fraction(sigma) ** 2 * 2
    with_scale = _CONTEXT.multiply(
        _CONTEXT.exp(_CONTEXT.divide(Decimal(-exact.denominator), Decimal(exact.numerator))), Decimal(1 << _SCALE)
    )
    # p(k + 1) / p(k) = q**(2k + 1): the ratio itself falls by q**2 each time.
    ratio = int(with_scale)
    fall = ratio * ratio >> _SCALE
    weight, weights = 1 << _SCALE, [1 << (_SCALE - 1)]
    while weight >> (_SCALE - _TAIL):
        weight = weight * ratio >> _SCALE
        ratio = ratio * fall >> _SCALE
        weights.append(weight)
    return _table(weights)


@lru_cache(maxsize=8)
def skellam(sigma: float) -> Table:
    """The table of the difference of two Poisson variables of mean ``sigma**2 / 2`` each.

    Raises:
        ValueError: sigma is beyond what a table is made for.
    """
    _check(sigma)
    variance = Fraction(sigma) ** 2
    # P(k) ~ I_k(variance), by Miller's backward recurrence I_{k-1} = I_{k+1} + (2k / variance) I_k, normalised at the
    # end. It begins far enough out that what it begins with does not matter.
    at = int(16 * sigma) + 64
    above, here, weights = 0, 1 << _SCALE, []
    numerator, denominator = variance.numerator, variance.denominator
    for k in range(at, 0, -1):
        weights.append(here)
        above, here = here, above + 2 * k * denominator * here // numerator
    weights.append(here // 2)
    weights.reverse()
    least = weights[0] >> _TAIL
    return _table([weight for weight in weights if weight > least])
