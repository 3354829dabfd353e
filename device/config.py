"""The device's settings: one TOML file, every key checked, every default documented."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.dataset import DataConfig
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.config import ConnectionConfig, Protocol, is_loopback
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.trust.identity import TLS_DIRECTORY


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
class BrokerConfig:
    """The ``[broker]`` table.

    Attributes:
        host: name or address; with TLS, the broker's certificate must name it.
        port: TCP port.
        tls: off only for a broker on this machine.
        ca, cert, key: PEM files; by default those in the identity's ``tls`` folder.
        crl: revocation lists for the broker's certificate; none: not checked.
        keepalive: seconds of silence until a probe; 60 costs 0.2 MB per day.
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
    keepalive: Annotated[int, Range(1, 300)] = 60
    session_expiry: Annotated[int, Range(0, 30 * 86400)] = 7 * 86400
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
            # A window of chunks and a few small messages: what the broker may have on its way to us.
            receive_maximum=16,
            max_inflight=16,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The ``[run]`` table.

    Attributes:
        stop_as: what a clean stop says about us.
        log_level: of stderr.
        threads: of the TFLite runtime.
        seed: makes training and rounding repeatable; 0 draws from the operating system, as privacy wants it.
        max_model_mib: largest model file that this device takes.
    """

    stop_as: StopAs = StopAs.SLEEPING
    log_level: LogLevel = LogLevel.INFO
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
    broker: BrokerConfig
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
