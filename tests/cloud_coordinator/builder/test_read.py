"""What is not proven is refused by name, before anything is converted."""

from __future__ import annotations

from typing import Any

import pytest

from fleetfed.shared.errors import ConfigError

pytestmark = [pytest.mark.tensorflow, pytest.mark.filterwarnings("ignore")]


def read(model: Any) -> Any:
    from fleetfed.cloud_coordinator.builder.read import read_network

    return read_network(model)


def chain(shape: tuple[int, ...], *layers: Any, flatten: bool = True) -> Any:
    import keras

    tail = [keras.layers.Flatten(), keras.layers.Dense(3)] if flatten else []
    return keras.Sequential([keras.Input(shape), *layers, *tail])


IMAGE, SEQUENCE, VECTOR = (8, 8, 2), (12, 3), (6,)
LAYERS = [
    ("BatchNormalization", IMAGE, {}),
    ("LayerNormalization", IMAGE, {}),
    ("Dropout", VECTOR, {"rate": 0.5}),
    ("SpatialDropout2D", IMAGE, {"rate": 0.5}),
    ("GaussianNoise", VECTOR, {"stddev": 0.1}),
    ("DepthwiseConv2D", IMAGE, {"kernel_size": 3}),
    ("SeparableConv2D", IMAGE, {"filters": 2, "kernel_size": 3}),
    ("Conv2DTranspose", IMAGE, {"filters": 2, "kernel_size": 3}),
    ("Conv3D", (4, 4, 4, 1), {"filters": 2, "kernel_size": 3}),
    ("AveragePooling2D", IMAGE, {"pool_size": 2}),
    ("AveragePooling1D", SEQUENCE, {"pool_size": 2}),
    ("GlobalMaxPooling2D", IMAGE, {}),
    ("LSTM", SEQUENCE, {"units": 4}),
    ("GRU", SEQUENCE, {"units": 4}),
    ("SimpleRNN", SEQUENCE, {"units": 4}),
    ("Embedding", VECTOR, {"input_dim": 5, "output_dim": 2}),
    ("LeakyReLU", VECTOR, {}),
    ("PReLU", VECTOR, {}),
    ("ELU", VECTOR, {}),
    ("UpSampling2D", IMAGE, {}),
    ("ZeroPadding2D", IMAGE, {}),
    ("Cropping2D", IMAGE, {}),
    ("Permute", SEQUENCE, {"dims": (2, 1)}),
    ("Rescaling", VECTOR, {"scale": 2.0}),
]


@pytest.mark.parametrize(("name", "shape", "options"), LAYERS, ids=[each[0] for each in LAYERS])
def test_an_unproven_layer_is_refused_by_name(name, shape, options):
    import keras

    layer = getattr(keras.layers, name)(**options, name="culprit")
    if len(shape) > 3:
        with pytest.raises(ConfigError, match="input shape"):
            read(chain(shape, layer))
        return
    with pytest.raises(ConfigError, match=rf"layer 'culprit' \({name}\) is not supported.*Supported: Dense, Conv1D"):
        read(chain(shape, layer))


OPTIONS = [
    ("Dense", VECTOR, {"units": 4, "activation": "gelu"}, "activation 'gelu'"),
    ("Dense", VECTOR, {"units": 4, "activation": "leaky_relu"}, "activation 'leaky_relu'"),
    ("Dense", VECTOR, {"units": 4, "activation": "relu6"}, "activation 'relu6'"),
    ("Dense", VECTOR, {"units": 4, "activation": "softmax"}, "softmax is supported only as the last"),
    ("Dense", VECTOR, {"units": 4, "kernel_regularizer": "l2"}, "kernel_regularizer="),
    ("Dense", VECTOR, {"units": 4, "bias_regularizer": "l1"}, "bias_regularizer="),
    ("Dense", VECTOR, {"units": 4, "activity_regularizer": "l2"}, "activity_regularizer="),
    ("Dense", VECTOR, {"units": 4, "kernel_constraint": "non_neg"}, "kernel_constraint="),
    ("Dense", VECTOR, {"units": 4, "trainable": False}, "trainable=False"),
    ("Dense", VECTOR, {"units": 4, "lora_rank": 2}, "lora_rank="),
    ("Dense", VECTOR, {"units": 4, "dtype": "float16"}, "dtype='float16'"),
    ("Dense", VECTOR, {"units": 4, "dtype": "mixed_float16"}, "dtype='mixed_float16'"),
    ("Dense", SEQUENCE, {"units": 4}, "put a Flatten layer before it"),
    ("Conv2D", IMAGE, {"filters": 4, "kernel_size": 3, "dilation_rate": 2}, "dilation_rate="),
    ("Conv2D", IMAGE, {"filters": 4, "kernel_size": 3, "groups": 2}, "groups=2"),
    ("Conv2D", IMAGE, {"filters": 4, "kernel_size": 2, "data_format": "channels_first"}, "data_format="),
    ("Conv1D", SEQUENCE, {"filters": 4, "kernel_size": 3, "padding": "causal"}, "padding='causal'"),
    ("Conv1D", SEQUENCE, {"filters": 4, "kernel_size": 3, "activation": "swish"}, "activation 'silu'"),
    ("MaxPooling2D", IMAGE, {"data_format": "channels_first"}, "data_format="),
    ("GlobalAveragePooling2D", IMAGE, {"keepdims": True}, "keepdims=True"),
    ("Flatten", IMAGE, {"data_format": "channels_first"}, "data_format="),
    ("ReLU", VECTOR, {"max_value": 6.0}, "max_value="),
    ("ReLU", VECTOR, {"max_value": 0.0}, "max_value="),
    ("ReLU", VECTOR, {"negative_slope": 0.1}, "negative_slope="),
    ("ReLU", VECTOR, {"threshold": 0.1}, "threshold="),
    ("Activation", VECTOR, {"activation": "elu"}, "activation 'elu'"),
    ("Reshape", IMAGE, {"target_shape": (2, 2, 4, 8)}, "output shape"),
]


