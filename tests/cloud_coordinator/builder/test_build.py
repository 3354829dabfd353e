"""Building: sources, determinism, what is shipped, and the proof that stands between the converter and the user."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.interpreter import Model
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.wire import compression

tensorflow = pytest.mark.tensorflow
quiet = pytest.mark.filterwarnings("ignore")
SOURCE = "fleetfed.cloud_coordinator.zoo.models:digits"


def small():
    import keras

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(3)])
    model.name = "small"
    return model


@tensorflow
@quiet
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_what_is_shipped_is_what_the_builder_builds(name):
    from fleetfed.cloud_coordinator.zoo.ship import shipped_files

    folder = Path(zoo.__file__).parent
    for file_name, built in shipped_files(name).items():
        shipped = folder.joinpath(file_name).read_bytes()
        if file_name.endswith(".zst"):
            size = ModelCard.decode(folder.joinpath(f"{name}.card").read_bytes()).file_bytes
            built, shipped = compression.decompress(built, size=size), compression.decompress(shipped, size=size)
        if file_name.endswith(".card"):
            built, shipped = ModelCard.decode(built), ModelCard.decode(shipped)
        # Equal as long as TensorFlow is the release that the extra `model` pins.
        assert built == shipped, f"{file_name} is stale: run python -m fleetfed.cloud_coordinator.zoo.ship"


@tensorflow
@quiet
def test_a_model_is_built_with_its_own_weights_from_a_file_and_from_a_function(tmp_path, monkeypatch):
    from fleetfed.cloud_coordinator.builder import build_from_source, build_to_directory

    model = small()
    model.save(tmp_path / "saved.keras")
    built = build_from_source(str(tmp_path / "saved.keras"), batch=3, class_names=("a", "b", "c"))
    flat = np.concatenate([value.reshape(-1) for value in model.get_weights()])
    assert read_weights(built.data, built.card.table).tobytes() == flat.tobytes()
    assert built.card.class_names == ("a", "b", "c")
    assert (built.card.name, built.card.batch, built.card.softmax) == ("small", 3, False)
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    assert np.abs(Model(built.data, built.card).infer(x) - model(x).numpy()).max() < 1e-5

    (tmp_path / "my_models.py").write_text(
        "import keras\n\ndef make():\n    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = build_to_directory("my_models:make", tmp_path / "out", name="mine", batch=2)
    card = ModelCard.decode(paths.card.read_bytes())
    assert (paths.model.name, card.name, card.classes) == ("mine.tflite", "mine", 2)
    Model(paths.model, card).get_weights()


@tensorflow
@quiet
def test_the_same_model_gives_the_same_file():
    from fleetfed.cloud_coordinator.builder import build

    model = small()
    first, second = build(model, batch=2), build(model, batch=2)
    assert first == second


@tensorflow
@quiet
@pytest.mark.parametrize("wrong", ["forward", "gradient", "optimizer"])
def test_a_file_that_is_wrong_is_not_handed_out(monkeypatch, wrong):
    from fleetfed.cloud_coordinator.builder import build, graph, module

    if wrong == "forward":  # as if the converter had dropped every ReLU
        monkeypatch.setattr(graph.tf.nn, "relu", lambda x: x)
    elif wrong == "gradient":
        original = graph._weight_gradients
        monkeypatch.setattr(
            graph,
            "_weight_gradients",
            lambda step, x, flow, back, consume: original(step, x, flow * 1.01, back, consume),
        )
    else:
        original_pow = module.tf.pow
        monkeypatch.setattr(module.tf, "pow", lambda base, power: original_pow(base, power + 1))
    with pytest.raises(ConfigError, match="the converted file is wrong"):
        build(small(), batch=4)


@tensorflow
@quiet
def test_wrong_arguments_and_sources_are_explained(tmp_path):
    from fleetfed.cloud_coordinator.builder import build, build_from_source

    for options, message in (
        ({"name": "Big Model"}, "model name"),
        ({"name": "x" * 49}, "model name"),
        ({"batch": 0}, "batch 0"),
        ({"class_names": ["one"]}, "1 class names for 3 classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(small(), **options)
    (tmp_path / "broken.keras").write_bytes(b"not a model")
    for source, message in (
        (str(tmp_path / "missing.keras"), "does not exist"),
        (str(tmp_path / "broken.keras"), "cannot load"),
        ("nonsense", "must be a path"),
        ("no_such_module:make", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "is not a function"),
        ("os:getcwd", "expected a Keras model"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_from_source(source)


@tensorflow
@quiet
def test_the_module_builds_from_the_command_line(tmp_path, capsys):
    from fleetfed.cloud_coordinator.builder.__main__ import main

    assert main([SOURCE, str(tmp_path), "--batch", "4", "--name", "tiny"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "tiny.tflite"), str(tmp_path / "tiny.card")]
    assert main(["nonsense", str(tmp_path)]) == 2
    assert "error: model source" in capsys.readouterr().err


def test_without_tensorflow_the_message_says_what_to_install(monkeypatch):
    from fleetfed.cloud_coordinator.builder import build_from_source

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'fleetfed\[model\]'"):
        build_from_source(SOURCE)
