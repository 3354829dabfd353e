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
from fleetfed.shared.mqtt.config import ConnectionConfig, Protocol, is_loopback
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.telemetry import LEVELS
from fleetfed.shared.trust.identity import TLS_DIRECTORY
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.topics import CLOUD_SITE


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where a broker is.

    Attributes:
        host: name or address; with TLS, the broker's certificate must name it.
        port: TCP port.
        tls: off only for a broker on this machine.
        ca, cert, key: PEM files; by default those in the identity's ``tls`` folder.
        crl: revocation lists for the broker's certificate; none: not checked.
        keepalive: seconds of silence until a probe.
        session_expiry: seconds for which the broker keeps what is said while we are away.
        reconnect_cap: most seconds between attempts to connect.
        protocol: ``auto``, ``5`` or ``3.1.1``.
    """

    host: Annotated[str, Length(1, 253)]
    port: Annotated[int, Range(1, 65535)] = 8883
    tls: bool = True
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    crl: Path | None = None
    keepalive: Annotated[int, Range(1, 300)] = 15
    session_expiry: Annotated[int, Range(0, 30 * 86400)] = 86400
    reconnect_cap: Annotated[float, Range(0.0, 3600.0)] = 60.0
    protocol: Protocol = Protocol.AUTO

    def __post_init__(self) -> None:
        if not self.tls and not is_loopback(self.host):
            raise ConfigError(f"tls = false is allowed only for a broker on this machine, and {self.host} is not")

    def connection(self, *, client_id: str, identity: Path) -> ConnectionConfig:
        """How to connect as ``client_id`` with the identity in this folder."""
        folder = identity / TLS_DIRECTORY
        files = TlsFiles(
            ca=self.ca or folder / "ca.pem",
            cert=self.cert or folder / "cert.pem",
            key=self.key or folder / "key.pem",
            crl=self.crl,
        )
        return ConnectionConfig(
            host=self.host,
            port=self.port,
            client_id=client_id,
            tls=files if self.tls else None,
            keepalive=self.keepalive,
            session_expiry=self.session_expiry,
            reconnect_cap=self.reconnect_cap,
            protocol=self.protocol,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """The tier above.

    Attributes:
        site: the site that this gateway is a member of; ``_`` for the coordinator's.
        broker: where that site is; omitted for the own site's broker.
    """

    site: Annotated[str, Length(1, limits.MAX_ID)] = CLOUD_SITE
    broker: BrokerConfig | None = None


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
        log_level: of stderr.
    """

    identity: Path
    state: Path
    broker: BrokerConfig
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    log_level: str = "info"

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
