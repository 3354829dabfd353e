"""The codec: inverse of itself, indifferent to how bytes arrive, and closed over one exception."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.broker.acl import Acl
from fleetfed.broker.codec import decode, encode, frame
from fleetfed.broker.config import Limits
from fleetfed.broker.core import Broker
from fleetfed.broker.packets import (
    V3,
    V5,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
    Will,
)
from fleetfed.broker.properties import PacketError, Property, ReasonCode, read_varint, write_varint
from fleetfed.shared.errors import LocalProtocolError

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
topic = st.text(st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=20)
identifiers = st.integers(1, 0xFFFF)
pairs = st.lists(st.tuples(text, text), min_size=1, max_size=3).map(tuple)
VALUES: dict[Property, st.SearchStrategy[Any]] = {
    Property.PAYLOAD_FORMAT: st.integers(0, 1),
    Property.MESSAGE_EXPIRY: st.integers(0, 2**32 - 1),
    Property.CONTENT_TYPE: text,
    Property.RESPONSE_TOPIC: text,
    Property.CORRELATION_DATA: st.binary(max_size=20),
    Property.SESSION_EXPIRY: st.integers(0, 2**32 - 1),
    Property.RECEIVE_MAXIMUM: st.integers(1, 0xFFFF),
    Property.MAXIMUM_PACKET_SIZE: st.integers(1, 2**32 - 1),
    Property.WILL_DELAY: st.integers(0, 2**32 - 1),
    Property.REASON_STRING: text,
    Property.SERVER_KEEP_ALIVE: st.integers(0, 0xFFFF),
    Property.ASSIGNED_CLIENT_ID: text,
    Property.SUBSCRIPTION_ID: st.integers(1, 268_435_455),
    Property.USER_PROPERTY: pairs,
}


def props(version: int, *names: Property) -> st.SearchStrategy[dict[Property, Any]]:
    if version == V3:
        return st.just({})
    return st.fixed_dictionaries({}, optional={name: VALUES[name] for name in names})


PUBLISH = (
    Property.PAYLOAD_FORMAT,
    Property.MESSAGE_EXPIRY,
    Property.CONTENT_TYPE,
    Property.RESPONSE_TOPIC,
    Property.CORRELATION_DATA,
    Property.USER_PROPERTY,
)


@st.composite
def packets(draw: st.DrawFn, version: int) -> Packet:
    reason = props(version, Property.REASON_STRING, Property.USER_PROPERTY)
    code = st.integers(0, 255) if version == V5 else st.just(0)
    kind = draw(st.sampled_from(range(12)))
    if kind == 0:
        will = draw(
            st.none()
            | st.builds(
                Will,
                topic=topic,
                payload=st.binary(max_size=50),
                qos=st.integers(0, 2),
                retain=st.booleans(),
                properties=props(version, *PUBLISH, Property.WILL_DELAY),
            )
        )
        username = draw(st.none() | text)
        password = draw(st.none() | st.binary(max_size=20)) if username is not None or version == V5 else None
        return Connect(
            version=version,
            client_id=draw(text),
            clean_start=draw(st.booleans()),
            keepalive=draw(st.integers(0, 0xFFFF)),
            username=username,
            password=password,
            will=will,
            properties=draw(props(version, Property.SESSION_EXPIRY, Property.RECEIVE_MAXIMUM, Property.USER_PROPERTY)),
        )
    if kind == 1:
        names = (Property.ASSIGNED_CLIENT_ID, Property.SERVER_KEEP_ALIVE, Property.MAXIMUM_PACKET_SIZE)
        return ConnAck(
            session_present=draw(st.booleans()), code=draw(st.integers(0, 255)), properties=draw(props(version, *names))
        )
    if kind == 2:
        qos = draw(st.integers(0, 2))
        return Publish(
            topic=draw(topic),
            payload=draw(st.binary(max_size=300)),
            qos=qos,
            retain=draw(st.booleans()),
            dup=draw(st.booleans()) if qos else False,
            packet_id=draw(identifiers) if qos else 0,
            properties=draw(props(version, *PUBLISH)),
        )
    if kind in (3, 4, 5, 6):
        made: type[PubAck] | type[PubRec] | type[PubRel] | type[PubComp] = (PubAck, PubRec, PubRel, PubComp)[kind - 3]
        return made(packet_id=draw(identifiers), code=draw(code), properties=draw(reason))
    if kind == 7:
        flag = st.booleans() if version == V5 else st.just(False)
        item = st.builds(
            Subscription,
            topic_filter=text,
            qos=st.integers(0, 2),
            no_local=flag,
            retain_as_published=flag,
            retain_handling=st.integers(0, 2) if version == V5 else st.just(0),
        )
        return Subscribe(
            packet_id=draw(identifiers),
            subscriptions=tuple(draw(st.lists(item, min_size=1, max_size=4))),
            properties=draw(props(version, Property.SUBSCRIPTION_ID, Property.USER_PROPERTY)),
        )
    if kind == 8:
        codes = draw(st.lists(st.integers(0, 255), max_size=4))
        return SubAck(packet_id=draw(identifiers), codes=tuple(codes), properties=draw(reason))
    if kind == 9:
        filters = draw(st.lists(text, min_size=1, max_size=4))
        return Unsubscribe(
            packet_id=draw(identifiers), filters=tuple(filters), properties=draw(props(version, Property.USER_PROPERTY))
        )
    if kind == 10:
        codes = draw(st.lists(st.integers(0, 255), max_size=4)) if version == V5 else []
        return UnsubAck(packet_id=draw(identifiers), codes=tuple(codes), properties=draw(reason))
    return draw(
        st.sampled_from([PingReq(), PingResp()]) | st.builds(Disconnect, code=code, properties=reason)  # type: ignore[arg-type]
    )


versioned = st.sampled_from([V3, V5]).flatmap(lambda version: st.tuples(st.just(version), packets(version)))


@given(versioned)
def test_decode_is_the_inverse_of_encode(case: tuple[int, Packet]) -> None:
    version, packet = case
    data = encode(packet, version)
    header = frame(data, 0, len(data))
    assert header is not None
    start, length = header
    assert start + length == len(data)
    again = decode(data[0], data[start:], version)
    assert again == packet
    assert encode(again, version) == data


@given(versioned, st.data())
def test_a_truncated_or_extended_packet_is_one_error(case: tuple[int, Packet], data: st.DataObject) -> None:
    version, packet = case
    encoded = encode(packet, version)
    header = frame(encoded, 0, len(encoded))
    assert header is not None
    body = encoded[header[0] :]
    cut = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=3))
    with contextlib.suppress(PacketError):
        decode(encoded[0], cut, version)


@given(st.integers(0, 255), st.binary(max_size=200), st.sampled_from([V3, V5]))
def test_garbage_is_a_packet_or_one_error(first: int, body: bytes, version: int) -> None:
    with contextlib.suppress(PacketError):
        decode(first, body, version)


@given(st.binary(max_size=12))
def test_framing_garbage_is_a_frame_or_one_error(data: bytes) -> None:
    try:
        found = frame(data, 0, len(data))
    except PacketError:
        return
    assert found is None or (2 <= found[0] <= 5 and found[1] <= 268_435_455)


def make_broker() -> Broker:
    return Broker(limits=Limits(), acl=None, make_id=lambda: "made", now=0.0)


HELLO = encode(Connect(version=V5, client_id="a"), V5)


@given(st.lists(packets(V5), max_size=5), st.data())
def test_a_byte_at_a_time_is_the_same_as_all_at_once(sent: list[Packet], data: st.DataObject) -> None:
    stream = HELLO + b"".join(encode(packet, V5) for packet in sent)
    size = data.draw(st.sampled_from([1, 2, 7, 1000]))
    outputs = []
    for step in (len(stream), size):
        connection = make_broker().open(None, 0.0)
        for at in range(0, len(stream), step):
            connection.receive_data(stream[at : at + step], 0.0)
        output = b""
        while chunk := connection.data_to_send():
            output += b"".join(chunk)
        outputs.append((output, connection.closing))
    assert outputs[0] == outputs[1]


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([1, 3, 1000]))
def test_a_connection_survives_any_bytes(data: bytes, connected: bool, step: int) -> None:
    broker = make_broker()
    connection = broker.open(None, 0.0)
    stream = (HELLO if connected else b"") + data
    for at in range(0, len(stream), step):
        connection.receive_data(stream[at : at + step], 0.0)
    connection.data_to_send()
    connection.connection_lost(1.0)
    broker.handle_timer(1000.0)
    assert broker.statistics()["clients_connected"] == 0


@given(st.integers(0, 268_435_455))
def test_lengths_have_one_form(value: int) -> None:
    data = write_varint(value)
    assert read_varint(data, 0) == (value, len(data))


@pytest.mark.parametrize("data", [b"\x80\x00", b"\xff\xff\xff\xff", b"\x80"])
def test_other_forms_of_a_length_are_refused(data: bytes) -> None:
    with pytest.raises(PacketError):
        read_varint(data, 0)


def test_a_length_beyond_mqtt_is_our_fault() -> None:
    with pytest.raises(LocalProtocolError):
        write_varint(268_435_456)


# Bytes from the specifications: figure 3.x of MQTT 3.1.1 and MQTT 5.
VECTORS = [
    (V3, "1010 0004 4d515454 04 02 003c 0004 74657374", Connect(version=V3, client_id="test", keepalive=60)),
    (V3, "2002 0100", ConnAck(session_present=True, code=0)),
    (V3, "320a 0003 612f62 0001 6869 6a", Publish(topic="a/b", payload=b"hij", qos=1, packet_id=1)),
    (V5, "330b 0003 612f62 000a 00 6869 6a", Publish(topic="a/b", payload=b"hij", qos=1, retain=True, packet_id=10)),
    (V3, "8208 000a 0003 612f62 01", Subscribe(packet_id=10, subscriptions=(Subscription(topic_filter="a/b", qos=1),))),
    (V5, "4004 0001 10 00", PubAck(packet_id=1, code=0x10)),
    (V5, "e002 8e 00", Disconnect(code=ReasonCode.SESSION_TAKEN_OVER)),
]


@pytest.mark.parametrize(("version", "data", "packet"), VECTORS)
def test_known_bytes(version: int, data: str, packet: Packet) -> None:
    raw = bytes.fromhex(data)
    header = frame(raw, 0, len(raw))
    assert header is not None
    assert header[0] + header[1] == len(raw)
    assert decode(raw[0], raw[header[0] :], version) == packet


@pytest.mark.parametrize(
    ("version", "data", "code"),
    [
        (V3, "10 0004 4d515454 03 02 003c 0000", ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (V3, "10 0006 4d5149736470 03 02 003c 0000", ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (V3, "36 0001 61 0001", ReasonCode.MALFORMED_PACKET),
        (V3, "32 0001 61 0000", ReasonCode.PROTOCOL_ERROR),
        (V3, "30 0001 2b", ReasonCode.TOPIC_NAME_INVALID),
        (V3, "30 0000", ReasonCode.TOPIC_NAME_INVALID),
        (V3, "30 0002 c328", ReasonCode.MALFORMED_PACKET),
        (V3, "30 0001 00", ReasonCode.MALFORMED_PACKET),
        (V3, "80 0001 0001 61 00", ReasonCode.MALFORMED_PACKET),
        (V3, "82 0001", ReasonCode.PROTOCOL_ERROR),
        (V3, "82 0001 0001 61 03", ReasonCode.MALFORMED_PACKET),
        (V5, "30 0001 61 03 01 02", ReasonCode.MALFORMED_PACKET),
        (V5, "30 0001 61 02 01 02", ReasonCode.PROTOCOL_ERROR),
        (V5, "30 0001 61 04 01 00 01 00", ReasonCode.PROTOCOL_ERROR),
        (V5, "30 0001 61 05 11 00000001", ReasonCode.MALFORMED_PACKET),
        (V5, "f0", ReasonCode.PROTOCOL_ERROR),
        (V3, "00", ReasonCode.PROTOCOL_ERROR),
        (V3, "c0 00", ReasonCode.MALFORMED_PACKET),
    ],
)
def test_broken_rules_have_their_code(version: int, data: str, code: ReasonCode) -> None:
    raw = bytes.fromhex(data)
    with pytest.raises(PacketError) as caught:
        decode(raw[0], raw[1:], version)
    assert caught.value.code is code


def test_an_empty_acl_refuses_everything() -> None:
    broker = Broker(limits=Limits(), acl=Acl(), make_id=lambda: "made", now=0.0)
    connection = broker.open("d-1", 0.0)
    connection.receive_data(HELLO + encode(Publish(topic="a", payload=b"", qos=1, packet_id=1), V5), 0.0)
    assert b"".join(connection.data_to_send()).endswith(b"\x40\x03\0\x01\x87")
