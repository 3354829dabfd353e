"""A second reading of `docs/wire.md`: decodes messages with none of the project's code.

Written from the document, byte offsets and all. msgpack is decoded by hand (the subset that the wire uses), hashes
come from hashlib, signatures are checked by `cryptography` (OpenSSL) instead of libsodium.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KINDS = {
    1: "update",
    2: "decline",
    3: "receipt",
    4: "propose",
    5: "commit",
    6: "reveal",
    7: "manifest",
    8: "plan",
    9: "round_end",
    10: "census",
    11: "request",
    12: "response",
    13: "status",
    14: "revocations",
    15: "cosign",
    16: "seal_key",
    17: "mask_request",
    18: "mask_sums",
}
ROLES = {1: "authority", 2: "coordinator", 3: "gateway", 4: "device", 5: "operator", 6: "helper", 7: "enroller"}


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def number(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "little")


def msgpack_value(data: bytes, at: int) -> tuple[Any, int]:
    """One msgpack value at ``at`` and where the next begins (https://github.com/msgpack/msgpack/blob/master/spec.md)."""
    first = data[at]
    at += 1

    def big(size: int) -> int:
        return int.from_bytes(data[at : at + size], "big")

    if first <= 0x7F:
        return first, at
    if first >= 0xE0:
        return first - 0x100, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first == 0xCB:
        return struct.unpack(">d", data[at : at + 8])[0], at + 8
    if 0xCC <= first <= 0xCF:
        size = 1 << (first - 0xCC)
        return big(size), at + size
    if 0xD0 <= first <= 0xD3:
        size = 1 << (first - 0xD0)
        return int.from_bytes(data[at : at + size], "big", signed=True), at + size
    if 0xC4 <= first <= 0xC6:
        width = 1 << (first - 0xC4)
        start = at + width
        return data[start : start + big(width)], start + big(width)
    if 0xA0 <= first <= 0xBF:
        return data[at : at + (first & 31)].decode(), at + (first & 31)
    if 0xD9 <= first <= 0xDB:
        width = 1 << (first - 0xD9)
        start = at + width
        return data[start : start + big(width)].decode(), start + big(width)
    if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
        width = 0 if first <= 0x9F else 2 << (first - 0xDC)
        count = first & 15 if not width else big(width)
        at += width
        items = []
        for _ in range(count):
            item, at = msgpack_value(data, at)
            items.append(item)
        return items, at
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        width = 0 if first <= 0x8F else 2 << (first - 0xDE)
        count = first & 15 if not width else big(width)
        at += width
        found = {}
        for _ in range(count):
            key, at = msgpack_value(data, at)
            found[key], at = msgpack_value(data, at)
        return found, at
    raise ValueError(f"msgpack type {first:#x}")


def certificate(data: bytes, authority: bytes) -> dict[str, Any]:
    assert data[:4] == b"FFID"
    assert data[4] == 1
    body, signature = data[:-64], data[-64:]
    Ed25519PublicKey.from_public_bytes(authority).verify(signature, b"fleetfed/1 certificate\0" + body)
    assert body[62:78] == blake(b"ff-key" + authority)[:16]
    texts, at = [], 78
    for _ in range(4):
        texts.append(body[at + 1 : at + 1 + body[at]].decode())
        at += 1 + body[at]
    assert at == len(body)
    return {
        "role": ROLES[data[5]],
        "serial": number(data, 6, 8),
        "not_before": number(data, 14, 8),
        "not_after": number(data, 22, 8),
        "public_key": data[30:62],
        **dict(zip(("fleet", "id", "site", "owner"), texts, strict=True)),
    }


def message(data: bytes, authority: bytes) -> dict[str, Any]:
    """All that a message says; AssertionError or InvalidSignature if it is not what it claims to be."""
    assert data[:4] == b"FFM1"
    assert data[4] == 1
    assert data[6] in (0, 1)
    assert data[7] == 0
    kind = KINDS[data[5]]
    extension_end = 132 + number(data, 96, 2)
    signature_end = extension_end + 64
    body_start = signature_end + number(data, 98, 2)
    who = certificate(data[signature_end:body_start], authority)
    signed = data[:extension_end]
    context = b"fleetfed/1 signature\0" + bytes([len(kind)]) + kind.encode()
    Ed25519PublicKey.from_public_bytes(who["public_key"]).verify(data[extension_end:signature_end], context + signed)
    assert data[24:40] == blake(b"ff-key" + who["public_key"])[:16]
    assert data[8:24] == blake(b"ff-fleet" + who["fleet"].encode())[:16]
    body = data[body_start:]
    assert len(body) == number(data, 88, 4)
    assert blake(body) == data[100:132]
    raw = zstandard.ZstdDecompressor().decompress(body) if data[6] & 1 else body
    assert len(raw) == number(data, 92, 4)
    found: dict[str, Any] = {
        "kind": kind,
        "from": who,
        "round": number(data, 40, 8),
        "sequence": number(data, 48, 8),
        "issued_at": number(data, 56, 8),
        "expires_at": number(data, 64, 8),
        "message_id": data[72:88],
        "head_hash": blake(signed),
    }
    if kind == "update":
        extension = data[132:extension_end]
        box = 1168 if extension[1] == 3 else 113
        assert len(extension) in (76, 76 + 2 * box, 76 + 3 * box)
        found["extension"] = {
            **dict(zip(("mode", "suite", "bits", "lane_bits"), extension[:4], strict=True)),
            "dimension": number(extension, 4, 4),
            "meta_words": number(extension, 8, 4),
            "plan": extension[12:44],
            "model_sha256": extension[44:76],
            "boxes": [extension[at : at + box] for at in range(76, len(extension), box)],
        }
        found["body"] = raw
    else:
        found["body"], end = msgpack_value(raw, 0)
        assert end == len(raw)
    return found


__all__ = ["InvalidSignature", "certificate", "message", "msgpack_value"]
