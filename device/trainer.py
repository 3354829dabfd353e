"""Local training: from the plan's model and the device's own data to a delta of the weights.

`Trainer` is what the runtime needs; `TfliteTrainer` is what it gets unless ``trainer = "module:factory"`` in
``device.toml`` names another. A factory is called with the device's settings and returns a `Trainer`::

    class Noise:
        def prepare(self, card): ...
        def train(self, task):
            delta = task.rng.normal(0, 1e-3, task.card.parameters).astype(np.float32)
            return Trained(delta=delta, examples=100, seen=100, steps=0, training_loss=0.0)

    def factory(settings): return Noise()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fleetfed.device import memory
from fleetfed.device.config import DeviceConfig
from fleetfed.shared import dataset
from fleetfed.shared.dataset import Dataset
from fleetfed.shared.errors import ConfigError, FleetFedError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire.messages import DeclineReason, Eligibility, Optimizer, Training
from fleetfed.shared.wire.projection import Projection

if TYPE_CHECKING:
    from fleetfed.shared.model import interpreter

Floats = NDArray[np.float32]


class TrainingDeclinedError(FleetFedError):
    """No result, for a reason that the gateway is told.

    Attributes:
        reason: the stable label.
        detail: for people.
    """

    def __init__(self, reason: DeclineReason, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class TrainingCancelledError(FleetFedError):
    """The runtime asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One round's training.

    Attributes:
        training: what to do.
        eligibility: what the data must be like.
        card: the model's card.
        model: the file to start from; not to be changed.
        rng: source of all randomness.
        projection: what travels of the delta; a trainer that moves nothing else loses nothing. None for all of it.
        cancelled: whether to give up; ask it often.
    """

    training: Training
    eligibility: Eligibility
    card: ModelCard
    model: Path
    rng: np.random.Generator
    cancelled: Callable[[], bool]
    projection: Projection | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """What came of it.

    Attributes:
        delta: trained less initial weights, float32 of shape (parameters,), finite.
        examples: distinct training examples, what the update weighs before the plan's cap.
        seen: examples trained on, over all epochs.
        steps: batches trained.
        training_loss: mean over ``seen``.
        holdout_examples, holdout_correct, holdout_loss: the trained model on held-out examples; zeros for none. The
            loss is a mean.
        before_correct, before_loss: the same for the model before training.
    """

    delta: Floats
    examples: int
    seen: int
    steps: int
    training_loss: float
    holdout_examples: int = 0
    holdout_correct: int = 0
    holdout_loss: float = 0.0
    before_correct: int = 0
    before_loss: float = 0.0


class Trainer(Protocol):
    """Trains on this device's data. One thread at a time calls it."""

    def prepare(self, card: ModelCard) -> str:
        """Load what can be loaded ahead, check it against a model, and say in a line what there is.

        Raises:
            ConfigError: the data do not exist or do not fit.
        """

    def train(self, task: Task) -> Trained:
        """Train.

        Raises:
            TrainingDeclinedError: there is no result, and why.
            TrainingCancelledError: ``task.cancelled`` said so.
        """


