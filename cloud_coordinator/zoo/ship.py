"""``python -m fleetfed.cloud_coordinator.zoo.ship DIRECTORY``: build the files that this package ships.

Needs TensorFlow. A test builds them again and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fleetfed.cloud_coordinator.builder import BuiltModel, build_from_source
from fleetfed.cloud_coordinator.zoo import NAMES, initial_weights
from fleetfed.shared.model.table import write_weights
from fleetfed.shared.wire import compression

BATCH = {"digits": 16, "fedkeeper_cnn": 10, "fedkeeper_dense": 10, "wrist": 16}
"""FedKeeper's paper trains with batches of 10."""


def shipped_build(name: str) -> BuiltModel:
    """Build a ready model from its Keras code; its weights are whatever Keras drew."""
    return build_from_source(f"fleetfed.cloud_coordinator.zoo.models:{name}", batch=BATCH[name], name=name)


def shipped_files(name: str) -> dict[str, bytes]:
    """File names and contents that the package ships for one model."""
    built = shipped_build(name)
    data = bytearray(built.data)
    card = built.card
    if name == "digits":
        write_weights(data, card.table, initial_weights(card, 0))
        return {f"{name}.card": card.encode(), f"{name}.tflite": bytes(data)}
    write_weights(data, card.table, np.zeros(card.parameters, dtype=np.float32))
    return {f"{name}.card": card.encode(), f"{name}.tflite.zst": compression.compress(bytes(data), level=19)}


def main() -> int:
    """Write every file into the directory that the command line names."""
    directory = Path(sys.argv[1])
    for name in NAMES:
        for file_name, data in shipped_files(name).items():
            directory.joinpath(file_name).write_bytes(data)
            print(f"{file_name}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
