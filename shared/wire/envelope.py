"""The envelope of every signed message: a fixed-layout head that carries the hash of the body.

::

    message = head ‖ body
    head    = header (132 bytes) ‖ extension (extension_len) ‖ signature (64) ‖ certificate (certificate_len)

The signature covers ``context ‖ header ‖ extension`` (`signed_bytes`), and the header covers the body by its hash.
So a receiver verifies about 250 bytes before it allocates, decompresses or parses anything else, a head can be
forwarded without its body, and nothing is ever serialised again before it is verified. The certificate is not
covered: it carries the authority's own signature, and the header names the key that it must bear.

This module parses and builds; `fleetfed.shared.trust` signs and verifies. `docs/wire.md` annotates an example.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NewType

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.compression import decompress

MAGIC: Final = b"FFM1"
VERSION: Final = 1
SIGNATURE_SIZE: Final = 64
MAX_EXTENSION: Final = 3840
MAX_CERTIFICATE: Final = 512

_HEADER: Final = struct.Struct("<4sBBBB16s16sQQQQ16sIIHH32s")
HEADER_SIZE: Final = _HEADER.size
MAX_HEAD: Final = HEADER_SIZE + MAX_EXTENSION + SIGNATURE_SIZE + MAX_CERTIFICATE

_FLAG_ZSTD: Final = 1

Digest = NewType("Digest", bytes)
"""BLAKE2b-256 of something, 32 bytes."""

KeyId = NewType("KeyId", bytes)
"""First 16 bytes of BLAKE2b-256 of ``"ff-key" ‖ Ed25519 public key``."""

MessageId = NewType("MessageId", bytes)
"""16 random bytes that name one message for ever; the same bytes are sent again under the same id."""


class MessageKind(IntEnum):
    """What a signed message is; part of the signature's context, so that none passes for another."""

    UPDATE = 1
    DECLINE = 2
    RECEIPT = 3
    PROPOSE = 4
    COMMIT = 5
    REVEAL = 6
    MANIFEST = 7
    PLAN = 8
    ROUND_END = 9
    CENSUS = 10
    REQUEST = 11
    RESPONSE = 12
    STATUS = 13
    REVOCATIONS = 14
    COSIGN = 15
    SEAL_KEY = 16
    MASK_REQUEST = 17
    MASK_SUMS = 18


BODY_LIMITS: Final[dict[MessageKind, int]] = {
    MessageKind.UPDATE: limits.MAX_UPDATE,
    MessageKind.DECLINE: limits.MAX_SMALL_MESSAGE,
    MessageKind.RECEIPT: limits.MAX_SMALL_MESSAGE,
    MessageKind.PROPOSE: limits.MAX_PROPOSAL,
    MessageKind.COMMIT: limits.MAX_PROPOSAL,
    MessageKind.REVEAL: limits.MAX_PARTIAL,
    MessageKind.MANIFEST: limits.MAX_MANIFEST,
    MessageKind.PLAN: limits.MAX_PLAN,
    MessageKind.ROUND_END: limits.MAX_SMALL_MESSAGE,
    MessageKind.CENSUS: limits.MAX_PLAN,
    MessageKind.REQUEST: limits.MAX_SMALL_MESSAGE,
    MessageKind.RESPONSE: limits.MAX_PLAN,
    MessageKind.STATUS: limits.MAX_PLAN,
    MessageKind.REVOCATIONS: limits.MAX_PLAN,
    MessageKind.COSIGN: limits.MAX_SMALL_MESSAGE,
    MessageKind.SEAL_KEY: limits.MAX_SMALL_MESSAGE,
    MessageKind.MASK_REQUEST: 2 * limits.MAX_PROPOSAL + limits.MAX_PLAN,
    MessageKind.MASK_SUMS: limits.MAX_PARTIAL,
}
"""Bytes of a body as sent, per kind."""

_RAW_FACTOR: Final = 16
"""How much larger than its limit as sent a body may be once decompressed; the size itself is signed."""


def digest(data: bytes | memoryview) -> Digest:
    """BLAKE2b-256 (RFC 7693) of ``data``."""
    return Digest(hashlib.blake2b(data, digest_size=32).digest())


def key_id(public_key: bytes) -> KeyId:
    """The id of an Ed25519 public key (32 bytes)."""
    return KeyId(digest(b"ff-key" + public_key)[:16])


def fleet_id(fleet: str) -> bytes:
    """The 16 bytes that stand for a fleet's name in every header."""
    return digest(b"ff-fleet" + fleet.encode())[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The signed header.

    Attributes:
        kind: what the message is.
        fleet: `fleet_id` of the fleet's name; a message of one fleet is nothing in another.
        sender: the signing key.
        round: the round that the message belongs to; 0 for none.
        sequence: grows with every message that this sender signs, over restarts too.
        issued_at: unix time in milliseconds; 0 from a sender without a clock.
        expires_at: unix time in milliseconds after which it is void; 0 for never.
        message_id: names this message.
        body_size: bytes of the body as sent.
        raw_size: bytes of the body once decompressed; equal to ``body_size`` where it is not compressed.
        compressed: whether the body is one zstd frame.
        body_hash: BLAKE2b-256 of the body as sent.
        extension_size, certificate_size: bytes of what follows.
    """

    kind: MessageKind
    fleet: bytes
    sender: KeyId
    round: int
    sequence: int
    issued_at: int
    expires_at: int
    message_id: MessageId
    body_size: int
    raw_size: int
    compressed: bool
    body_hash: Digest
    extension_size: int
    certificate_size: int

    def encode(self) -> bytes:
        """The header's bytes, `HEADER_SIZE` of them."""
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            _FLAG_ZSTD if self.compressed else 0,
            0,
            self.fleet,
            self.sender,
            self.round,
            self.sequence,
            self.issued_at,
            self.expires_at,
            self.message_id,
            self.body_size,
            self.raw_size,
            self.extension_size,
            self.certificate_size,
            self.body_hash,
        )


