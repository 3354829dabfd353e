from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.codec import Length, Range, decode, encode, unpack


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    text: Annotated[str, Length(0, 20)]


@dataclass(frozen=True)
class Sample:
    count: Annotated[int, Range(0, 100)]
    ratio: Annotated[float, Range(-1.0, 1.0)]
    raw: Annotated[bytes, Length(0, 16)]
    colour: Colour
    inner: Inner
    many: Annotated[tuple[Inner, ...], Length(0, 3)] = ()
    maybe: Colour | None = None
    named: dict[str, int] = field(default_factory=dict)
    flag: bool = False


samples = st.builds(
    Sample,
    count=st.integers(0, 100),
    ratio=st.floats(-1, 1),
    raw=st.binary(max_size=16),
    colour=st.sampled_from(Colour),
    inner=st.builds(Inner, text=st.text(max_size=20)),
    many=st.lists(st.builds(Inner, text=st.text(max_size=20)), max_size=3).map(tuple),
    maybe=st.none() | st.sampled_from(Colour),
    named=st.dictionaries(st.text(max_size=5), st.integers(-5, 5), max_size=3),
    flag=st.booleans(),
)
GOOD = Sample(count=1, ratio=0.5, raw=b"x", colour=Colour.RED, inner=Inner("i"))


@given(samples)
def test_a_value_survives_the_wire_and_encodes_to_the_same_bytes_again(sample: Sample) -> None:
    data = encode(sample)
    decoded = decode(Sample, data, limit=10_000)
    assert decoded == sample
    assert encode(decoded) == data


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(Sample, data, limit=10_000)


@given(samples, st.data())
def test_a_truncated_message_is_refused(sample: Sample, data: st.DataObject) -> None:
    encoded = encode(sample)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(RemoteProtocolError):
        decode(Sample, encoded[:cut], limit=10_000)


def change(**fields: Any) -> bytes:
    plain = msgpack.unpackb(encode(GOOD))
    plain.update(fields)
    packed = msgpack.packb(plain)
    assert isinstance(packed, bytes)
    return packed


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"count": 101}, RejectReason.OUT_OF_RANGE),
        ({"count": -1}, RejectReason.OUT_OF_RANGE),
        ({"count": True}, RejectReason.MALFORMED),
        ({"count": 1.0}, RejectReason.MALFORMED),
        ({"count": "1"}, RejectReason.MALFORMED),
        ({"ratio": float("nan")}, RejectReason.OUT_OF_RANGE),
        ({"ratio": float("inf")}, RejectReason.OUT_OF_RANGE),
        ({"raw": "text"}, RejectReason.MALFORMED),
        ({"raw": b"x" * 17}, RejectReason.OUT_OF_RANGE),
        ({"colour": "green"}, RejectReason.MALFORMED),
        ({"inner": None}, RejectReason.MALFORMED),
        ({"inner": {}}, RejectReason.MALFORMED),
        ({"many": [{"text": "a"}] * 4}, RejectReason.OUT_OF_RANGE),
        ({"many": {"text": "a"}}, RejectReason.MALFORMED),
        ({"named": {"a": "b"}}, RejectReason.MALFORMED),
    ],
)
def test_a_field_of_the_wrong_type_or_size_is_refused(fields: dict[str, Any], reason: RejectReason) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(Sample, change(**fields), limit=10_000)
    assert caught.value.reason is reason


def test_a_newer_peer_may_say_more_and_an_optional_field_may_be_missing() -> None:
    plain = msgpack.unpackb(encode(GOOD))
    plain["hint"] = {"from": "the future"}
    del plain["flag"]
    assert decode(Sample, msgpack.packb(plain), limit=10_000) == GOOD


def test_a_missing_field_is_refused() -> None:
    plain = msgpack.unpackb(encode(GOOD))
    del plain["count"]
    with pytest.raises(RemoteProtocolError, match="count is missing"):
        decode(Sample, msgpack.packb(plain), limit=10_000)


def test_a_message_over_its_limit_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack(b"\x00" * 11, limit=10)
    assert caught.value.reason is RejectReason.TOO_LARGE


def test_a_length_bomb_allocates_nothing() -> None:
    claims_four_billion_items = b"\xdd\xff\xff\xff\xff"
    with pytest.raises(RemoteProtocolError):
        unpack(claims_four_billion_items, limit=100)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        unpack(b"\x91" * 5000 + b"\x00", limit=10_000)


def test_every_wire_message_has_a_working_schema() -> None:
    from fleetfed.shared.wire import messages

    classes = [cls for cls in vars(messages).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)]
    assert len(classes) > 15
    for cls in classes:
        with pytest.raises(RemoteProtocolError):
            decode(cls, encode(Inner("none of its fields")), limit=1000) if any(
                f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
                for f in dataclasses.fields(cls)
            ) else decode(cls, b"\x91\x00", limit=1000)
