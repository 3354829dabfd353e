"""The gateway's settings: one TOML file, every key checked, every default documented.

Example::

    identity = "identity"
    state = "state"

    [broker]
    host = "broker.north.example.org"

    [upstream]
    site = "_"

    [upstream.broker]
    host = "broker.example.org"

Without ``[upstream.broker]`` the upstream site is on the same broker; then, and also where both tables name the same
host and port, one MQTT session serves both sites: the identity is the client id, and a second connection with it would
take over from the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.monitoring.config import GatewayMonitoringConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.telemetry import LEVELS, LogFormat
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.topics import CLOUD_SITE


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """The tier above.

    Attributes:
        site: the site that this gateway is a member of; ``_`` for the coordinator's.
        broker: where that site is; omitted for the own site's broker.
    """

    site: Annotated[str, Length(1, limits.MAX_ID)] = CLOUD_SITE
    broker: Endpoint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What bounds memory, disk and waiting.

    Attributes:
        assembling_mib: bytes of messages on their way in, all members together; beyond it they are ``overloaded``.
        journal_mib: bytes of updates that one round may put on disk; beyond it they are ``overloaded``.
        settle: seconds after the first connection to the site before which a round does not close because all who are
            present answered: retained presences may still be on their way.
    """

    assembling_mib: Annotated[int, Range(1, 65_536)] = 256
    journal_mib: Annotated[int, Range(1, 1_048_576)] = 4096
    settle: Annotated[float, Range(0.0, 60.0)] = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """A whole ``gateway.toml``.

    Attributes:
        identity: folder that ``fleetfed keys issue`` wrote; its certificate names the site that this gateway serves.
        state: folder of everything that must outlive the process.
        broker: the broker of the own site.
        upstream: the tier above.
        limits: what bounds memory, disk and waiting.
        monitoring: where Prometheus finds it, and how many devices it sees.
        log_level: of stderr.
        log_format: of stderr: ``text``, or ``json`` with one object per line.
    """

    identity: Path
    state: Path
    broker: Endpoint
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    monitoring: GatewayMonitoringConfig = field(default_factory=GatewayMonitoringConfig)
    log_level: str = "info"
    log_format: LogFormat = LogFormat.TEXT

    def __post_init__(self) -> None:
        if self.log_level not in LEVELS:
            raise ConfigError(f"log_level {self.log_level!r} is none of: {', '.join(LEVELS)}")

    @property
    def shared(self) -> bool:
        """Whether one MQTT session serves both sites."""
        other = self.upstream.broker
        return other is None or (other.host, other.port) == (self.broker.host, self.broker.port)


def load(path: Path) -> GatewayConfig:
    """Read ``gateway.toml``; relative paths begin at its folder.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    return config.load(GatewayConfig, path)
