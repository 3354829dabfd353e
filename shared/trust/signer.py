"""Builds signed messages for one member: head, signature, certificate, body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fleetfed.shared.trust.certificates import Certificate
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.compression import compress
from fleetfed.shared.wire.envelope import (
    Digest,
    Head,
    Header,
    MessageId,
    MessageKind,
    digest,
    fleet_id,
    signed_bytes,
)

_LEVEL = 3
"""Of zstd: signed bodies are small, or compressed already."""
_COMPRESS_FROM = 512
"""Bytes from which a body is worth compressing."""
_NO_HASH = Digest(bytes(32))
"""Of a body that is not there yet."""


@dataclass(frozen=True, slots=True)
class Message:
    """A signed message ready to send."""

    head: Head
    body: bytes

    @property
    def id(self) -> MessageId:
        """Names the message."""
        return self.head.header.message_id

    def encode(self) -> bytes:
        """Head and body: the bytes to send, and to send again."""
        return self.head.encode() + self.body


class Signer:
    """Signs in the name of one certificate's bearer.

    Args:
        key: the signing key.
        certificate: the parsed certificate of that key.
        encoded_certificate: its bytes, which travel in every head.
        sequence: returns a number larger than any it returned before, over restarts too.
        randomness: returns so many unpredictable bytes.
    """

    def __init__(
        self,
        key: SigningKey,
        certificate: Certificate,
        encoded_certificate: bytes,
        *,
        sequence: Callable[[], int],
        randomness: Callable[[int], bytes],
    ) -> None:
        assert certificate.public_key == key.public
        self.certificate = certificate
        self._key = key
        self._encoded_certificate = encoded_certificate
        self._fleet = fleet_id(certificate.fleet)
        self._sequence = sequence
        self._randomness = randomness

    def sign(
        self,
        kind: MessageKind,
        body: object,
        *,
        now: int,
        round: int = 0,
        lifetime: int = 0,
        extension: bytes = b"",
    ) -> Message:
        """Sign a dataclass of `messages` as ``kind``, compressed where that helps.

        Args:
            kind: what it is.
            body: a dataclass, or bytes that are the body as they stand.
            now: unix milliseconds.
            round: the round that it belongs to, 0 for none.
            lifetime: milliseconds until it is void; 0 for ever.
            extension: kind-specific signed bytes.
        """
        raw = bytes(body) if isinstance(body, bytes | memoryview) else codec.encode(body)
        compressed = compress(raw, level=_LEVEL) if len(raw) >= _COMPRESS_FROM else raw
        sent = compressed if len(compressed) < len(raw) else raw
        return self.sign_raw(
            kind,
            sent,
            raw_size=len(raw),
            compressed=sent is not raw,
            now=now,
            round=round,
            lifetime=lifetime,
            extension=extension,
        )

    def sign_raw(
        self,
        kind: MessageKind,
        body: bytes,
        *,
        raw_size: int,
        compressed: bool,
        now: int,
        round: int = 0,
        lifetime: int = 0,
        extension: bytes = b"",
        body_hash: Digest | None = None,
    ) -> Message:
        """Sign a body that is encoded, and perhaps compressed, already.

        Args:
            kind, now, round, lifetime, extension: as for `sign`.
            body: as it is sent.
            raw_size: bytes once decompressed.
            compressed: whether it is.
            body_hash: its hash, from whoever has taken it already where the body is large.
        """
        header = self._header(
            kind,
            now,
            round,
            lifetime,
            body=len(body),
            raw=raw_size,
            compressed=compressed,
            extension=len(extension),
            body_hash=digest(body) if body_hash is None else body_hash,
        )
        return self._message(header, body, extension)

    def sign_bound(
        self,
        kind: MessageKind,
        fill: Callable[[Header], tuple[bytes, bytes]],
        *,
        body_size: int,
        extension_size: int,
        now: int,
        round: int = 0,
        lifetime: int = 0,
    ) -> Message:
        """Sign a message whose body and extension depend on its header, such as keys that are bound to it.

        Args:
            kind, now, round, lifetime: as for `sign`.
            fill: given the header, whose hash of the body is all zeros yet, returns body and extension.
            body_size, extension_size: their bytes, which must be known before.
        """
        header = self._header(
            kind, now, round, lifetime, body=body_size, raw=body_size, compressed=False, extension=extension_size
        )
        body, extension = fill(header)
        assert (len(body), len(extension)) == (body_size, extension_size)
        return self._message(replace(header, body_hash=digest(body)), body, extension)

    def _header(
        self,
        kind: MessageKind,
        now: int,
        round: int,
        lifetime: int,
        *,
        body: int,
        raw: int,
        compressed: bool,
        extension: int,
        body_hash: Digest = _NO_HASH,
    ) -> Header:
        return Header(
            kind=kind,
            fleet=self._fleet,
            sender=self.certificate.key_id,
            round=round,
            sequence=self._sequence(),
            issued_at=now,
            expires_at=now + lifetime if lifetime else 0,
            message_id=MessageId(self._randomness(16)),
            body_size=body,
            raw_size=raw,
            compressed=compressed,
            body_hash=body_hash,
            extension_size=extension,
            certificate_size=len(self._encoded_certificate),
        )

    def _message(self, header: Header, body: bytes, extension: bytes) -> Message:
        signed = header.encode() + extension
        signature = self._key.sign(signed_bytes(header.kind, signed))
        return Message(Head(header, extension, signature, self._encoded_certificate, signed), body)
