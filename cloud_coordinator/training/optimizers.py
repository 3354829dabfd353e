"""Server optimizers: from the fleet's mean delta to the step that the global model takes.

Reddi et al. 2021, "Adaptive Federated Optimization" (ICLR), algorithms 1 and 2: the mean delta is used as a
pseudo-gradient that points downhill. With the mean delta ``d`` of a round, elementwise::

    FedAvg    step = lr * d
    Momentum  m <- beta1 * m + d                                step = lr * m
    Adam      m <- beta1 * m + (1 - beta1) * d
              v <- beta2 * v + (1 - beta2) * d**2               step = lr * m / (sqrt(v) + tau)
    Yogi      m as Adam
              v <- v - (1 - beta2) * d**2 * sign(v - d**2)      step = lr * m / (sqrt(v) + tau)

``m`` starts at 0 and ``v`` at ``tau**2`` (algorithm 2 asks for at least that); as there, no bias correction. The step
is a difference, not a model, because the model that results is what the patch can express.

Everything is float64 with correctly rounded operations in a fixed order: the same deltas give the same bits anywhere.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError, StorageError

_STATE: Final = struct.Struct("<4s16sQI4x")
_MAGIC: Final = b"FFO1"

Vector = NDArray[np.float64]


class OptimizerName(StrEnum):
    """The server optimizers, by the names that a configuration uses."""

    FEDAVG = "fedavg"
    MOMENTUM = "momentum"
    ADAM = "adam"
    YOGI = "yogi"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """What a configuration says about the server optimizer.

    Attributes:
        name: which one.
        learning_rate: lr; 1 with FedAvg takes the mean as it is. Adam and Yogi need about 0.01 (figure 2 of the paper).
        beta1: decay of the first moment, or momentum.
        beta2: decay of the second moment.
        tau: the degree of adaptivity; larger is closer to plain momentum.
    """

    name: OptimizerName = OptimizerName.FEDAVG
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"server learning_rate must be a positive number, not {self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"server beta1 and beta2 must be in [0, 1), not {self.beta1} and {self.beta2}")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"server tau must be a positive number, not {self.tau}")


class ServerOptimizer(Protocol):
    """What every server optimizer does."""

    def step(self, mean: Vector) -> Vector:
        """Return the step for this round's mean delta (float64, shape (dimension,)) and move the state on.

        Raises:
            ValueError: another shape, or a value that is not finite; the state is unchanged.
        """

    def state(self) -> bytes:
        """Return the state; `restore` continues from it bit for bit. Store it with the version that the step made."""

    def restore(self, state: bytes) -> None:
        """Continue from what `state` returned.

        Raises:
            StorageError: of another optimizer or dimension, or damaged; the state is unchanged.
        """


class FedAvg:
    """``step = lr * d``: no state."""

    def __init__(self, config: OptimizerConfig, dimension: int) -> None:
        self._config, self._dimension = config, dimension

    def step(self, mean: Vector) -> Vector:
        """See `ServerOptimizer.step`."""
        _check(mean, self._dimension)
        return mean * self._config.learning_rate

    def state(self) -> bytes:
        """See `ServerOptimizer.state`."""
        return _dump(OptimizerName.FEDAVG, self._dimension, ())

    def restore(self, state: bytes) -> None:
        """See `ServerOptimizer.restore`."""
        _load(state, OptimizerName.FEDAVG, self._dimension, 0)


class Momentum:
    """SGD with momentum on the pseudo-gradient (FedAvgM)."""

    def __init__(self, config: OptimizerConfig, dimension: int) -> None:
        self._config, self._dimension = config, dimension
        self._m: Vector = np.zeros(dimension)

    def step(self, mean: Vector) -> Vector:
        """See `ServerOptimizer.step`."""
        _check(mean, self._dimension)
        self._m *= self._config.beta1
        self._m += mean
        return self._m * self._config.learning_rate

    def state(self) -> bytes:
        """See `ServerOptimizer.state`."""
        return _dump(OptimizerName.MOMENTUM, self._dimension, (self._m,))

    def restore(self, state: bytes) -> None:
        """See `ServerOptimizer.restore`."""
        (self._m,) = _load(state, OptimizerName.MOMENTUM, self._dimension, 1)


class Adaptive:
    """FedAdam and FedYogi, which differ in the second moment alone."""

    def __init__(self, config: OptimizerConfig, dimension: int) -> None:
        self._config, self._dimension = config, dimension
        self._m: Vector = np.zeros(dimension)
        self._v: Vector = np.full(dimension, config.tau * config.tau)

    def step(self, mean: Vector) -> Vector:
        """See `ServerOptimizer.step`."""
        _check(mean, self._dimension)
        config = self._config
        self._m *= config.beta1
        self._m += (1 - config.beta1) * mean
        square = mean * mean
        if config.name is OptimizerName.YOGI:
            self._v -= (1 - config.beta2) * square * np.sign(self._v - square)
        else:
            self._v *= config.beta2
            self._v += (1 - config.beta2) * square
        return config.learning_rate * self._m / (np.sqrt(self._v) + config.tau)

    def state(self) -> bytes:
        """See `ServerOptimizer.state`."""
        return _dump(self._config.name, self._dimension, (self._m, self._v))

    def restore(self, state: bytes) -> None:
        """See `ServerOptimizer.restore`."""
        self._m, self._v = _load(state, self._config.name, self._dimension, 2)


def make_optimizer(config: OptimizerConfig, dimension: int) -> ServerOptimizer:
    """Return the configured optimizer in its initial state for a model of ``dimension`` weights."""
    match config.name:
        case OptimizerName.FEDAVG:
            return FedAvg(config, dimension)
        case OptimizerName.MOMENTUM:
            return Momentum(config, dimension)
        case OptimizerName.ADAM | OptimizerName.YOGI:
            return Adaptive(config, dimension)


def _check(mean: Vector, dimension: int) -> None:
    if mean.shape != (dimension,) or mean.dtype != np.float64:
        raise ValueError(f"a mean delta of {mean.dtype} {mean.shape}, not float64 of ({dimension},)")
    if not np.isfinite(mean).all():
        raise ValueError("the mean delta holds NaN or infinity")


def _dump(name: OptimizerName, dimension: int, vectors: tuple[Vector, ...]) -> bytes:
    head = _STATE.pack(_MAGIC, name.value.encode(), dimension, len(vectors))
    return b"".join((head, *(vector.astype("<f8").tobytes() for vector in vectors)))


def _load(state: bytes, name: OptimizerName, dimension: int, vectors: int) -> tuple[Vector, ...]:
    if len(state) != _STATE.size + 8 * dimension * vectors:
        raise StorageError(f"{len(state)} bytes are no state of {name} for {dimension} weights")
    if state[: _STATE.size] != _STATE.pack(_MAGIC, name.value.encode(), dimension, vectors):
        raise StorageError(f"the stored optimizer state is not of {name} for {dimension} weights")
    flat = np.frombuffer(state, dtype="<f8", offset=_STATE.size).astype(np.float64)
    if not np.isfinite(flat).all():
        raise StorageError("the stored optimizer state holds NaN or infinity")
    return tuple(flat[i * dimension : (i + 1) * dimension].copy() for i in range(vectors))
