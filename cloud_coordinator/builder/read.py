"""Read a Keras model into a `Network`, refusing by name whatever is not proven.

Every option that changes what a layer computes is checked, also those that nobody sets on purpose: a layer that is
converted with one option silently ignored would train a different model than the one that was asked for.
"""

from __future__ import annotations

import math
from typing import Any

import keras

from fleetfed.cloud_coordinator.builder.layers import (
    Activation,
    Conv,
    Dense,
    Function,
    GlobalAverage,
    MaxPool,
    Network,
    Padding,
    Reshape,
    Step,
    Weight,
)
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import Initializer, InitializerKind
from fleetfed.shared.wire import limits

SUPPORTED = (
    "Supported: Dense, Conv1D, Conv2D, MaxPooling1D, MaxPooling2D, GlobalAveragePooling1D, GlobalAveragePooling2D, "
    "Flatten, Reshape, ReLU and Activation layers, with the activations relu, tanh, sigmoid and linear, and softmax at "
    "the very end."
)
INITIALIZERS = {
    "GlorotUniform": InitializerKind.GLOROT_UNIFORM,
    "HeUniform": InitializerKind.HE_UNIFORM,
    "Zeros": InitializerKind.ZEROS,
}
PART = 65_536
"""Values in one part of a dense kernel, about: a part and its optimiser's temporaries fit a processor's cache, and a
device holds the temporaries of one part at a time instead of those of the whole layer."""
MAX_PARTS = 16

_L = keras.layers


