"""The weight table: where each trainable tensor's bytes stand in a .tflite file.

The builder finds the offsets once. From then on a new global model is the same file with those bytes replaced, which
needs no TensorFlow, and every file that came from one table has the same length and differs in weights alone.

A *flat* vector is every tensor's values in table order, each tensor in row-major order, float32.

>>> table = WeightTable(tensors=(TensorSlot(name="d/kernel", shape=(2, 3), dtype="float32", offset=16),))
>>> table.parameters, table.ranges()
(6, ((16, 40),))
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range

FLOAT32 = "float32"
_ITEM = 4
_LAYOUT_PREFIX = b"fleetfed weight table v1\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """One trainable tensor in the file.

    Attributes:
        name: the layer's name and the tensor's role, as in ``conv2d/kernel``.
        shape: its dimensions; the layout in the file is row-major.
        dtype: always ``float32`` (little-endian).
        offset: of its first byte in the file; a multiple of 4.
    """

    name: Annotated[str, Length(1, 200)]
    shape: Annotated[tuple[Annotated[int, Range(1, limits.MAX_PARAMETERS)], ...], Length(1, 6)]
    dtype: Annotated[str, Length(1, 16)]
    offset: Annotated[int, Range(0, limits.MAX_BLOB)]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Offset after its last byte."""
        return self.offset + _ITEM * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTable:
    """Every trainable tensor of a model, in the order of the flat vector."""

    tensors: Annotated[tuple[TensorSlot, ...], Length(1, limits.MAX_TENSORS)]

    @property
    def parameters(self) -> int:
        """Number of values in the flat vector."""
        return sum(slot.size for slot in self.tensors)

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First byte and end of each tensor, in table order."""
        return tuple((slot.offset, slot.end) for slot in self.tensors)

    def splits(self) -> tuple[slice, ...]:
        """Where each tensor's values stand in the flat vector."""
        slices = []
        position = 0
        for slot in self.tensors:
            slices.append(slice(position, position + slot.size))
            position += slot.size
        return tuple(slices)

    def layout_hash(self) -> bytes:
        """BLAKE2b-256 over names, shapes, dtypes and offsets: equal for files whose weights are interchangeable."""
        digest = hashlib.blake2b(_LAYOUT_PREFIX, digest_size=32)
        digest.update(struct.pack("<I", len(self.tensors)))
        for slot in self.tensors:
            for text in (slot.name, slot.dtype):
                raw = text.encode()
                digest.update(struct.pack("<H", len(raw)) + raw)
            digest.update(struct.pack(f"<B{len(slot.shape)}Q", len(slot.shape), *slot.shape))
            digest.update(struct.pack("<Q", slot.offset))
        return digest.digest()

    def validate(self, file_bytes: int) -> None:
        """Check the table against a file's length.

        Raises:
            RemoteProtocolError: `TOO_LARGE` where a bound is exceeded, `MALFORMED` where a tensor has another dtype
                than float32, is not aligned, lies outside the file, overlaps another, or shares its name.
        """
        if not 1 <= len(self.tensors) <= limits.MAX_TENSORS:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(self.tensors)} tensors")
        if file_bytes > limits.MAX_BLOB:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"file of {file_bytes} bytes")
        if self.parameters > limits.MAX_PARAMETERS:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{self.parameters} parameters")
        if len({slot.name for slot in self.tensors}) != len(self.tensors):
            raise _malformed("two tensors of the same name")
        for slot in self.tensors:
            if slot.dtype != FLOAT32:
                raise _malformed(f"{slot.name}: dtype {slot.dtype}")
            if not slot.shape or min(slot.shape) < 1:
                raise _malformed(f"{slot.name}: shape {slot.shape}")
            if slot.offset < 0 or slot.offset % _ITEM:
                raise _malformed(f"{slot.name}: offset {slot.offset} is not aligned")
            if slot.end > file_bytes:
                raise _malformed(f"{slot.name}: ends at {slot.end} in a file of {file_bytes} bytes")
        ordered = sorted(self.tensors, key=lambda slot: slot.offset)
        for before, after in itertools.pairwise(ordered):
            if before.end > after.offset:
                raise _malformed(f"{before.name} and {after.name} overlap")


def read_weights(data: bytes | bytearray | memoryview, table: WeightTable) -> NDArray[np.float32]:
    """Copy the weights out of a .tflite file.

    Args:
        data: the file.
        table: its weight table.

    Returns:
        Flat float32 vector of `WeightTable.parameters` values.

    Raises:
        RemoteProtocolError: the table does not fit the file (see `WeightTable.validate`).
    """
    table.validate(len(data))
    flat = np.empty(table.parameters, dtype=np.float32)
    for slot, part in zip(table.tensors, table.splits(), strict=True):
        flat[part] = np.frombuffer(data, dtype="<f4", count=slot.size, offset=slot.offset)
    return flat


def write_weights(data: bytearray | memoryview, table: WeightTable, flat: NDArray[np.float32]) -> None:
    """Put new weights into a .tflite file, in place.

    Args:
        data: the file, writable.
        table: its weight table.
        flat: float32 [`WeightTable.parameters`].

    Raises:
        ConfigError: ``flat`` has another shape or dtype.
        RemoteProtocolError: the table does not fit the file (see `WeightTable.validate`).
    """
    table.validate(len(data))
    check_flat(flat, table)
    for slot, part in zip(table.tensors, table.splits(), strict=True):
        np.frombuffer(data, dtype="<f4", count=slot.size, offset=slot.offset)[:] = flat[part]


def split_weights(flat: NDArray[np.float32], table: WeightTable) -> list[NDArray[np.float32]]:
    """The flat vector as tensors in table order, each in its shape; views where ``flat`` is contiguous.

    Raises:
        ConfigError: ``flat`` has another shape or dtype.
    """
    check_flat(flat, table)
    return [flat[part].reshape(slot.shape) for slot, part in zip(table.tensors, table.splits(), strict=True)]


def check_flat(flat: NDArray[np.float32], table: WeightTable) -> None:
    """Refuse a vector that is not the table's.

    Raises:
        ConfigError: ``flat`` has another shape or dtype.
    """
    if flat.shape != (table.parameters,) or flat.dtype != np.float32:
        raise ConfigError(
            f"expected float32 weights of shape ({table.parameters},), got {flat.dtype} of shape {flat.shape}"
        )


def _malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(RejectReason.MALFORMED, f"weight table: {detail}")
