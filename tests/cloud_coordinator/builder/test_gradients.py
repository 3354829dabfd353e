"""Every supported layer and option against TensorFlow: loss, every gradient, and some optimiser steps.

The cases are checked here on LiteRT and, where FLEETFED_MODEL_CASES names a folder, left in it for
`tests/shared/model/test_cases.py`, which runs in an environment that has another runtime and no TensorFlow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing import model_cases

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # TensorFlow's own
]
BATCH = 6
STEPS = 5


def sequential(shape: tuple[int, ...], *layers: Any) -> Any:
    import keras

    return keras.Sequential([keras.Input(shape), *layers])


def layer(name: str, *arguments: Any, **options: Any) -> Any:
    import keras

    return getattr(keras.layers, name)(*arguments, **options)


def zoo_model(name: str) -> Any:
    from fleetfed.cloud_coordinator.zoo import models

    return getattr(models, name)()


def functional() -> Any:
    import keras

    inputs = keras.Input((12,))
    hidden = keras.layers.Dense(9, activation="tanh")(inputs)
    hidden = keras.layers.Activation("sigmoid")(keras.layers.Dense(7)(hidden))
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


def conv2d(*options: dict[str, Any], shape: tuple[int, int, int] = (9, 11, 3)) -> Any:
    layers = [layer("Conv2D", 4 + i, activation="tanh", **each) for i, each in enumerate(options)]
    return sequential(shape, *layers, layer("Flatten"), layer("Dense", 4))


def conv1d(*options: dict[str, Any], shape: tuple[int, int] = (50, 3)) -> Any:
    layers = [layer("Conv1D", 4 + i, activation="tanh", **each) for i, each in enumerate(options)]
    return sequential(shape, *layers, layer("Flatten"), layer("Dense", 4))


def pool2d(activation: str, **options: Any) -> Any:
    return sequential(
        (11, 10, 2),
        layer("Conv2D", 4, 3, padding="same", activation=activation),
        layer("MaxPooling2D", **options),
        layer("Conv2D", 3, 2),
        layer("Flatten"),
        layer("Dense", 4),
    )


def pool1d(activation: str, **options: Any) -> Any:
    return sequential(
        (31, 2),
        layer("Conv1D", 4, 3, padding="same", activation=activation),
        layer("MaxPooling1D", **options),
        layer("Conv1D", 3, 2),
        layer("Flatten"),
        layer("Dense", 4),
    )


def random_image_net(seed: int) -> Any:
    rng = np.random.default_rng([seed, 99])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    shape = (int(rng.integers(9, 15)), int(rng.integers(9, 15)), int(rng.integers(1, 4)))
    return sequential(
        shape,
        layer(
            "Conv2D",
            int(rng.integers(1, 6)),
            (pick(1, 2, 3, 4), pick(1, 2, 3, 5)),
            strides=(pick(1, 2, 3), pick(1, 2)),
            padding=pick("same", "valid"),
            activation=pick("relu", "tanh", "sigmoid", None),
            use_bias=pick(True, False),
        ),
        layer(
            "MaxPooling2D",
            (pick(1, 2, 3), pick(1, 2, 3)),
            strides=(pick(1, 2, 3), pick(1, 2)),
            padding=pick("same", "valid"),
        ),
        layer("Conv2D", 3, pick(1, 2), strides=pick(1, 2), padding="same", activation=pick("relu", "tanh")),
        pick(layer("Flatten"), layer("GlobalAveragePooling2D")),
        layer("Dense", 5, activation=pick("softmax", None)),
    )


CASES: dict[str, Any] = {
    "zoo-digits": lambda: zoo_model("digits"),
    "zoo-fedkeeper_cnn": lambda: zoo_model("fedkeeper_cnn"),
    "zoo-fedkeeper_dense": lambda: zoo_model("fedkeeper_dense"),
    "zoo-wrist": lambda: zoo_model("wrist"),
    "functional": functional,
    "dense-relu-softmax": lambda: sequential(
        (7,), layer("Dense", 8, activation="relu"), layer("Dense", 3, activation="softmax")
    ),
    "dense-no-bias": lambda: sequential((7,), layer("Dense", 8, use_bias=False), layer("Dense", 3, use_bias=False)),
    **{
        f"dense-no-bias-{function}": lambda function=function: sequential(
            (7,), layer("Dense", 8, use_bias=False, activation=function), layer("Dense", 3)
        )
        for function in ("relu", "tanh", "sigmoid")
    },
    **{
        f"conv2d-no-bias-{function}": lambda function=function: sequential(
            (7, 6, 2), layer("Conv2D", 8, 2, use_bias=False, activation=function), layer("Flatten"), layer("Dense", 3)
        )
        for function in ("relu", "tanh", "sigmoid")
    },
    "dense-parts": lambda: sequential((301,), layer("Dense", 500, activation="tanh"), layer("Dense", 3)),
    "dense-parts-inside": lambda: sequential(
        (5,), layer("Dense", 300, activation="relu", use_bias=False), layer("Dense", 450), layer("Dense", 2)
    ),
    "layers-relu-softmax": lambda: sequential(
        (6,), layer("Dense", 9), layer("ReLU"), layer("Dense", 3), layer("Softmax")
    ),
    "reshape": lambda: sequential(
        (24,),
        layer("Reshape", (4, 6, 1)),
        layer("Conv2D", 4, 3, use_bias=False),
        layer("Reshape", (-1, 2)),
        layer("Conv1D", 4, 2, activation="sigmoid"),
        layer("GlobalAveragePooling1D"),
        layer("Dense", 3),
    ),
    "conv2d-valid": lambda: conv2d({"kernel_size": 3}, {"kernel_size": (2, 4)}),
    "conv2d-same": lambda: conv2d({"kernel_size": 3, "padding": "same"}, {"kernel_size": (2, 4), "padding": "same"}),
    "conv2d-valid-strides": lambda: conv2d(
        {"kernel_size": 3, "strides": 2}, {"kernel_size": 2, "strides": (2, 1), "use_bias": False}
    ),
    "conv2d-same-strides": lambda: conv2d(
        {"kernel_size": (3, 2), "strides": 2, "padding": "same"},
        {"kernel_size": 4, "strides": (2, 3), "padding": "same"},
    ),
    "conv2d-strides-over-kernel": lambda: conv2d(
        {"kernel_size": 2, "strides": 3}, {"kernel_size": 1, "strides": 2, "padding": "same"}
    ),
    "conv1d-valid": lambda: conv1d({"kernel_size": 5}, {"kernel_size": 3, "strides": 2}),
    "conv1d-same": lambda: conv1d(
        {"kernel_size": 4, "padding": "same"}, {"kernel_size": 5, "strides": 3, "padding": "same"}
    ),
    "conv-global-average": lambda: sequential(
        (7, 6, 2),
        layer("Conv2D", 5, 3, activation="relu"),
        layer("GlobalAveragePooling2D"),
        layer("Dense", 4, activation="softmax"),
    ),
    "pool2d-valid": lambda: pool2d("relu"),
    "pool2d-same": lambda: pool2d("relu", padding="same"),
    "pool2d-after-tanh": lambda: pool2d("tanh", pool_size=(3, 2)),
    "pool2d-overlapping": lambda: pool2d("sigmoid", pool_size=3, strides=2),
    "pool2d-overlapping-same": lambda: pool2d("relu", pool_size=3, strides=(1, 2), padding="same"),
    "pool2d-gaps": lambda: pool2d("tanh", pool_size=2, strides=3),
    "pool1d-valid": lambda: pool1d("relu"),
    "pool1d-overlapping-same": lambda: pool1d("tanh", pool_size=3, strides=2, padding="same"),
    "pool-first": lambda: sequential((8, 8, 1), layer("MaxPooling2D"), layer("Flatten"), layer("Dense", 4)),
    **{f"random-{seed}": lambda seed=seed: random_image_net(seed) for seed in range(8)},
}


def batch(rng: np.random.Generator, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    x = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    # A flat background: whole windows tie in max pooling, with and without a ReLU before it.
    x[np.abs(x) < 1] = 0
    return x, rng.integers(0, classes, BATCH).astype(np.int32)


def reference(model: Any, softmax: bool) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    rng = np.random.default_rng(11)
    shape, classes = model.input_shape[1:], model.output_shape[-1]

    def gradients(x: Any, y: Any, w: Any) -> tuple[float, list[Any]]:
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=not softmax)
            loss = tf.reduce_sum(each * w) / tf.reduce_sum(w)
        return float(loss), tape.gradient(loss, model.trainable_variables)

    def flat(values: Any) -> Any:
        return np.concatenate([np.asarray(value).reshape(-1) for value in values])

    x, y = batch(rng, shape, classes)
    w = np.array([1, 1, 2, 0.5, 0, 1], dtype=np.float32)
    loss, found = gradients(x, y, w)
    result: dict[str, Any] = {"x": x, "y": y, "w": w, "loss": loss, "gradients": flat(found)}
    result["sizes"] = np.array([int(np.prod(variable.shape)) for variable in model.trainable_variables])
    result["scores"] = model(x).numpy()
    steps = [batch(rng, shape, classes) for _ in range(STEPS)]
    result["steps_x"] = np.stack([each[0] for each in steps])
    result["steps_y"] = np.stack([each[1] for each in steps])
    start = model.get_weights()
    for name, rule in model_cases.RULES.items():
        model.set_weights(start)
        optimizer = model_cases.keras_optimizer(rule)
        losses = []
        for x, y in steps:
            loss, found = gradients(x, y, np.ones(BATCH, dtype=np.float32))
            losses.append(loss)
            pulled = [
                g + rule.proximal * (v - a) for g, v, a in zip(found, model.trainable_variables, start, strict=True)
            ]
            optimizer.apply(pulled, model.trainable_variables)
        result[f"{name}_losses"] = np.array(losses)
        result[f"{name}_moved"] = flat(model.trainable_variables) - flat(start)
    model.set_weights(start)
    return result


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_steps_are_tensorflows(name, tmp_path):
    import keras

    from fleetfed.cloud_coordinator.builder import build

    keras.utils.set_random_seed(3)
    model = CASES[name]()
    rng = np.random.default_rng(5)
    # Biases start at zero in Keras, and a zero hides a mistake.
    model.set_weights([value + 0.1 * rng.normal(size=value.shape).astype(np.float32) for value in model.get_weights()])
    built = build(model, batch=BATCH, name="case")
    expected = reference(model, built.card.softmax)
    folder = Path(os.environ.get("FLEETFED_MODEL_CASES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tflite").write_bytes(built.data)
    (folder / f"{name}.card").write_bytes(built.card.encode())
    np.savez_compressed(folder / f"{name}.npz", **expected)
    model_cases.check(folder, name)
