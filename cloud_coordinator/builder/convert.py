"""Convert the training module and find its weights in the result by the sentinel method.

Every variable is given random values that occur nowhere else. After the conversion each is looked for in the file and
must be found exactly once: then its offset is known, and whatever is written there is the weight. (With real values,
all-zero biases of equal length would share one buffer.) The sentinels come from a fixed seed, so the same model gives
the same file.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fleetfed.cloud_coordinator.builder.layers import Network
from fleetfed.cloud_coordinator.builder.module import TrainableModule
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.table import FLOAT32, TensorSlot

_TRIES = 4


def convert(network: Network, batch: int) -> tuple[bytes, tuple[TensorSlot, ...]]:
    """Convert a network.

    Args:
        network: what `read_network` returned.
        batch: examples in one training step.

    Returns:
        The .tflite with sentinels for weights, and where each weight stands in it.

    Raises:
        ConfigError: the converter refused, or a weight was not found exactly once.
    """
    reason = ""
    for seed in range(_TRIES):
        sentinels = _sentinels(network, seed)
        data = _run_converter(TrainableModule(network, sentinels, batch))
        try:
            return data, _find(network, sentinels, data)
        except ConfigError as error:
            # Four random bytes (a bias of one value) may occur twice by chance: other values settle it.
            reason = str(error)
    raise ConfigError(reason)


def _sentinels(network: Network, seed: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng([seed, 0x5E471E1])
    return [rng.uniform(0.5, 1.0, size=weight.shape).astype(np.float32) for weight in network.weights]


def _find(network: Network, sentinels: list[NDArray[np.float32]], data: bytes) -> tuple[TensorSlot, ...]:
    slots = []
    for weight, sentinel in zip(network.weights, sentinels, strict=True):
        raw = sentinel.tobytes()
        offset = data.find(raw)
        if offset < 0 or data.find(raw, offset + 1) >= 0:
            found = "more than once" if offset >= 0 else "nowhere"
            raise ConfigError(f"weight {weight.name} stands {found} in the converted file; its offset is not known")
        slots.append(TensorSlot(name=weight.name, shape=weight.shape, dtype=FLOAT32, offset=offset))
    return tuple(slots)


def _run_converter(module: TrainableModule) -> bytes:
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="fleetfed-build-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signatures = module.signatures()
            tf.saved_model.save(
                module,
                folder,
                signatures=signatures,
                options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
            )
            converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=sorted(signatures))
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
            converter.experimental_enable_resource_variables = True
            converted = converter.convert()
    except tf.lite.python.convert.ConverterError as error:
        raise ConfigError(f"the TFLite converter refused the model: {error}") from error
    finally:
        logger.setLevel(level)
    return bytes(converted)
