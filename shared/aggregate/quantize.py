"""From a device's float delta to integers on the plan's scale, and from their sum back to a mean.

Every device of a round rounds to the same grid: for each tensor the plan fixes the clip ``v_max`` and, for the whole
model, the bits ``b``; the scale is ``s = (2**(b-1) - 1) / v_max``. A device with weight ``w`` scales its delta by
``w / weight_cap`` *before* clipping, so that the influence of one device is bounded whatever weight it claims, and
sends ``v = floor(x * s + U)`` with ``U`` uniform in [0, 1) from its private generator: unbiased, and never outside
``±(2**(b-1) - 1)``. The mean of the fleet is ``sum(v) / s / (sum(w) / weight_cap)``: both sums come out of the same
addition, so no tier ever needs one device's values or weight.

What rounding and clipping lost may be carried to the device's next update (error feedback)::

    q = quantize(delta, grid, weight=w, rng=rng, residual=residual)
    # send q.values with q.clipped and q.log2_rms in the meta words; keep q.residual once the update is accepted
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.lanes import Values, levels
from fleetfed.shared.errors import LocalProtocolError

_CHUNK: Final = 1 << 15
"""Coordinates per step: three scratch vectors of this length are all that quantizing needs beyond its results."""

_LEAST_RMS: Final = 1 / 8
_LEAST_CLIP: Final = float(np.float32(1e-30))
_MOST_CLIP: Final = float(np.float32(1e30))
"""The plan's bounds on a clip; between them no scale overflows float32."""

Floats = NDArray[np.floating[Any]]


class NonFiniteDeltaError(LocalProtocolError):
    """The delta or residual holds NaN or infinity: the device skips the round and sends nothing."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers that a round's plan lets a device say.

    Attributes:
        sizes: coordinates of each tensor, in the weight table's order.
        clips: ``v_max`` of each tensor, 1e-30 to 1e30, in units of the weights. Taken as float32, which is how a
            plan carries them.
        bits: signed bits per coordinate, 2..16.
        weight_cap: largest weight that counts; 1 makes every device count the same.
    """

    sizes: tuple[int, ...]
    clips: tuple[float, ...]
    bits: int
    weight_cap: int = 1

    def __post_init__(self) -> None:
        levels(self.bits)
        if not self.sizes or min(self.sizes) < 1 or len(self.sizes) != len(self.clips):
            raise ValueError(f"{len(self.sizes)} tensor sizes and {len(self.clips)} clips do not make a grid")
        if self.weight_cap < 1:
            raise ValueError(f"weight_cap must be at least 1, not {self.weight_cap}")
        clips = tuple(float(np.float32(clip)) for clip in self.clips)
        if not all(_LEAST_CLIP <= clip <= _MOST_CLIP for clip in clips):
            raise ValueError(f"clips must be in {_LEAST_CLIP}..{_MOST_CLIP}")
        object.__setattr__(self, "clips", clips)

    @property
    def dimension(self) -> int:
        """Coordinates in all."""
        return sum(self.sizes)

    @property
    def limit(self) -> int:
        """Largest magnitude of one device's value."""
        return levels(self.bits)

    def spans(self) -> Iterator[tuple[int, int, float]]:
        """Yield (start, stop, clip) of each tensor in the flat vector."""
        start = 0
        for size, clip in zip(self.sizes, self.clips, strict=True):
            yield start, start + size, clip
            start += size


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """One device's contribution and what the coordinator needs to steer the next clips.

    Attributes:
        values: int8 (up to 8 bits) or int16, shape (dimension,), within ``±grid.limit``.
        clipped: per tensor, coordinates whose magnitude exceeded the clip.
        log2_rms: per tensor, log2 of the root mean square of the weighted delta ``delta * w / weight_cap``, which is
            what the clip has to fit; without the residual, whose size follows from the clip itself. At least that of an
            eighth of a level, so that half a fleet whose tensor does not move cannot shrink it for the others.
        residual: float32, shape (dimension,), to add to the next weighted delta; None if no residual was given.
    """

    values: Values
    clipped: tuple[int, ...]
    log2_rms: tuple[float, ...]
    residual: NDArray[np.float32] | None


