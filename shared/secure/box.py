"""Keys sealed to one reader and bound to one message, and bodies encrypted with such a key.

A box is ``crypto_box_seal(tag ‖ key ‖ binding)``: who opens it sees for whom it was meant and for which header, so a
gateway cannot send a victim's masked vector and seed again under another name (the sum would be n times the victim's).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.kdf import KEY_SIZE
from fleetfed.shared.wire.envelope import Digest

TAG_SIZE: Final = 16
"""Bytes that encryption adds to a body."""
_NONCE: Final = bytes(12)
"""Every key encrypts one body only."""


class Reader(Enum):
    """Whom a box is for; also its place in the head of an update."""

    GATEWAY = b"G"
    COORDINATOR = b"C"
    HELPER = b"H"

    @property
    def place(self) -> int:
        """The box's index among an update's boxes."""
        return list(Reader).index(self)


@dataclass(frozen=True, slots=True)
class SealSecret:
    """An X25519 key pair of one round; its secret half never appears in a repr or a log."""

    _key: PrivateKey

    def __repr__(self) -> str:
        return f"SealSecret({self.public.hex()[:16]})"

    @classmethod
    def from_bytes(cls, secret: bytes) -> SealSecret:
        """The pair of a 32-byte secret key."""
        return cls(PrivateKey(secret))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return bytes(self._key.public_key)

    def encode(self) -> bytes:
        """The secret key, 32 bytes; for storage until the round is over."""
        return bytes(self._key)

    def open(self, box: bytes, reader: Reader, binding: Digest) -> bytes:
        """Return the key in a box, 32 bytes.

        Raises:
            RemoteProtocolError: `BAD_BOX`: it does not open, or is another reader's or another header's.
        """
        try:
            plain = SealedBox(self._key).decrypt(box)
        except (CryptoError, ValueError, TypeError) as error:
            raise RemoteProtocolError(RejectReason.BAD_BOX, f"the {reader.name.lower()}'s box does not open") from error
        tag, key, bound = plain[:1], plain[1 : 1 + KEY_SIZE], plain[1 + KEY_SIZE :]
        if tag != reader.value or bound != binding:
            raise RemoteProtocolError(RejectReason.BAD_BOX, "the box was sealed for another reader or another message")
        return key


def seal(key: bytes, reader: Reader, binding: Digest, public_key: bytes) -> bytes:
    """Seal ``key`` (32 bytes) to ``public_key`` (32 bytes): `update.BOX_SIZE` bytes.

    Raises:
        RemoteProtocolError: `BAD_BOX`: a public key that all shared keys are the same with (a point of small order).
    """
    assert len(key) == KEY_SIZE
    try:
        return bytes(SealedBox(PublicKey(public_key)).encrypt(reader.value + key + binding))
    except (CryptoError, ValueError, TypeError) as error:
        raise RemoteProtocolError(
            RejectReason.BAD_BOX, f"nothing can be sealed to the {reader.name.lower()}'s key"
        ) from error


def encrypt(plain: memoryview, key: bytes, binding: Digest) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439) under a key of its own, with the binding as associated data."""
    fast = _library()
    if fast is not None:
        return bytes(fast(key).encrypt(_NONCE, plain, binding))
    return bytes(crypto_aead_chacha20poly1305_ietf_encrypt(bytes(plain), binding, _NONCE, key))


def decrypt(body: bytes | memoryview, key: bytes, binding: Digest) -> bytes:
    """Undo `encrypt`.

    Raises:
        RemoteProtocolError: `BAD_BOX`: the body was changed, or encrypted for another header.
    """
    fast = _library()
    try:
        if fast is not None:
            return bytes(fast(key).decrypt(_NONCE, body, binding))
        return bytes(crypto_aead_chacha20poly1305_ietf_decrypt(bytes(body), binding, _NONCE, key))
    except Exception as error:
        raise RemoteProtocolError(RejectReason.BAD_BOX, "the body does not decrypt") from error


@cache
def _library() -> Any:
    # Not at import: see `prg`.
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError:
        return None
    return ChaCha20Poly1305
