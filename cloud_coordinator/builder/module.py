"""The TensorFlow module whose signatures become those of the .tflite.

Signatures (``B`` is the training batch, fixed; ``n`` is free; all numbers float32 unless said):

- ``train_sgd(x [B, ...], y int32 [B], w [B], lr, momentum, mu) -> loss``
- ``train_adam(x, y, w, lr, beta1, beta2, eps, mu) -> loss``
- ``gradients(x, y, w) -> loss, g000, g001, ...``: proof of the training signatures, moves nothing
- ``infer(x [n, ...]) -> scores [n, classes]``
- ``evaluate(x [n, ...], y int32 [n], w [n]) -> loss, correct``: weighted sums, not means
- ``get_weights() -> w000, w001, ...`` and ``set_weights(w000, w001, ...) -> parameters`` (their number)

``loss`` is the weighted mean cross-entropy, without the proximal term. ``mu`` pulls towards the anchor: the weights
that the file held when it was loaded, or the last that `set_weights` set.

The optimiser's slots and the anchor start as copies of the weights. In the file these are one and the same constant, so
the weights stand in it exactly once and slots cost no bytes; the count of steps tells the first step to read the
slots as zero. `set_weights` writes slots and anchor too: a value that overflowed cannot outlive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fleetfed.cloud_coordinator.builder import graph
from fleetfed.cloud_coordinator.builder.layers import Network

Tensor = Any


class TrainableModule(tf.Module):  # type: ignore[misc]
    """State and signatures of one model."""

    def __init__(self, network: Network, values: Sequence[NDArray[np.float32]], batch: int) -> None:
        super().__init__()
        self.network = network
        self.batch = batch
        self.theta = [tf.Variable(value, name=f"theta{i:03}") for i, value in enumerate(values)]
        self.anchor = [tf.Variable(value, name=f"anchor{i:03}") for i, value in enumerate(values)]
        self.first = [tf.Variable(value, name=f"first{i:03}") for i, value in enumerate(values)]
        self.second = [tf.Variable(value, name=f"second{i:03}") for i, value in enumerate(values)]
        self.steps = tf.Variable(0.0, name="steps")

    def signatures(self) -> dict[str, Any]:
        """Every signature as a concrete function."""
        shape = self.network.input_shape
        scalar = tf.TensorSpec((), tf.float32)

        def examples(batch: int | None) -> list[Any]:
            return [
                tf.TensorSpec((batch, *shape), tf.float32, name="x"),
                tf.TensorSpec((batch,), tf.int32, name="y"),
                tf.TensorSpec((batch,), tf.float32, name="w"),
            ]

        names = [f"w{i:03}" for i in range(len(self.theta))]
        weights = {
            name: tf.TensorSpec(value.shape, tf.float32, name=name)
            for name, value in zip(names, self.theta, strict=True)
        }
        fixed, free = examples(self.batch), examples(None)

        def function(body: Callable[..., Any], *specs: Any, **named: Any) -> Any:
            return tf.function(body, autograph=False).get_concrete_function(*specs, **named)

        return {
            "train_sgd": function(self._train_sgd, *fixed, lr=scalar, momentum=scalar, mu=scalar),
            "train_adam": function(
                self._train_adam, *fixed, lr=scalar, beta1=scalar, beta2=scalar, eps=scalar, mu=scalar
            ),
            "gradients": function(self._gradients, *fixed),
            "infer": function(self._infer, free[0]),
            "evaluate": function(self._evaluate, *free),
            "get_weights": function(self._get_weights),
            "set_weights": function(self._set_weights, **weights),
        }

    def _read(self, index: int) -> Tensor:
        return self.theta[index].read_value()

    def _descend(
        self, x: Tensor, y: Tensor, w: Tensor, mu: Tensor, update: Callable[[int, Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        def consume(i: int, gradient: Tensor) -> Tensor:
            # Anchor and slots are read when the gradient is there and not before: the interpreter plans its memory by
            # first and last use, and they would otherwise lie in it from the first operation on.
            with tf.control_dependencies([gradient]):
                value = self.theta[i].read_value()
                return update(i, value, gradient + mu * (value - self.anchor[i].read_value()))

        return {"loss": graph.train(self.network, self._read, x, y, w, consume)}

    def _train_sgd(
        self, x: Tensor, y: Tensor, w: Tensor, lr: Tensor, momentum: Tensor, mu: Tensor
    ) -> dict[str, Tensor]:
        keep = momentum * tf.minimum(self.steps.read_value(), 1.0)

        def update(i: int, value: Tensor, gradient: Tensor) -> Tensor:
            velocity = self.first[i].read_value() * keep - gradient * lr
            self.first[i].assign(velocity)
            return self.theta[i].assign(value + velocity, read_value=False)

        result = self._descend(x, y, w, mu, update)
        self.steps.assign_add(1.0)
        return result

    def _train_adam(
        self, x: Tensor, y: Tensor, w: Tensor, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, mu: Tensor
    ) -> dict[str, Tensor]:
        before = self.steps.read_value()
        now = before + 1.0
        begun = tf.minimum(before, 1.0)
        rate = lr * tf.sqrt(1.0 - tf.pow(beta2, now)) / (1.0 - tf.pow(beta1, now))

        def update(i: int, value: Tensor, gradient: Tensor) -> Tensor:
            mean = self.first[i].read_value() * (beta1 * begun) + gradient * (1.0 - beta1)
            self.first[i].assign(mean)
            spread = self.second[i].read_value() * (beta2 * begun) + (gradient * gradient) * (1.0 - beta2)
            self.second[i].assign(spread)
            return self.theta[i].assign(value - (mean * rate) / (tf.sqrt(spread) + eps), read_value=False)

        result = self._descend(x, y, w, mu, update)
        self.steps.assign(now)
        return result

    def _gradients(self, x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def consume(i: int, gradient: Tensor) -> None:
            found[f"g{i:03}"] = gradient

        loss = graph.train(self.network, self._read, x, y, w, consume)
        return {"loss": loss} | dict(sorted(found.items()))

    def _infer(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": graph.output(self.network, self._read, x)}

    def _evaluate(self, x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
        scores = graph.logits(self.network, self._read, x)
        right = tf.cast(tf.equal(tf.argmax(scores, axis=-1, output_type=tf.int32), y), tf.float32)
        return {
            "loss": tf.reduce_sum(graph.losses(self.network, scores, y) * w),
            "correct": tf.reduce_sum(right * w),
        }

    def _get_weights(self) -> dict[str, Tensor]:
        return {f"w{i:03}": variable.read_value() for i, variable in enumerate(self.theta)}

    def _set_weights(self, **weights: Tensor) -> dict[str, Tensor]:
        for i in range(len(self.theta)):
            value = weights[f"w{i:03}"]
            for variable in (self.theta[i], self.anchor[i], self.first[i], self.second[i]):
                variable.assign(value)
        self.steps.assign(0.0)
        return {"parameters": tf.constant(sum(int(np.prod(variable.shape)) for variable in self.theta))}
