"""``python -m fleetfed.cloud_coordinator.builder SOURCE DIRECTORY``: build without the operator's command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fleetfed.cloud_coordinator.builder.build import DEFAULT_BATCH, build_to_directory
from fleetfed.shared.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Build one model; 0 where it worked, 2 where the message on stderr says why not."""
    parser = argparse.ArgumentParser(prog="python -m fleetfed.cloud_coordinator.builder", description=__doc__)
    parser.add_argument("source", help="path/to/model.keras, or module:function")
    parser.add_argument("directory", type=Path, help="where NAME.tflite and NAME.card go")
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="examples in one training step")
    parser.add_argument("--name", default="", help="default: the Keras model's own name")
    parser.add_argument("--class-name", action="append", default=[], help="once for each class, in order")
    options = parser.parse_args(arguments)
    try:
        paths = build_to_directory(
            options.source,
            options.directory,
            batch=options.batch,
            name=options.name,
            class_names=options.class_name,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(paths.model)
    print(paths.card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
