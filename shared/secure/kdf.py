"""Key derivation: HKDF-SHA256 (RFC 5869) with a label for every purpose, so that no key serves two."""

from __future__ import annotations

import hmac
from enum import StrEnum
from typing import Final

KEY_SIZE: Final = 32
PROTOCOL: Final = b"ff-sa/1"
_BLOCK: Final = 32


class Label(StrEnum):
    """What a derived key is for; a label is never given a second purpose."""

    SEED = "S/seed"
    """A mask's seed, from fresh randomness and the device's hedge secret: a cloned card whose generator is frozen still
    gives every header another seed."""
    BODY_KEY = "S/body-key"
    """The key of an update's body."""
    MASK = "S/mask"
    """The key of the generator that a mask is read from."""
    NOISE = "DP/noise"
    """The keys of the generators that noise is read from."""


def lp(*parts: bytes) -> bytes:
    """The parts end to end, each after its length (u32, little-endian): unambiguous whatever they hold."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def hkdf(secret: bytes, *, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 (RFC 5869): ``size`` bytes, at most 255 blocks of 32."""
    assert 0 < size <= 255 * _BLOCK
    extracted = hmac.digest(salt or bytes(_BLOCK), secret, "sha256")
    found, block = b"", b""
    for counter in range(1, -(-size // _BLOCK) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        found += block
    return found[:size]


def derive(secret: bytes, label: Label, context: bytes) -> bytes:
    """Return 32 bytes: HKDF-SHA256 with the protocol's name as salt and ``lp(protocol, label, context)`` as info."""
    return hkdf(secret, salt=PROTOCOL, info=lp(PROTOCOL, label.value.encode(), context), size=KEY_SIZE)
