"""TLS of the embedded broker: the server's context, and the serial numbers in a revocation list."""

from __future__ import annotations

import base64
import re
import ssl
from pathlib import Path
from typing import Final

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles

_PEM: Final = re.compile(rb"-----BEGIN X509 CRL-----(.+?)-----END X509 CRL-----", re.DOTALL)
_SEQUENCE: Final = 0x30
_INTEGER: Final = 0x02


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that asks every client for a certificate of the fleet's authority; TLS 1.2 or newer.

    Raises:
        ConfigError: a file is missing or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # A client that resumes would skip the look at the revocation list.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS certificate {files.cert} with key {files.key}: {error}") from error
    try:
        context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS authority {files.ca}: {error}") from error
    if files.crl is not None:
        try:
            context.load_verify_locations(files.crl)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"revocation list {files.crl}: {error}") from error
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def revoked_serials(path: Path) -> frozenset[int]:
    """The serial numbers in a file of PEM revocation lists (RFC 5280 §5.1), one per authority.

    The signature is not checked here: OpenSSL does that at every handshake; this only finds whom to disconnect.

    Raises:
        ConfigError: the file cannot be read or is not a revocation list.
    """
    try:
        lists = _PEM.findall(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"revocation list {path}: {error.strerror}") from error
    if not lists:
        raise ConfigError(f"revocation list {path}: no X509 CRL in PEM form")
    try:
        return frozenset(serial for each in lists for serial in _serials(base64.b64decode(each)))
    except (ValueError, IndexError) as error:
        raise ConfigError(f"revocation list {path}: {error or 'damaged'}") from error


def _serials(der: bytes) -> list[int]:
    outer, _ = _element(der, 0, _SEQUENCE)
    body, _ = _element(outer, 0, _SEQUENCE)
    at = 0
    found: list[int] = []
    # TBSCertList: version?, algorithm, issuer, thisUpdate, nextUpdate?, revokedCertificates?, extensions?
    sequences = 0
    while at < len(body):
        tag = body[at]
        content, at = _element(body, at, tag)
        sequences += tag == _SEQUENCE
        if tag == _SEQUENCE and sequences == 3:
            entry_at = 0
            while entry_at < len(content):
                entry, entry_at = _element(content, entry_at, _SEQUENCE)
                number, _ = _element(entry, 0, _INTEGER)
                found.append(int.from_bytes(number, signed=True))
    return found


def _element(data: bytes, at: int, tag: int) -> tuple[bytes, int]:
    if data[at] != tag:
        raise ValueError("not a certificate revocation list")
    size = data[at + 1]
    at += 2
    if size & 0x80:
        width = size & 0x7F
        size = int.from_bytes(data[at : at + width])
        at += width
    if at + size > len(data):
        raise ValueError("truncated")
    return data[at : at + size], at + size
