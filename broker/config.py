"""Settings of a broker: what a person writes in ``broker.toml``, and every bound with what it costs.

Example of a file::

    host = "0.0.0.0"
    port = 8883
    acl_file = "acl"
    persistence_dir = "state"

    [tls]
    ca = "ca.pem"
    cert = "broker.pem"
    key = "broker.key"
    crl = "crl.pem"

    [limits]
    max_connections = 2000

    [bridge]                            # Mosquitto only
    host = "mqtt.example.org"
    tls = { ca = "bridge/ca.pem", cert = "bridge/cert.pem", key = "bridge/key.pem" }

Relative paths are taken from the file's own folder. Unknown keys are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from fleetfed.shared import config
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.monitoring.config import MonitoringConfig
from fleetfed.shared.mqtt.config import is_loopback
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.wire.limits import KIB, MAX_PACKET, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound of the broker.

    Attributes:
        max_packet: bytes of one packet from a client; more ends its connection (0x95).
        max_connections: connections at once; further ones are closed after the TLS handshake.
        max_sessions: sessions, connected or not; further new ones are refused (0x97).
        connect_timeout: seconds from the connection to its CONNECT.
        max_keepalive: seconds; a longer wish, or none, is shortened for an MQTT 5 client.
        max_session_expiry: seconds that a session outlives its connection at most.
        receive_maximum: QoS 1 and 2 messages of one client that may wait for their acknowledgement.
        max_inflight: QoS 1 and 2 messages sent to one client and not yet acknowledged by it.
        max_subscriptions: filters of one session.
        high_water: bytes queued for one connected subscriber from which its publishers wait for their PUBACK.
        memory_high_water: bytes queued for all connected subscribers, each message counted once, from which
            clients that have nothing to acknowledge are not read any more, until half of it is left.
        stall_timeout: seconds without any progress after which a subscriber that holds others up is disconnected.
        max_queued_messages: messages kept for one offline session; more are dropped and counted. A connected client
            with more than that waiting may not subscribe to more that is retained.
        max_queued_bytes: bytes kept for one offline session.
        max_offline_bytes: bytes kept for all offline sessions together.
        max_retained_messages: retained messages; more are refused (0x97) and counted.
        max_retained_bytes: bytes of retained messages.
        max_message_rate: messages per second and client, averaged over ten seconds; 0 means unlimited.
        max_byte_rate: bytes per second and client, averaged over ten seconds; 0 means unlimited.
    """

    max_packet: int = MAX_PACKET
    max_connections: int = 4096
    max_sessions: int = 20_000
    connect_timeout: float = 10.0
    max_keepalive: int = 300
    max_session_expiry: int = 7 * 86_400
    receive_maximum: int = 64
    max_inflight: int = 64
    max_subscriptions: int = 16_384
    high_water: int = 8 * MIB
    memory_high_water: int = 64 * MIB
    stall_timeout: float = 60.0
    max_queued_messages: int = 20_000
    max_queued_bytes: int = 64 * MIB
    max_offline_bytes: int = 256 * MIB
    max_retained_messages: int = 100_000
    max_retained_bytes: int = 1024 * MIB
    max_message_rate: int = 0
    max_byte_rate: int = 0

    def __post_init__(self) -> None:
        may_be_zero = {"max_message_rate", "max_byte_rate", "max_session_expiry"}
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 0 or (value == 0 and item.name not in may_be_zero):
                raise ConfigError(f"limits.{item.name} is {value}: give a positive number")
        if self.max_packet < KIB or self.max_packet > 256 * MIB:
            raise ConfigError(f"limits.max_packet is {self.max_packet}: MQTT allows 1024 bytes to 256 MiB")
        for name in ("receive_maximum", "max_inflight", "max_keepalive"):
            if getattr(self, name) > 0xFFFF:
                raise ConfigError(f"limits.{name} is {getattr(self, name)}: MQTT allows at most 65535")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """The way from a site's broker to the one above; who goes it is in the inventory. Mosquitto only.

    Attributes:
        host: the broker above; its certificate must name it.
        port: TCP port.
        tls: the bridge's own identity (``fleetfed keys issue --role bridge``); ``crl`` is not checked.
        keepalive: seconds of silence until a probe; after one and a half times this the way is taken for broken.
        reconnect_cap: most seconds between two attempts to connect.
    """

    host: str
    port: int = 8883
    tls: TlsFiles
    keepalive: int = 15
    reconnect_cap: int = 30

    def __post_init__(self) -> None:
        if not self.host or any(character.isspace() for character in self.host):
            raise ConfigError(f"bridge.host {self.host!r}: give the name or address of the broker above")
        if not 1 <= self.port <= 0xFFFF:
            raise ConfigError(f"bridge.port {self.port}: give 1 to 65535")
        if not 5 <= self.keepalive <= 300:
            raise ConfigError(f"bridge.keepalive {self.keepalive}: give 5 to 300 seconds")
        if not 1 <= self.reconnect_cap <= 3600:
            raise ConfigError(f"bridge.reconnect_cap {self.reconnect_cap}: give 1 to 3600 seconds")


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """One broker with one listener, or two.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 picks a free one.
        tls: files for TLS with mutual authentication; ``None`` makes the listener plain, which is allowed on a
            loopback address only: a plain client may call itself what it likes.
        acl_file: access control in Mosquitto's format; ``None`` allows everything.
        persistence_dir: where retained messages, durable sessions and their queues survive a crash;
            ``None`` keeps them in memory only.
        plain_port: a second, plain listener on 127.0.0.1, for measurements and tests; 0 picks a free port.
        sys_interval: seconds between two publications of ``$SYS``; 0 turns it off.
        limits: every bound.
        bridge: the way to the broker above, which the embedded broker does not have.
        monitoring: where Prometheus finds the embedded broker.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: TlsFiles | None = None
    acl_file: Path | None = None
    persistence_dir: Path | None = None
    plain_port: int | None = None
    sys_interval: float = 10.0
    limits: Limits = field(default_factory=Limits)
    bridge: Bridge | None = None
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

    def __post_init__(self) -> None:
        for port in (self.port, self.plain_port or 0):
            if not 0 <= port <= 0xFFFF:
                raise ConfigError(f"port {port}: give 0 to 65535")
        if self.tls is None and not is_loopback(self.host):
            raise ConfigError(f"host {self.host} needs [tls]: without it only a loopback address is served")
        if self.tls is None and self.plain_port is not None:
            raise ConfigError("plain_port: the listener is plain already; leave it out or add [tls]")


def load_config(path: Path) -> BrokerConfig:
    """Read ``broker.toml``; relative paths start at its folder.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or a value that it must not have.
    """
    return config.load(BrokerConfig, path)
