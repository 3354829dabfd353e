"""The model card: what a program must know of a .tflite to train it, in a few hundred bytes.

A card travels beside the file. It says nothing about the values of the weights, so one card serves every version of
a model; its `layout` ties it to the weight table that updates and patches are made for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.model.table import FLOAT32, TensorSlot, WeightTable
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.codec import Length, Range

FORMAT = 1
SIGNATURES = ("evaluate", "get_weights", "gradients", "infer", "set_weights", "train_adam", "train_sgd")
"""Every file has these; ``gradients`` proves the two training signatures and is never needed to train."""

_Text = Annotated[str, Length(0, 100)]
_Size = Annotated[int, Range(1, 1 << 24)]
_Fan = Annotated[int, Range(1, limits.MAX_PARAMETERS)]


class InitializerKind(StrEnum):
    """How a tensor starts."""

    NONE = "none"
    """By a rule that the card has no word for: only the file knows its first values."""
    ZEROS = "zeros"
    GLOROT_UNIFORM = "glorot_uniform"
    """Uniform within ``sqrt(6 / (fan_in + fan_out))`` of zero."""
    HE_UNIFORM = "he_uniform"
    """Uniform within ``sqrt(6 / fan_in)`` of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """How a tensor starts; the fans are those of the whole layer where the tensor is a part of its kernel."""

    kind: InitializerKind
    fan_in: _Fan
    fan_out: _Fan


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a program must know of a .tflite to train it.

    Attributes:
        format: version of this card's format.
        name: the model's name, ``[a-z0-9_-]``.
        builder: what built the file, for people.
        file_bytes: length of the .tflite.
        input_shape: of one example, without the batch.
        input_dtype: always ``float32``.
        classes: length of the scores; labels are 0 to ``classes - 1``.
        class_names: one per class, or none at all.
        softmax: whether ``infer`` returns probabilities (else logits).
        batch: number of examples in one training step, fixed in the file.
        tensors: the weight table.
        initializers: how each tensor starts.
        signatures: names of the file's signatures, sorted.
        layout: `WeightTable.layout_hash` of the tensors.
    """

    format: Annotated[int, Range(FORMAT, FORMAT)] = FORMAT
    name: Annotated[str, Length(1, limits.MAX_ID)]
    builder: _Text
    file_bytes: Annotated[int, Range(1, limits.MAX_BLOB)]
    input_shape: Annotated[tuple[_Size, ...], Length(1, 3)]
    input_dtype: _Text = FLOAT32
    classes: Annotated[int, Range(2, 65_536)]
    class_names: Annotated[tuple[_Text, ...], Length(0, 65_536)] = ()
    softmax: bool
    batch: Annotated[int, Range(1, 65_536)]
    tensors: Annotated[tuple[TensorSlot, ...], Length(1, limits.MAX_TENSORS)]
    initializers: Annotated[tuple[Initializer, ...], Length(1, limits.MAX_TENSORS)]
    signatures: Annotated[tuple[_Text, ...], Length(1, 64)] = SIGNATURES
    layout: Annotated[bytes, Length(32, 32)]

    @property
    def table(self) -> WeightTable:
        """The weight table."""
        return WeightTable(tensors=self.tensors)

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return self.table.parameters

    @property
    def example_size(self) -> int:
        """Number of values in one example."""
        return math.prod(self.input_shape)

    def encode(self) -> bytes:
        """The card as msgpack; equal cards give equal bytes."""
        return codec.encode(self)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> ModelCard:
        """Read a card from bytes of a peer or a file.

        Raises:
            RemoteProtocolError: `TOO_LARGE`, `MALFORMED` or `OUT_OF_RANGE`; nothing else, whatever the bytes.
        """
        card = codec.decode(cls, data, limit=limits.MAX_MANIFEST)
        card.validate()
        return card

    def validate(self) -> None:
        """Check what the fields' own bounds cannot: that they agree with each other.

        Raises:
            RemoteProtocolError: `MALFORMED`, or `TOO_LARGE` from `WeightTable.validate`.
        """
        if not set(self.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
            raise _malformed(f"name {self.name!r}")
        if self.input_dtype != FLOAT32:
            raise _malformed(f"input dtype {self.input_dtype!r}")
        if self.class_names and len(self.class_names) != self.classes:
            raise _malformed(f"{len(self.class_names)} names for {self.classes} classes")
        if len(self.initializers) != len(self.tensors):
            raise _malformed("initializers do not fit the tensors")
        if not set(SIGNATURES) <= set(self.signatures):
            raise _malformed(f"signatures {self.signatures}")
        self.table.validate(self.file_bytes)
        if self.layout != self.table.layout_hash():
            raise _malformed("the layout hash is not that of the tensors")

    def check_file(self, head: bytes, size: int) -> None:
        """Refuse a file that cannot be this card's.

        Args:
            head: at least its first 8 bytes.
            size: its length in bytes.

        Raises:
            ConfigError: it has another length, or is no .tflite.
        """
        if size != self.file_bytes:
            raise ConfigError(f"model {self.name}: the file has {size} bytes, its card says {self.file_bytes}")
        if head[4:8] != b"TFL3":
            raise ConfigError(f"model {self.name}: the file is not a .tflite")


def _malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(RejectReason.MALFORMED, f"model card: {detail}")
