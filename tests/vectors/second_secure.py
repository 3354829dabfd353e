"""A second reading of the section "Masked updates" of `docs/wire.md`, with none of the project's code and no libsodium.

ChaCha20, Salsa20 and Poly1305 are written out from RFC 8439 and Bernstein's papers ("Salsa20 specification", "Extending
the Salsa20 nonce"); only the curve and ML-KEM are `cryptography`'s (OpenSSL). Slow, and not constant in time: for
vectors alone.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
SIGMA = struct.unpack("<4I", b"expand 32-byte k")


def blake(data: bytes, size: int = 32) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def rotate(value: int, by: int) -> int:
    return (value << by | value >> 32 - by) & U32


# --- ChaCha20 and Poly1305 (RFC 8439) --------------------------------------------------------------------------------


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    start = [*SIGMA, *struct.unpack("<8I", key), counter, *struct.unpack("<3I", nonce)]
    x = start.copy()

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for p, q, r, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & U32
            x[r] = rotate(x[r] ^ x[p], by)

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *((a + b) & U32 for a, b in zip(x, start, strict=True)))


def chacha20(key: bytes, nonce: bytes, size: int, *, counter: int = 0) -> bytes:
    blocks = [chacha20_block(key, counter + i, nonce) for i in range(-(-size // 64))]
    return b"".join(blocks)[:size]


def poly1305(key: bytes, message: bytes) -> bytes:
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for at in range(0, len(message), 16):
        block = message[at : at + 16] + b"\1"
        total = (total + int.from_bytes(block, "little")) * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(key[16:], "little")) & ((1 << 128) - 1)).to_bytes(16, "little")


def exclusive_or(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def open_aead(key: bytes, sealed: bytes, associated: bytes, nonce: bytes = bytes(12)) -> bytes:
    """ChaCha20-Poly1305, by default with a nonce of zeros; ValueError for a wrong tag."""
    text, tag = sealed[:-16], sealed[-16:]
    padded = b"".join(part + bytes(-len(part) % 16) for part in (associated, text))
    lengths = struct.pack("<QQ", len(associated), len(text))
    if poly1305(chacha20(key, nonce, 32), padded + lengths) != tag:
        raise ValueError("wrong tag")
    return exclusive_or(text, chacha20(key, nonce, len(text), counter=1))


# --- crypto_box_seal: X25519, HSalsa20, XSalsa20-Poly1305 ------------------------------------------------------------


def salsa20_rounds(start: list[int]) -> list[int]:
    x = start.copy()

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for to, p, q, by in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
            x[to] ^= rotate((x[p] + x[q]) & U32, by)

    for _ in range(10):
        for i in range(4):
            quarter(*((5 * i + 4 * j) % 16 for j in range(4)))
        for i in range(4):
            quarter(*(4 * i + (i + j) % 4 for j in range(4)))
    return x


def salsa20_state(key: bytes, middle: bytes) -> list[int]:
    k, m = struct.unpack("<8I", key), struct.unpack("<4I", middle)
    return [SIGMA[0], *k[:4], SIGMA[1], *m, SIGMA[2], *k[4:], SIGMA[3]]


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    x = salsa20_rounds(salsa20_state(key, nonce))
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20(key: bytes, nonce: bytes, size: int) -> bytes:
    inner, out = hsalsa20(key, nonce[:16]), b""
    for counter in range(-(-size // 64)):
        start = salsa20_state(inner, nonce[16:] + struct.pack("<Q", counter))
        out += struct.pack("<16I", *((a + b) & U32 for a, b in zip(salsa20_rounds(start), start, strict=True)))
    return out[:size]


def open_sealed_box(secret: bytes, sealed: bytes) -> bytes:
    """`crypto_box_seal_open`; ValueError for a wrong tag."""
    key = X25519PrivateKey.from_private_bytes(secret)
    ephemeral, tag, text = sealed[:32], sealed[32:48], sealed[48:]
    shared = hsalsa20(key.exchange(X25519PublicKey.from_public_bytes(ephemeral)), bytes(16))
    nonce = blake(ephemeral + key.public_key().public_bytes_raw(), 24)
    stream = xsalsa20(shared, nonce, 32 + len(text))
    if poly1305(stream[:32], text) != tag:
        raise ValueError("wrong tag")
    return exclusive_or(text, stream[32:])


# --- HPKE (RFC 9180, base mode) over X-Wing (draft-connolly-cfrg-xwing-kem), HKDF-SHA256, ChaCha20-Poly1305 ----------

HPKE_SUITE = b"HPKE" + struct.pack(">HHH", 0x647A, 1, 3)


def labeled_extract(salt: bytes, label: bytes, secret: bytes) -> bytes:
    return hmac.new(salt or bytes(32), b"HPKE-v1" + HPKE_SUITE + label + secret, hashlib.sha256).digest()


def labeled_expand(key: bytes, label: bytes, info: bytes, size: int) -> bytes:
    """At most one block."""
    whole = struct.pack(">H", size) + b"HPKE-v1" + HPKE_SUITE + label + info
    return hmac.new(key, whole + b"\1", hashlib.sha256).digest()[:size]


def open_hpke(secret: bytes, sealed: bytes, info: bytes) -> bytes:
    """What a box of suite 3 holds; ValueError for a wrong tag."""
    expanded = hashlib.shake_256(secret).digest(96)
    curve = X25519PrivateKey.from_private_bytes(expanded[64:])
    ephemeral = sealed[1088:1120]
    lattice_shared = MLKEM768PrivateKey.from_seed_bytes(expanded[:64]).decapsulate(sealed[:1088])
    curve_shared = curve.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    mixed = lattice_shared + curve_shared + ephemeral + curve.public_key().public_bytes_raw() + b"\\.//^\\"
    shared = hashlib.sha3_256(mixed).digest()
    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    key = labeled_extract(shared, b"secret", b"")
    nonce = labeled_expand(key, b"base_nonce", context, 12)
    return open_aead(labeled_expand(key, b"key", context, 32), sealed[1120:], b"", nonce)


# --- The document ----------------------------------------------------------------------------------------------------


def lp(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def kdf(secret: bytes, label: str, context: bytes) -> bytes:
    extracted = hmac.new(b"ff-sa/1", secret, hashlib.sha256).digest()
    return hmac.new(extracted, lp(b"ff-sa/1", label.encode(), context) + b"\1", hashlib.sha256).digest()


def stream_words(key: bytes, count: int) -> list[int]:
    return list(struct.unpack(f"<{count}Q", chacha20(key, b"LibsodiumDRG", 8 * count)))


def binding(message: bytes) -> bytes:
    return blake(b"ff-binding" + message[:100] + bytes(32) + message[132:208])


def update(message: bytes, secrets: dict[str, bytes], *, randomness: bytes, hedge: bytes) -> dict[str, Any]:
    """Everything that an update hides from those who hold only one of the secrets.

    Args:
        message: header, extension, signature, certificate, body.
        secrets: of `G`, `C` and perhaps `H`, 32 bytes each.
        randomness, hedge: what the device made its keys of, to derive them a second time.
    """
    extension_end = 132 + int.from_bytes(message[96:98], "little")
    body = message[extension_end + 64 + int.from_bytes(message[98:100], "little") :]
    bound = binding(message)
    keys = {}
    for place, (tag, secret) in enumerate(secrets.items()):
        if message[133] == 3:
            start = 208 + 1168 * place
            keys[tag] = open_hpke(secret, message[start : start + 1168], lp(b"ff-sa/1", b"box", tag.encode(), bound))
            continue
        start = 208 + 113 * place
        plain = open_sealed_box(secret, message[start : start + 113])
        assert plain[:1] == tag.encode()
        assert plain[33:] == bound
        keys[tag] = plain[1:33]
    assert keys["G"] == kdf(randomness + hedge, "S/body-key", bound)
    holders = [tag for tag in keys if tag != "G"]
    assert all(keys[tag] == kdf(randomness + hedge, "S/seed", bound + tag.encode()) for tag in holders)
    masked = open_aead(keys["G"], body, bound)
    words = list(struct.unpack(f"<{len(masked) // 8}Q", masked))
    masks = {tag: stream_words(kdf(keys[tag], "S/mask", bound), len(words)) for tag in holders}
    return {"binding": bound, "keys": keys, "masked": words, "masks": masks}


def add(*vectors: list[int]) -> list[int]:
    return [sum(column) & U64 for column in zip(*vectors, strict=True)]


def subtract(a: list[int], *others: list[int]) -> list[int]:
    return [(first - sum(rest)) & U64 for first, *rest in zip(a, *others, strict=True)]


def deal(owners: dict[bytes, str], size: int, minimum: int, ours: bytes, theirs: bytes) -> list[list[bytes]]:
    order = sorted(owners, key=lambda member: blake(b"ff-deal" + ours + theirs + member))
    count = max(1, len(order) // size)
    while True:
        found = [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]
        if count == 1 or min(len({owners[member] for member in bucket}) for bucket in found) >= minimum:
            return found
        count -= 1