@pytest.mark.parametrize(("name", "shape", "options", "message"), OPTIONS, ids=[each[3] for each in OPTIONS])
def test_an_unproven_option_is_refused_with_its_value(name, shape, options, message):
    import keras

    layer = getattr(keras.layers, name)(**options, name="culprit")
    with pytest.raises(ConfigError) as caught:
        read(chain(shape, layer))
    assert f"layer 'culprit' ({name})" in str(caught.value)
    assert message in str(caught.value)


def test_a_function_that_only_bears_a_known_name_is_refused():
    import keras

    def relu(x: Any) -> Any:
        return 2 * x

    with pytest.raises(ConfigError, match="one of Keras's own"):
        read(chain(VECTOR, keras.layers.Dense(4, activation=relu)))


def test_a_subclass_of_a_supported_layer_is_refused():
    import keras

    class Doubled(keras.layers.Dense):
        def call(self, inputs: Any) -> Any:
            return 2 * super().call(inputs)

    with pytest.raises(ConfigError, match="Doubled"):
        read(chain(VECTOR, Doubled(4)))


def test_only_a_chain_of_layers_is_read():
    import keras

    inputs = keras.Input((4,))
    dense = keras.layers.Dense(4)
    twice = keras.Model(inputs, dense(dense(inputs)))
    branch = keras.Model(inputs, keras.layers.Add()([keras.layers.Dense(3)(inputs), keras.layers.Dense(3)(inputs)]))
    operation = keras.Model(inputs, keras.layers.Dense(3)(keras.ops.sin(inputs)))
    early_exit = keras.layers.Dense(3)(inputs)
    two_outputs = keras.Model(inputs, [early_exit, keras.layers.Dense(2)(early_exit)])
    two_inputs = keras.Model([inputs, keras.Input((2,))], keras.layers.Dense(3)(inputs))
    nested = chain((4,), chain((4,), flatten=True))
    for model in (twice, branch, operation, two_outputs, two_inputs, nested):
        with pytest.raises(ConfigError):
            read(model)


def test_the_ends_of_the_model_are_checked():
    import keras

    dense = keras.layers.Dense
    for model, message in (
        (keras.Sequential([dense(3)]), "fixed shape"),
        (chain((None, 3), keras.layers.GlobalAveragePooling1D()), "fixed dimensions"),
        (chain((4,), dense(1), flatten=False), "1 classes"),
        (chain((4,), dense(3, activation="sigmoid"), flatten=False), "last activation must be softmax or linear"),
        (chain((4, 4, 1), keras.layers.Conv2D(2, 3), flatten=False), "one score per class"),
        (chain((4,), keras.layers.Activation("softmax"), flatten=False), "no trainable weights"),
        (keras.Sequential([keras.Input((4,), dtype="int32"), dense(3)]), "input dtype int32"),
        ("model", "expected a Keras model"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(model)


def test_a_large_kernel_is_kept_in_parts_that_are_its_rows_in_order():
    network = read(chain((1024,), __import__("keras").layers.Dense(512, name="big")))
    parts = [weight for weight in network.weights if weight.name.startswith("big/kernel")]
    assert [weight.shape for weight in parts] == [(128, 512)] * 8
    assert [weight.name for weight in parts[:2]] == ["big/kernel[0:128]", "big/kernel[128:256]"]
    assert {(weight.initializer.fan_in, weight.initializer.fan_out) for weight in parts} == {(1024, 512)}
