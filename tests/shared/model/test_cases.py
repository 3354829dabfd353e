"""The cases that `tests/cloud_coordinator/builder/test_gradients.py` left, on the runtime installed here.

`make test-models` sets FLEETFED_MODEL_CASES and runs this under tflite-runtime; elsewhere there is nothing to check.
"""

import os
from pathlib import Path

import pytest
from fleetfed_testing import model_cases

FOLDER = Path(os.environ.get("FLEETFED_MODEL_CASES", "/nonexistent"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.tflite"))


@pytest.mark.skipif(not NAMES, reason="FLEETFED_MODEL_CASES names no folder of cases; run `make test-models`")
def test_there_are_cases_for_every_kind_of_layer():
    kinds = {name.split("-")[0] for name in NAMES}
    assert kinds >= {"zoo", "dense", "reshape", "conv2d", "conv1d", "conv", "pool2d", "pool1d", "random"}


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_steps_are_tensorflows(name):
    model_cases.check(FOLDER, name)
