"""The two packets that a gateway sees a thousand of per round, read and written without a detour.

paho copies a payload five times on its way in and builds an object for each property and each acknowledgement. What is
not exactly as expected here is left to it.
"""

from __future__ import annotations

from typing import Final

_PUBACK: Final = 0x40
_MOST_LENGTH_BYTES: Final = 4
"""MQTT 5 section 1.5.5."""

Publish = tuple[str, int, int, bool, bytes]
"""Topic, packet identifier (0 at QoS 0), QoS, whether it is a retained copy, payload."""


def read_publish(first: int, packet: bytes | bytearray, *, version5: bool) -> Publish | None:
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
        length = shift = 0
        for _ in range(_MOST_LENGTH_BYTES):
            if at >= len(packet):
                return None
            byte = packet[at]
            length |= (byte & 0x7F) << shift
            shift += 7
            at += 1
            if byte < 0x80:
                break
        else:
            return None
        at += length
        if at > len(packet):
            return None
    mid = int.from_bytes(packet[end : end + 2], "big") if qos else 0
    with memoryview(packet) as view:
        return topic, mid, qos, bool(first & 1), bytes(view[at:])


def puback(mid: int) -> bytes:
    """A PUBACK that says success (MQTT 5 section 3.4.2.1: without a reason code it does; MQTT 3.1.1 has none)."""
    return bytes((_PUBACK, 2, mid >> 8, mid & 0xFF))