@dataclass(frozen=True, slots=True)
class Head:
    """A head as it was received: parsed, not yet verified.

    Attributes:
        header: the header's fields.
        extension: kind-specific signed bytes.
        signature: Ed25519 over `signed_bytes`.
        certificate: the sender's certificate; empty where the receiver must know the key.
        signed: the exact bytes ``header ‖ extension``.
    """

    header: Header
    extension: bytes
    signature: bytes
    certificate: bytes
    signed: bytes

    @property
    def size(self) -> int:
        """Bytes of the head, which is where the body begins."""
        return len(self.signed) + SIGNATURE_SIZE + len(self.certificate)

    @property
    def message_size(self) -> int:
        """Bytes of the whole message."""
        return self.size + self.header.body_size

    @property
    def hash(self) -> Digest:
        """BLAKE2b-256 of ``header ‖ extension``: what receipts and proposals name a message by."""
        return digest(self.signed)

    def encode(self) -> bytes:
        """The head's bytes, as they were received."""
        return self.signed + self.signature + self.certificate


def signed_bytes(kind: MessageKind, signed: bytes) -> bytes:
    """What the signature covers: a context that names protocol and kind, then ``header ‖ extension``."""
    name = kind.name.lower().encode()
    return b"fleetfed/1 signature\0" + bytes([len(name)]) + name + signed


def parse_head(data: bytes | memoryview) -> Head:
    """Parse the head at the start of ``data``, which may hold any part of the body after it.

    Raises:
        RemoteProtocolError: `TRUNCATED`, `MALFORMED`, `UNKNOWN_VERSION` or `TOO_LARGE`. Nothing was verified.
    """
    view = memoryview(data)
    if len(view) < HEADER_SIZE:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(view)} bytes are no header")
    (
        magic,
        version,
        kind_code,
        flags,
        reserved,
        fleet,
        sender,
        round_,
        sequence,
        issued_at,
        expires_at,
        message_id,
        body_size,
        raw_size,
        extension_size,
        certificate_size,
        body_hash,
    ) = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"magic {magic!r}")
    if version != VERSION:
        raise RemoteProtocolError(RejectReason.UNKNOWN_VERSION, f"message version {version}, this is {VERSION}")
    try:
        kind = MessageKind(kind_code)
    except ValueError as error:
        raise RemoteProtocolError(RejectReason.UNKNOWN_VERSION, f"message kind {kind_code}") from error
    if flags & ~_FLAG_ZSTD or reserved:
        raise RemoteProtocolError(RejectReason.UNKNOWN_VERSION, f"flags {flags:#x}, reserved {reserved}")
    limit = BODY_LIMITS[kind]
    if body_size > limit or raw_size > limit * _RAW_FACTOR:
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{kind.name}: {body_size}/{raw_size} bytes, limit {limit}")
    if extension_size > MAX_EXTENSION or certificate_size > MAX_CERTIFICATE:
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"extension {extension_size}, certificate {certificate_size}")
    compressed = bool(flags & _FLAG_ZSTD)
    if not compressed and raw_size != body_size:
        raise RemoteProtocolError(RejectReason.MALFORMED, "two sizes for a body that is not compressed")
    signature_at = HEADER_SIZE + extension_size
    certificate_at = signature_at + SIGNATURE_SIZE
    end = certificate_at + certificate_size
    if len(view) < end:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(view)} of {end} bytes of head")
    header = Header(
        kind=kind,
        fleet=fleet,
        sender=KeyId(sender),
        round=round_,
        sequence=sequence,
        issued_at=issued_at,
        expires_at=expires_at,
        message_id=MessageId(message_id),
        body_size=body_size,
        raw_size=raw_size,
        compressed=compressed,
        body_hash=Digest(body_hash),
        extension_size=extension_size,
        certificate_size=certificate_size,
    )
    return Head(
        header=header,
        extension=bytes(view[HEADER_SIZE:signature_at]),
        signature=bytes(view[signature_at:certificate_at]),
        certificate=bytes(view[certificate_at:end]),
        signed=bytes(view[:signature_at]),
    )


def check_body(header: Header, body: bytes | memoryview) -> None:
    """Check that ``body`` is the one that was signed.

    Raises:
        RemoteProtocolError: `TRUNCATED`, `MALFORMED` (bytes after the body) or `BODY_MISMATCH`.
    """
    if len(body) < header.body_size:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(body)} of {header.body_size} bytes of body")
    if len(body) > header.body_size:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(body) - header.body_size} bytes after the body")
    if digest(body) != header.body_hash:
        raise RemoteProtocolError(RejectReason.BODY_MISMATCH)


def open_body(header: Header, body: bytes | memoryview) -> bytes:
    """Check ``body`` against its signed header and decompress it.

    Raises:
        RemoteProtocolError: as `check_body`, or `DECOMPRESSION`.
    """
    check_body(header, body)
    return decompress(body, size=header.raw_size) if header.compressed else bytes(body)
