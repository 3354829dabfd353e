"""``enroll.toml``: one file, every key checked, every default documented."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.monitoring.config import MonitoringConfig
from fleetfed.shared.telemetry import LogFormat

SETTINGS: Final = "enroll.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFiles:
    """The ``[broker]`` table: what a broker has to be told after each revocation.

    Attributes:
        out: folder that receives ``current/`` with ca.pem, crl.pem, acl and revocations.bin, replaced all at once.
        listed: name every enrolled device in the access list; otherwise any certified device may speak under its own
            id, and those that were revoked are named as shut out.
        reload: command that makes the broker read its files again.
    """

    out: Path
    listed: bool = False
    reload: Annotated[tuple[str, ...], Length(0, 32)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The ``[limits]`` table.

    Attributes:
        connections: open at one time.
        per_minute: requests per address (IPv6: per /64), and as many at once.
        seconds: that one connection may last.
    """

    connections: Annotated[int, Range(1, 10_000)] = 128
    per_minute: Annotated[int, Range(1, 100_000)] = 30
    seconds: Annotated[float, Range(0.1, 120.0)] = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrollConfig:
    """The whole file.

    Attributes:
        identity: folder that `fleetfed keys issue ID --role enroller --host NAME` wrote.
        state: folder of the register, the log and the TLS authority; back it up.
        authority: folder of what the offline authority says, see `fleetfed-enroll import`.
        host, port: where to listen.
        days: how long a certificate is valid; a device renews it at half of that.
        grace_days: for how long after its end it may still be renewed.
        broker: a broker's files; none: this service writes none.
        limits: every bound.
        monitoring: where Prometheus finds it.
        log_format: of stderr: ``text``, or ``json`` with one object per line.
    """

    identity: Path
    state: Path
    authority: Path
    host: Annotated[str, Length(1, 253)] = "0.0.0.0"  # noqa: S104 - devices come from anywhere
    port: Annotated[int, Range(0, 65535)] = 8443
    days: Annotated[int, Range(1, 366)] = 30
    grace_days: Annotated[int, Range(0, 366)] = 60
    broker: BrokerFiles | None = None
    limits: Limits = field(default_factory=Limits)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    log_format: LogFormat = LogFormat.TEXT


def load(path: Path) -> EnrollConfig:
    """Read ``enroll.toml``; relative paths begin at its folder.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    return config.load(EnrollConfig, path)
