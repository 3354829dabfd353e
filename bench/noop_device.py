"""A trainer that trains nothing: the model plus noise. `bench/overhead.py` names it in every device's settings."""

from __future__ import annotations

import numpy as np

from fleetfed.device.config import DeviceConfig
from fleetfed.device.trainer import Task, Trained, Trainer
from fleetfed.shared.model.card import ModelCard


class Noise:
    def prepare(self, card: ModelCard) -> str:
        return f"noise of {card.parameters} values"

    def train(self, task: Task) -> Trained:
        delta = task.rng.standard_normal(task.card.parameters, dtype=np.float32)
        delta *= np.float32(1e-3)
        return Trained(delta=delta, examples=100, seen=100, steps=0, training_loss=0.0)


def factory(settings: DeviceConfig) -> Trainer:
    del settings
    return Noise()
