"""Prove a built file against Keras before anyone gets it.

A conversion that succeeds may still have lost something: the converter is known to drop a fused ReLU, and to convert
gradients that are wrong. So every file that `build` returns was run once, on random weights and examples, next to the
Keras model that it came from.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.interpreter import Adam, Model, Sgd
from fleetfed.shared.model.table import write_weights

TOLERANCE = 1e-3
"""Relative error of a tensor's gradient at which a file is refused; what is right lies below 1e-5."""


def prove(model: keras.Model, data: bytes, card: ModelCard) -> None:
    """Compare scores, loss, gradients and one step of each optimiser with Keras.

    Args:
        model: what the file was built from; left as it was.
        data: the file.
        card: its card.

    Raises:
        ConfigError: something differs, or no TFLite runtime is installed.
    """
    rng = np.random.default_rng(0xF1EE7)
    twin = keras.models.clone_model(model)
    # Biases that are zero would hide a missing addition.
    twin.set_weights([value + 0.05 * rng.normal(size=value.shape).astype(np.float32) for value in model.get_weights()])
    flat = _flat(twin.trainable_variables)
    patched = bytearray(data)
    write_weights(patched, card.table, flat)
    x = rng.normal(size=(card.batch, *card.input_shape)).astype(np.float32)
    y = rng.integers(0, card.classes, card.batch).astype(np.int32)
    w = rng.uniform(0.5, 1.5, card.batch).astype(np.float32)
    ones = np.ones(card.batch, dtype=np.float32)

    with Model(bytes(patched), card) as built:
        _compare(card, "the scores", built.infer(x), np.asarray(twin(x)))
        loss, gradients = built.gradients(x, y, w)
        expected_loss, expected = _keras_gradients(twin, card, x, y, w)
        _compare(card, "the loss", np.array([loss]), np.array([expected_loss]))
        for slot, part in zip(card.tensors, card.table.splits(), strict=True):
            floor = 1e-4 * float(np.linalg.norm(expected))
            _compare(card, f"the gradient of {slot.name}", gradients[part], expected[part], floor)

        _, expected = built.gradients(x, y, ones)
        built.train_epoch(x, y, optimizer=Sgd(lr=0.1), order=np.arange(card.batch))
        _compare(card, "a step of SGD", (flat - built.get_weights()) / np.float32(0.1), expected)
        built.set_weights(flat)
        built.train_epoch(x, y, optimizer=Adam(lr=0.1, epsilon=0.01), order=np.arange(card.batch))
        # The first step in closed form; with Keras's rule epsilon is not corrected for bias, the rest is.
        root = np.float32(np.sqrt(1 - Adam().beta2))
        step = root * expected / (root * np.abs(expected) + np.float32(0.01))
        _compare(card, "a step of Adam", (flat - built.get_weights()) / np.float32(0.1), step)


def _keras_gradients(model: Any, card: ModelCard, x: Any, y: Any, w: Any) -> tuple[float, NDArray[np.float32]]:
    with tf.GradientTape() as tape:
        each = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=not card.softmax)
        loss = tf.reduce_sum(each * w) / tf.reduce_sum(w)
    return float(loss), _flat(tape.gradient(loss, model.trainable_variables))


def _flat(values: Any) -> NDArray[np.float32]:
    return np.concatenate([np.asarray(value, dtype=np.float32).reshape(-1) for value in values])


def _compare(card: ModelCard, what: str, found: Any, expected: Any, floor: float = 0.0) -> None:
    scale = max(float(np.linalg.norm(expected)), floor, 1e-20)
    error = float(np.linalg.norm(np.asarray(found, dtype=np.float64) - expected)) / scale
    # Written so that NaN is refused.
    if not error < TOLERANCE:
        raise ConfigError(
            f"model {card.name}: the converted file is wrong: {what} differs from Keras by {error:.1e} (relative), "
            f"limit {TOLERANCE:.0e}. Please report the model; its file was not written."
        )
