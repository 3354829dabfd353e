"""The fleet's own certificates: who a signing key belongs to, in what role and at which site.

They are not X.509: TLS ends at the broker, and these must be checked by every tier, for every message, on any
board. A certificate is a fixed layout of about 200 bytes, signed by the fleet's authority key::

    "FFID" ‖ version 1 ‖ role ‖ serial u64 ‖ not_before u64 ‖ not_after u64 ‖ public key 32 ‖ authority key id 16 ‖
    len ‖ fleet ‖ len ‖ id ‖ len ‖ site ‖ len ‖ owner ‖ signature 64                              (little-endian)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust.keys import SigningKey, signature_is_good
from fleetfed.shared.wire.envelope import MAX_CERTIFICATE, SIGNATURE_SIZE, KeyId, key_id
from fleetfed.shared.wire.topics import check_id

_MAGIC: Final = b"FFID"
_VERSION: Final = 1
_FIXED: Final = struct.Struct("<4sBBQQQ32s16s")
_CONTEXT: Final = b"fleetfed/1 certificate\0"

SERIALS: Final = 1 << 32
"""How many serial numbers an issuer has. Whoever's own certificate has the serial number s gives out those from
s * SERIALS on, the offline authority (serial 0) those from 0: so no two issuers ever give out the same."""


class Role(IntEnum):
    """What a key may be used for."""

    AUTHORITY = 1
    """Issues certificates and revocations; kept offline."""
    COORDINATOR = 2
    GATEWAY = 3
    DEVICE = 4
    OPERATOR = 5
    HELPER = 6
    """Holds mask seeds beside the coordinator; run by somebody else than it."""
    ENROLLER = 7
    """Issues and revokes the certificates of devices, and of nobody else; see `verifier.Authority`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Binds a public key to an id.

    Attributes:
        serial: unique over all issuers, see `SERIALS`; what a revocation names.
        role: what the key may be used for.
        fleet: the fleet's name.
        id: the member's id, which is also its MQTT user name, client id and TLS common name.
        site: the site that it belongs to: where a device sends its updates, or that a gateway *serves*;
            ``_`` for coordinator, operators and the authority.
        owner: who answers for the member; may be empty.
        not_before, not_after: unix milliseconds.
        public_key: Ed25519, 32 bytes.
    """

    serial: int
    role: Role
    fleet: str
    id: str
    site: str
    owner: str = ""
    not_before: int
    not_after: int
    public_key: bytes

    @property
    def key_id(self) -> KeyId:
        """The id of the certified key."""
        return key_id(self.public_key)


def _text(value: str) -> bytes:
    raw = value.encode("ascii")
    return bytes([len(raw)]) + raw


def issue(certificate: Certificate, authority: SigningKey) -> bytes:
    """Sign ``certificate`` and return its bytes.

    Raises:
        LocalProtocolError: an id that a topic may not carry, or an empty validity.
    """
    check_id(certificate.fleet, "fleet")
    check_id(certificate.id)
    check_id(certificate.site, "site")
    if certificate.owner:
        check_id(certificate.owner, "owner")
    if not 0 <= certificate.not_before < certificate.not_after:
        raise LocalProtocolError(f"validity from {certificate.not_before} to {certificate.not_after} is empty")
    body = _FIXED.pack(
        _MAGIC,
        _VERSION,
        certificate.role,
        certificate.serial,
        certificate.not_before,
        certificate.not_after,
        certificate.public_key,
        authority.id,
    ) + b"".join(map(_text, (certificate.fleet, certificate.id, certificate.site, certificate.owner)))
    encoded = body + authority.sign(_CONTEXT + body)
    assert len(encoded) <= MAX_CERTIFICATE
    return encoded


def issuer(encoded: bytes) -> KeyId:
    """The key id of the authority that claims to have issued a certificate; nothing is verified.

    Raises:
        RemoteProtocolError: `BAD_CERTIFICATE`: too short to name one.
    """
    if len(encoded) < _FIXED.size:
        raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, f"{len(encoded)} bytes")
    return KeyId(_FIXED.unpack_from(encoded)[-1])


def claimed_site(encoded: bytes) -> str | None:
    """The site that a certificate claims, None for bytes that claim none; nothing is verified."""
    texts: list[bytes] = []
    position = _FIXED.size
    while position < len(encoded) - SIGNATURE_SIZE and len(texts) < 3:
        end = position + 1 + encoded[position]
        texts.append(encoded[position + 1 : end])
        position = end
    return texts[2].decode("ascii", errors="replace") if len(texts) == 3 else None


def verify(encoded: bytes, authority_key: bytes) -> Certificate:
    """Check the authority's signature and parse. Validity in time, revocation and role are the caller's to check.

    Args:
        encoded: the bytes that `issue` made.
        authority_key: the authority's public key, 32 bytes.

    Raises:
        RemoteProtocolError: `BAD_CERTIFICATE`.
    """

    def bad(detail: str) -> RemoteProtocolError:
        return RemoteProtocolError(RejectReason.BAD_CERTIFICATE, detail)

    if not _FIXED.size + 4 + SIGNATURE_SIZE <= len(encoded) <= MAX_CERTIFICATE:
        raise bad(f"{len(encoded)} bytes")
    body, signature = encoded[:-SIGNATURE_SIZE], encoded[-SIGNATURE_SIZE:]
    magic, version, role, serial, not_before, not_after, public_key, issuer = _FIXED.unpack_from(body)
    if magic != _MAGIC or version != _VERSION:
        raise bad(f"magic {magic!r}, version {version}")
    if issuer != key_id(authority_key):
        raise bad("issued by another authority")
    if not signature_is_good(authority_key, _CONTEXT + body, signature):
        raise bad("the authority's signature does not match")
    texts = []
    position = _FIXED.size
    for _ in range(4):
        if position >= len(body):
            raise bad("ends early")
        end = position + 1 + body[position]
        texts.append(body[position + 1 : end])
        position = end
    if position != len(body):
        raise bad("bytes left over")
    try:
        fleet, id_, site, owner = (text.decode("ascii") for text in texts)
        for text in (fleet, id_, site):
            check_id(text)
        return Certificate(
            serial=serial,
            role=Role(role),
            fleet=fleet,
            id=id_,
            site=site,
            owner=owner,
            not_before=not_before,
            not_after=not_after,
            public_key=public_key,
        )
    except (ValueError, LocalProtocolError) as error:
        raise bad(str(error)) from error
