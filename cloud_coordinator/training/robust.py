"""Robust means over the buckets of a masked round: what a well-formed lie in one of them can do stays bounded.

A bucket's mean is what its devices agree on; with more honest buckets than bad ones, these rules stay among the honest:

- trimmed mean (Yin et al. 2018, "Byzantine-Robust Distributed Learning"): of every coordinate, the largest and the
  smallest values are left out, the rest is averaged;
- geometric median (Pillutla et al. 2022, "Robust Aggregation for Federated Learning"): the point with the least sum of
  distances to all bucket means, by Weiszfeld's iteration from the coordinates' medians.

Buckets count alike, whatever their weight: they are of nearly the same size, and weight must not buy influence. All of
it is float64 in a fixed order, so the same buckets give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.accumulator import Partial
from fleetfed.shared.aggregate.quantize import Grid, mean_delta

Vector = NDArray[np.float64]

_CHUNK: Final = 1 << 14
"""Coordinates at a time where all buckets are looked at together."""
_NEAR: Final = 1e-9
"""Distances below this part of the middle one count as this part: a median that meets a bucket's mean stays finite. Of
the largest it would be as large as a liar wants."""


class Robust(StrEnum):
    """How bucket means become one step."""

    NONE = "none"
    """The plain mean of all devices."""
    TRIMMED_MEAN = "trimmed_mean"
    GEOMETRIC_MEDIAN = "geometric_median"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RobustRule:
    """How the sums of one round become one delta.

    Attributes:
        rule: which.
        trim: for the trimmed mean, the part of the buckets to leave out at either end.
        iterations: for the geometric median.
        parts: each bucket's sum, checked; for `Robust.NONE` none.
    """

    rule: Robust = Robust.NONE
    trim: float = 0.2
    iterations: int = 50
    parts: tuple[Partial, ...] = ()

    def mean(self, total: Partial, grid: Grid, *, weight: int) -> Vector:
        """Return the fleet's delta, float64 of shape (dimension,); a robust one needs as much for each bucket.

        Args:
            total: the sum of all.
            grid: of the plan.
            weight: of all.
        """
        if self.rule is Robust.NONE:
            return mean_delta(total.values(), grid, weight=weight)
        means = [mean_delta(part.values(), grid, weight=part.meta().weight) for part in self.parts]
        if self.rule is Robust.TRIMMED_MEAN:
            return trimmed_mean(means, trim=self.trim)
        return geometric_median(means, iterations=self.iterations)


def trimmed_mean(vectors: Sequence[Vector], *, trim: float) -> Vector:
    """Average each coordinate over all but the ``trim`` smallest and as many largest.

    At least one is left out at either end where there are three, and at least one or two stay.
    """
    count = len(vectors)
    out = min(max(int(trim * count), 1), (count - 1) // 2)
    result = np.zeros_like(vectors[0])
    for start in range(0, result.size, _CHUNK):
        ordered = np.sort(np.stack([vector[start : start + _CHUNK] for vector in vectors]), axis=0)
        part = result[start : start + _CHUNK]
        for row in ordered[out : count - out]:
            part += row
        part /= count - 2 * out
    return result


def geometric_median(vectors: Sequence[Vector], *, iterations: int) -> Vector:
    """Weiszfeld's iteration, so many times."""
    # As much as possible cut off at either end leaves each coordinate's median.
    point = trimmed_mean(vectors, trim=0.5)
    for _ in range(iterations):
        distances = [_distance(vector, point) for vector in vectors]
        nearest = _NEAR * sorted(distances)[len(distances) // 2]
        if not nearest:
            break
        weights = [1 / max(distance, nearest) for distance in distances]
        total = sum(weights)
        point = np.zeros_like(point)
        for vector, weight in zip(vectors, weights, strict=True):
            point += vector * (weight / total)
    return point


def _distance(a: Vector, b: Vector) -> float:
    # Not `dot`: its order of additions is the library's, and the number of threads changes it.
    return float(np.sqrt(sum(float(np.square(part).sum()) for part in _parts(a - b))))


def _parts(vector: Vector) -> list[Vector]:
    return [vector[start : start + _CHUNK] for start in range(0, vector.size, _CHUNK)]
