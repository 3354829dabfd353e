"""Make ``model_<name>.npz``: what TensorFlow computes for a ready model, for tests that run without TensorFlow.

    .venv-tf/bin/python tests/vectors/make_model_vectors.py

Weights come from ``zoo.load(name, seed=0)``, inputs from raw PCG64 output, both the same on every machine. Of each
gradient and of the weights after some steps the file holds, for each tensor, the norm and eight projections on
pseudo-random vectors of signs: an error of relative size e in a tensor moves a projection by about e times the norm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import keras
import numpy as np
import tensorflow as tf
from fleetfed_testing.model_vectors import STEPS, digest, inputs

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.zoo import models


def flat(values):
    return np.concatenate([np.asarray(value).reshape(-1) for value in values])


def main():
    for name in zoo.NAMES:
        made = zoo.load(name, seed=0)
        table = made.card.table
        model = getattr(models, name)()

        def load(model=model, made=made, table=table):
            values = zoo.initial_weights(made.card, 0)
            position = 0
            for variable in model.trainable_variables:
                size = int(np.prod(variable.shape))
                variable.assign(values[position : position + size].reshape(variable.shape))
                position += size

        def gradients(x, y, w, model=model):
            with tf.GradientTape() as tape:
                each = keras.losses.sparse_categorical_crossentropy(y, model(x))
                loss = tf.reduce_sum(each * w) / tf.reduce_sum(w)
            return float(loss), tape.gradient(loss, model.trainable_variables)

        load()
        x, y, w = inputs(made.card, 1)
        loss, found = gradients(x, y, w)
        out = {"loss": loss, "gradients": digest(table, flat(found)), "scores": model(x).numpy()}
        for rule, optimizer, mu in (
            ("sgd", keras.optimizers.SGD(0.05, momentum=0.9), 0.0),
            ("adam", keras.optimizers.Adam(0.002), 0.0),
            ("prox", keras.optimizers.SGD(0.05), 0.5),
        ):
            load()
            anchor = [variable.numpy() for variable in model.trainable_variables]
            losses = []
            for step in range(STEPS):
                x, y, w = inputs(made.card, 10 + step)
                loss, found = gradients(x, y, np.ones_like(w))
                losses.append(loss)
                pulled = [g + mu * (v - a) for g, v, a in zip(found, model.trainable_variables, anchor, strict=True)]
                optimizer.apply(pulled, model.trainable_variables)
            out[f"{rule}_losses"] = np.array(losses)
            moved = flat(model.trainable_variables) - flat(anchor)
            out[f"{rule}_moved"] = digest(table, moved)
        path = Path(__file__).with_name(f"model_{name}.npz")
        np.savez_compressed(path, **out)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
