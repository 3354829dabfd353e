"""The helper's settings: one TOML file, every key checked, every default documented.

Example::

    identity = "identity"
    state = "state"

    [broker]
    host = "broker.example.org"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fleetfed.shared import config
from fleetfed.shared.config import Range
from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.monitoring.config import MonitoringConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.secure.box import check_suite
from fleetfed.shared.telemetry import LEVELS, LogFormat
from fleetfed.shared.wire.masking import SEALED_BOX


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperConfig:
    """A whole ``helper.toml``.

    Attributes:
        identity: folder that ``fleetfed keys issue --role helper`` wrote.
        state: folder of everything that must outlive the process; keep no copies of it, it holds keys that are to be
            destroyed.
        broker: the coordinator's broker.
        rotate_hours: hours after which a new key takes the place of the one before. A key is valid for twice as long,
            so a round may take up to so many hours; then its secret is destroyed.
        suite: how seeds are sealed to this helper: that of the coordinator's ``rounds.suite``.
        request_mib: largest request; about a third of a KiB per device of a cohort.
        monitoring: where Prometheus finds it.
        log_level: of stderr.
        log_format: of stderr: ``text``, or ``json`` with one object per line.
    """

    identity: Path
    state: Path
    broker: Endpoint
    rotate_hours: Annotated[float, Range(0.01, 24 * 365)] = 24.0
    suite: Annotated[int, Range(1, 255)] = SEALED_BOX
    request_mib: Annotated[int, Range(1, 1024)] = 128
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    log_level: str = "info"
    log_format: LogFormat = LogFormat.TEXT

    def __post_init__(self) -> None:
        try:
            check_suite(self.suite)
        except RemoteProtocolError as error:
            raise ConfigError(f"suite: {error.detail}") from error
        if self.log_level not in LEVELS:
            raise ConfigError(f"log_level {self.log_level!r} is none of: {', '.join(LEVELS)}")


def load(path: Path) -> HelperConfig:
    """Read ``helper.toml``; relative paths begin at its folder.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    return config.load(HelperConfig, path)
