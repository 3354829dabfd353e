"""Brokers that a fleet grows into, and what each of them gets from the inventory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

from fleetfed.broker.nats import render_users
from fleetfed.broker.rabbitmq import FOLDER, render_definitions
from fleetfed.broker.render import Inventory
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic

_FILE_MODE: Final = 0o644
"""The broker is another user than whoever renders; nothing in it is secret."""


class Engine(StrEnum):
    """Which broker."""

    MOSQUITTO = "mosquitto"
    RABBITMQ = "rabbitmq"
    NATS = "nats"


def render_rights(engine: Engine, inventory: Inventory, directory: Path) -> list[Path]:
    """Write who may read and write what, for RabbitMQ or NATS, into ``directory``; return the files in their order.

    Raises:
        ConfigError: the directory cannot be written, or the broker has no form for what the inventory says.
    """
    if engine is Engine.RABBITMQ:
        files = {directory / FOLDER / name: text for name, text in render_definitions(inventory).items()}
    else:
        files = {directory / "users.conf": render_users(inventory)}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: a broker that reads it again must not find half of its users.
            write_atomic(path, text.encode())
            path.chmod(_FILE_MODE)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error
    return list(files)
