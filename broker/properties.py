"""MQTT primitive types and the properties of MQTT 5: bytes to values and back.

Pure functions. Every reader takes ``(buffer, position)`` and returns ``(value, next position)``; the only exception
that leaves this module is `PacketError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError

Buffer = bytes | bytearray | memoryview
"""What carries bytes without a copy."""

PropertyValue = int | str | bytes | tuple[tuple[str, str], ...]
Properties = Mapping[int, PropertyValue]
"""Property identifier to value; user properties are a tuple of pairs, in order."""

NO_PROPERTIES: Final[Properties] = {}


class ReasonCode(IntEnum):
    """The reason codes of MQTT 5 §2.4 that this broker sends or tells apart."""

    SUCCESS = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    UNSPECIFIED = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_ID_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_ID_IN_USE = 0x91
    PACKET_ID_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    QUOTA_EXCEEDED = 0x97
    SUBSCRIPTION_ID_NOT_SUPPORTED = 0xA1


class Property(IntEnum):
    """Property identifiers, MQTT 5 §2.2.2.2."""

    PAYLOAD_FORMAT = 0x01
    MESSAGE_EXPIRY = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_ID = 0x0B
    SESSION_EXPIRY = 0x11
    ASSIGNED_CLIENT_ID = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTHENTICATION_METHOD = 0x15
    AUTHENTICATION_DATA = 0x16
    REQUEST_PROBLEM_INFORMATION = 0x17
    WILL_DELAY = 0x18
    REQUEST_RESPONSE_INFORMATION = 0x19
    RESPONSE_INFORMATION = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_AVAILABLE = 0x28
    SUBSCRIPTION_ID_AVAILABLE = 0x29
    SHARED_AVAILABLE = 0x2A


class _Type(IntEnum):
    BYTE = 1
    SHORT = 2
    LONG = 4
    VARINT = 5
    TEXT = 6
    BINARY = 7
    PAIR = 8


_TYPES: Final[dict[int, _Type]] = {
    Property.PAYLOAD_FORMAT: _Type.BYTE,
    Property.MESSAGE_EXPIRY: _Type.LONG,
    Property.CONTENT_TYPE: _Type.TEXT,
    Property.RESPONSE_TOPIC: _Type.TEXT,
    Property.CORRELATION_DATA: _Type.BINARY,
    Property.SUBSCRIPTION_ID: _Type.VARINT,
    Property.SESSION_EXPIRY: _Type.LONG,
    Property.ASSIGNED_CLIENT_ID: _Type.TEXT,
    Property.SERVER_KEEP_ALIVE: _Type.SHORT,
    Property.AUTHENTICATION_METHOD: _Type.TEXT,
    Property.AUTHENTICATION_DATA: _Type.BINARY,
    Property.REQUEST_PROBLEM_INFORMATION: _Type.BYTE,
    Property.WILL_DELAY: _Type.LONG,
    Property.REQUEST_RESPONSE_INFORMATION: _Type.BYTE,
    Property.RESPONSE_INFORMATION: _Type.TEXT,
    Property.SERVER_REFERENCE: _Type.TEXT,
    Property.REASON_STRING: _Type.TEXT,
    Property.RECEIVE_MAXIMUM: _Type.SHORT,
    Property.TOPIC_ALIAS_MAXIMUM: _Type.SHORT,
    Property.TOPIC_ALIAS: _Type.SHORT,
    Property.MAXIMUM_QOS: _Type.BYTE,
    Property.RETAIN_AVAILABLE: _Type.BYTE,
    Property.USER_PROPERTY: _Type.PAIR,
    Property.MAXIMUM_PACKET_SIZE: _Type.LONG,
    Property.WILDCARD_AVAILABLE: _Type.BYTE,
    Property.SUBSCRIPTION_ID_AVAILABLE: _Type.BYTE,
    Property.SHARED_AVAILABLE: _Type.BYTE,
}

_BOOLEAN: Final = frozenset(
    {
        Property.PAYLOAD_FORMAT,
        Property.REQUEST_PROBLEM_INFORMATION,
        Property.REQUEST_RESPONSE_INFORMATION,
        Property.MAXIMUM_QOS,
        Property.RETAIN_AVAILABLE,
        Property.WILDCARD_AVAILABLE,
        Property.SUBSCRIPTION_ID_AVAILABLE,
        Property.SHARED_AVAILABLE,
    }
)
# MQTT 5 says "It is a Protocol Error" for a zero in each of these.
_NOT_ZERO: Final = frozenset({Property.RECEIVE_MAXIMUM, Property.MAXIMUM_PACKET_SIZE, Property.SUBSCRIPTION_ID})

MAX_VARINT: Final = 268_435_455
MAX_USER_PROPERTIES: Final = 64
"""User properties accepted in one packet."""


class PacketError(RemoteProtocolError):
    """The peer's bytes are not MQTT, or break one of its rules.

    Attributes:
        code: the reason code to close the connection with.
    """

    def __init__(self, code: ReasonCode, detail: str) -> None:
        self.code = code
        reason = RejectReason.TOO_LARGE if code is ReasonCode.PACKET_TOO_LARGE else RejectReason.MALFORMED
        super().__init__(reason, detail)


def malformed(detail: str) -> PacketError:
    """The error for bytes that do not parse (MQTT 5 §4.13.1)."""
    return PacketError(ReasonCode.MALFORMED_PACKET, detail)


def read_short(buffer: Buffer, at: int) -> tuple[int, int]:
    """Read two bytes, big-endian."""
    if at + 2 > len(buffer):
        raise malformed("truncated integer")
    return buffer[at] << 8 | buffer[at + 1], at + 2


def read_varint(buffer: Buffer, at: int) -> tuple[int, int]:
    """Read a variable byte integer; it must be in its shortest form (MQTT 5 §1.5.5)."""
    value = shift = 0
    for index in range(4):
        if at >= len(buffer):
            raise malformed("truncated length")
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and index:
                raise malformed("length is not in its shortest form")
            return value, at
        shift += 7
    raise malformed("length is longer than four bytes")


def read_binary(buffer: Buffer, at: int) -> tuple[bytes, int]:
    """Read a length of two bytes and as many bytes."""
    size, at = read_short(buffer, at)
    if at + size > len(buffer):
        raise malformed("truncated string")
    return bytes(buffer[at : at + size]), at + size


def read_text(buffer: Buffer, at: int) -> tuple[str, int]:
    """Read a UTF-8 string; NUL and surrogates are refused (MQTT 5 §1.5.4)."""
    raw, at = read_binary(buffer, at)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise malformed("string is not UTF-8") from None
    if "\0" in text:
        raise malformed("string contains NUL")
    return text, at


def write_varint(value: int) -> bytes:
    """Encode a variable byte integer.

    Raises:
        LocalProtocolError: the value does not fit four bytes.
    """
    if value < 0x80:
        return bytes((value,))
    if value > MAX_VARINT:
        raise LocalProtocolError(f"{value} bytes do not fit an MQTT packet")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_binary(data: Buffer) -> bytes:
    """Encode a length of two bytes and the bytes.

    Raises:
        LocalProtocolError: more than 65,535 bytes.
    """
    if len(data) > 0xFFFF:
        raise LocalProtocolError(f"{len(data)} bytes do not fit an MQTT string")
    return len(data).to_bytes(2) + data


def write_text(text: str) -> bytes:
    """Encode a UTF-8 string."""
    return write_binary(text.encode())


def read_properties(buffer: Buffer, at: int, allowed: frozenset[int]) -> tuple[Properties, int]:
    """Read the length-prefixed properties at ``at``.

    Raises:
        PacketError: a property that is unknown, not ``allowed`` here, given twice, or has an impossible value.
    """
    size, at = read_varint(buffer, at)
    if size == 0:
        return NO_PROPERTIES, at
    end = at + size
    if end > len(buffer):
        raise malformed("truncated properties")
    found: dict[int, PropertyValue] = {}
    pairs: list[tuple[str, str]] = []
    # A view that ends with the properties, so that no value can reach beyond them.
    inside = memoryview(buffer)[:end]
    while at < end:
        identifier, at = read_varint(inside, at)
        if identifier not in allowed:
            raise malformed(f"property 0x{identifier:02x} does not belong here")
        value: PropertyValue
        match _TYPES[identifier]:
            case _Type.BYTE:
                if at >= end:
                    raise malformed("truncated property")
                value, at = inside[at], at + 1
                if value > 1 and identifier in _BOOLEAN:
                    raise PacketError(ReasonCode.PROTOCOL_ERROR, f"property 0x{identifier:02x} is {value}")
            case _Type.SHORT:
                value, at = read_short(inside, at)
            case _Type.LONG:
                if at + 4 > end:
                    raise malformed("truncated property")
                value, at = int.from_bytes(inside[at : at + 4]), at + 4
            case _Type.VARINT:
                value, at = read_varint(inside, at)
            case _Type.TEXT:
                value, at = read_text(inside, at)
            case _Type.BINARY:
                value, at = read_binary(inside, at)
            case _Type.PAIR:
                name, at = read_text(inside, at)
                content, at = read_text(inside, at)
                pairs.append((name, content))
                if len(pairs) > MAX_USER_PROPERTIES:
                    raise PacketError(ReasonCode.QUOTA_EXCEEDED, "too many user properties")
                continue
        if identifier in found:
            raise PacketError(ReasonCode.PROTOCOL_ERROR, f"property 0x{identifier:02x} is given twice")
        if value == 0 and identifier in _NOT_ZERO:
            raise PacketError(ReasonCode.PROTOCOL_ERROR, f"property 0x{identifier:02x} is zero")
        found[identifier] = value
    if pairs:
        found[Property.USER_PROPERTY] = tuple(pairs)
    return found, end


def write_property_list(properties: Properties) -> bytes:
    """Encode properties without their length, in the order of their identifiers."""
    parts: list[bytes] = []
    for identifier, value in sorted(properties.items()):
        tag = write_varint(identifier)
        match _TYPES[identifier], value:
            case _Type.BYTE, int():
                parts += (tag, value.to_bytes(1))
            case _Type.SHORT, int():
                parts += (tag, value.to_bytes(2))
            case _Type.LONG, int():
                parts += (tag, value.to_bytes(4))
            case _Type.VARINT, int():
                parts += (tag, write_varint(value))
            case _Type.TEXT, str():
                parts += (tag, write_text(value))
            case _Type.BINARY, bytes():
                parts += (tag, write_binary(value))
            case _Type.PAIR, tuple():
                for name, content in value:
                    parts += (tag, write_text(name), write_text(content))
            case _:
                raise LocalProtocolError(f"property 0x{identifier:02x} cannot be {type(value).__name__}")
    return b"".join(parts)


def write_properties(properties: Properties) -> bytes:
    """Encode properties with their length."""
    if not properties:
        return b"\0"
    body = write_property_list(properties)
    return write_varint(len(body)) + body
