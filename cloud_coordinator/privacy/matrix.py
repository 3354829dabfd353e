"""Noise that is correlated over rounds: the banded square-root factorisation (BandMF).

Training sums up steps, so what matters is the noise of the *prefix sums*. With a lower triangular banded matrix ``C``
whose first column is ``1, 1/2, 3/8, ...`` (the coefficients of ``1 / sqrt(1 - x)``, cut after the band), the released
sums ``x + C^-1 w`` are what one may compute from ``C x + w``: later noise takes back part of what earlier noise did.
Devices that stay a band apart from their last round meet disjoint rows, so that one device's squared sensitivity is
the number of its rounds times the squared norm of a column (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix
Factorization"). No sampling is assumed; devices enforce the separation themselves.

Everything is whole numbers: noise comes in parts of a level (`cost.fineness`), coefficients in units of 2**-16, and
what is taken back of earlier noise is rounded to the noise's own grid. So a round's noise is an exact discrete Gaussian
around a function of the rounds before, and what rounding adds to the sensitivity is known (`cost.gaussian_precision`).

The last ``band - 1`` noise vectors are needed for the next: they are as secret as the data, and losing them ends the
mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import StorageError
from fleetfed.shared.privacy import mechanism
from fleetfed.shared.privacy.cost import COEFFICIENT, coefficients, fineness
from fleetfed.shared.privacy.noise import Integers

_FORMAT: Final = 2
_OLD: Final = 1
_LIMIT: Final = np.iinfo(np.int32)

Vector = NDArray[np.int32]
"""Noise of a round, in parts of a level."""


def prefix_rmse(rounds: int, band: int) -> float:
    """Root mean square, over the rounds, of the deviation of the prefix sums' noise, for fresh noise of deviation 1."""
    inverse = _inverse_column(rounds, band)
    prefix = np.cumsum(inverse)
    # The noise of the t-th prefix sum is sum_{j<=t} prefix[t-j] w_j.
    return math.sqrt(float(np.cumsum(prefix**2).sum()) / rounds)


def _inverse_column(rounds: int, band: int) -> NDArray[np.float64]:
    column, known = np.zeros(rounds), coefficients(min(band, rounds))
    for t in range(rounds):
        column[t] = (t == 0) - sum(known[j] * column[t - j] for j in range(1, min(len(known) - 1, t) + 1))
    return column


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixState:
    """The noise of the last rounds.

    Attributes:
        mechanism: which parameters and key it belongs to (`noising.Noise.mechanism`); others begin with fresh noise.
        round: number of the last of them.
        history: int32 vectors, newest first, at most ``band - 1`` of them.
    """

    mechanism: str
    round: int = 0
    history: tuple[Vector, ...] = field(default=())

    def encode(self) -> bytes:
        """The state's bytes: as secret as the data of the devices."""
        packed = msgpack.packb([_FORMAT, self.mechanism, self.round, [v.astype("<i4").tobytes() for v in self.history]])
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> MatrixState:
        """Read what `encode` wrote.

        Raises:
            StorageError: it is damaged.
        """
        try:
            version, name, number, vectors = msgpack.unpackb(data, max_bin_len=len(data))
            if version == _OLD:
                # Floats of another grid: the noise begins anew, which costs nobody more.
                return cls(mechanism="")
            if version != _FORMAT:
                raise StorageError(f"noise state of version {version}")
            history: list[Any] = [np.frombuffer(vector, dtype="<i4").astype(np.int32) for vector in vectors]
        except (ValueError, TypeError) as error:
            raise StorageError(f"the stored noise state is damaged: {error}") from error
        return cls(mechanism=name, round=number, history=tuple(history))


def next_noise(history: Sequence[Vector], *, dimension: int, sigma: float, band: int, key: bytes) -> Vector:
    """The noise of the next round, in parts of a level: fresh noise less what the band takes back.

    Args:
        history: the noise of the rounds before, newest first.
        dimension: of the vector.
        sigma: deviation of the fresh noise, in levels.
        band: of the matrix.
        key: 32 bytes, of this round.
    """
    taken: Integers = np.full(dimension, COEFFICIENT // 2, dtype=np.int64)
    for c, before in zip(coefficients(band)[1:], history, strict=False):
        taken += int(c * COEFFICIENT) * before.astype(np.int64)
    drawn = mechanism.gaussian(dimension, sigma * fineness(sigma), key) - taken // COEFFICIENT
    # Only what lies beyond twelve deviations does not fit, which no delta sees.
    noise: Vector = np.clip(drawn, _LIMIT.min, _LIMIT.max).astype(np.int32)
    return noise


def add_noise(values: Integers, noise: Vector, *, sigma: float) -> Integers:
    """The noised sum in whole levels.

    Args:
        values: the sum, in levels.
        noise: from `next_noise`, for the same ``sigma``.
    """
    fine = fineness(sigma)
    # As the noised sum in parts of a level would be rounded: a function of it, and of nothing else.
    rounded: Integers = values + (noise.astype(np.int64) + fine // 2) // fine
    return rounded
