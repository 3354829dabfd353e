import math

import numpy as np
import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import Initializer, InitializerKind
from fleetfed.shared.model.interpreter import Model
from fleetfed.shared.model.table import read_weights, split_weights

PARAMETERS = {"digits": 6_090, "fedkeeper_cnn": 582_026, "fedkeeper_dense": 397_510, "wrist": 18_622}
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "fedkeeper_cnn": ((28, 28, 1), 10),
    "fedkeeper_dense": ((28, 28, 1), 10),
    "wrist": ((128, 3), 14),
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_ready_model_loads_with_the_documented_size(name):
    made = zoo.load(name)
    assert made.card.parameters == PARAMETERS[name]
    assert (made.card.input_shape, made.card.classes) == SHAPES[name]
    assert len(made.data) == made.card.file_bytes
    with Model(made.data, made.card) as model:
        scores = model.infer(np.zeros((2, *made.card.input_shape), dtype=np.float32))
    assert scores.shape == (2, made.card.classes)
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_first_weights_are_glorot_uniform_and_biases_zero(name):
    card = zoo.load_card(name)
    parts = split_weights(zoo.initial_weights(card, 3), card.table)
    for slot, rule, values in zip(card.tensors, card.initializers, parts, strict=True):
        if "/bias" in slot.name:
            assert not values.any()
            continue
        limit = math.sqrt(6 / (rule.fan_in + rule.fan_out))
        assert np.abs(values).max() <= limit
        assert np.abs(values).max() > 0.9 * limit
        assert abs(values.mean()) < 5 * limit / math.sqrt(3 * values.size)
        assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.25)


def test_a_seed_names_one_file():
    assert zoo.load("wrist", seed=1) == zoo.load("wrist", seed=1)
    assert zoo.load("wrist", seed=1).data != zoo.load("wrist", seed=2).data
    # Pinned: everyone who names a seed means these weights.
    flat = zoo.initial_weights(zoo.load_card("digits"), 0)
    assert flat[:3].tolist() == [0.054244909435510635, -0.0911780446767807, -0.18180157244205475]


def test_the_shipped_file_is_seed_zero():
    made = zoo.load("digits")
    assert made.data == zoo._read("digits.tflite")
    assert np.array_equal(read_weights(made.data, made.card.table), zoo.initial_weights(made.card, 0))


def test_what_is_unknown_is_refused():
    with pytest.raises(ConfigError, match="there are: digits, fedkeeper_cnn"):
        zoo.load("resnet")
    with pytest.raises(ConfigError, match="there is no ready model"):
        zoo.load("../digits")
    card = zoo.load_card("digits")
    object.__setattr__(card, "initializers", (Initializer(kind=InitializerKind.NONE, fan_in=1, fan_out=1),) * 6)
    with pytest.raises(ConfigError, match="does not say how conv1/kernel starts"):
        zoo.initial_weights(card, 0)
