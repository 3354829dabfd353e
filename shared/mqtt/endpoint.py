"""The ``[broker]`` table of every role's settings: where the broker is and how to speak with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.config import MAX_OTHERS, ConnectionConfig, Protocol, is_loopback, split_address
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.trust.identity import TLS_DIRECTORY


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a broker is.

    Attributes:
        host: name or address; with TLS, the broker's certificate must name it.
        port: TCP port.
        others: further nodes of the same cluster, each ``HOST`` or ``HOST:PORT``; a member begins at the one that
            follows from its id, and goes on to the next where that one fails.
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
    others: Annotated[tuple[str, ...], Length(0, MAX_OTHERS)] = ()
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
        for host in (self.host, *(split_address(each, self.port)[0] for each in self.others)):
            if not self.tls and not is_loopback(host):
                raise ConfigError(f"tls = false is allowed only for a broker on this machine, and {host} is not")

    def connection(self, *, client_id: str, identity: Path, **changes: Any) -> ConnectionConfig:
        """How to connect as ``client_id``, with the identity in this folder.

        Args:
            client_id: the member's id.
            identity: its identity folder.
            **changes: other values of `ConnectionConfig`.
        """
        folder = identity / TLS_DIRECTORY
        files = TlsFiles(
            ca=self.ca or folder / "ca.pem",
            cert=self.cert or folder / "cert.pem",
            key=self.key or folder / "key.pem",
            crl=self.crl,
        )
        values = {
            "keepalive": self.keepalive,
            "session_expiry": self.session_expiry,
            "reconnect_cap": self.reconnect_cap,
            "protocol": self.protocol,
            **changes,
        }
        return ConnectionConfig(
            host=self.host,
            port=self.port,
            others=self.others,
            client_id=client_id,
            tls=files if self.tls else None,
            **values,
        )
