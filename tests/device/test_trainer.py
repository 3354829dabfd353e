from __future__ import annotations

import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator import zoo
from fleetfed.device import memory, update, worker
from fleetfed.device.config import DeviceConfig, DeviceEndpoint
from fleetfed.device.trainer import (
    Task,
    TfliteTrainer,
    Trained,
    TrainingCancelledError,
    TrainingDeclinedError,
    make_trainer,
)
from fleetfed.device.worker import Finished, Job, Worker
from fleetfed.shared.aggregate.body import decode_body
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.telemetry import peak_mb
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import (
    DeclineReason,
    Eligibility,
    Optimizer,
    Plan,
    Quantization,
    Training,
    Weighting,
)

MODEL = zoo.load("digits", seed=1)
CARD = MODEL.card


def settings(directory: Path, **data: Any) -> DeviceConfig:
    return DeviceConfig(
        identity=directory,
        state=directory,
        broker=DeviceEndpoint(host="localhost"),
        data=DataConfig(**{"path": directory / "data.npz", **data}),
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    y = rng.integers(0, 10, 100)
    x = rng.normal(0, 0.1, (100, *CARD.input_shape)).astype(np.float32)
    x[np.arange(100), y % 8, :, 0] += 1
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "model.tflite").write_bytes(MODEL.data)
    return tmp_path


def task(directory: Path, *, seed: int = 1, eligibility: Eligibility | None = None, **training: Any) -> Task:
    return Task(
        training=Training(**{"learning_rate": 0.05, **training}),
        eligibility=eligibility or Eligibility(),
        card=CARD,
        model=directory / "model.tflite",
        rng=np.random.default_rng(seed),
        cancelled=lambda: False,
    )


def plan(**changes: Any) -> Plan:
    whole = {
        "round": 1,
        "model_version": 1,
        "model_sha256": bytes(32),
        "dimension": CARD.parameters,
        "quantization": Quantization(
            bits=4, lane_bits=16, clips=(0.05,) * len(CARD.tensors), weight_cap=50, error_feedback=True
        ),
        "training": Training(learning_rate=0.05),
        "opened": 0,
        "deadline": 1,
        "expires": 1,
        "nonce": bytes(16),
    }
    return Plan(**{**whole, **changes})


def test_training_learns_and_counts(files: Path) -> None:
    trained = TfliteTrainer(settings(files)).train(task(files, epochs=15))
    assert trained.examples == 80
    assert trained.seen == 15 * 80
    assert trained.steps == 15 * 5
    assert trained.holdout_examples == 20
    assert trained.holdout_loss < trained.before_loss * 0.8
    assert trained.holdout_correct > trained.before_correct
    assert trained.delta.dtype == np.float32
    assert np.abs(trained.delta).max() > 1e-3


