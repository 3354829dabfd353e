"""Evaluates versions on the configured validation set, with the TFLite runtime that devices use."""

from __future__ import annotations

import numpy as np

from fleetfed.shared import dataset
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.interpreter import Model
from fleetfed.shared.model.table import read_weights


class Evaluator:
    """Keeps one interpreter and gives it each version's weights. For one thread at a time.

    Args:
        config: the validation set.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, config: DataConfig) -> None:
        self._where = str(config.path or config.function)
        self._data = dataset.load(config)
        self._layout: bytes | None = None
        self._model: Model | None = None

    def evaluate(self, file: bytes, card: ModelCard) -> dict[str, float]:
        """Accuracy and mean loss of a model file.

        Raises:
            ConfigError: the validation set does not fit the model, or no TFLite runtime is installed.
        """
        if self._model is None or self._layout != card.layout:
            self._data = dataset.check(
                self._data, input_shape=card.input_shape, classes=card.classes, where=f"validation data {self._where}"
            )
            self._model = Model(file, card)
            self._layout = card.layout
        self._model.set_weights(read_weights(file, card.table))
        x, y = self._data.batch(np.arange(len(self._data)))
        result = self._model.evaluate(x, y)
        if not result.examples:
            raise ConfigError(f"validation data {self._where}: no examples")
        return {"accuracy": result.correct / result.examples, "loss": result.loss_sum / result.examples}
