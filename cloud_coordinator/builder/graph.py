"""The training graph, forward and backward, from TensorFlow operations that become TFLite builtins.

Every step has a forward and a backward half. Backward is written out here because TensorFlow's own gradient operations
(`Conv2DBackpropFilter`, `MaxPoolGrad`, `ReluGrad`, ...) are no TFLite builtins:

- the gradient of a convolution's kernel is itself a convolution: the input with batch and channels swapped, convolved
  with the output's gradient, where the forward strides become dilation. One builtin instead of one product per kernel
  position;
- the gradient of its input is the transposed convolution, which is a builtin;
- max pooling is taken apart into the strided views of its windows. The gradient goes to the first maximum of each
  window, as in TensorFlow, also where several are equal (after a ReLU whole windows are zero).

The functions take and return tensors, hold no state, and know nothing of optimisers or signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from fleetfed.cloud_coordinator.builder.layers import (
    Activation,
    Conv,
    Dense,
    Function,
    GlobalAverage,
    MaxPool,
    Network,
    Reshape,
    Step,
    window,
)

Tensor = Any


Read = Callable[[int], Tensor]
"""Reads the weight with this index in `Network.weights`."""
Consume = Callable[[int, Tensor], Tensor | None]
"""Takes the gradient of the weight with this index; returns the operation that is done with it, if any."""


_RELU = Activation(function=Function.RELU)


def logits(network: Network, read: Read, x: Tensor) -> Tensor:
    """Run the chain forward: float32 [batch, *input_shape] to float32 [batch, classes]."""
    return _forward(network, read, x)[-1]


def output(network: Network, read: Read, x: Tensor) -> Tensor:
    """Run the model as its author wrote it: the softmax of the logits where it has one."""
    scores = logits(network, read, x)
    return tf.nn.softmax(scores) if network.softmax else scores


def losses(network: Network, scores: Tensor, labels: Tensor) -> Tensor:
    """Sparse categorical cross-entropy of each example, float32 [batch], from logits (stable for any size of them)."""
    return -tf.reduce_sum(tf.one_hot(labels, network.classes) * tf.nn.log_softmax(scores), axis=-1)


def train(network: Network, read: Read, x: Tensor, labels: Tensor, importance: Tensor, consume: Consume) -> Tensor:
    """Run forward and backward, handing out each weight's gradient as soon as it is known.

    A weight's gradient is handed out after the last use of its value, so that ``consume`` may change the weight at
    once: gradients and the temporaries of the optimiser need not all be in memory together.
    `tf.control_dependencies` keep the converter from reordering that.

    Args:
        network: the model.
        read: reads a weight.
        x: float32 [batch, *input_shape], batch fixed.
        labels: int32 [batch].
        importance: float32 [batch], not negative; 0 takes an example out, as in the padding of a short last batch. An
            all-zero batch has loss 0 and gradients 0.
        consume: called once for each weight.

    Returns:
        Weighted mean loss, a scalar.
    """
    values = _forward(network, read, x)
    scores = values[-1]
    share = importance / tf.maximum(tf.reduce_sum(importance), 1e-12)
    loss = tf.reduce_sum(losses(network, scores, labels) * share)
    flow = (tf.nn.softmax(scores) - tf.one_hot(labels, network.classes)) * tf.expand_dims(share, 1)
    first = next(i for i, step in enumerate(network.steps) if isinstance(step, Dense | Conv))
    done: Tensor | None = None
    for index in reversed(range(first, len(network.steps))):
        step = network.steps[index]
        # Nothing of a backward half starts before its turn: what is computed early lies in memory until it is used.
        with tf.control_dependencies([flow] if done is None else [flow, done]):
            back = _input_gradient(step, read, values[index], values[index + 1], flow) if index > first else flow
            if isinstance(step, Dense | Conv):
                done = _weight_gradients(step, values[index], flow, back, consume)
        flow = back
    return loss


def _forward(network: Network, read: Read, x: Tensor) -> list[Tensor]:
    """The input, and what each step makes of it."""
    values = [x]
    for before, step in zip((None, *network.steps), network.steps, strict=False):
        x = values[-1]
        # Weights are read at their step's turn, not all at the start, for the sake of memory.
        with tf.control_dependencies([x]):
            if step == _RELU and isinstance(before, Dense) and before.bias is None:
                # The converter fuses a ReLU into the product before it, then replaces that by a BATCH_MATMUL, which
                # has no fused activation: the ReLU is gone. A select is not fused.
                values.append(tf.where(x > 0.0, x, 0.0))
            else:
                values.append(_step(step, read, x))
    return values


def _step(step: Step, read: Read, x: Tensor) -> Tensor:
    match step:
        case Dense():
            y = None if step.bias is None else read(step.bias)
            for index, first, last in step.parts:
                with tf.control_dependencies([x] if y is None else [y]):
                    part = tf.matmul(x[:, first:last] if len(step.parts) > 1 else x, read(index))
                    y = part if y is None else part + y
            return y
        case Conv():
            y = tf.nn.conv2d(
                _planes(x, step.shape), _kernel(step, read), strides=step.strides, padding=step.padding.upper()
            )
            y = y if step.bias is None else tf.nn.bias_add(y, read(step.bias))
            return _like_rank(y, x)
        case MaxPool():
            y = tf.nn.max_pool2d(_planes(x, step.shape), step.size, step.strides, step.padding.upper())
            return _like_rank(y, x)
        case GlobalAverage():
            return tf.reduce_mean(_planes(x, step.shape), axis=(1, 2))
        case Reshape():
            return tf.reshape(x, (-1, *step.after))
        case Activation(function=Function.RELU):
            return tf.nn.relu(x)
        case Activation(function=Function.TANH):
            return tf.nn.tanh(x)
        case Activation(function=Function.SIGMOID):
            return tf.nn.sigmoid(x)
    raise AssertionError(step)


def _input_gradient(step: Step, read: Read, x: Tensor, y: Tensor, flow: Tensor) -> Tensor:
    match step:
        case Dense():
            parts: list[Tensor] = []
            for index, _, _ in step.parts:
                with tf.control_dependencies(parts[-1:]):
                    parts.append(tf.matmul(flow, read(index), transpose_b=True))
            return tf.concat(parts, axis=1) if len(parts) > 1 else parts[0]
        case Conv():
            back = tf.nn.conv2d_transpose(
                _flow_planes(step, x, flow),
                _kernel(step, read),
                output_shape=(x.shape[0], *step.shape),
                strides=step.strides,
                padding=step.padding.upper(),
            )
            return tf.reshape(back, x.shape)
        case MaxPool():
            return _pool_gradient(step, x, y, flow)
        case GlobalAverage():
            height, width, channels = step.shape
            one = tf.reshape(flow * (1.0 / (height * width)), (-1, 1, 1, channels))
            return tf.reshape(tf.tile(one, (1, height, width, 1)), x.shape)
        case Reshape():
            return tf.reshape(flow, (-1, *step.before))
        case Activation(function=Function.RELU):
            return flow * tf.cast(y > 0.0, tf.float32)
        case Activation(function=Function.TANH):
            return flow * (1.0 - y * y)
        case Activation(function=Function.SIGMOID):
            return flow * (y * (1.0 - y))
    raise AssertionError(step)


def _weight_gradients(step: Dense | Conv, x: Tensor, flow: Tensor, back: Tensor, consume: Consume) -> Tensor | None:
    """Hand out a layer's gradients, one after the other, once ``back`` no longer needs the weights."""
    done: Tensor | None = back
    if step.bias is not None:
        with tf.control_dependencies([done]):
            done = consume(step.bias, tf.reduce_sum(flow, axis=tuple(range(len(flow.shape) - 1))))
    if isinstance(step, Conv):
        with tf.control_dependencies([] if done is None else [done]):
            return consume(step.kernel, _kernel_gradient(step, x, flow))
    for index, first, last in step.parts:
        with tf.control_dependencies([] if done is None else [done]):
            rows = x[:, first:last] if len(step.parts) > 1 else x
            done = consume(index, tf.matmul(rows, flow, transpose_a=True))
    return done


