"""The body of an update or a partial: small integers and meta words as few bytes.

::

    u64 LE  peak       largest magnitude among the values
    zstd frame of
        u64 LE x M     meta words
        packed values

How the values are packed follows from the peak alone:

- peak 0: nothing at all;
- peak up to 127: ``m`` values to a byte in base ``2 * peak + 1``, the first of them the lowest digit, each digit
  ``value + peak``, with ``m`` as large as a byte allows (5 for peak 1, 3 for 2, 2 for 3 to 7, else 1); missing values
  at the end are digit 0. zstd's entropy coder spends whole bits per byte, so joint symbols come closer to the entropy
  than single ones;
- above: ``(value << 1) ^ (value >> 63)`` (zigzag) as planes of bytes, lowest first, as many planes as the peak needs.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.compression import compress, decompress, max_compressed

_PEAK: Final = struct.Struct("<Q")
_BYTE_PEAK: Final = 127
_MAX_PEAK: Final = (1 << 62) - 1

Bytes = NDArray[np.uint8]


def encode_body(values: Values, meta: Words | None = None, *, limit: int, level: int | None = None) -> bytes:
    """Return the integers and meta words as a body.

    Args:
        values: signed integers, shape (dimension,).
        meta: uint64, shape (M,); nothing by default.
        limit: largest magnitude that the receiver will take; ``levels(bits)`` for one update, that times the number of
            contributors for a sum.
        level: as in `compression.compress`.

    Raises:
        ValueError: a value lies outside ``±limit``.
    """
    peak = _peak(values)
    if peak > limit:
        raise ValueError(f"a value of magnitude {peak} in a body limited to {limit}")
    head = b"" if meta is None else meta.astype("<u8").tobytes()
    return _PEAK.pack(peak) + compress(head + pack_symbols(values, peak).tobytes(), level=level)


def decode_body(
    body: bytes | bytearray | memoryview, *, dimension: int, limit: int, meta_words: int = 0
) -> tuple[Values, Words]:
    """Return the integers and meta words of a body.

    Every size is derived from the arguments and the peak before anything is allocated.

    Args:
        body: what `encode_body` returned, from a peer.
        dimension: number of values, from the plan.
        limit: largest magnitude that the plan allows.
        meta_words: number of meta words, from the plan.

    Returns:
        The values, shape (dimension,), in the narrowest of int8, int16, int32 and int64; the meta words, uint64.

    Raises:
        RemoteProtocolError: TRUNCATED, TOO_LARGE, DECOMPRESSION, MALFORMED (trailing bytes, padding that is not zero)
            or OUT_OF_RANGE (a value outside ``±limit``).
    """
    if len(body) < _PEAK.size:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(body)} bytes are no body")
    (peak,) = _PEAK.unpack_from(body)
    if peak > min(limit, _MAX_PEAK):
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"peak {peak} where {limit} is allowed")
    size = 8 * meta_words + packed_size(dimension, peak)
    content = decompress(memoryview(body)[_PEAK.size :], size=size)
    meta = np.frombuffer(content, dtype="<u8", count=meta_words).astype(np.uint64)
    packed = np.frombuffer(content, dtype=np.uint8, offset=8 * meta_words)
    return unpack_symbols(packed, peak, dimension), meta


def max_body(dimension: int, limit: int, meta_words: int = 0) -> int:
    """Return more bytes than any valid body needs: what a receiver checks an announced size against."""
    return _PEAK.size + max_compressed(8 * meta_words + packed_size(dimension, limit))


def packed_size(dimension: int, peak: int) -> int:
    """Return the bytes of ``dimension`` values of magnitude up to ``peak`` before compression."""
    if peak == 0:
        return 0
    if peak <= _BYTE_PEAK:
        return -(-dimension // _per_byte(peak))
    return dimension * _planes(peak)


def pack_symbols(values: Values, peak: int) -> Bytes:
    """Return the values packed into bytes as the module describes; none may exceed ``peak`` in magnitude."""
    if peak == 0:
        return np.empty(0, dtype=np.uint8)
    if peak > _BYTE_PEAK:
        kind: Any = _kind(peak)
        signed: Values = values.astype(kind)
        zigzag: Values = (signed << kind(1)) ^ (signed >> kind(8 * np.dtype(kind).itemsize - 1))
        planes = zigzag.astype(signed.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, signed.itemsize)
        return np.ascontiguousarray(planes[:, : _planes(peak)].T).reshape(-1)
    # A cast to uint8 is modulo 256, and so is the addition: together they give value + peak exactly.
    digits = values.astype(np.uint8)
    digits += np.uint8(peak)
    m = _per_byte(peak)
    if m == 1:
        return digits
    base = np.uint8(2 * peak + 1)
    packed = np.zeros(-(-values.size // m), dtype=np.uint8)
    for i in reversed(range(m)):
        packed *= base
        part = digits[i::m]
        packed[: part.size] += part
    return packed


def unpack_symbols(packed: Bytes, peak: int, dimension: int) -> Values:
    """Return ``dimension`` values from bytes of length ``packed_size(dimension, peak)``.

    Raises:
        RemoteProtocolError: OUT_OF_RANGE for a byte that is no symbol, MALFORMED for padding that is not zero.
    """
    if packed.size != packed_size(dimension, peak):
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{packed.size} packed bytes for {dimension} values")
    if peak == 0:
        return np.zeros(dimension, dtype=np.int8)
    if peak > _BYTE_PEAK:
        kind: Any = _kind(peak)
        planes = np.zeros((dimension, np.dtype(kind).itemsize), dtype=np.uint8)
        planes[:, : _planes(peak)] = packed.reshape(-1, dimension).T
        zigzag: Values = planes.view(np.dtype(kind).newbyteorder("<")).reshape(-1).astype(kind)
        sign = -(zigzag & kind(1))
        # The shift must bring in a zero, whatever the top bit: zigzag is an unsigned number.
        zigzag = (zigzag >> kind(1)) & kind(np.iinfo(kind).max)
        zigzag ^= sign
        if _peak(zigzag) > peak:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"a value beyond the peak of {peak}")
        return zigzag
    m, base = _per_byte(peak), 2 * peak + 1
    if int(packed.max()) >= base**m:
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"a byte that is no group of {m} symbols of base {base}")
    padding = packed.size * m - dimension
    if padding and int(packed[-1]) >= base ** (m - padding):
        raise RemoteProtocolError(RejectReason.MALFORMED, "padding is not zero")
    if m == 1:
        # Modulo 256, as packing was.
        return (packed - np.uint8(peak)).view(np.int8)
    table = np.empty((256, m), dtype=np.int8)
    code = np.arange(256)
    for i in range(m):
        table[:, i] = (code // base**i % base) - peak
    # `take` copies whole rows, where indexing goes value by value: 15 times faster.
    return table.take(packed, axis=0).reshape(-1)[:dimension]


def _per_byte(peak: int) -> int:
    base, m = 2 * peak + 1, 1
    while base ** (m + 1) <= 256:
        m += 1
    return m


def _kind(peak: int) -> type[np.int16 | np.int32 | np.int64]:
    """The narrowest type that holds plus and minus the peak; its zigzag needs no wider one."""
    return np.int16 if peak < 1 << 15 else np.int32 if peak < 1 << 31 else np.int64


def _planes(peak: int) -> int:
    return -(-(2 * peak).bit_length() // 8)


def _peak(values: NDArray[np.signedinteger[Any]]) -> int:
    return max(-int(values.min()), int(values.max()), 0)