def test_the_same_seed_gives_the_same_delta(files: Path) -> None:
    trainer = TfliteTrainer(settings(files))
    first, again, other = (trainer.train(task(files, seed=seed)).delta for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_delta_is_what_the_model_moved_by(files: Path) -> None:
    """One step with a vanishing rate moves nothing; the file itself never changes."""
    trainer = TfliteTrainer(settings(files))
    still = trainer.train(task(files, learning_rate=1e-9, max_steps=1))
    assert still.steps == 1
    assert np.abs(still.delta).max() < 1e-6
    assert (files / "model.tflite").read_bytes() == MODEL.data
    moved = trainer.train(task(files, epochs=3))
    start = read_weights(MODEL.data, CARD.table)
    from fleetfed.shared.model.interpreter import Model

    model = Model(files / "model.tflite", CARD)
    model.set_weights(start + moved.delta)
    training, holdout = trainer._load(CARD)
    x, y = holdout.batch(np.arange(len(holdout)))
    assert model.evaluate(x, y).correct == moved.holdout_correct
    assert len(training) == 80


def test_the_proximal_term_holds_back(files: Path) -> None:
    trainer = TfliteTrainer(settings(files))
    free = trainer.train(task(files, epochs=5, momentum=0.0)).delta
    bound = trainer.train(task(files, epochs=5, momentum=0.0, proximal=5.0)).delta
    assert np.linalg.norm(bound) < 0.7 * np.linalg.norm(free)


def test_adam(files: Path) -> None:
    trained = TfliteTrainer(settings(files)).train(
        task(files, optimizer=Optimizer.ADAM, learning_rate=0.003, epochs=10)
    )
    assert trained.holdout_loss < trained.before_loss


@pytest.mark.parametrize("how", ["blow up", "bad start"])
def test_what_diverges_is_declined(files: Path, how: str) -> None:
    if how == "blow up":
        data = settings(files, scale=1e9)
    else:
        data = settings(files)
        file = bytearray(MODEL.data)
        at = CARD.tensors[0].offset
        file[at : at + 4] = np.array([np.nan], dtype="<f4").tobytes()
        (files / "model.tflite").write_bytes(file)
    with pytest.raises(TrainingDeclinedError) as caught:
        TfliteTrainer(data).train(task(files, learning_rate=1000.0, epochs=20))
    assert caught.value.reason is DeclineReason.DIVERGED


def test_too_few_examples_are_declined(files: Path) -> None:
    with pytest.raises(TrainingDeclinedError) as caught:
        TfliteTrainer(settings(files)).train(task(files, eligibility=Eligibility(minimum_examples=81)))
    assert caught.value.reason is DeclineReason.TOO_FEW_EXAMPLES


def test_data_that_do_not_fit_are_declined(files: Path) -> None:
    np.savez(files / "data.npz", x=np.zeros((5, 3)), y=np.zeros(5))
    trainer = TfliteTrainer(settings(files))
    with pytest.raises(ConfigError, match="the model takes"):
        trainer.prepare(CARD)
    with pytest.raises(TrainingDeclinedError) as caught:
        trainer.train(task(files))
    assert caught.value.reason is DeclineReason.TRAINING_FAILED


def test_cancelling_stops_within_a_batch(files: Path) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(TrainingCancelledError):
        TfliteTrainer(settings(files)).train(dataclasses.replace(task(files, epochs=1000), cancelled=cancelled))
    assert len(asked) == 6


def test_a_sensor_is_read_for_every_round(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(files))
    (files / "counting_sensor.py").write_text(
        "import numpy as np\nreads = []\n"
        "def read():\n    reads.append(1)\n    n = 20 * len(reads)\n"
        f"    return np.ones((n, *{CARD.input_shape}), np.float32), np.arange(n) % 10\n"
    )
    trainer = TfliteTrainer(settings(files, path=None, function="counting_sensor:read", holdout=0.0))
    assert trainer.train(task(files)).examples == 20
    assert trainer.train(task(files)).examples == 40
    sys.modules.pop("counting_sensor")


def test_the_example_sensor_fits_the_wrist_model(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    wrist = zoo.load("wrist", seed=1)
    config = settings(files, path=None, function="sensor:read", processing="sensor:normalize")
    said = TfliteTrainer(config).prepare(wrist.card)
    assert said == "48 training and 12 holdout examples of float32"
    sys.modules.pop("sensor")


# --- A trainer of one's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no function 'factory'"),
        ("def factory(settings): return 5", "int has no methods prepare and train"),
        ("def factory(settings): raise OSError('no port')", "OSError: no port"),
    ],
)
def test_trainers_that_are_none(files: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.syspath_prepend(str(files))
    (files / "odd_trainer.py").write_text(text)
    sys.modules.pop("odd_trainer", None)
    with pytest.raises(ConfigError, match=says):
        make_trainer(dataclasses.replace(settings(files), trainer="odd_trainer:factory"))


class Fixed:
    """Returns what it was given, or raises it."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def prepare(self, card: Any) -> str:
        return ""

    def train(self, task: Task) -> Trained:
        if isinstance(self.result, Exception):
            raise self.result
        trained: Trained = self.result
        return trained


def trained(value: float = 0.01, examples: int = 100) -> Trained:
    delta = np.full(CARD.parameters, value, dtype=np.float32)
    return Trained(delta=delta, examples=examples, seen=2 * examples, steps=3, training_loss=1.5)


def job(**changes: Any) -> Job:
    whole = {
        "plan": plan(),
        "plan_hash": Digest(bytes(32)),
        "card": CARD,
        "model": Path("unused"),
        "residual": lambda: None,
        "seed": [1],
    }
    return Job(**{**whole, **changes})


def outcome(result: Any, **changes: Any) -> Finished:
    done: list[Finished] = []
    running = Worker(Fixed(result), done.append)
    running.start(job(**changes))
    running.join(PATIENCE)
    (finished,) = done
    return finished


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (trained(np.nan), DeclineReason.DIVERGED),
        (trained(np.inf), DeclineReason.DIVERGED),
        (TrainingDeclinedError(DeclineReason.BUSY, ""), DeclineReason.BUSY),
        (ZeroDivisionError("oops"), DeclineReason.TRAINING_FAILED),
        (dataclasses.replace(trained(), delta=np.zeros(3, np.float32)), DeclineReason.TRAINING_FAILED),
        (dataclasses.replace(trained(), training_loss=np.nan), DeclineReason.TRAINING_FAILED),
        ("not a result", DeclineReason.TRAINING_FAILED),
    ],
)
def test_whatever_a_trainer_does_is_an_outcome(result: Any, reason: DeclineReason) -> None:
    finished = outcome(result)
    assert finished.prepared is None
    assert finished.reason is reason


def test_a_cancelled_job_says_nothing() -> None:
    done: list[Finished] = []
    running = Worker(Fixed(trained()), done.append)
    running.start(job())
    running.start(job(plan=plan(round=2), plan_hash=Digest(b"2" * 32)))
    running.join(PATIENCE)
    assert done[-1].plan_hash == b"2" * 32
    assert len(done) <= 2


def test_a_trainer_that_never_returns_holds_up_one_thread_and_then_the_latest_round_trains() -> None:
    done: list[Finished] = []
    release, begun = threading.Event(), []

    class Stuck(Fixed):
        def train(self, task: Task) -> Trained:
            begun.append(task)
            release.wait(PATIENCE)
            return super().train(task)

    running, threads = Worker(Stuck(trained()), done.append), threading.active_count()
    for number in range(1, 8):
        running.start(job(plan=plan(round=number), plan_hash=Digest(bytes([number]) * 32)))
    assert threading.active_count() == threads + 1
    release.set()
    running.join(PATIENCE)
    assert [finished.plan_hash for finished in done] == [b"\x07" * 32]
    assert len(begun) <= 2


# --- Updates ----------------------------------------------------------------------------------------------------------


def test_an_update_is_the_plans_numbers() -> None:
    prepared = update.prepare(trained(), plan(), CARD, rng=np.random.default_rng(1), residual=None)
    assert prepared.weight == 50
    values, meta = decode_body(prepared.body, dimension=CARD.parameters, limit=7, meta_words=prepared.meta_words)
    assert meta[:3].tolist() == [1, 50, 200]
    # 0.01 at clip 0.05 and 7 levels is 1.4 grid steps.
    assert set(np.unique(values)) == {1, 2}
    assert abs(values.mean() - 1.4) < 0.05
    assert prepared.residual is not None
    np.testing.assert_allclose(values * 0.05 / 7 + prepared.residual, 0.01, atol=1e-7)


def test_weight_follows_the_plan() -> None:
    rng = np.random.default_rng(1)
    few = update.prepare(trained(examples=20), plan(), CARD, rng=rng, residual=None)
    same = update.prepare(trained(examples=20), plan(weighting=Weighting.UNIFORM), CARD, rng=rng, residual=None)
    assert (few.weight, same.weight) == (20, 50)


def test_without_error_feedback_nothing_is_kept() -> None:
    settings = dataclasses.replace(plan().quantization, error_feedback=False)
    old = np.ones(CARD.parameters, dtype=np.float32)
    prepared = update.prepare(trained(), plan(quantization=settings), CARD, rng=np.random.default_rng(1), residual=old)
    assert prepared.residual is None


@pytest.mark.parametrize("changes", [{"dimension": 5}, {"quantization": Quantization(
    bits=4, lane_bits=16, clips=(1.0,), weight_cap=5)}])  # fmt: skip
def test_a_plan_that_does_not_fit_the_model_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        worker.work(Fixed(trained()), job(plan=plan(**changes)), lambda: False)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_released_pages_come_back(files: Path) -> None:
    trainer = TfliteTrainer(settings(files))
    before = trainer.train(task(files)).delta
    for _ in range(3):
        memory.trim()
    np.testing.assert_array_equal(trainer.train(task(files)).delta, before)
    assert peak_mb() > 10


def test_mappings_with_pages_of_their_own_are_left_alone() -> None:
    smaps = (
        "1000-2000 r-xp 00000000 08:01 7 /lib/a.so\nRss: 4 kB\nAnonymous: 0 kB\n"
        "2000-3000 r-xp 00000000 08:01 7 /lib/b.so\nRss: 4 kB\nAnonymous: 4 kB\n"
        "3000-4000 rw-p 00000000 08:01 7 /lib/c.so\nAnonymous: 0 kB\n"
        "4000-5000 r--s 00000000 08:01 7 /models/m.tflite\nAnonymous: 0 kB\n"
        "5000-6000 r-xp 00000000 00:00 0 [vdso]\nAnonymous: 0 kB\n"
    )
    kept = [line.split()[-1] for line in memory._without_own_pages(smaps)]
    assert kept == ["/lib/a.so", "/models/m.tflite"]
