"""Training confined to what travels, where a plan sends projections: so that nothing of what was learned is lost.

The weights are ``base + S z``, where S has the signs of the plan's bases, and the optimizer moves z: a step costs the
model's gradient, two small products and as many numbers of optimizer state as travel. The rules are those of the model
file's own training graph.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.projection import Subspace
from fleetfed.shared.model.interpreter import Adam, Model, Optimizer
from fleetfed.shared.wire.projection import Projection

Floats = NDArray[np.float32]


class Confined:
    """Trains a model within a projection's subspace, from the weights that it has now.

    Args:
        model: to train; nobody else may move it meanwhile.
        projection: of the plan, checked against the model's card.
        optimizer: rule and settings.
    """

    def __init__(self, model: Model, projection: Projection, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._base = model.get_weights()
        # Adam moves every number by about its rate, whatever the gradient's size: with normalized rows the weights move
        # by about it too, as if they were trained themselves. Descent would diverge so: with normalized columns its
        # steps are the projected gradient's.
        self._subspace = Subspace(
            projection, tuple(slot.size for slot in model.card.tensors), by_rows=isinstance(optimizer, Adam)
        )
        self._z = np.zeros(projection.dimension, dtype=np.float32)
        self._first = np.zeros_like(self._z)
        self._second = np.zeros_like(self._z) if isinstance(optimizer, Adam) else None
        self._steps = 0

    def step(self, x: Floats, y: NDArray[np.integer[Any]]) -> float:
        """Take one step on at most a batch of examples; return their mean loss before it."""
        weights = np.zeros(self._model.card.batch, dtype=np.float32)
        weights[: len(y)] = 1.0
        if len(y) < len(weights):
            # Filled up with examples of weight 0, which change nothing.
            chosen = np.minimum(np.arange(len(weights)), len(y) - 1)
            x, y = x[chosen], y[chosen]
        loss, gradient = self._model.gradients(x, y, weights)
        if self._optimizer.proximal and self._steps:
            gradient += np.float32(self._optimizer.proximal) * self._subspace.expand(self._z)
        # A model that diverges overflows here; whoever trains it looks at loss and weights.
        with np.errstate(over="ignore", invalid="ignore"):
            self._move(self._subspace.project(gradient))
            del gradient
            self._model.set_weights(self.get_weights())
        return loss

    def get_weights(self) -> Floats:
        """The present weights, shape (parameters,)."""
        weights = self._subspace.expand(self._z).astype(np.float32, copy=False)
        weights += self._base
        return weights

    def _move(self, gradient: Any) -> None:
        settings = self._optimizer
        self._steps += 1
        if self._second is None:
            assert not isinstance(settings, Adam)
            self._first *= np.float32(settings.momentum)
            self._first -= np.float32(settings.lr) * gradient
            self._z += self._first
            return
        assert isinstance(settings, Adam)
        self._first += (gradient - self._first) * np.float32(1 - settings.beta1)
        self._second += (np.square(gradient) - self._second) * np.float32(1 - settings.beta2)
        t = self._steps
        rate = np.float32(settings.lr * math.sqrt(1 - settings.beta2**t) / (1 - settings.beta1**t))
        self._z -= rate * self._first / (np.sqrt(self._second) + np.float32(settings.epsilon))
