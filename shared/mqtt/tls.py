"""TLS contexts for clients: version 1.2 or later, the server's name always checked, no switch to turn that off."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from fleetfed.shared.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Key material of one client, as PEM files.

    Attributes:
        ca: the authorities that may have issued the server's certificate.
        cert: this client's certificate.
        key: its private key, unencrypted, readable by its owner alone.
        crl: revocation lists to check the server against; none: not checked.
    """

    ca: Path
    cert: Path
    key: Path
    crl: Path | None = None


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Load ``files`` for a client.

    Raises:
        ConfigError: a file is missing, unreadable, not PEM, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_authorities(context, files.ca)
    _load_identity(context, files.cert, files.key)
    if files.crl is not None:
        _load_revocations(context, files.crl)
    return context


def _load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    """Trust the certificates in ``ca``.

    Raises:
        ConfigError: the file is missing, unreadable or holds none.
    """
    _readable(ca, "the authorities' certificates (ca)")
    try:
        context.load_verify_locations(cafile=ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca}: holds no PEM certificate; copy the fleet's CA file there") from error


def _load_identity(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Present ``cert`` with ``key``; warns where others than the owner may read the key.

    Raises:
        ConfigError: a file is missing or unreadable, or they do not belong together.
    """
    _readable(cert, "the certificate (cert)")
    _readable(key, "the private key (key)")
    mode = key.stat().st_mode & 0o077
    if mode:
        _log.warning("%s: the private key is open to others (mode %03o); run: chmod 600 %s", key, mode, key)
    try:
        # The empty password turns OpenSSL's question on the terminal into an error.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert}, {key}: no PEM certificate with its unencrypted private key ({error.reason}); "
            "issue both again, together"
        ) from error


def _load_revocations(context: ssl.SSLContext, crl: Path) -> None:
    """Refuse peers whose certificate is on a list in ``crl``.

    Raises:
        ConfigError: the file is missing, unreadable or holds no list.
    """
    _readable(crl, "the revocation list (crl)")
    try:
        context.load_verify_locations(cafile=crl)
    except ssl.SSLError as error:
        raise ConfigError(f"{crl}: holds no PEM revocation list; write it again with the CA's tool") from error
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _readable(path: Path, what: str) -> None:
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise ConfigError(f"{path}: {what} is an empty file; issue it again")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: {what} is missing; issue it, or correct the path in the [tls] table") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {what}: {error.strerror}; check owner and permissions") from error
