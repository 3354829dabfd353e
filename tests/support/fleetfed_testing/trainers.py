"""Trainers for whole-fleet tests, named in ``device.toml`` as ``fleetfed_testing.trainers:one_hot`` and so on.

They do no learning, but make what every device contributed visible in the model, and can be held back: a device
does not finish a training while the file ``hold`` stands in its folder or in the fleet's.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np

from fleetfed.device.config import DeviceConfig
from fleetfed.device.trainer import Task, Trained, TrainingCancelledError
from fleetfed.shared.model.card import ModelCard

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


one_hot = OneHot
repeatable = Repeatable
