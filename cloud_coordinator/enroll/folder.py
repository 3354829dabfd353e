"""The service's folder as the commands name it: ``--dir``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fleetfed.cloud_coordinator.enroll import config
from fleetfed.cloud_coordinator.enroll.config import SETTINGS, EnrollConfig
from fleetfed.cloud_coordinator.enroll.enroller import Enroller
from fleetfed.shared.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def dir_option(function: F) -> F:
    """The option ``--dir``."""
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("enroll"),
        show_default=True,
        help="The service's folder. It holds a key that certifies devices: nobody else may read it.",
    )(function)


def open_enroller(directory: Path) -> Enroller:
    """Open the service in a folder.

    Raises:
        ConfigError: there is none.
    """
    return Enroller.open(settings_of(directory))


def settings_of(directory: Path) -> EnrollConfig:
    """The settings in a folder.

    Raises:
        ConfigError: there are none.
    """
    path = directory / SETTINGS
    if not path.exists():
        raise ConfigError(f"{directory} holds no enrolment service; make it with `fleetfed-enroll init`")
    return config.load(path)