def quantize(
    delta: Floats,
    grid: Grid,
    *,
    weight: int,
    rng: np.random.Generator,
    residual: NDArray[np.float32] | None = None,
    stochastic: bool = True,
) -> Quantized:
    """Round a delta to the plan's grid.

    Works through the tensors in steps of 32,768 coordinates; beyond its results it needs under 1 MB. Up to 8 bits it
    computes in float32: ``x * s`` is below 2**7 and off by at most 2**-17 grid steps, which is all the bias there is.
    From 9 bits on it computes in float64.

    Args:
        delta: float32 or float64, shape (dimension,): trained weights less the round's base. Not changed.
        grid: the plan's grid.
        weight: w, 1..weight_cap; a device with more examples counts as weight_cap.
        rng: the device's private generator.
        residual: what the last accepted update lost, float32 of shape (dimension,); zeros to start error feedback.
        stochastic: unbiased rounding; False rounds to nearest, which error feedback may be worth trading it for.

    Raises:
        NonFiniteDeltaError: NaN or infinity in the delta or the residual.
        ValueError: wrong shape or weight.
    """
    if delta.shape != (grid.dimension,) or delta.dtype.kind != "f":
        raise ValueError(f"delta is {delta.dtype} of {delta.shape}, not floats of ({grid.dimension},)")
    if residual is not None and (residual.shape != delta.shape or residual.dtype != np.float32):
        raise ValueError(f"residual is {residual.dtype} of {residual.shape}, not float32 of ({grid.dimension},)")
    if not 1 <= weight <= grid.weight_cap:
        raise ValueError(f"weight must be in 1..{grid.weight_cap}, not {weight}")
    limit, share = grid.limit, weight / grid.weight_cap
    work: Any = np.float32 if grid.bits <= 8 else np.float64
    values: Values = np.empty(grid.dimension, dtype=np.int8 if grid.bits <= 8 else np.int16)
    carried = None if residual is None else np.empty(grid.dimension, dtype=np.float32)
    scratch, noise = np.empty(_CHUNK, dtype=work), np.empty(_CHUNK, dtype=work)
    clipped, log2_rms = [], []
    for start, stop, clip in grid.spans():
        scale = limit / clip
        beyond, square = 0, 0.0
        for at in range(start, stop, _CHUNK):
            to = min(at + _CHUNK, stop)
            x, u = scratch[: to - at], noise[: to - at]
            # Overflow to infinity is refused below with a reason; the warning would say less.
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(delta[at:to], share * scale, out=x, casting="same_kind")
                square += float(np.dot(x, x))
                if residual is not None:
                    np.multiply(residual[at:to], work(scale), out=u)
                    x += u
            if not np.isfinite(x).all():
                raise NonFiniteDeltaError("the delta holds NaN or infinity")
            np.abs(x, out=u)
            beyond += int(np.count_nonzero(u > limit))
            if carried is not None:
                carried[at:to] = x
            if stochastic:
                rng.random(out=u, dtype=work)
            else:
                u.fill(0.5)
            np.clip(x, -limit, limit, out=x)
            x += u
            np.floor(x, out=x)
            # limit + U may round up to limit + 1.
            np.minimum(x, work(limit), out=x)
            values[at:to] = x
            if carried is not None:
                lost = carried[at:to]
                lost -= x
                lost *= np.float32(clip / limit)
        clipped.append(beyond)
        # In grid steps. The floor keeps a tensor that did not move from dragging the fleet's mean to nothing.
        rms = max(math.sqrt(square / (stop - start)), _LEAST_RMS)
        log2_rms.append(math.log2(rms) - math.log2(scale))
    return Quantized(values=values, clipped=tuple(clipped), log2_rms=tuple(log2_rms), residual=carried)


def mean_delta(total: Values, grid: Grid, *, weight: int) -> NDArray[np.float64]:
    """Return the fleet's mean delta from the sum of its values: ``sum(v) / s / (sum(w) / weight_cap)``.

    Elementwise float64 with correctly rounded operations: the same bits on every platform.

    Args:
        total: summed values, signed integers of shape (dimension,).
        grid: the grid they were quantized on.
        weight: the summed weights, at least 1.

    Raises:
        ValueError: wrong shape or weight.
    """
    if total.shape != (grid.dimension,) or weight < 1:
        raise ValueError(f"cannot average {total.shape} of weight {weight} on a grid of {grid.dimension}")
    mean = total.astype(np.float64)
    share = weight / grid.weight_cap
    for start, stop, clip in grid.spans():
        mean[start:stop] *= clip / grid.limit / share
    return mean
