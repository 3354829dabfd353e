"""A TLS key of the device's own, and the request to certify it (PKCS#10, RFC 2986), in DER.

The key is Ed25519 (RFC 8410), which the device's one cryptographic library makes: no other is needed. It is another
key than the one that signs messages.
"""

from __future__ import annotations

import base64
from typing import Final

from nacl.signing import SigningKey

_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_INTEGER: Final = 0x02
_BIT_STRING: Final = 0x03
_OCTET_STRING: Final = 0x04
_UTF8: Final = 0x0C
_ATTRIBUTES: Final = 0xA0

_ED25519: Final = bytes.fromhex("300506032b6570")
"""AlgorithmIdentifier, RFC 8410 section 3."""
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_PRIVATE_PREFIX: Final = bytes.fromhex("302e020100300506032b657004220420")
"""PrivateKeyInfo, RFC 8410 section 7, up to the 32 bytes of the seed."""


def private_pem(seed: bytes) -> bytes:
    """The private key's file (PKCS#8 in PEM)."""
    text = base64.b64encode(_PRIVATE_PREFIX + seed)
    return b"-----BEGIN PRIVATE KEY-----\n" + text + b"\n-----END PRIVATE KEY-----\n"


def seed_of(pem: bytes) -> bytes:
    """The seed in a file that `private_pem` made.

    Raises:
        ValueError: it is another kind of key.
    """
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]), validate=True)
    if len(der) != len(_PRIVATE_PREFIX) + 32 or not der.startswith(_PRIVATE_PREFIX):
        raise ValueError("not an Ed25519 key")
    return der[len(_PRIVATE_PREFIX) :]


def request(seed: bytes, name: str) -> bytes:
    """A request for the key of this seed, signed by it.

    Args:
        seed: 32 bytes.
        name: common name; whoever certifies decides on it.
    """
    key = SigningKey(seed)
    public = _item(_SEQUENCE, _ED25519, _item(_BIT_STRING, b"\0", bytes(key.verify_key)))
    subject = _item(_SEQUENCE, _item(_SET, _item(_SEQUENCE, _COMMON_NAME, _item(_UTF8, name.encode()))))
    info = _item(_SEQUENCE, _item(_INTEGER, b"\0"), subject, public, _item(_ATTRIBUTES))
    return _item(_SEQUENCE, info, _ED25519, _item(_BIT_STRING, b"\0", key.sign(info).signature))


def _item(tag: int, *parts: bytes) -> bytes:
    """One DER element; none here is longer than 64 KiB."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        length = bytes([size])
    elif size < 0x100:
        length = bytes([0x81, size])
    else:
        length = bytes([0x82]) + size.to_bytes(2)
    return bytes([tag]) + length + content