def read_network(model: keras.Model) -> Network:
    """Check a Keras model and read it as a chain of proven steps.

    Args:
        model: a built `keras.Sequential`, or a functional model that is a chain from one input to one output.

    Raises:
        ConfigError: the model holds a layer, activation or option that is not proven; the message names it.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"expected a Keras model, got {type(model).__name__}")
    if not model.built or not (isinstance(model, keras.Sequential) or type(model).__name__ == "Functional"):
        raise ConfigError(
            f"model {model.name!r} must be a built Sequential or functional model: give it an Input layer with a "
            "fixed shape (a subclassed model cannot be read layer by layer)"
        )
    reader = _Reader(_input_shape(model))
    layers = _chain(model)
    for position, layer in enumerate(layers):
        reader.add(layer, last=position == len(layers) - 1)
    return reader.finish(model)


def _input_shape(model: keras.Model) -> tuple[int, ...]:
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ConfigError(f"model {model.name!r} must have exactly one input and one output")
    tensor = model.inputs[0]
    if tensor.dtype != "float32":
        raise ConfigError(f"model {model.name!r}: input dtype {tensor.dtype} is not supported; use float32")
    shape = tuple(tensor.shape[1:])
    if not 1 <= len(shape) <= 3 or any(size is None for size in shape):
        raise ConfigError(f"model {model.name!r}: input shape {shape} must have 1 to 3 fixed dimensions besides batch")
    return tuple(int(size) for size in shape)


def _chain(model: keras.Model) -> list[Any]:
    if isinstance(model, keras.Sequential):
        layers = [layer for layer in model.layers if not isinstance(layer, _L.InputLayer)]
    else:
        # `operations`, not `layers`: bare operations such as `keras.ops.add` are not layers, and must not be missed.
        layers = [operation for operation in model.operations if not isinstance(operation, _L.InputLayer)]
        tensor = model.inputs[0]
        for layer in layers:
            nodes = layer._inbound_nodes
            if len(nodes) != 1 or len(nodes[0].input_tensors) != 1 or nodes[0].input_tensors[0] is not tensor:
                raise ConfigError(
                    f"layer {layer.name!r}: only a plain chain of layers is supported, without branches or reuse"
                )
            tensor = nodes[0].output_tensors[0]
        if tensor is not model.outputs[0]:
            raise ConfigError(f"model {model.name!r}: the output must be that of the last layer of the chain")
    if not layers:
        raise ConfigError(f"model {model.name!r} has no layers")
    if len({id(layer) for layer in layers}) != len(layers):
        raise ConfigError(f"model {model.name!r} uses a layer twice; only a plain chain of layers is supported")
    return layers


class _Reader:
    """Grows the chain, tracking the shape between layers."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self.input_shape = input_shape
        self.shape = input_shape
        self.steps: list[Step] = []
        self.weights: list[Weight] = []
        self.sizes: list[int] = []
        self.softmax = False

    def add(self, layer: Any, *, last: bool) -> None:
        """Check one layer and append its steps."""
        kind = type(layer)
        reader = _READERS.get(kind)
        where = f"layer {layer.name!r} ({kind.__name__})"
        if reader is None:
            raise ConfigError(f"{where} is not supported. {SUPPORTED}")
        _check_common(layer, where)
        reader(self, layer, where, last)

    def finish(self, model: keras.Model) -> Network:
        """Check the whole and freeze it."""
        if len(self.shape) != 1:
            raise ConfigError(f"model {model.name!r}: the output must be one score per class, not shape {self.shape}")
        if self.steps and isinstance(self.steps[-1], Activation):
            raise ConfigError(
                f"model {model.name!r}: the last activation must be softmax or linear (one score per class), "
                f"not {self.steps[-1].function}"
            )
        if not 2 <= self.shape[0] <= 65_536:
            raise ConfigError(f"model {model.name!r}: {self.shape[0]} classes are outside 2..65536")
        if not self.weights:
            raise ConfigError(f"model {model.name!r} has no trainable weights")
        if len(self.weights) > limits.MAX_TENSORS:
            raise ConfigError(f"model {model.name!r} has more than {limits.MAX_TENSORS} weight tensors")
        parameters = sum(math.prod(weight.shape) for weight in self.weights)
        if parameters > limits.MAX_PARAMETERS:
            raise ConfigError(f"model {model.name!r} has {parameters} parameters; the limit is {limits.MAX_PARAMETERS}")
        names = [weight.name for weight in self.weights]
        if len(set(names)) != len(names):
            raise ConfigError(f"model {model.name!r} has two weights of the same name: {names}")
        # The order of the weight table is Keras's own, so `model.get_weights()` lines up with it.
        # (Parts are whole rows in order, so their values one after the other are the tensor's.)
        assert [math.prod(variable.shape) for variable in model.trainable_variables] == self.sizes
        return Network(
            input_shape=self.input_shape,
            steps=_pool_first(self.steps),
            weights=tuple(self.weights),
            classes=self.shape[0],
            softmax=self.softmax,
        )

    def weight(self, layer: Any, role: str, *, parts: int = 1) -> list[tuple[int, int, int]]:
        """Register the layer's kernel or bias, in parts of whole rows.

        Returns:
            Index, first row and row after the last, for each part.
        """
        shape = tuple(int(n) for n in getattr(layer, role).shape)
        kind = INITIALIZERS.get(type(getattr(layer, f"{role}_initializer")).__name__, InitializerKind.NONE)
        # Keras's rule for fans: all but the last two dimensions are the receptive field.
        field = math.prod(shape[:-2])
        initializer = Initializer(kind=kind, fan_in=field * shape[max(len(shape) - 2, 0)], fan_out=field * shape[-1])
        rows = -(-shape[0] // parts)
        result = []
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            name = f"{layer.name}/{role}" + (f"[{first}:{last}]" if parts > 1 else "")
            result.append((len(self.weights), first, last))
            self.weights.append(Weight(name=name, shape=(last - first, *shape[1:]), initializer=initializer))
        self.sizes.append(math.prod(shape))
        return result

    def activate(self, function: str, where: str, *, last: bool) -> None:
        """Append an activation, or note the final softmax."""
        if function == "linear":
            return
        if function == "softmax":
            if not last or len(self.shape) != 1:
                raise ConfigError(f"{where}: softmax is supported only as the last activation. {SUPPORTED}")
            self.softmax = True
            return
        if function not in set(Function):
            raise ConfigError(f"{where}: activation {function!r} is not supported. {SUPPORTED}")
        self.steps.append(Activation(function=Function(function)))

    def plane(self) -> tuple[int, int, int]:
        """The current shape as (height, width, channels)."""
        height, width, channels = self.shape if len(self.shape) == 3 else (1, *self.shape)
        return height, width, channels


def _pool_first(steps: list[Step]) -> tuple[Step, ...]:
    """Move each ReLU behind the max pooling that follows it.

    ``pool(relu(x))`` and ``relu(pool(x))`` are equal, and so are their gradients: where they route them differently (a
    window without a positive value) both are zero. The second needs a quarter of the work and memory.
    """
    result = list(steps)
    for i in range(len(result) - 1):
        if result[i] == Activation(function=Function.RELU) and isinstance(result[i + 1], MaxPool):
            result[i], result[i + 1] = result[i + 1], result[i]
    return tuple(result)


def _refuse(where: str, option: str, value: object, supported: str) -> None:
    raise ConfigError(f"{where}: {option}={value!r} is not supported; supported is {supported}. {SUPPORTED}")


def _check_common(layer: Any, where: str) -> None:
    for option in (
        "kernel_regularizer",
        "bias_regularizer",
        "activity_regularizer",
        "kernel_constraint",
        "bias_constraint",
    ):
        if getattr(layer, option, None) is not None:
            _refuse(where, option, getattr(layer, option), "None (put the penalty into the round plan)")
    if not layer.trainable and layer.weights:
        _refuse(where, "trainable", False, "True")
    if getattr(layer, "dtype_policy", None) is not None and layer.dtype_policy.name != "float32":
        _refuse(where, "dtype", layer.dtype_policy.name, "float32")
    if getattr(layer, "lora_enabled", False):
        _refuse(where, "lora_rank", getattr(layer, "lora_rank", None), "None")
    if getattr(layer, "data_format", "channels_last") not in (None, "channels_last"):
        _refuse(where, "data_format", layer.data_format, "'channels_last'")


def _activation_name(layer: Any, where: str) -> str:
    function = layer.activation
    name = getattr(function, "__name__", type(function).__name__)
    # A user's own function may be called relu, too: only Keras's own function object counts.
    if getattr(keras.activations, name, None) is not function:
        _refuse(where, "activation", name, "one of Keras's own")
    return str(name)


def _read_dense(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    if len(reader.shape) != 1:
        raise ConfigError(f"{where}: input shape {reader.shape} is not supported; put a Flatten layer before it")
    inputs, units = reader.shape[0], int(layer.units)
    parts = reader.weight(layer, "kernel", parts=min(-(-inputs * units // PART), MAX_PARTS, inputs))
    bias = reader.weight(layer, "bias")[0][0] if layer.use_bias else None
    reader.steps.append(Dense(parts=tuple(parts), bias=bias, inputs=inputs, units=units))
    reader.shape = (int(layer.units),)
    reader.activate(_activation_name(layer, where), where, last=last)


def _read_conv(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    rank = layer.rank
    if len(reader.shape) != rank + 1:
        raise ConfigError(f"{where}: input shape {reader.shape} is not supported; it needs {rank + 1} dimensions")
    if layer.padding not in set(Padding):
        _refuse(where, "padding", layer.padding, "'valid' or 'same'")
    if set(layer.dilation_rate) != {1}:
        _refuse(where, "dilation_rate", layer.dilation_rate, "1")
    if layer.groups != 1:
        _refuse(where, "groups", layer.groups, "1")
    kernel = reader.weight(layer, "kernel")[0][0]
    bias = reader.weight(layer, "bias")[0][0] if layer.use_bias else None
    rows, columns = (1,) * (2 - rank) + tuple(int(n) for n in layer.kernel_size)
    down, right = (1,) * (2 - rank) + tuple(int(n) for n in layer.strides)
    reader.steps.append(
        Conv(
            kernel=kernel,
            bias=bias,
            shape=reader.plane(),
            size=(rows, columns),
            filters=int(layer.filters),
            strides=(down, right),
            padding=Padding(layer.padding),
        )
    )
    reader.shape = tuple(int(n) for n in layer.compute_output_shape((None, *reader.shape))[1:])
    reader.activate(_activation_name(layer, where), where, last=last)


def _read_pool(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    del last
    rank = len(layer.pool_size)
    if len(reader.shape) != rank + 1:
        raise ConfigError(f"{where}: input shape {reader.shape} is not supported; it needs {rank + 1} dimensions")
    if layer.padding not in set(Padding):
        _refuse(where, "padding", layer.padding, "'valid' or 'same'")
    rows, columns = (1,) * (2 - rank) + tuple(int(n) for n in layer.pool_size)
    down, right = (1,) * (2 - rank) + tuple(int(n) for n in layer.strides)
    reader.steps.append(
        MaxPool(shape=reader.plane(), size=(rows, columns), strides=(down, right), padding=Padding(layer.padding))
    )
    reader.shape = tuple(int(n) for n in layer.compute_output_shape((None, *reader.shape))[1:])


def _read_average(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    del last
    rank = 1 if type(layer) is _L.GlobalAveragePooling1D else 2
    if len(reader.shape) != rank + 1:
        raise ConfigError(f"{where}: input shape {reader.shape} is not supported; it needs {rank + 1} dimensions")
    if layer.keepdims:
        _refuse(where, "keepdims", True, "False")
    reader.steps.append(GlobalAverage(shape=reader.plane()))
    reader.shape = (reader.shape[-1],)


def _read_reshape(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    del last
    after = tuple(int(n) for n in layer.compute_output_shape((None, *reader.shape))[1:])
    if not 1 <= len(after) <= 3:
        raise ConfigError(f"{where}: output shape {after} is not supported; 1 to 3 dimensions are")
    reader.steps.append(Reshape(before=reader.shape, after=after))
    reader.shape = after


def _read_activation(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    reader.activate(_activation_name(layer, where), where, last=last)


def _read_relu(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    for option in ("max_value", "negative_slope", "threshold"):
        if getattr(layer, option):
            _refuse(where, option, getattr(layer, option), "the default")
    if layer.max_value is not None:
        _refuse(where, "max_value", layer.max_value, "None")
    reader.activate("relu", where, last=last)


def _read_softmax(reader: _Reader, layer: Any, where: str, last: bool) -> None:
    if layer.axis != -1:
        _refuse(where, "axis", layer.axis, "-1")
    reader.activate("softmax", where, last=last)


_READERS = {
    _L.Dense: _read_dense,
    _L.Conv1D: _read_conv,
    _L.Conv2D: _read_conv,
    _L.MaxPooling1D: _read_pool,
    _L.MaxPooling2D: _read_pool,
    _L.GlobalAveragePooling1D: _read_average,
    _L.GlobalAveragePooling2D: _read_average,
    _L.Flatten: _read_reshape,
    _L.Reshape: _read_reshape,
    _L.Activation: _read_activation,
    _L.ReLU: _read_relu,
    _L.Softmax: _read_softmax,
}
