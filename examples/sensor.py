"""A data source for ``[data] function = "sensor:read"``: what a device with a real sensor puts in place of a file.

The device calls `read` before every round's training, without arguments. It returns ``(x, y)``, or yields batches of
them; here four seconds of a made-up accelerometer at a time, labelled by what the wearer did. A real one would read
the last day from a ring buffer, and its labels from what the user confirmed.

    [data]
    function = "sensor:read"
    processing = "sensor:normalize"
    holdout = 0.2
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

RATE = 32
SECONDS = 4
ACTIVITIES = ("rest", "walk", "climb")
_HZ = {"rest": 0.0, "walk": 1.8, "climb": 1.2}
_SWING = {"rest": 0.02, "walk": 0.3, "climb": 0.6}

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]


def read(windows: int = 60, *, seed: int | None = None) -> Iterator[Batch]:
    """Yield batches of 10 windows: x float32 of shape (10, 128, 3) in g, y the index of the activity."""
    rng = np.random.default_rng(seed)
    time = np.arange(RATE * SECONDS, dtype=np.float32) / RATE
    for _ in range(windows // 10):
        labels = rng.integers(0, len(ACTIVITIES), 10)
        x = rng.normal(0.0, 0.02, (10, time.size, 3)).astype(np.float32)
        x[:, :, 2] += 1.0
        for window, label in zip(x, labels, strict=True):
            activity = ACTIVITIES[int(label)]
            phase = rng.uniform(0, 2 * np.pi)
            window[:, 2] += np.float32(_SWING[activity]) * np.sin(2 * np.pi * _HZ[activity] * time + np.float32(phase))
        yield x, labels


def normalize(x: NDArray[np.float32], y: NDArray[np.int64]) -> Batch:
    """Take gravity out: each window loses its mean."""
    return x - x.mean(axis=1, keepdims=True), y
