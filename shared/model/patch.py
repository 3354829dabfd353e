"""The delta patch: from one model file to the next, byte for byte, as quantized differences of the weights.

The next global model is *defined* as base plus dequantized patch, ``new = base + q * scale``, computed in float32 as
two separately rounded operations (numpy has no fused multiply-add), so every platform gets the same bytes and a hash
proves it. What quantization lost stays with the coordinator and goes into the next patch (server-side error feedback).

Layout, all little-endian::

    4s   magic "FFP1"
    u8   bits              2..8 or 16
    u8   reserved, 0
    u16  tensors           T
    u32  dimension         D, the sum of the tensors' sizes
    u64  size              bytes of the file, before and after
    32s  base              SHA-256 of the file to start from
    32s  target            SHA-256 of the file that results
    u64  peak              largest magnitude among the q
    zstd frame of
        f32 x T  scales    of the tensors, 0 for one that did not move
        packed q           as in `aggregate.body`

The table (where the weights sit in the file) is not in the patch: it belongs to the architecture and is signed with the
model's card. What a patch cannot change is everything else in the file.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.body import pack_symbols, packed_size, unpack_symbols
from fleetfed.shared.aggregate.lanes import Values, levels
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.model.table import WeightTable
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.compression import compress, decompress, max_compressed

DEFAULT_BITS: Final = 4
DEFAULT_CLIP: Final = 14.0
"""Largest expressible difference in units of the step's rms."""

_HEADER: Final = struct.Struct("<4sBBHIQ32s32sQ")
_MAGIC: Final = b"FFP1"

Weights = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchInfo:
    """The header of a patch.

    Attributes:
        bits: signed bits of a quantized difference.
        tensors: number of tensors.
        dimension: weights in all.
        size: bytes of the model file.
        base_sha256: of the file to start from.
        target_sha256: of the file that results.
        peak: largest quantized magnitude.
    """

    bits: int
    tensors: int
    dimension: int
    size: int
    base_sha256: bytes
    target_sha256: bytes
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patched:
    """What `make_patch` made.

    Attributes:
        patch: the bytes to publish.
        file: the new model file; what `apply_patch` gives on every device.
        residual: float32, shape (dimension,): what quantization lost, to pass to the next call.
        target_sha256: of ``file``.
    """

    patch: bytes
    file: bytes
    residual: Weights
    target_sha256: bytes


def make_patch(
    base: bytes,
    step: NDArray[np.floating[Any]],
    table: WeightTable,
    *,
    residual: Weights | None = None,
    bits: int = DEFAULT_BITS,
    clip: float = DEFAULT_CLIP,
    level: int | None = None,
) -> Patched:
    """Return the patch that moves the base by about ``step``, and the file that it makes.

    A tensor's scale is ``clip * rms / (2**(bits-1) - 1)``: one level is a fixed multiple of the step's rms, which
    fixes the entropy and so the bytes per weight. The rms, unlike the maximum, is not set by one outlier; what lies
    beyond the clip goes with the residual into the next patch.

    Args:
        base: the model file that devices hold.
        step: wanted weights less the base's, shape (dimension,), finite; float32 or float64.
        table: where the weights sit in it.
        residual: of the patch before this one; None starts anew.
        bits: 2..8 or 16.
        clip: largest expressible difference in units of the tensor's rms.
        level: as in `compression.compress`.

    Raises:
        ValueError: wrong shape, bits or clip, or a step that is not finite.
    """
    _check_bits(bits)
    table.validate(len(base))
    dimension = table.parameters
    if step.shape != (dimension,) or (residual is not None and residual.shape != (dimension,)):
        raise ValueError(f"a step of {step.shape} for {dimension} weights")
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}")
    limit = levels(bits)
    wanted = step.astype(np.float64)
    if residual is None:
        residual = np.zeros(dimension, dtype=np.float32)
    wanted += residual
    if not np.isfinite(wanted).all():
        raise ValueError("the step holds NaN or infinity")
    scales = np.zeros(len(table.tensors), dtype="<f4")
    values: Values = np.zeros(dimension, dtype=np.int8 if bits <= 8 else np.int16)
    at = 0
    for i, slot in enumerate(table.tensors):
        part = wanted[at : at + slot.size]
        # The rms of the step without what was carried: carried errors are as large as the scale makes them, and a
        # scale that follows them in full would grow without end once a level exceeds 3.5 rms.
        rms = max(_rms(step[at : at + slot.size]), _rms(residual[at : at + slot.size]) / 4)
        scale = np.float32(clip * rms / limit)
        # A subnormal scale would lose its precision on processors that flush subnormals to zero.
        if scale >= np.finfo(np.float32).tiny:
            scales[i] = scale
            values[at : at + slot.size] = np.clip(np.rint(part / float(scale)), -limit, limit)
        at += slot.size
    new = bytearray(base)
    lost = _add(new, table, values, scales, wanted=wanted)
    peak = max(-int(values.min()), int(values.max()))
    target = hashlib.sha256(new).digest()
    head = _HEADER.pack(
        _MAGIC, bits, 0, len(table.tensors), dimension, len(base), hashlib.sha256(base).digest(), target, peak
    )
    body = scales.tobytes() + pack_symbols(values, peak).tobytes()
    return Patched(patch=head + compress(body, level=level), file=bytes(new), residual=lost, target_sha256=target)


