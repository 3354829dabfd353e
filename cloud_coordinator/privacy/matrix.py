"""Noise that is correlated over rounds: the banded square-root factorisation (BandMF).

Training sums up steps, so what matters is the noise of the *prefix sums*. With a lower triangular banded matrix ``C``
whose first column is ``1, 1/2, 3/8, ...`` (the coefficients of ``1 / sqrt(1 - x)``, cut after the band), the released
sums ``x + C^-1 w`` are what one may compute from ``C x + w``: later noise takes back part of what earlier noise did.
Devices that stay a band apart from their last round meet disjoint rows, so that one device's squared sensitivity is
the number of its rounds times the squared norm of a column (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix
Factorization"). No sampling is assumed; devices enforce the separation themselves.

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
from fleetfed.shared.privacy.noise import MOST_SIGMA, Integers

_FINE: Final = 1 << 16
"""Fresh noise comes in steps of this part of a level (of whole levels where it is very wide)."""
_FORMAT: Final = 1

Vector = NDArray[np.float32]


def coefficients(band: int) -> list[float]:
    """The first column of the matrix: ``band`` numbers, the first of them 1."""
    found = [1.0]
    for j in range(1, band):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return found


def column_square(band: int) -> float:
    """Squared norm of a column: what one participation adds to the squared sensitivity, for a clip of 1."""
    return math.fsum(c * c for c in coefficients(band))


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
        history: float32 vectors, newest first, at most ``band - 1`` of them.
    """

    mechanism: str
    round: int = 0
    history: tuple[Vector, ...] = field(default=())

    def encode(self) -> bytes:
        """The state's bytes: as secret as the data of the devices."""
        packed = msgpack.packb([_FORMAT, self.mechanism, self.round, [v.astype("<f4").tobytes() for v in self.history]])
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
            if version != _FORMAT:
                raise StorageError(f"noise state of version {version}")
            history: list[Any] = [np.frombuffer(vector, dtype="<f4").astype(np.float32) for vector in vectors]
        except (ValueError, TypeError) as error:
            raise StorageError(f"the stored noise state is damaged: {error}") from error
        return cls(mechanism=name, round=number, history=tuple(history))


def next_noise(history: Sequence[Vector], *, dimension: int, sigma: float, band: int, key: bytes) -> Vector:
    """The noise of the next round, in levels: fresh noise less what the band takes back.

    Args:
        history: the noise of the rounds before, newest first.
        dimension: of the vector.
        sigma: deviation of the fresh noise.
        band: of the matrix.
        key: 32 bytes, of this round.
    """
    fine = _FINE if sigma * _FINE <= MOST_SIGMA else 1
    fresh: NDArray[np.float64] = mechanism.gaussian(dimension, sigma * fine, key) / fine
    for c, before in zip(coefficients(band)[1:], history, strict=False):
        fresh -= c * before
    # What is stored is what is released: the next round takes back exactly that.
    return fresh.astype(np.float32)


def add_noise(values: Integers, noise: Vector) -> Integers:
    """The noised sum in whole levels: rounding hides what lies in the low bits of a float."""
    return np.rint(values + noise.astype(np.float64)).astype(np.int64)
