"""Inputs and digests of the model vectors: the same for the script that makes them and the tests that check them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.table import WeightTable

PROJECTIONS = 8
STEPS = 4
TOLERANCE = 1e-4


def inputs(card: ModelCard, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """One training batch and the examples' weights, the last of them 0."""
    raw = np.random.PCG64(seed)
    size = card.batch * card.example_size
    x = ((raw.random_raw(size) >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)
    x[x < 0.3] = 0  # ties in the pooling windows, as a dark background makes them
    y = (raw.random_raw(card.batch) % np.uint64(card.classes)).astype(np.int32)
    w = (1 + raw.random_raw(card.batch) % np.uint64(3)).astype(np.float32)
    w[-1] = 0
    return x.reshape(card.batch, *card.input_shape), y, w


def digest(table: WeightTable, flat: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each tensor its norm and its projections on pseudo-random vectors of signs."""
    rows = []
    for part in table.splits():
        values = flat[part].astype(np.float64)
        rows.append([np.linalg.norm(values), *(_signs(values.size, i) @ values for i in range(PROJECTIONS))])
    return np.array(rows)


def distance(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Largest relative error of any tensor that two digests betray.

    An error vector of norm e moves a projection on random signs by about e, and eight of them hardly ever all by
    less than a quarter of it.
    """
    scale = np.maximum(expected[:, :1], 1e-12)
    return float(np.max(np.abs(found - expected) / scale))


def _signs(size: int, index: int) -> NDArray[np.float64]:
    return 1.0 - 2.0 * ((np.random.PCG64(index).random_raw(size) >> np.uint64(63)).astype(np.float64))
