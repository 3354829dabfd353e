"""What a model may consist of: a chain of steps, each with the shapes that it needs.

No TensorFlow here. Shapes are without the batch; images are (height, width, channels), sequences (length, channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fleetfed.shared.model.card import Initializer


class Padding(StrEnum):
    """Keras's names."""

    VALID = "valid"
    SAME = "same"


class Function(StrEnum):
    """Activations with a proven gradient."""

    RELU = "relu"
    TANH = "tanh"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """``y = x @ kernel + bias``; kernel (inputs, units), kept in parts of whole rows.

    Attributes:
        parts: for each part of the kernel its index in `Network.weights`, its first row and the row after its last.
        bias: its index in `Network.weights`.
        inputs: rows of the kernel.
        units: columns of the kernel.
    """

    parts: tuple[tuple[int, int, int], ...]
    bias: int | None
    inputs: int
    units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """Convolution of (height, width, channels); a sequence has height 1. Kernel (rows, columns, channels, filters)."""

    kernel: int
    bias: int | None
    shape: tuple[int, int, int]
    size: tuple[int, int]
    filters: int
    strides: tuple[int, int]
    padding: Padding


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPool:
    """Maximum over windows of (height, width, channels); a sequence has height 1."""

    shape: tuple[int, int, int]
    size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalAverage:
    """Mean over height and width; a sequence has height 1."""

    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshape:
    """A new shape for the same values (Flatten is one)."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An elementwise function."""

    function: Function


Step = Dense | Conv | MaxPool | GlobalAverage | Reshape | Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A trainable tensor: Keras's shape, and how it starts.

    Attributes:
        name: ``layer/kernel`` or ``layer/bias``; of a part also its rows, as in ``layer/kernel[0:128]``.
        shape: Keras's own shape (of a part: its rows of it), which is also its layout in the file.
        initializer: how it starts, where the model card has a word for it.
    """

    name: str
    shape: tuple[int, ...]
    initializer: Initializer


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A whole model: chain of steps from the input to the logits.

    Attributes:
        input_shape: one example, without the batch.
        steps: what happens to it, in order.
        weights: trainable tensors in Keras's order; `Conv.kernel` and its like index this.
        classes: length of the logits.
        softmax: whether the model's own output is the softmax of the logits.
    """

    input_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    weights: tuple[Weight, ...]
    classes: int
    softmax: bool


def window(length: int, size: int, stride: int, padding: Padding) -> tuple[int, int, int]:
    """Output length and padding of a sliding window.

    Returns:
        Output length, values padded before, values padded after (TensorFlow's rule: the odd one goes after).
    """
    if padding is Padding.VALID:
        return (length - size) // stride + 1, 0, 0
    outputs = -(-length // stride)
    total = max((outputs - 1) * stride + size - length, 0)
    return outputs, total // 2, total - total // 2