class TfliteTrainer:
    """Trains the model file itself in a TFLite runtime, which is imported at the first training.

    Files are read once; a sensor (``data.function``) is read anew in every round.

    Args:
        settings: the device's.
    """

    def __init__(self, settings: DeviceConfig) -> None:
        self._settings = settings
        self._data: tuple[Dataset, Dataset] | None = None

    def prepare(self, card: ModelCard) -> str:
        """See `Trainer.prepare`."""
        training, holdout = self._load(card)
        return f"{len(training)} training and {len(holdout)} holdout examples of {training.x.dtype}"

    def train(self, task: Task) -> Trained:
        """See `Trainer.train`."""
        try:
            training, holdout = self._load(task.card)
            if len(training) < task.eligibility.minimum_examples:
                raise TrainingDeclinedError(
                    DeclineReason.TOO_FEW_EXAMPLES, f"{len(training)} of {task.eligibility.minimum_examples}"
                )
            return self._train(task, training, holdout)
        except ConfigError as error:
            raise TrainingDeclinedError(DeclineReason.TRAINING_FAILED, str(error)) from error
        finally:
            _trim(task.card)

    def _load(self, card: ModelCard) -> tuple[Dataset, Dataset]:
        settings = self._settings.data
        if self._data is None or settings.function:
            whole = dataset.load(settings)
            self._data = dataset.split(whole, holdout=settings.holdout, seed=settings.seed)
        training, holdout = self._data
        where = str(settings.path or settings.function)
        training = dataset.check(training, input_shape=card.input_shape, classes=card.classes, where=where)
        if len(holdout):
            holdout = dataset.check(holdout, input_shape=card.input_shape, classes=card.classes, where=where)
        return training, holdout

    def _train(self, task: Task, training: Dataset, holdout: Dataset) -> Trained:
        # One interpreter at a time, and each with one purpose: it keeps memory for everything that it ever ran.
        _trim(task.card)
        before = self._evaluate(task, holdout, None)
        steps = _Steps()
        delta = self._descend(task, training, steps)
        _trim(task.card)
        if not np.isfinite(delta).all():
            raise TrainingDeclinedError(DeclineReason.DIVERGED, f"weights not finite after {steps.count} steps")
        after = self._evaluate(task, holdout, delta)
        if not np.isfinite(after.loss_sum):
            raise TrainingDeclinedError(DeclineReason.DIVERGED, "a holdout loss that is not finite")
        _subtract_file(delta, task)
        held = max(after.examples, 1)
        return Trained(
            delta=delta,
            examples=len(training),
            seen=steps.seen,
            steps=steps.count,
            training_loss=max(steps.loss_sum / max(steps.seen, 1), 0.0),
            holdout_examples=after.examples,
            holdout_correct=after.correct,
            holdout_loss=max(after.loss_sum / held, 0.0),
            before_correct=before.correct,
            before_loss=before.loss_sum / held if np.isfinite(before.loss_sum) else 0.0,
        )

    def _model(self, task: Task) -> interpreter.Model:
        # Imported late: a device that waits does not carry the runtime.
        from fleetfed.shared.model.interpreter import Model

        model = Model(task.model, task.card, num_threads=self._settings.run.threads)
        _release(task.card)
        return model

    def _descend(self, task: Task, training: Dataset, steps: _Steps) -> Floats:
        """Train; return the trained weights."""
        model = self._model(task)
        optimizer = _optimizer(task.training)
        confined = None
        if task.projection is not None:
            from fleetfed.device.confined import Confined

            confined = Confined(model, task.projection, optimizer)
        batch, limit = task.card.batch, task.training.max_steps
        within = np.arange(batch)
        for _ in range(task.training.epochs):
            order = task.rng.permutation(len(training))
            for start in range(0, len(order), batch):
                if limit and steps.count >= limit:
                    break
                if task.cancelled():
                    raise TrainingCancelledError
                x, y = training.batch(order[start : start + batch])
                if confined is None:
                    loss = model.train_epoch(x, y, optimizer=optimizer, order=within[: len(y)])
                else:
                    loss = confined.step(x, y)
                if not np.isfinite(loss):
                    raise TrainingDeclinedError(DeclineReason.DIVERGED, f"loss {loss} after {steps.count} steps")
                if not steps.count:
                    # The weights were copied out of the file: its pages and the code that did it are not needed again.
                    _release(task.card)
                steps.add(loss, len(y))
        _release(task.card)
        return model.get_weights() if confined is None else confined.get_weights()

    def _evaluate(self, task: Task, data: Dataset, weights: Floats | None) -> _Score:
        """Score the file's model, or the same with other weights."""
        if not len(data):
            return _Score()
        model = self._model(task)
        if weights is not None:
            model.set_weights(weights)
        loss_sum, correct = 0.0, 0
        for start in range(0, len(data), task.card.batch):
            if task.cancelled():
                raise TrainingCancelledError
            x, y = data.batch(np.arange(start, min(start + task.card.batch, len(data))))
            part = model.evaluate(x, y)
            loss_sum += part.loss_sum
            correct += part.correct
        return _Score(loss_sum, correct, len(data))


@dataclass(slots=True)
class _Steps:
    """What training did so far."""

    count: int = 0
    seen: int = 0
    loss_sum: float = 0.0

    def add(self, loss: float, examples: int) -> None:
        self.count += 1
        self.seen += examples
        self.loss_sum += loss * examples


@dataclass(frozen=True, slots=True)
class _Score:
    loss_sum: float = 0.0
    correct: int = 0
    examples: int = 0


def _trim(card: ModelCard) -> None:
    if card.parameters >= memory.WORTH_TRIMMING:
        memory.trim()


def _release(card: ModelCard) -> None:
    if card.parameters >= memory.WORTH_TRIMMING:
        memory.release_clean_pages()


def _optimizer(training: Training) -> interpreter.Optimizer:
    from fleetfed.shared.model.interpreter import Adam, Sgd

    if training.optimizer is Optimizer.ADAM:
        return Adam(
            lr=training.learning_rate,
            beta1=training.beta1,
            beta2=training.beta2,
            epsilon=training.epsilon,
            proximal=training.proximal,
        )
    return Sgd(lr=training.learning_rate, momentum=training.momentum, proximal=training.proximal)


def _subtract_file(weights: Floats, task: Task) -> None:
    """Turn the trained weights into the delta, in place, tensor by tensor."""
    at = 0
    with task.model.open("rb") as file:
        for slot in task.card.tensors:
            file.seek(slot.offset)
            # The difference is inspected by the caller; a diverged model overflows here without a warning.
            with np.errstate(over="ignore", invalid="ignore"):
                weights[at : at + slot.size] -= np.fromfile(file, dtype="<f4", count=slot.size)
            at += slot.size


def make_trainer(settings: DeviceConfig) -> Trainer:
    """The configured trainer.

    Raises:
        ConfigError: the factory cannot be imported, fails, or returns no trainer.
    """
    if not settings.trainer:
        return TfliteTrainer(settings)
    factory = dataset.named(settings.trainer)
    try:
        trainer = factory(settings)
    # The factory is the user's own; whatever it raises, the person who named it in the settings must hear of it.
    except Exception as error:
        raise ConfigError(f"trainer {settings.trainer} failed: {type(error).__name__}: {error}") from error
    if not all(callable(getattr(trainer, name, None)) for name in ("prepare", "train")):
        raise ConfigError(f"trainer {settings.trainer}: {type(trainer).__name__} has no methods prepare and train")
    return cast("Trainer", trainer)


__all__ = [
    "Task",
    "TfliteTrainer",
    "Trained",
    "Trainer",
    "TrainingCancelledError",
    "TrainingDeclinedError",
    "make_trainer",
]
