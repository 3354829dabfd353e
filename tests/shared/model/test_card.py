import contextlib
import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator import zoo
from fleetfed.shared.errors import ConfigError, FleetFedError, RejectReason, RemoteProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire import limits

CARD = zoo.load_card("digits")
RAW = CARD.encode()


def with_fields(**changes: object) -> bytes:
    return msgpack.packb(msgpack.unpackb(RAW) | changes)


def test_encode_and_decode_are_inverse_and_deterministic():
    assert ModelCard.decode(RAW) == CARD
    assert ModelCard.decode(RAW).encode() == RAW
    assert CARD.parameters == 6090
    assert CARD.example_size == 64


def test_unknown_fields_of_a_newer_builder_are_ignored():
    assert ModelCard.decode(with_fields(colour="green")) == CARD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, RejectReason.OUT_OF_RANGE),
        ({"name": "Digits"}, RejectReason.MALFORMED),
        ({"name": "../etc"}, RejectReason.MALFORMED),
        ({"name": ""}, RejectReason.OUT_OF_RANGE),
        ({"classes": 1}, RejectReason.OUT_OF_RANGE),
        ({"classes": True}, RejectReason.MALFORMED),
        ({"input_dtype": "uint8"}, RejectReason.MALFORMED),
        ({"input_shape": []}, RejectReason.OUT_OF_RANGE),
        ({"input_shape": [8, 0, 1]}, RejectReason.OUT_OF_RANGE),
        ({"class_names": ["zero"]}, RejectReason.MALFORMED),
        ({"initializers": msgpack.unpackb(RAW)["initializers"][:1]}, RejectReason.MALFORMED),
        ({"signatures": ["infer"]}, RejectReason.MALFORMED),
        ({"layout": bytes(32)}, RejectReason.MALFORMED),
        ({"layout": bytes(31)}, RejectReason.OUT_OF_RANGE),
        ({"file_bytes": 100}, RejectReason.MALFORMED),
        ({"file_bytes": limits.MAX_BLOB + 1}, RejectReason.OUT_OF_RANGE),
        ({"batch": 0}, RejectReason.OUT_OF_RANGE),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(changes, reason):
    with pytest.raises(RemoteProtocolError) as caught:
        ModelCard.decode(with_fields(**changes))
    assert caught.value.reason is reason


def test_a_moved_tensor_is_refused_by_the_layout_hash():
    tensors = (dataclasses.replace(CARD.tensors[0], offset=CARD.tensors[0].offset - 4), *CARD.tensors[1:])
    with pytest.raises(RemoteProtocolError, match="layout hash"):
        ModelCard.decode(dataclasses.replace(CARD, tensors=tensors).encode())


def test_an_oversized_card_is_refused_unread():
    with pytest.raises(RemoteProtocolError) as caught:
        ModelCard.decode(b"\x00" * (limits.MAX_MANIFEST + 1))
    assert caught.value.reason is RejectReason.TOO_LARGE


@given(st.data())
def test_damaged_bytes_decode_or_raise_the_documented_error(data):
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(raw)))
    for candidate in (bytes(raw), bytes(raw[:end])):
        with contextlib.suppress(RemoteProtocolError):
            ModelCard.decode(candidate)


def test_a_file_of_another_length_or_kind_is_not_the_cards():
    with pytest.raises(ConfigError, match="bytes"):
        CARD.check_file(b"\x1c\x00\x00\x00TFL3", CARD.file_bytes - 1)
    with pytest.raises(FleetFedError, match=r"not a \.tflite"):
        CARD.check_file(b"\x1c\x00\x00\x00ELF3", CARD.file_bytes)
