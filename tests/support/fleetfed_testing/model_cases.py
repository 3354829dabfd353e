"""What a built model must do, checked on whichever runtime is installed; the expectations are TensorFlow's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.interpreter import Adam, Model, Optimizer, Sgd

TOLERANCE = 1e-4
RULES: dict[str, Optimizer] = {
    "sgd": Sgd(lr=0.05, momentum=0.9),
    "fedprox": Sgd(lr=0.05, momentum=0.5, proximal=0.7),
    # An epsilon that is not tiny: else steps along a gradient of almost zero are the signs of rounding errors.
    "adam": Adam(lr=0.01, beta1=0.8, beta2=0.95, epsilon=1e-2),
    "adam_prox": Adam(lr=0.01, epsilon=1e-2, proximal=0.7),
}


def keras_optimizer(rule: Optimizer) -> Any:
    """Keras's optimiser of the same rule."""
    import keras

    if isinstance(rule, Sgd):
        return keras.optimizers.SGD(rule.lr, momentum=rule.momentum)
    return keras.optimizers.Adam(rule.lr, beta_1=rule.beta1, beta_2=rule.beta2, epsilon=rule.epsilon)


def worst(found: Any, expected: Any, sizes: Any) -> float:
    """Largest relative error of any tensor, in the Euclidean norm.

    A tensor whose expected norm is a millionth of the whole vector's is measured against that instead: a bias before
    a softmax that nothing reaches has a gradient of rounding errors.
    """
    floor = 1e-6 * float(np.linalg.norm(expected))
    errors = []
    position = 0
    for size in sizes:
        part = slice(position, position + size)
        scale = max(float(np.linalg.norm(expected[part])), floor, 1e-30)
        errors.append(float(np.linalg.norm(found[part] - expected[part])) / scale)
        position += size
    assert position == len(found) == len(expected)
    return max(errors)


def check(folder: Path, name: str) -> None:
    """Check one case, as `tests/cloud_coordinator/builder/test_gradients.py` left it."""
    card = ModelCard.decode((folder / f"{name}.card").read_bytes())
    expected = np.load(folder / f"{name}.npz")
    path = folder / f"{name}.tflite"
    errors: dict[str, float] = {}
    for delegate in (True, False):
        model = Model(path, card, delegate=delegate)
        start = model.get_weights()
        suffix = "" if delegate else "_without_delegate"
        loss, gradients = model.gradients(expected["x"], expected["y"], expected["w"])
        errors[f"loss{suffix}"] = abs(loss / float(expected["loss"]) - 1)
        errors[f"gradients{suffix}"] = worst(gradients, expected["gradients"], expected["sizes"])
        errors[f"scores{suffix}"] = float(np.abs(model.infer(expected["x"]) - expected["scores"]).max())
        for rule, optimizer in RULES.items():
            model.set_weights(start)
            for x, y, expected_loss in zip(
                expected["steps_x"], expected["steps_y"], expected[f"{rule}_losses"], strict=True
            ):
                loss = model.train_epoch(x, y, optimizer=optimizer, order=np.arange(len(x)))
                key = f"{rule}_loss{suffix}"
                errors[key] = max(errors.get(key, 0), abs(loss / float(expected_loss) - 1))
            moved = model.get_weights() - start
            errors[f"{rule}_moved{suffix}"] = worst(moved, expected[f"{rule}_moved"], expected["sizes"])
    report = os.environ.get("FLEETFED_MODEL_ERRORS")
    if report:
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name} | errors) + "\n")
    wrong = {key: error for key, error in errors.items() if not error < TOLERANCE}
    assert not wrong, f"{name}: relative errors above {TOLERANCE}: {wrong}"
