"""Key derivation: HKDF-SHA256 (RFC 5869) with a label for every purpose, so that no key serves two."""

from __future__ import annotations

import hashlib
import hmac
from enum import StrEnum
from typing import Final

KEY_SIZE: Final = 32
_PROTOCOL: Final = b"ff-sa/1"


class Label(StrEnum):
    """What a derived key is for; a label is never given a second purpose."""

    SEED = "S/seed"
    """A mask's seed, from fresh randomness and the device's hedge secret: a cloned card whose generator is frozen still
    gives every header another seed."""
    BODY_KEY = "S/body-key"
    """The key of an update's body."""
    MASK = "S/mask"
    """The key of the generator that a mask is read from."""


def lp(*parts: bytes) -> bytes:
    """The parts end to end, each after its length (u32, little-endian): unambiguous whatever they hold."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def derive(secret: bytes, label: Label, context: bytes) -> bytes:
    """Return 32 bytes: HKDF-SHA256 with the protocol's name as salt and ``lp(protocol, label, context)`` as info."""
    extracted = hmac.new(_PROTOCOL, secret, hashlib.sha256).digest()
    info = lp(_PROTOCOL, label.value.encode(), context)
    # One block of SHA-256 is all that 32 bytes need (RFC 5869, section 2.3).
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
