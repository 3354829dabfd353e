"""Trainers for whole-fleet tests, named in ``device.toml`` as ``fleetfed_testing.trainers:one_hot`` and so on.

They do no learning, but make what every device contributed visible in the model, and can be held back: a device
does not finish a training while the file ``hold`` stands in its folder or in the fleet's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.device.config import DeviceConfig
from fleetfed.device.trainer import Task, Trained, TrainingCancelledError
from fleetfed.shared.model.card import ModelCard

Delta = np.ndarray[Any, np.dtype[np.float32]]

HOLD = "hold"
BEGUN = "begun"
"""Made in the device's folder when a training begins."""


class _Held:
    def __init__(self, settings: DeviceConfig) -> None:
        self.name = settings.identity.name
        self._folder = settings.state.parent

    def prepare(self, card: ModelCard) -> str:
        return f"{self.name} for {card.name}"

    def hold(self, task: Task) -> None:
        (self._folder / BEGUN).touch()
        while any((folder / HOLD).exists() for folder in (self._folder, self._folder.parent)):
            if task.cancelled():
                raise TrainingCancelledError
            time.sleep(0.005)


class OneHot(_Held):
    """Device ``d-07`` moves coordinate 6, further than any clip: its integer there is the limit, exactly once."""

    def train(self, task: Task) -> Trained:
        self.hold(task)
        delta = np.zeros(task.card.parameters, dtype=np.float32)
        delta[int(self.name.rpartition("-")[2]) - 1] = 1e6
        return Trained(delta=delta, examples=1, seen=1, steps=1, training_loss=0.0)


class Repeatable(_Held):
    """A delta, weight and loss that follow from the device's name and the model alone."""

    def train(self, task: Task) -> Trained:
        self.hold(task)
        seed = hashlib.sha256(self.name.encode() + Path(task.model).read_bytes()).digest()
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        return Trained(
            delta=rng.normal(0, 0.05, task.card.parameters).astype(np.float32),
            examples=int(rng.integers(1, 900)),
            seen=10,
            steps=1,
            training_loss=float(rng.random()),
            holdout_examples=8,
            holdout_correct=int(rng.integers(0, 9)),
            holdout_loss=float(rng.random()),
        )


class Wayward(_Held):
    """Small random steps, or what a file ``way`` in the device's folder or the fleet's says instead: see `_WAYS`."""

    def train(self, task: Task) -> Trained:
        self.hold(task)
        rng = np.random.default_rng()
        delta = rng.normal(0, 1e-3, task.card.parameters).astype(np.float32)
        for folder in (self._folder, self._folder.parent):
            if (folder / WAY).exists():
                delta = _WAYS[(folder / WAY).read_text()](delta)
                break
        return Trained(
            delta=delta,
            examples=10,
            seen=10,
            steps=1,
            training_loss=1.0,
            holdout_examples=8,
            holdout_correct=4,
            holdout_loss=1.0,
        )


WAY = "way"
_WAYS: dict[str, Callable[[Delta], Delta]] = {
    "explodes": lambda delta: np.full_like(delta, np.nan),
    "runs away": lambda delta: 1e6 * np.sign(delta),
    "stands out": lambda delta: 100 * delta,
}

one_hot = OneHot
repeatable = Repeatable
wayward = Wayward
