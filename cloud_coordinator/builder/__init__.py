"""Keras model in, trainable .tflite out. Only this package needs TensorFlow, and only inside its functions.

Rules:

- A model is read layer by layer (`read`), and every layer, activation and option is checked against the list of what
  is proven. Anything else is refused by name. A conversion that merely succeeds proves nothing.
- The training graph (`graph`) is written out forward and backward from TensorFlow operations that are TFLite builtins,
  so no gradient operation of TensorFlow is left for the converter to refuse or to get wrong.
- The weights are found in the converted file by the sentinel method (`convert`): from then on nobody needs TensorFlow.

Example::

    from fleetfed.cloud_coordinator.builder import build_to_directory

    paths = build_to_directory("fleetfed.cloud_coordinator.zoo.models:digits", Path("runs/models"), batch=16)
"""

from __future__ import annotations

from fleetfed.cloud_coordinator.builder.build import (
    BuiltModel,
    BuiltPaths,
    build,
    build_from_source,
    build_to_directory,
)

__all__ = ["BuiltModel", "BuiltPaths", "build", "build_from_source", "build_to_directory"]
