"""The two packets that a gateway sees thousands of per round, read and written without a detour.

paho copies a payload five times on its way in and builds an object for each property and each acknowledgement. What is
not exactly as expected here is left to it.
"""

from __future__ import annotations

from typing import Final

PUBLISH: Final = 0x30
PUBACK: Final = 0x40
DISCONNECT: Final = 0xE0
"""First bytes, without flags (MQTT 5 section 2.1.2)."""
LONGEST_LENGTH: Final = 4
"""Bytes of a variable byte integer (MQTT 5 section 1.5.5)."""

Publish = tuple[str, int, int, bool, bytes]
"""Topic, packet identifier (0 at QoS 0), QoS, whether it is a retained copy, payload."""


def read_publish(first: int, packet: bytes | bytearray | memoryview, *, version5: bool) -> Publish | None:
    """Read a PUBLISH of QoS 0 or 1 (MQTT 5 section 3.3).

    Args:
        first: its first byte.
        packet: what follows the remaining length.
        version5: whether it has properties, which are passed over.

    Returns:
        None for one that paho should look at: QoS 2, a topic that is empty or not text, a packet that is too short.
    """
    qos = first >> 1 & 3
    end = 2 + int.from_bytes(packet[:2], "big")
    at = end + (2 if qos else 0)
    if qos > 1 or not 2 < end <= len(packet) or at > len(packet):
        return None
    try:
        topic = str(packet[2:end], "utf-8")
    except UnicodeDecodeError:
        return None
    if version5:
        properties = read_length(packet[at : at + LONGEST_LENGTH])
        if properties is None:
            return None
        at += sum(properties)
        if at > len(packet):
            return None
    mid = int.from_bytes(packet[end : end + 2], "big") if qos else 0
    return topic, mid, qos, bool(first & 1), bytes(memoryview(packet)[at:])


def read_puback(packet: bytes | bytearray | memoryview) -> tuple[int, int] | None:
    """Read what follows the remaining length of a PUBACK (MQTT 5 section 3.4, MQTT 3.1.1 section 3.4).

    Returns:
        Packet identifier and reason code, 0 where it has none; None for one that is too short.
    """
    if len(packet) < 2:
        return None
    return int.from_bytes(packet[:2], "big"), packet[2] if len(packet) > 2 else 0


def read_length(encoded: bytes | bytearray | memoryview) -> tuple[int, int] | None:
    """Read a variable byte integer (MQTT 5 section 1.5.5).

    Args:
        encoded: begins with it.

    Returns:
        The number and the bytes that it takes; None where its end is not among the first four.
    """
    length = 0
    for at, byte in enumerate(encoded[:LONGEST_LENGTH]):
        length |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            return length, at + 1
    return None


def publish(topic: bytes, payload: bytes, mid: int, *, retain: bool, version5: bool) -> bytes:
    """A PUBLISH of QoS 1 without properties (MQTT 5 section 3.3).

    Args:
        topic: UTF-8, at most 65535 bytes, without wildcards.
        payload: what it carries.
        mid: packet identifier, not 0.
        retain: whether the broker keeps it.
        version5: MQTT 5, or else 3.1.1.
    """
    name, number = len(topic).to_bytes(2, "big") + topic, mid.to_bytes(2, "big")
    return whole(PUBLISH | 2 | retain, b"".join((name, number, b"\0" if version5 else b"", payload)))


def whole(first: int, rest: bytes | bytearray | memoryview) -> bytes:
    """A packet of its first byte and what follows the remaining length."""
    head, length = bytearray((first,)), len(rest)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, rest))


def puback(mid: int) -> bytes:
    """A PUBACK that says success (MQTT 5 section 3.4.2.1: without a reason code it does; MQTT 3.1.1 has none)."""
    return bytes((PUBACK, 2, mid >> 8, mid & 0xFF))
