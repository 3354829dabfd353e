"""Ready models that need no TensorFlow.

`digits.tflite` is shipped whole. Of the others the *structure* is shipped: the file with every weight set to zero,
which compresses to a few kilobytes; `load` draws the first weights by the rules in the model's card.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import InitializerKind, ModelCard
from fleetfed.shared.model.table import write_weights
from fleetfed.shared.wire import compression

NAMES = ("digits", "fedkeeper_cnn", "fedkeeper_dense", "wrist")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooModel:
    """A .tflite and its card."""

    data: bytes
    card: ModelCard


def load_card(name: str) -> ModelCard:
    """The card of a ready model.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no ready model {name!r}; there are: {', '.join(NAMES)}")
    return ModelCard.decode(_read(f"{name}.card"))


def load(name: str, seed: int = 0) -> ZooModel:
    """A ready model with fresh weights.

    Args:
        name: one of `NAMES`.
        seed: of the first weights, not negative; equal seeds give equal files on every machine.

    Raises:
        ConfigError: there is no such model.
    """
    card = load_card(name)
    if name == "digits":
        data = bytearray(_read("digits.tflite"))
    else:
        data = bytearray(compression.decompress(_read(f"{name}.tflite.zst"), size=card.file_bytes))
    write_weights(data, card.table, initial_weights(card, seed))
    return ZooModel(data=bytes(data), card=card)


def initial_weights(card: ModelCard, seed: int) -> NDArray[np.float32]:
    """First weights by the card's rules.

    The values come from the raw output of PCG64, which NumPy keeps stable, and not from `Generator`, which it does not.

    Args:
        card: of the model.
        seed: not negative.

    Returns:
        Flat float32 vector in table order.

    Raises:
        ConfigError: the card has no rule for a tensor.
    """
    raw = np.random.PCG64(seed)
    flat = np.zeros(card.parameters, dtype=np.float32)
    for slot, rule, part in zip(card.tensors, card.initializers, card.table.splits(), strict=True):
        match rule.kind:
            case InitializerKind.ZEROS:
                continue
            case InitializerKind.GLOROT_UNIFORM:
                limit = np.sqrt(6.0 / (rule.fan_in + rule.fan_out))
            case InitializerKind.HE_UNIFORM:
                limit = np.sqrt(6.0 / rule.fan_in)
            case InitializerKind.NONE:
                raise ConfigError(f"model {card.name}: the card does not say how {slot.name} starts")
        unit = (np.asarray(raw.random_raw(slot.size)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        flat[part] = ((2.0 * unit - 1.0) * limit).astype(np.float32)
    return flat


def _read(name: str) -> bytes:
    return resources.files(__name__).joinpath(name).read_bytes()
