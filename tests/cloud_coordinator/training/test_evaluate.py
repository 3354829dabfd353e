"""Evaluation with a real model file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.training.evaluate import Evaluator
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.table import read_weights, write_weights

MODEL = zoo.load("digits")


def evaluator(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> Evaluator:
    np.savez(tmp_path / "v.npz", x=x, y=y)
    return Evaluator(DataConfig(path=tmp_path / "v.npz"))


def test_every_version_is_evaluated_with_its_own_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, *MODEL.card.input_shape)).astype(np.float32)
    y = np.arange(40) % MODEL.card.classes
    it = evaluator(tmp_path, x, y)
    first = it.evaluate(MODEL.data, MODEL.card)
    silent = bytearray(MODEL.data)
    write_weights(silent, MODEL.card.table, np.zeros_like(read_weights(MODEL.data, MODEL.card.table)))
    other = it.evaluate(bytes(silent), MODEL.card)
    # Without weights all classes are equally likely, and the first one is taken.
    assert other["loss"] == pytest.approx(np.log(MODEL.card.classes), rel=1e-5)
    assert other["accuracy"] == pytest.approx((y == 0).mean())
    assert it.evaluate(MODEL.data, MODEL.card) == first != other


def test_data_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    it = evaluator(tmp_path, np.zeros((3, 7), dtype=np.float32), np.zeros(3, dtype=np.int64))
    with pytest.raises(ConfigError, match="validation data"):
        it.evaluate(MODEL.data, MODEL.card)
