"""How to reach a broker: settings that both the asyncio session and the device's session take."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.wire import limits

MAX_OTHERS: Final = 15
"""Nodes of one cluster, less the first."""


class Protocol(StrEnum):
    """Which version of MQTT to speak."""

    AUTO = "auto"
    """5 first, 3.1.1 where the broker does not know it."""
    V5 = "5"
    V311 = "3.1.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What the broker publishes when a client vanishes without a word."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """One connection to one broker.

    Attributes:
        host: name or address; with TLS, the server's certificate must name it.
        port: TCP port.
        others: further nodes of the same cluster, each ``HOST`` or ``HOST:PORT``.
        client_id: the certificate's common name; it is also the broker's name for the session.
        tls: key material; only a broker on this machine may go without.
        keepalive: seconds of silence after which either side probes the other. A dead peer is noticed after at
            most twice this. 15 suits a node; a device on battery takes 60, which costs 0.2 MB per day.
        session_expiry: seconds for which the broker keeps subscriptions and undelivered messages.
        connect_timeout: seconds for TCP, TLS and the broker's answer, each.
        max_inflight: own messages that may wait for the broker's confirmation at once; the broker's own
            limit is respected where it is lower.
        receive_maximum: messages that the broker may send ahead of our confirmation (MQTT 5; an MQTT 3.1.1
            broker uses its own limit). Bounds memory together with ``max_packet``.
        queue_messages: received messages that wait for the handler before reading stops. QoS 0 messages are
            dropped and counted instead.
        queue_bytes: the same, in payload bytes.
        max_packet: largest packet accepted or sent, in bytes.
        reconnect_cap: upper bound of the back-off between attempts, in seconds.
        protocol: MQTT version; `Protocol.AUTO` unless a broker misbehaves.
    """

    host: Annotated[str, Length(1, 253)]
    port: Annotated[int, Range(1, 65535)] = 8883
    others: Annotated[tuple[str, ...], Length(0, MAX_OTHERS)] = ()
    client_id: Annotated[str, Length(1, 64)] = ""
    tls: TlsFiles | None = None
    keepalive: Annotated[int, Range(1, 300)] = 15
    session_expiry: Annotated[int, Range(0, 30 * 86400)] = 86400
    connect_timeout: Annotated[float, Range(0.1, 120)] = 10.0
    max_inflight: Annotated[int, Range(1, 1000)] = 64
    receive_maximum: Annotated[int, Range(1, 1000)] = 64
    queue_messages: Annotated[int, Range(1, 100_000)] = 512
    queue_bytes: Annotated[int, Range(limits.KIB, 1024 * limits.MIB)] = 64 * limits.MIB
    max_packet: Annotated[int, Range(limits.KIB, 16 * limits.MIB)] = limits.MAX_PACKET
    reconnect_cap: Annotated[float, Range(0.0, 3600.0)] = 60.0
    protocol: Protocol = Protocol.AUTO

    def __post_init__(self) -> None:
        if not self.client_id:
            raise ConfigError("client_id is missing: it is the common name of the client's certificate")
        for host in (self.host, *(split_address(each, self.port)[0] for each in self.others)):
            if self.tls is None and not is_loopback(host):
                raise ConfigError(f"host {host} is not this machine, so a [tls] table with ca, cert and key is needed")
        if self.receive_maximum > self.queue_messages:
            raise ConfigError("receive_maximum must not exceed queue_messages, or the broker's window cannot fit")

    @classmethod
    def from_table(cls, table: dict[str, Any], base_dir: Path, *, where: str = "connection", **defaults: Any) -> Self:
        """Build from a TOML table.

        Args:
            table: keys are this class's attributes; ``tls`` is a table of ``ca``, ``cert``, ``key``, ``crl``.
            base_dir: the folder that relative paths begin at.
            where: the file's name, for messages.
            **defaults: values for keys that the table leaves out, such as ``client_id`` and ``keepalive``.

        Raises:
            ConfigError: an unknown key, or a value that is missing, of the wrong type or out of range.
        """
        return config.build(cls, {**defaults, **table}, where=where, base=base_dir)

    def with_defaults(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def is_loopback(host: str) -> bool:
    """Whether ``host`` certainly means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(text: str, port: int) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT``; an IPv6 address with a port is written ``[ADDRESS]:PORT``.

    >>> split_address("n2.example", 8883), split_address("[::1]:8884", 8883), split_address("::1", 8883)
    (('n2.example', 8883), ('::1', 8884), ('::1', 8883))

    Raises:
        ConfigError: it is neither.
    """
    host, number = text, str(port)
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        number = rest[1:] if rest.startswith(":") else "" if rest or not closed else number
    elif text.count(":") == 1:
        host, _, number = text.partition(":")
    if not host or len(host) > 253 or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 65535:
        raise ConfigError(f"{text!r} is no address: give HOST or HOST:PORT")
    return host, int(number)
