"""From a Keras model to a .tflite and its card.

TensorFlow is imported by the functions, not by the module: the command line lists its commands without it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.table import WeightTable, write_weights
from fleetfed.shared.wire import limits

if TYPE_CHECKING:
    import keras

VERSION = 1
"""Of the builder: raised whenever it would build another file from the same model."""
DEFAULT_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A .tflite that infers and trains, and its card."""

    data: bytes
    card: ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPaths:
    """Where `build_to_directory` put its files."""

    model: Path
    card: Path


def build(
    model: keras.Model,
    *,
    batch: int = DEFAULT_BATCH,
    name: str = "",
    class_names: Sequence[str] = (),
) -> BuiltModel:
    """Build a trainable .tflite from a Keras model, with the model's present weights.

    Args:
        model: built Sequential or functional model, a chain of supported layers that ends in one score per class.
        batch: examples in one training step, fixed in the file.
        name: the model's name in cards and topics; the Keras model's own where empty.
        class_names: one per class, or none.

    Raises:
        ConfigError: the model holds something unsupported (named in the message), an argument is out of range,
            TensorFlow or a TFLite runtime is not installed, or the file does not do what the Keras model does.
    """
    _require_tensorflow()
    from fleetfed.cloud_coordinator.builder import convert
    from fleetfed.cloud_coordinator.builder.prove import prove
    from fleetfed.cloud_coordinator.builder.read import read_network

    network = read_network(model)
    name = name or str(model.name)
    if not 1 <= len(name) <= limits.MAX_ID or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
        raise ConfigError(f"model name {name!r} must be 1 to {limits.MAX_ID} characters of a-z, 0-9, _ and -")
    if not 1 <= batch <= 4096:
        raise ConfigError(f"batch {batch} is outside 1..4096")
    if class_names and len(class_names) != network.classes:
        raise ConfigError(f"{len(class_names)} class names for {network.classes} classes")
    data, slots = convert.convert(network, batch)
    table = WeightTable(tensors=slots)
    card = ModelCard(
        name=name,
        builder=f"fleetfed builder {VERSION}, tensorflow {importlib.metadata.version(_tensorflow_package())}",
        file_bytes=len(data),
        input_shape=network.input_shape,
        classes=network.classes,
        class_names=tuple(class_names),
        softmax=network.softmax,
        batch=batch,
        tensors=slots,
        initializers=tuple(weight.initializer for weight in network.weights),
        layout=table.layout_hash(),
    )
    card.validate()
    patched = bytearray(data)
    values = [np.asarray(variable, dtype=np.float32) for variable in model.trainable_variables]
    write_weights(patched, table, np.concatenate([value.reshape(-1) for value in values]))
    with _quiet():
        prove(model, data, card)
    return BuiltModel(data=bytes(patched), card=card)


def build_from_source(
    source: str,
    *,
    batch: int = DEFAULT_BATCH,
    name: str = "",
    class_names: Sequence[str] = (),
) -> BuiltModel:
    """Build from ``path/to/model.keras`` or from ``module:function`` (a function that returns a Keras model).

    Raises:
        ConfigError: as `build`, or the source cannot be loaded.
    """
    return build(_load(source), batch=batch, name=name, class_names=class_names)


def build_to_directory(
    source: str,
    directory: Path,
    *,
    batch: int = DEFAULT_BATCH,
    name: str = "",
    class_names: Sequence[str] = (),
) -> BuiltPaths:
    """Build from a source (see `build_from_source`) and write ``NAME.tflite`` and ``NAME.card``.

    Raises:
        ConfigError: as `build_from_source`.
    """
    built = build_from_source(source, batch=batch, name=name, class_names=class_names)
    directory.mkdir(parents=True, exist_ok=True)
    paths = BuiltPaths(model=directory / f"{built.card.name}.tflite", card=directory / f"{built.card.name}.card")
    _replace(paths.model, built.data)
    _replace(paths.card, built.card.encode())
    return paths


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _load(source: str) -> Any:
    _require_tensorflow()
    import keras

    if source.endswith((".keras", ".h5")):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"model file {source} does not exist")
        try:
            with _quiet():
                return keras.models.load_model(path, compile=False)
        # Keras documents no set of errors for a file that it cannot read.
        except Exception as error:
            raise ConfigError(f"Keras cannot load {source}: {error}") from error
    module_name, colon, function_name = source.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"model source {source!r} must be a path ending in .keras, or module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model source {source!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"model source {source!r} is not a function")
    with _quiet():
        return function()


def _tensorflow_package() -> str:
    for package in ("tensorflow", "tensorflow-cpu", "tensorflow-macos"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return package
    raise ConfigError(_MISSING)


_MISSING = "building a model needs TensorFlow: pip install 'fleetfed[model]'"


def _require_tensorflow() -> None:
    _tensorflow_package()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{_MISSING} ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without TensorFlow's own log below errors."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
