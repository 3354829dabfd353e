"""Integer noise from a key: the same key gives the same noise, on every machine.

The randomness is ChaCha20 (`secure.prg`); the distributions are exact to 128 bits (`tables`). No floating point decides
anything, so there are no gaps between representable numbers that could tell a value from its neighbour (Mironov 2012).

A discrete Gaussian wider than a table is the sum ``x + k y`` of two narrower ones. With
``s = 1 / hypot(k / sx, 1 / sy)`` its probabilities are those of the wide one times a factor within
``1 +- 2 exp(-2 pi**2 s**2)`` (Poisson summation); here ``s`` is at least 3.4, the factor nearer to one than 2**-300.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.privacy import tables
from fleetfed.shared.privacy.tables import GUIDE_BITS, Table
from fleetfed.shared.secure.kdf import Label, derive
from fleetfed.shared.secure.prg import add_mask

LEAST_SIGMA: Final = tables.LEAST_SIGMA
MOST_SIGMA: Final = float(1 << 40)
MOST_SKELLAM: Final = 4 * tables.MOST_SIGMA
"""Widest Skellam noise: sixteen draws, whose variances add."""

_BASE: Final = 4096.0
_STEP: Final = 1024
_CHUNK: Final = 1 << 15
_STEPS: Final = 3
_UNIFORM_SHIFT: Final = np.uint64(64 - GUIDE_BITS)

Integers = NDArray[np.int64]


def discrete_gaussian(count: int, sigma: float, key: bytes) -> Integers:
    """Return ``count`` independent discrete Gaussian integers.

    Args:
        count: how many.
        sigma: their parameter, 0.05 to 2**40; from 2 on it is their standard deviation to many digits.
        key: 32 bytes, secret, used for nothing else.

    Raises:
        ValueError: sigma is out of range.
    """
    if not sigma <= MOST_SIGMA:
        raise ValueError(f"sigma must be at most 2**40, not {sigma}")
    total: Integers = np.zeros(count, dtype=np.int64)
    factor, draw = 1, 0
    while sigma > tables.MOST_SIGMA:
        _add(total, tables.discrete_gaussian(_BASE), _key(key, draw), factor)
        sigma = math.sqrt(sigma * sigma - _BASE * _BASE) / _STEP
        factor, draw = factor * _STEP, draw + 1
    _add(total, tables.discrete_gaussian(sigma), _key(key, draw), factor)
    return total


def skellam(count: int, sigma: float, key: bytes) -> Integers:
    """Return ``count`` independent Skellam integers of variance ``sigma**2``.

    Args:
        count: how many.
        sigma: 0.05 to `MOST_SKELLAM`.
        key: 32 bytes, secret, used for nothing else.

    Raises:
        ValueError: sigma is out of range.
    """
    if not sigma <= MOST_SKELLAM:
        raise ValueError(f"sigma must be at most {MOST_SKELLAM:g}, not {sigma}")
    draws = max(1, math.ceil((sigma / tables.MOST_SIGMA) ** 2))
    table = tables.skellam(sigma / math.sqrt(draws))
    total: Integers = np.zeros(count, dtype=np.int64)
    for draw in range(draws):
        _add(total, table, _key(key, draw), 1)
    return total


def _key(key: bytes, draw: int) -> bytes:
    return derive(key, Label.NOISE, b"draw" + draw.to_bytes(4, "little"))


def _add(total: Integers, table: Table, key: bytes, factor: int) -> None:
    """Add ``factor`` times fresh samples of the table to ``total``."""
    uniform = np.zeros(total.size, dtype=np.uint64)
    add_mask(uniform, derive(key, Label.NOISE, b"high"))
    signs = np.zeros(-(-total.size // 64), dtype=np.uint64)
    add_mask(signs, derive(key, Label.NOISE, b"sign"))
    bits = np.unpackbits(signs.astype("<u8", copy=False).view(np.uint8), bitorder="little")
    tied: list[int] = []
    for start in range(0, total.size, _CHUNK):
        part = uniform[start : start + _CHUNK]
        found, ties = magnitudes(table, part)
        tied.extend(int(i) + start for i in ties)
        found *= factor * (1 - 2 * bits[start : start + part.size].astype(np.int64))
        total[start : start + part.size] += found
    if tied:
        _settle(total, table, uniform, bits, tied, key, factor)


def magnitudes(table: Table, uniform: NDArray[np.uint64]) -> tuple[Integers, NDArray[np.int64]]:
    """Count the thresholds whose upper halves each number reaches, and say which numbers that does not decide.

    Args:
        table: of the distribution.
        uniform: the upper 64 bits of uniform 128-bit numbers.

    Returns:
        The magnitudes, int64; and the places where a threshold has the same upper half, so that the lower half counts:
        one in 2**40 or so.
    """
    high = table.high
    found = table.guide[uniform >> _UNIFORM_SHIFT]
    pending = np.flatnonzero(high[found] <= uniform)
    for _ in range(_STEPS):
        # Most stop after a step or two.
        found[pending] += found[pending] < table.length
        pending = pending[high[found[pending]] <= uniform[pending]]
        if not pending.size:
            break
    else:
        # The tails crowd into the last bins.
        found[pending] = np.searchsorted(high[:-1], uniform[pending], side="right")
    ties = np.flatnonzero(high[np.maximum(found - 1, 0)] == uniform)
    return found.astype(np.int64), ties


def _settle(
    total: Integers,
    table: Table,
    uniform: NDArray[np.uint64],
    bits: NDArray[np.uint8],
    tied: list[int],
    key: bytes,
    factor: int,
) -> None:
    """Decide the ties by the lower halves of their numbers, a stream of its own."""
    low = np.zeros(max(tied) + 1, dtype=np.uint64)
    add_mask(low, derive(key, Label.NOISE, b"low"))
    for i in tied:
        sign = 1 - 2 * int(bits[i])
        guessed = int(magnitudes(table, uniform[i : i + 1])[0][0])
        exact = table.magnitude(int(uniform[i]) << 64 | int(low[i]))
        total[i] += factor * sign * (exact - guessed)
