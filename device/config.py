"""The device's settings: one TOML file, every key checked, every default documented."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.telemetry import LogFormat


class StopAs(StrEnum):
    """What a clean stop says about us."""

    SLEEPING = "sleeping"
    """We will be back: rounds go on expecting us."""
    DISCONNECTED = "disconnected"
    """Nobody needs to wait."""


class LogLevel(StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEndpoint(Endpoint):
    """The ``[broker]`` table with what suits a device.

    60 s of silence cost 0.07 MB per day, and what is said during a week's sleep is not lost.
    """

    keepalive: Annotated[int, Range(1, 300)] = 60
    session_expiry: Annotated[int, Range(0, 30 * 86400)] = 7 * 86400

    def connection(self, *, client_id: str, identity: Path, **changes: Any) -> ConnectionConfig:
        """How to connect: a window of chunks and a few small messages is all that may be on its way to us."""
        # Not super(): a dataclass with slots is another class than the one that this method was compiled in.
        return Endpoint.connection(
            self, client_id=client_id, identity=identity, **{"receive_maximum": 16, "max_inflight": 16, **changes}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The ``[run]`` table.

    Attributes:
        stop_as: what a clean stop says about us.
        log_level: of stderr.
        log_format: of stderr: ``text``, or ``json`` with one object per line.
        telemetry: whether to tell the gateway, on change and every hour, how this device fares (docs/monitoring.md).
        threads: of the TFLite runtime.
        seed: makes training and rounding repeatable; 0 draws from the operating system, as privacy wants it.
        max_model_mib: largest model file that this device takes.
    """

    stop_as: StopAs = StopAs.SLEEPING
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.TEXT
    telemetry: bool = True
    threads: Annotated[int, Range(1, 64)] = 1
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    max_model_mib: Annotated[int, Range(1, 256)] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """A whole ``device.toml``.

    Attributes:
        identity: folder that `fleetfed keys issue` wrote.
        state: folder of everything that must outlive the process.
        broker: how to reach the broker.
        data: what to train on.
        run: how to run.
        labels: what this device says about itself; plans may ask for labels.
        trainer: ``module:factory`` of another trainer (`fleetfed.device.trainer.Trainer`) in place of TFLite.
    """

    identity: Path
    state: Path
    broker: DeviceEndpoint
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    labels: Annotated[dict[str, Annotated[str, Length(0, 100)]], Length(0, 32)] = field(default_factory=dict)
    trainer: Annotated[str, Length(0, 200)] = ""


def load(path: Path) -> DeviceConfig:
    """Read ``device.toml``; relative paths begin at its folder.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    return config.load(DeviceConfig, path)


def with_log_level(settings: DeviceConfig, level: str) -> DeviceConfig:
    """A copy that logs at another level."""
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, log_level=LogLevel(level)))
