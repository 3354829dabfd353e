"""The short way of reading a PUBLISH finds what paho finds, or leaves it to paho."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import client as paho
from paho.mqtt._packet import decode_publish

from fleetfed.broker.codec import decode, encode, frame
from fleetfed.broker.packets import V3, V5, PubAck, Publish
from fleetfed.broker.properties import Property
from fleetfed.shared.mqtt.frames import puback, publish, read_length, read_puback, read_publish

TOPICS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="+#\0"), min_size=1, max_size=20)


@given(
    topic=TOPICS,
    payload=st.binary(max_size=300),
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    mid=st.integers(1, 65535),
    version=st.sampled_from([V3, V5]),
    note=st.binary(max_size=200),
)
def test_it_finds_what_paho_finds(
    topic: str, payload: bytes, qos: int, retain: bool, mid: int, version: int, note: bytes
) -> None:
    properties = {Property.CORRELATION_DATA: note} if version == V5 and note else {}
    sent = Publish(
        topic=topic, payload=payload, qos=qos, retain=retain, packet_id=mid if qos else 0, properties=properties
    )
    raw = bytes(encode(sent, version))
    head = frame(memoryview(raw), 0, len(raw))
    assert head is not None
    body = bytearray(raw[head[0] :])
    found = read_publish(raw[0], body, version5=version == V5)
    assert found == (topic, mid if qos else 0, qos, retain, payload)
    theirs = decode_publish(raw[0], body, paho.MQTTv5 if version == V5 else paho.MQTTv311)
    assert (theirs.topic.decode(), theirs.mid, bytes(theirs.payload)) == (found[0], found[1], found[4])


@given(first=st.integers(0x30, 0x3F), body=st.binary(max_size=30), version5=st.booleans())
def test_garbage_is_left_to_paho_or_is_a_publish(first: int, body: bytes, version5: bool) -> None:
    found = read_publish(first, body, version5=version5)
    if found is not None:
        topic, mid, qos, retained, payload = found
        assert topic
        assert len(topic.encode()) + len(payload) + 2 <= len(body)
        assert (qos, retained) == (first >> 1 & 3, bool(first & 1))
        assert 0 <= mid < 65536


def test_an_empty_topic_and_one_that_is_not_text_are_left_to_paho() -> None:
    assert read_publish(0x32, b"\0\0\0\1hello", version5=False) is None
    assert read_publish(0x32, b"\0\1\xff\0\1hello", version5=False) is None
    assert read_publish(0x34, b"\0\1a\0\1hello", version5=False) is None


@given(st.integers(1, 65535))
def test_an_acknowledgement_is_one(mid: int) -> None:
    raw = puback(mid)
    for version in (V3, V5):
        packet = decode(raw[0], memoryview(raw)[2:], version)
        assert isinstance(packet, PubAck)
        assert (packet.packet_id, packet.code) == (mid, 0)


@given(
    topic=TOPICS,
    payload=st.binary(max_size=300) | st.just(bytes(20_000)),
    mid=st.integers(1, 65535),
    retain=st.booleans(),
    version=st.sampled_from([V3, V5]),
)
def test_a_message_is_one(topic: str, payload: bytes, mid: int, retain: bool, version: int) -> None:
    raw = publish(topic.encode(), payload, mid, retain=retain, version5=version == V5)
    head = frame(memoryview(raw), 0, len(raw))
    assert head is not None
    packet = decode(raw[0], memoryview(raw)[head[0] :], version)
    assert isinstance(packet, Publish)
    assert (packet.topic, bytes(packet.payload), packet.packet_id) == (topic, payload, mid)
    assert (packet.qos, packet.retain, packet.dup) == (1, retain, False)


@given(mid=st.integers(1, 65535), code=st.sampled_from([0, 0x10, 0x80, 0x87, 0x97]), version=st.sampled_from([V3, V5]))
def test_a_confirmation_is_understood(mid: int, code: int, version: int) -> None:
    raw = bytes(encode(PubAck(packet_id=mid, code=code if version == V5 else 0), version))
    assert read_puback(raw[2:]) == (mid, code if version == V5 else 0)
    assert read_puback(raw[2:3]) is None


@given(st.binary(max_size=6))
def test_a_length_is_read_or_is_none(encoded: bytes) -> None:
    found = read_length(encoded)
    if found is None:
        assert all(byte >= 0x80 for byte in encoded[:4])
    else:
        length, size = found
        assert 0 <= length < 1 << 28
        assert 1 <= size <= 4
