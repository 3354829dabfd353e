"""Training in a thread of its own, so that the device hears of a round's end while it trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fleetfed.device import memory, update
from fleetfed.device.trainer import Task, Trained, Trainer, TrainingCancelledError, TrainingDeclinedError
from fleetfed.device.update import Prepared, Residual
from fleetfed.shared.errors import LocalProtocolError, StorageError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import DeclineReason, Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One plan's work.

    Attributes:
        plan, plan_hash: the plan.
        card: of the model.
        model: the file to start from.
        residual: reads the error feedback in force; called after training, when there is room for it.
        seed: of all randomness; None draws from the operating system.
    """

    plan: Plan
    plan_hash: Digest
    card: ModelCard
    model: Path
    residual: Callable[[], Residual | None]
    seed: list[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is worth noting of a training, besides its result."""

    steps: int
    loss: float
    holdout_examples: int
    holdout_correct: int
    before_correct: int
    clipped: float
    weight: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """A job ended: with a result, with a reason why there is none, or because it was cancelled (neither)."""

    plan_hash: Digest
    prepared: Prepared | None = None
    summary: Summary | None = None
    reason: DeclineReason | None = None
    detail: str = ""


class Worker:
    """Runs one job at a time; the latest one waits until the one before it noticed that it was cancelled.

    A trainer that never notices (a sensor that does not answer) holds up one thread, however many rounds pass.

    Args:
        trainer: what trains.
        done: called in the job's thread with how it ended.
    """

    def __init__(self, trainer: Trainer, done: Callable[[Finished], None]) -> None:
        self._trainer = trainer
        self._done = done
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._guard = threading.Lock()
        self._next: tuple[Job, threading.Event] | None = None

    def start(self, job: Job) -> None:
        """Begin a job; the one before it is cancelled."""
        self.cancel()
        self._cancel = threading.Event()
        with self._guard:
            self._next = (job, self._cancel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="training", daemon=True)
                self._thread.start()

    def cancel(self) -> None:
        """Ask the job to give up."""
        self._cancel.set()

    def join(self, timeout: float) -> None:
        """Wait until no job runs, for at most so many seconds."""
        with self._guard:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._guard:
                if self._next is None:
                    self._thread = None
                    return
                job, cancel = self._next
                self._next = None
            if cancel.is_set():
                continue
            finished = self._attempt(job, cancel)
            if not cancel.is_set():
                self._done(finished)
            # What a job leaves is large, and this thread may wait for long.
            del job, finished

    def _attempt(self, job: Job, cancel: threading.Event) -> Finished:
        try:
            return work(self._trainer, job, cancel.is_set)
        except TrainingCancelledError:
            return Finished(plan_hash=job.plan_hash)
        except TrainingDeclinedError as error:
            return Finished(plan_hash=job.plan_hash, reason=error.reason, detail=error.detail)
        except update.NonFiniteDeltaError as error:
            return Finished(plan_hash=job.plan_hash, reason=DeclineReason.DIVERGED, detail=str(error))
        except (LocalProtocolError, StorageError) as error:
            return Finished(plan_hash=job.plan_hash, reason=DeclineReason.TRAINING_FAILED, detail=str(error))
        # Whatever a data source, a processing function or a trainer of the user's raises: this round fails, with its
        # traceback in the log, and the device lives on.
        except Exception as error:  # noqa: BLE001
            _log.exception("round %d: training failed", job.plan.round)
            detail = f"{type(error).__name__}: {error}"
            return Finished(plan_hash=job.plan_hash, reason=DeclineReason.TRAINING_FAILED, detail=detail[:500])


def work(trainer: Trainer, job: Job, cancelled: Callable[[], bool]) -> Finished:
    """Train and quantize.

    Raises:
        TrainingCancelledError, TrainingDeclinedError: as `Trainer.train`.
        NonFiniteDeltaError: the trainer's delta is not finite.
        LocalProtocolError: the plan does not fit the model.
        StorageError: the error feedback is damaged.
    """
    update.check_plan(job.plan, job.card)
    training_rng, rounding_rng = (np.random.default_rng(seed) for seed in np.random.SeedSequence(job.seed).spawn(2))
    trained = trainer.train(
        Task(
            training=job.plan.training,
            eligibility=job.plan.eligibility,
            card=job.card,
            model=job.model,
            rng=training_rng,
            cancelled=cancelled,
            projection=job.plan.projection,
        )
    )
    prepared = update.prepare(trained, job.plan, job.card, rng=rounding_rng, residual=job.residual())
    summary = _summary(trained, prepared)
    del trained
    if job.card.parameters > memory.WORTH_TRIMMING:
        memory.trim()
    return Finished(plan_hash=job.plan_hash, prepared=prepared, summary=summary)


def _summary(trained: Trained, prepared: Prepared) -> Summary:
    return Summary(
        steps=trained.steps,
        loss=trained.training_loss,
        holdout_examples=trained.holdout_examples,
        holdout_correct=trained.holdout_correct,
        before_correct=trained.before_correct,
        clipped=prepared.clipped,
        weight=prepared.weight,
    )
