"""One device's contribution under differential privacy: integers whose L2 norm is bounded, exactly.

The noise is measured against the norm of what is *sent*: whole numbers, on the plan's grid. Rounding stochastically
makes vectors longer, by chance without a bound that helps; so the device scales to a smaller norm first, rounds, checks
the integers' norm in integer arithmetic and rounds again until it holds (Kairouz et al. 2021, "The Distributed Discrete
Gaussian Mechanism", section 4.1). How much smaller follows from the number of coordinates alone: the rounded vector
keeps the bound with probability 1 - exp(-1/2) or more, and nearly always once a level is small against a coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.lanes import Values
from fleetfed.shared.aggregate.quantize import Floats, Grid, NonFiniteDeltaError
from fleetfed.shared.errors import LocalProtocolError

_CHUNK: Final = 1 << 15
_RETRIES: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Clipped:
    """One device's integers.

    Attributes:
        values: int16, shape (dimension,), within ``±grid.limit`` and the norm's bound.
        beyond: whether the delta was longer than the bound and was scaled down.
    """

    values: NDArray[np.int16]
    beyond: bool


def rounded_norm(norm: float, dimension: int) -> float:
    """The bound that a rounded vector keeps with probability 1 - exp(-1/2), if it was no longer than ``norm`` before.

    Kairouz et al. 2021, theorem 1, with ``beta = exp(-1/2)``; all in levels.
    """
    root = math.sqrt(dimension)
    return min(norm + root, math.sqrt(norm * norm + dimension / 4 + norm + root / 2))


def unrounded_norm(clip: float, dimension: int) -> float:
    """The longest norm that still may be rounded within ``clip``: the inverse of `rounded_norm`.

    Raises:
        ValueError: the levels are too coarse for this many coordinates.
    """
    root = math.sqrt(dimension)
    inner = clip * clip + 0.25 - dimension / 4 - root / 2
    norm = max(clip - root, math.sqrt(inner) - 0.5 if inner > 0 else 0.0)
    if norm < 1:
        raise ValueError(f"a clip of {clip:g} levels for {dimension} values: rounding alone would exceed it")
    return norm


def clip_and_round(delta: Floats, grid: Grid, *, clip: float, rng: np.random.Generator) -> Clipped:
    """Scale a delta to the bound and round it to the plan's grid.

    Args:
        delta: float32 or float64, shape (dimension,). Not changed.
        grid: the plan's grid.
        clip: L2 bound of the result, in levels.
        rng: source of the rounding; the guarantee does not depend on it.

    Raises:
        NonFiniteDeltaError: NaN or infinity in the delta.
        ValueError: wrong shape, or a clip that rounding alone would exceed.
        LocalProtocolError: the bound cannot be kept, which arithmetic rules out.
    """
    if delta.shape != (grid.dimension,) or delta.dtype.kind != "f":
        raise ValueError(f"delta is {delta.dtype} of {delta.shape}, not floats of ({grid.dimension},)")
    allowed = unrounded_norm(clip, grid.dimension)
    square = 0.0
    for start, stop, v_max in grid.spans():
        for at in range(start, stop, _CHUNK):
            part = delta[at : min(at + _CHUNK, stop)].astype(np.float64) * (grid.limit / v_max)
            square += float(np.dot(part, part))
    if not math.isfinite(square):
        raise NonFiniteDeltaError("the delta holds NaN or infinity")
    norm = math.sqrt(square)
    scale = min(1.0, allowed / norm) if norm else 1.0
    values = np.empty(grid.dimension, dtype=np.int16)
    most = math.floor(Fraction(clip) ** 2)
    for _ in range(_RETRIES):
        if _round(delta, grid, scale, values, rng) <= most:
            return Clipped(values=values, beyond=norm > allowed)
    # Towards zero no vector grows. Not unbiased, and one in 10**14 devices. Not in an assertion: `python -O` removes
    # those with all that they call.
    if _round(delta, grid, scale, values, None) > most:
        raise LocalProtocolError(f"{clip:g} levels do not hold a delta that was scaled to {allowed:g}")
    return Clipped(values=values, beyond=norm > allowed)


def squared_norm(values: Values) -> int:
    """The squared L2 norm of integers of up to 16 bits, exactly."""
    total = 0
    for at in range(0, values.size, _CHUNK):
        part = values[at : at + _CHUNK].astype(np.int64)
        total += int(np.dot(part, part))
    return total


def _round(delta: Floats, grid: Grid, scale: float, values: NDArray[np.int16], rng: np.random.Generator | None) -> int:
    """Round into ``values``; return their squared norm."""
    limit = grid.limit
    for start, stop, v_max in grid.spans():
        factor = limit / v_max * scale
        for at in range(start, stop, _CHUNK):
            to = min(at + _CHUNK, stop)
            x = delta[at:to].astype(np.float64) * factor
            np.clip(x, -limit, limit, out=x)
            if rng is None:
                np.trunc(x, out=x)
            else:
                x += rng.random(to - at)
                np.floor(x, out=x)
                # limit + U may round up to limit + 1.
                np.minimum(x, limit, out=x)
            values[at:to] = x
    return squared_norm(values)