def _planes(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[batch, length, channels] as [batch, 1, length, channels]; images as they are."""
    return tf.reshape(x, (-1, *shape)) if len(x.shape) == 3 else x


def _like_rank(y: Tensor, x: Tensor) -> Tensor:
    return tf.reshape(y, (-1, *y.shape[2:])) if len(x.shape) == 3 else y


def _kernel(step: Conv, read: Read) -> Tensor:
    return tf.reshape(read(step.kernel), (*step.size, step.shape[2], step.filters))


def _pads(step: Conv | MaxPool) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Output height and width, and the padding before and after in each."""
    rows, top, bottom = window(step.shape[0], step.size[0], step.strides[0], step.padding)
    columns, left, right = window(step.shape[1], step.size[1], step.strides[1], step.padding)
    return (rows, columns), (top, bottom), (left, right)


def _flow_planes(step: Conv, x: Tensor, flow: Tensor) -> Tensor:
    (rows, columns), _, _ = _pads(step)
    return tf.reshape(flow, (x.shape[0], rows, columns, step.filters))


def _kernel_gradient(step: Conv, x: Tensor, flow: Tensor) -> Tensor:
    (rows, columns), vertical, horizontal = _pads(step)
    down, right = step.strides
    swapped = tf.transpose(_planes(x, step.shape), (3, 1, 2, 0))
    if any(vertical) or any(horizontal):
        swapped = tf.pad(swapped, ((0, 0), vertical, horizontal, (0, 0)))
    # What the last window does not reach takes no part; without the cut the result would be larger than the kernel.
    reach = ((rows - 1) * down + step.size[0], (columns - 1) * right + step.size[1])
    if tuple(swapped.shape[1:3]) != reach:
        swapped = swapped[:, : reach[0], : reach[1], :]
    filters = tf.transpose(_flow_planes(step, x, flow), (1, 2, 0, 3))
    kernel = tf.nn.conv2d(swapped, filters, strides=1, padding="VALID", dilations=(down, right))
    kernel = tf.transpose(kernel, (1, 2, 0, 3))
    return kernel if len(x.shape) == 4 else kernel[0]


def _pool_gradient(step: MaxPool, x: Tensor, y: Tensor, flow: Tensor) -> Tensor:
    (rows, columns), vertical, horizontal = _pads(step)
    height, width, channels = step.shape
    down, right = step.strides
    batch = x.shape[0]
    image = _planes(x, step.shape)
    best = tf.reshape(y, (batch, rows, columns, channels))
    flow = tf.reshape(flow, (batch, rows, columns, channels))
    # A whole number of strides on each side, so that any view of a window is a plain cut of the padded image.
    tall = _round_up((rows - 1) * down + step.size[0], down)
    wide = _round_up((columns - 1) * right + step.size[1], right)
    lowest = -3.4e38
    after = (max(tall - vertical[0] - height, 0), max(wide - horizontal[0] - width, 0))
    if vertical[0] or horizontal[0] or any(after):
        image = tf.pad(
            image,
            ((0, 0), (vertical[0], after[0]), (horizontal[0], after[1]), (0, 0)),
            constant_values=lowest,
        )
    if tuple(image.shape[1:3]) != (tall, wide):
        image = image[:, :tall, :wide, :]
    # Strides as axes of their own: a strided view becomes a plain slice, which TFLite copies in runs of bytes.
    blocks = tf.reshape(image, (batch, tall // down, down, wide // right, right * channels))
    free = None
    parts: dict[tuple[int, int], Tensor] = {}
    for row in range(step.size[0]):
        for column in range(step.size[1]):
            view = tf.slice(
                blocks,
                (0, row // down, row % down, column // right, column % right * channels),
                (batch, rows, 1, columns, channels),
            )
            hit = tf.cast(tf.equal(tf.reshape(view, best.shape), best), tf.float32)
            if free is None:
                free = 1.0 - hit
            else:
                hit = hit * free
                free = free - hit
            parts[row, column] = hit * flow
    whole = _scatter(parts, step, batch, (rows, columns, channels), (tall, wide))
    if (tall, wide) != (height, width):
        whole = whole[:, vertical[0] : vertical[0] + height, horizontal[0] : horizontal[0] + width, :]
    short = (height - whole.shape[1], width - whole.shape[2])
    if any(short):
        whole = tf.pad(whole, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))
    return tf.reshape(whole, x.shape)


def _scatter(
    parts: dict[tuple[int, int], Tensor],
    step: MaxPool,
    batch: int,
    shape: tuple[int, int, int],
    size: tuple[int, int],
) -> Tensor:
    """Put each window position's share back to where it came from: [batch, *size, channels].

    Positions are ``(phase + stride * turn)`` in each direction. Within one turn the phases interleave without
    overlap, so a turn is one stack of planes; turns are shifted by whole strides and added.
    """
    rows, columns, channels = shape
    down, right = step.strides
    nothing = None
    total = None
    for turn_down in range(-(-step.size[0] // down)):
        for turn_right in range(-(-step.size[1] // right)):
            lines = []
            for row in range(down):
                planes = []
                for column in range(right):
                    part = parts.get((turn_down * down + row, turn_right * right + column))
                    if part is None:
                        if nothing is None:
                            nothing = tf.zeros((batch, rows, columns, channels))
                        part = nothing
                    planes.append(part)
                line = tf.concat(planes, axis=3) if right > 1 else planes[0]
                lines.append(tf.reshape(line, (batch, rows, 1, columns * right * channels)))
            block = tf.concat(lines, axis=2) if down > 1 else lines[0]
            block = tf.reshape(block, (batch, rows * down, columns * right, channels))
            shift = (turn_down * down, turn_right * right)
            rest = (size[0] - shift[0] - rows * down, size[1] - shift[1] - columns * right)
            if any(shift) or any(rest):
                block = tf.pad(block, ((0, 0), (shift[0], rest[0]), (shift[1], rest[1]), (0, 0)))
            total = block if total is None else total + block
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