def read_info(patch: bytes | bytearray | memoryview) -> PatchInfo:
    """Return a patch's header, checked against every limit but not against a file.

    Raises:
        RemoteProtocolError: TRUNCATED, UNKNOWN_VERSION, MALFORMED, TOO_LARGE or OUT_OF_RANGE.
    """
    if len(patch) < _HEADER.size:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(patch)} bytes are no patch")
    magic, bits, reserved, tensors, dimension, size, base, target, peak = _HEADER.unpack_from(patch)
    if magic != _MAGIC:
        raise RemoteProtocolError(RejectReason.UNKNOWN_VERSION, f"a patch that starts with {magic!r}")
    try:
        _check_bits(bits)
    except ValueError as error:
        raise RemoteProtocolError(RejectReason.MALFORMED, str(error)) from error
    if reserved:
        raise RemoteProtocolError(RejectReason.MALFORMED, "a reserved byte is not zero")
    if not (
        1 <= tensors <= limits.MAX_TENSORS
        and tensors <= dimension <= limits.MAX_PARAMETERS
        and 4 * dimension <= size <= limits.MAX_BLOB
    ):
        raise RemoteProtocolError(
            RejectReason.TOO_LARGE, f"{tensors} tensors, {dimension} weights, {size} bytes of file"
        )
    if peak > levels(bits):
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"peak {peak} at {bits} bits")
    return PatchInfo(
        bits=bits,
        tensors=tensors,
        dimension=dimension,
        size=size,
        base_sha256=base,
        target_sha256=target,
        peak=peak,
    )


def apply_patch(
    base: bytes | bytearray | memoryview, table: WeightTable, patch: bytes | bytearray | memoryview
) -> bytearray:
    """Return the new model file.

    Everything is checked before it is used, sizes before anything is allocated; the result is exactly the file whose
    hash the patch names, or there is no result.

    Args:
        base: the model file that the device holds; not changed. May be a memory map's view.
        table: where the weights sit in it.
        patch: what `make_patch` made.

    Raises:
        RemoteProtocolError: what `read_info` raises; WRONG_MODEL (the patch starts from another file); MALFORMED or
            WRONG_SHAPE (the table does not fit the file, or the patch); DECOMPRESSION, TRUNCATED, TOO_LARGE, MALFORMED
            or OUT_OF_RANGE (the content); BODY_MISMATCH (the result is not the promised file).
    """
    info = read_info(patch)
    if info.size != len(base) or hashlib.sha256(base).digest() != info.base_sha256:
        raise RemoteProtocolError(RejectReason.WRONG_MODEL, "the patch starts from another file")
    table.validate(len(base))
    if table.parameters != info.dimension or len(table.tensors) != info.tensors:
        raise RemoteProtocolError(
            RejectReason.WRONG_SHAPE, f"a patch of {info.tensors} tensors, {info.dimension} weights"
        )
    scale_bytes = 4 * info.tensors
    size = scale_bytes + packed_size(info.dimension, info.peak)
    content = decompress(memoryview(patch)[_HEADER.size :], size=size)
    scales = np.frombuffer(content, dtype="<f4", count=info.tensors)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, "a scale is negative or not finite")
    values = unpack_symbols(np.frombuffer(content, dtype=np.uint8, offset=scale_bytes), info.peak, info.dimension)
    new = bytearray(base)
    _add(new, table, values, scales)
    if hashlib.sha256(new).digest() != info.target_sha256:
        raise RemoteProtocolError(RejectReason.BODY_MISMATCH, "the patched file is not the promised one")
    return new


def max_patch(dimension: int, tensors: int, bits: int) -> int:
    """Return more bytes than any valid patch of such a model needs."""
    return _HEADER.size + max_compressed(4 * tensors + packed_size(dimension, levels(bits)))


def _add(
    file: bytearray,
    table: WeightTable,
    values: Values,
    scales: Weights,
    *,
    wanted: NDArray[np.float64] | None = None,
) -> Weights:
    """Add ``values * scale`` to the file's weights in place; return what is left of ``wanted`` (nothing without it)."""
    lost = np.empty(0 if wanted is None else values.size, dtype=np.float32)
    at = 0
    for slot, scale in zip(table.tensors, scales, strict=True):
        weights = np.frombuffer(file, dtype="<f4", count=slot.size, offset=slot.offset)
        change = values[at : at + slot.size].astype("<f4")
        # Two statements, two roundings: contracting them into a fused multiply-add would give other bytes.
        with np.errstate(over="ignore", invalid="ignore"):
            change *= scale
            before = None if wanted is None else weights.astype(np.float64)
            weights += change
        if wanted is not None and before is not None:
            lost[at : at + slot.size] = wanted[at : at + slot.size] - (weights - before)
        at += slot.size
    return lost


def _rms(part: NDArray[np.floating[Any]]) -> float:
    wide = part.astype(np.float64)
    return float(np.sqrt(np.dot(wide, wide) / wide.size))


def _check_bits(bits: int) -> None:
    if not (2 <= bits <= 8 or bits == 16):
        raise ValueError(f"a patch has 2..8 or 16 bits, not {bits}")
