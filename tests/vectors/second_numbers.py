"""A second reading of `docs/numbers.md`: decodes updates, sums and patches with none of the project's code.

Plain Python integers and the standard library, and zstandard for the frames. A float32 product and a float32 sum are
each computed in binary64 and rounded once, which is exact for these: a product of two float32 fits binary64, and a sum
that is rounded twice cannot differ when the wider format has more than twice the bits (Figueroa 1995).
"""

from __future__ import annotations

import hashlib
import struct

import zstandard


def symbols(packed: bytes, peak: int, dimension: int) -> list[int]:
    if peak == 0:
        assert packed == b""
        return [0] * dimension
    if peak > 127:
        planes = ((2 * peak).bit_length() + 7) // 8
        assert len(packed) == planes * dimension
        zigzag = [sum(packed[p * dimension + j] << 8 * p for p in range(planes)) for j in range(dimension)]
        return [z // 2 if z % 2 == 0 else -(z + 1) // 2 for z in zigzag]
    base = 2 * peak + 1
    group = max(m for m in range(1, 9) if base**m <= 256)
    digits = []
    for byte in packed:
        for _ in range(group):
            digits.append(byte % base)
            byte //= base
        assert byte == 0
    assert not any(digits[dimension:])
    assert len(digits) - dimension < group
    return [digit - peak for digit in digits[:dimension]]


def body(data: bytes, dimension: int, meta_words: int) -> tuple[list[int], list[int]]:
    (peak,) = struct.unpack_from("<Q", data)
    content = zstandard.ZstdDecompressor().decompress(data[8:])
    meta = list(struct.unpack_from(f"<{meta_words}Q", content))
    return symbols(content[8 * meta_words :], peak, dimension), meta


def lanes(words: bytes, dimension: int, lane_bits: int, meta_words: int) -> tuple[list[int], list[int]]:
    count = 64 // lane_bits
    n = -(-dimension // count)
    numbers = struct.unpack(f"<{n + meta_words}Q", words)
    values = [0] * (n * count)
    for j, word in enumerate(numbers[:n]):
        for lane in range(count):
            value = word % (1 << lane_bits)
            if value >> (lane_bits - 1):
                value -= 1 << lane_bits
            values[lane * n + j] = value
            word = ((word - value) % (1 << 64)) >> lane_bits
    return values[:dimension], list(numbers[n:])


def _single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def patch(base: bytes, tensors: list[tuple[int, int]], data: bytes) -> bytes:
    magic, bits, zero, count, dimension, size, start, target, peak = struct.unpack_from("<4sBBHIQ32s32sQ", data)
    assert (magic, zero, count, size) == (b"FFP1", 0, len(tensors), len(base))
    assert dimension == sum(size for _, size in tensors)
    assert peak <= 2 ** (bits - 1) - 1
    assert hashlib.sha256(base).digest() == start
    content = zstandard.ZstdDecompressor().decompress(data[92:])
    scales = struct.unpack_from(f"<{count}f", content)
    values = symbols(content[4 * count :], peak, dimension)
    file = bytearray(base)
    for (offset, size), scale in zip(tensors, scales, strict=True):
        for at in range(offset, offset + 4 * size, 4):
            (weight,) = struct.unpack_from("<f", file, at)
            struct.pack_into("<f", file, at, _single(weight + _single(values.pop(0) * scale)))
    assert hashlib.sha256(file).digest() == target
    return bytes(file)
