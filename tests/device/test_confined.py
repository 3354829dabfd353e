"""Training confined to what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.device import worker
from fleetfed.device.config import DeviceConfig, DeviceEndpoint
from fleetfed.device.confined import Confined
from fleetfed.device.trainer import TfliteTrainer
from fleetfed.device.worker import Job
from fleetfed.shared.aggregate.body import decode_body
from fleetfed.shared.aggregate.projection import Subspace
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.model.interpreter import Adam, Model, Optimizer, Sgd
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Optimizer as TrainingRule
from fleetfed.shared.wire.messages import Plan, Quantization, Training
from fleetfed.shared.wire.projection import Factor, Projection

MODEL = zoo.load("digits", seed=1)
CARD = MODEL.card
SIZES = tuple(slot.size for slot in CARD.tensors)
LARGEST = SIZES.index(max(SIZES))


def examples(count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    y = rng.integers(0, 10, count)
    x = rng.normal(0, 0.1, (count, *CARD.input_shape)).astype(np.float32)
    x[np.arange(count), y % 8, :, 0] += 1
    return x, y


def projection(rows: int = 8, rank: int = 2) -> Projection:
    sizes = tuple(size if i != LARGEST else size // rows * rank for i, size in enumerate(SIZES))
    return Projection(seed=bytes(16), factors=(Factor(tensor=LARGEST, rows=rows, rank=rank),), sizes=sizes)


def train(optimizer: Optimizer, chosen: Projection, epochs: int) -> tuple[np.ndarray, list[float]]:
    model = Model(MODEL.data, CARD)
    start = model.get_weights()
    confined = Confined(model, chosen, optimizer)
    x, y = examples()
    losses = [
        confined.step(x[at : at + CARD.batch], y[at : at + CARD.batch])
        for _ in range(epochs)
        for at in range(0, len(x), CARD.batch)
    ]
    weights = confined.get_weights()
    np.testing.assert_array_equal(weights, model.get_weights())
    return weights - start, losses


@pytest.mark.parametrize(
    "optimizer", [Adam(lr=5e-3), Sgd(lr=0.1), Sgd(lr=0.05, momentum=0.9), Adam(lr=5e-3, proximal=0.1)]
)
def test_it_learns_and_nothing_of_it_is_lost_on_the_way(optimizer: Optimizer) -> None:
    delta, losses = train(optimizer, projection(), epochs=6)
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert np.abs(delta).max() > 1e-3
    subspace = Subspace(projection(), SIZES)
    back = subspace.lift(subspace.project(delta).astype(np.float64))
    np.testing.assert_allclose(back, delta, atol=1e-6)


class Everything:
    """The subspace that is the whole space."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def project(self, delta: np.ndarray) -> np.ndarray:
        return delta.copy()

    def expand(self, numbers: np.ndarray) -> np.ndarray:
        return numbers.copy()


@pytest.mark.parametrize(
    "optimizer", [Adam(lr=1e-3), Sgd(lr=0.05), Sgd(lr=0.05, momentum=0.9), Sgd(lr=0.05, proximal=0.5)]
)
def test_the_rules_are_those_of_the_files_own_training(monkeypatch: pytest.MonkeyPatch, optimizer: Optimizer) -> None:
    """With a short last batch, against the graph in the model file."""
    monkeypatch.setattr("fleetfed.device.confined.Subspace", Everything)
    x, y = examples(CARD.batch * 3 + 1)
    own, model = Model(MODEL.data, CARD), Model(MODEL.data, CARD)
    loss = own.train_epoch(x, y, optimizer=optimizer, order=np.arange(len(x)))
    confined = Confined(model, Projection(seed=bytes(16), factors=(), sizes=SIZES), optimizer)
    total = 0.0
    for at in range(0, len(x), CARD.batch):
        part = slice(at, at + CARD.batch)
        total += confined.step(x[part], y[part]) * len(y[part])
    assert total / len(x) == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(confined.get_weights(), own.get_weights(), atol=2e-5)


def test_the_trainer_stays_within_what_the_plan_lets_travel(tmp_path: Path) -> None:
    x, y = examples(100)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "model.tflite").write_bytes(MODEL.data)
    settings = DeviceConfig(
        identity=tmp_path,
        state=tmp_path,
        broker=DeviceEndpoint(host="localhost"),
        data=DataConfig(path=tmp_path / "data.npz"),
    )
    finished = worker.work(TfliteTrainer(settings), job(tmp_path / "model.tflite", projection()), lambda: False)
    assert finished.prepared is not None
    assert finished.summary is not None
    assert finished.summary.steps == 10
    values, _ = decode_body(
        finished.prepared.body, dimension=projection().dimension, limit=127, meta_words=finished.prepared.meta_words
    )
    assert finished.prepared.dimension == values.size == projection().dimension
    assert np.count_nonzero(values) > 100


def test_a_projection_that_does_not_fit_is_refused_before_anything_is_trained() -> None:
    wrong = Projection(seed=bytes(16), factors=(Factor(tensor=LARGEST, rows=1024, rank=1023),), sizes=SIZES)
    with pytest.raises(LocalProtocolError, match="projection"):
        worker.work(Untouched(), job(Path("unused"), wrong), lambda: False)


class Untouched:
    """A trainer that nobody may ask."""

    def prepare(self, card: Any) -> str:
        raise AssertionError

    def train(self, task: Any) -> Any:
        raise AssertionError


def job(model: Path, chosen: Projection) -> Job:
    plan = Plan(
        round=1,
        model_version=1,
        model_sha256=bytes(32),
        dimension=CARD.parameters,
        quantization=Quantization(bits=8, lane_bits=32, clips=(0.05,) * len(SIZES), weight_cap=1),
        training=Training(optimizer=TrainingRule.ADAM, learning_rate=1e-3, epochs=2),
        opened=0,
        deadline=1,
        expires=1,
        nonce=bytes(16),
        projection=chosen,
    )
    return Job(plan=plan, plan_hash=Digest(bytes(32)), card=CARD, model=model, residual=lambda: None, seed=[1])
