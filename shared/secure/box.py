"""Keys sealed to one reader and bound to one message, and bodies encrypted with such a key.

A box of suite 1 is ``crypto_box_seal(tag ‖ key ‖ binding)``; one of suite 3 is HPKE of the key, with
``lp(protocol, "box", tag, binding)`` as info (`hybrid`). Either way it opens only for whom it was meant, and only with
the header for which it was made, so a gateway cannot send a victim's masked vector and seed again under another name
(the sum would be n times the victim's).
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
from fleetfed.shared.secure import hybrid
from fleetfed.shared.secure.kdf import KEY_SIZE, PROTOCOL, lp
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX, check_key

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
    """A key pair of one round; its secret half never appears in a repr or a log.

    Attributes:
        suite: that it is of.
        public: the public key, of `masking.KEY_SIZES` bytes.
    """

    _secret: bytes
    _key: Any
    suite: int
    public: bytes

    def __repr__(self) -> str:
        return f"SealSecret({self.public.hex()[:16]})"

    @classmethod
    def from_bytes(cls, secret: bytes, suite: int = SEALED_BOX) -> SealSecret:
        """The pair of a 32-byte secret, whatever the suite.

        Raises:
            RemoteProtocolError: `UNKNOWN_SUITE`.
        """
        assert len(secret) == KEY_SIZE
        if suite == HYBRID:
            private, public = hybrid.key_pair(secret)
            return cls(secret, private, suite, public)
        if suite != SEALED_BOX:
            raise RemoteProtocolError(RejectReason.UNKNOWN_SUITE, f"suite {suite} is unknown here")
        key = PrivateKey(secret)
        return cls(secret, key, suite, bytes(key.public_key))

    def encode(self) -> bytes:
        """The secret, 32 bytes; for storage until the round is over."""
        return self._secret

    def open(self, box: bytes, reader: Reader, binding: Digest) -> bytes:
        """Return the key in a box, 32 bytes.

        Raises:
            RemoteProtocolError: `BAD_BOX`: it does not open, or is another reader's or another header's.
        """
        try:
            if self.suite == HYBRID:
                return hybrid.decrypt(box, self._key, _info(reader, binding))
            plain = SealedBox(self._key).decrypt(box)
        except (CryptoError, ValueError, TypeError) as error:
            raise RemoteProtocolError(RejectReason.BAD_BOX, f"the {reader.name.lower()}'s box does not open") from error
        tag, key, bound = plain[:1], plain[1 : 1 + KEY_SIZE], plain[1 + KEY_SIZE :]
        if tag != reader.value or bound != binding:
            raise RemoteProtocolError(RejectReason.BAD_BOX, "the box was sealed for another reader or another message")
        return key


def check_suite(suite: int) -> None:
    """Refuse a suite that this program, or this installation, cannot do.

    Raises:
        RemoteProtocolError: `UNKNOWN_SUITE`, with what to install where that helps.
    """
    if suite == HYBRID:
        hybrid.check_available()
    elif suite != SEALED_BOX:
        raise RemoteProtocolError(RejectReason.UNKNOWN_SUITE, f"suite {suite} is unknown here")


def seal(key: bytes, reader: Reader, binding: Digest, public_key: bytes, suite: int = SEALED_BOX) -> bytes:
    """Seal ``key`` (32 bytes) to ``public_key`` (`masking.KEY_SIZES` bytes): `update.box_size` bytes.

    Raises:
        RemoteProtocolError: `BAD_BOX`: a public key of another suite's length, or that all shared keys are the same
            with (a point of small order); `UNKNOWN_SUITE`.
    """
    assert len(key) == KEY_SIZE
    check_key(suite, public_key)
    try:
        if suite == HYBRID:
            return hybrid.encrypt(key, public_key, _info(reader, binding))
        return bytes(SealedBox(PublicKey(public_key)).encrypt(reader.value + key + binding))
    except (CryptoError, ValueError, TypeError) as error:
        raise RemoteProtocolError(
            RejectReason.BAD_BOX, f"nothing can be sealed to the {reader.name.lower()}'s key"
        ) from error


def _info(reader: Reader, binding: Digest) -> bytes:
    return lp(PROTOCOL, b"box", reader.value, binding)


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
