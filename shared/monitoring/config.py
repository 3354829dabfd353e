"""The ``[monitoring]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoringConfig:
    """Where a role answers Prometheus.

    Attributes:
        listen: ``host:port`` of a small HTTP server with ``/metrics``, ``/healthz`` and ``/readyz``, without TLS and
            without a password: give an address that the scraper alone reaches, such as ``127.0.0.1:9465``. Empty for
            no server.
    """

    listen: Annotated[str, Length(0, 300)] = ""

    def __post_init__(self) -> None:
        if self.listen:
            address(self.listen)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayMonitoringConfig(MonitoringConfig):
    """A gateway also shows what its devices tell.

    Attributes:
        devices: devices with series of their own; the counters of further ones are added up under the label ``other``.
    """

    devices: Annotated[int, Range(0, 100_000)] = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorMonitoringConfig(MonitoringConfig):
    """The coordinator also shows its sites.

    Attributes:
        sites: sites with series of their own; the devices of further ones are added up under the label ``other``.
    """

    sites: Annotated[int, Range(0, 10_000)] = 1000


def address(listen: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f'listen {listen!r}: put an IPv6 address into brackets, as in "[::1]:9465"')
    if not colon or not host or any(c.isspace() for c in host) or not port.isdecimal() or int(port) > 0xFFFF:
        raise ConfigError(f'listen {listen!r}: give "host:port", such as "127.0.0.1:9465", or "" for none')
    return host, int(port)
