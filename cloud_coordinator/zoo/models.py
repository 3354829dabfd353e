"""The ready models, as Keras code. Needs TensorFlow; `fleetfed.cloud_coordinator.zoo.load` does not."""

from __future__ import annotations

import keras

_L = keras.layers


def digits() -> keras.Model:
    """Small CNN for 8x8 handwritten digits (pixels scaled to 0..1), 10 classes."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            _L.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            _L.MaxPooling2D(2, name="pool1"),
            _L.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            _L.MaxPooling2D(2, name="pool2"),
            _L.Flatten(name="flatten"),
            _L.Dense(10, activation="softmax", name="scores"),
        ],
        name="digits",
    )


def fedkeeper_cnn() -> keras.Model:
    """FedKeeper's CNN for 28x28 digits: 582,026 parameters, no padding."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            _L.Conv2D(32, 5, activation="relu", name="conv1"),
            _L.MaxPooling2D(2, name="pool1"),
            _L.Conv2D(64, 5, activation="relu", name="conv2"),
            _L.MaxPooling2D(2, name="pool2"),
            _L.Flatten(name="flatten"),
            _L.Dense(512, activation="relu", name="hidden"),
            _L.Dense(10, activation="softmax", name="scores"),
        ],
        name="fedkeeper_cnn",
    )


def fedkeeper_dense() -> keras.Model:
    """FedKeeper's dense net for 28x28 digits: 784-500-10, 397,510 parameters."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            _L.Flatten(name="flatten"),
            _L.Dense(500, activation="relu", name="hidden"),
            _L.Dense(10, activation="softmax", name="scores"),
        ],
        name="fedkeeper_dense",
    )


def wrist() -> keras.Model:
    """Conv1D net for windows of a wrist accelerometer: 128 samples of 3 axes (in g), 14 activities."""
    return keras.Sequential(
        [
            keras.Input((128, 3)),
            _L.Conv1D(32, 7, strides=2, padding="same", activation="relu", name="conv1"),
            _L.MaxPooling1D(2, name="pool1"),
            _L.Conv1D(48, 5, padding="same", activation="relu", name="conv2"),
            _L.MaxPooling1D(2, name="pool2"),
            _L.Conv1D(64, 3, padding="same", activation="relu", name="conv3"),
            _L.GlobalAveragePooling1D(name="average"),
            _L.Dense(14, activation="softmax", name="scores"),
        ],
        name="wrist",
    )
