"""MQTT 3.1.1 and 5 packets: bytes to frozen values and back. Pure.

`decode` takes one packet's first byte and body and returns its value, or raises `PacketError`, never anything else,
in time and memory proportional to the body. `encode` is its inverse. Sizes are checked by whoever frames the stream,
before a body is allocated (`frame`).

>>> encode(PubAck(packet_id=7), V3).hex()
'40020007'
"""

from __future__ import annotations

from typing import Final

from fleetfed.broker.packets import (
    V3,
    V5,
    Acknowledgement,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PacketType,
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
from fleetfed.broker.properties import (
    NO_PROPERTIES,
    Buffer,
    PacketError,
    Property,
    ReasonCode,
    malformed,
    read_binary,
    read_properties,
    read_short,
    read_text,
    write_binary,
    write_properties,
    write_text,
    write_varint,
)

# MQTT 5 table 2-4: which property may stand in which packet.
_P = Property
_REASON: Final = frozenset({_P.REASON_STRING, _P.USER_PROPERTY})
PUBLISH_PROPERTIES: Final = frozenset(
    {
        _P.PAYLOAD_FORMAT,
        _P.MESSAGE_EXPIRY,
        _P.CONTENT_TYPE,
        _P.RESPONSE_TOPIC,
        _P.CORRELATION_DATA,
        _P.SUBSCRIPTION_ID,
        _P.TOPIC_ALIAS,
        _P.USER_PROPERTY,
    }
)
_WILL: Final = (PUBLISH_PROPERTIES - {_P.SUBSCRIPTION_ID, _P.TOPIC_ALIAS}) | {_P.WILL_DELAY}
_CONNECT: Final = frozenset(
    {
        _P.SESSION_EXPIRY,
        _P.AUTHENTICATION_METHOD,
        _P.AUTHENTICATION_DATA,
        _P.REQUEST_PROBLEM_INFORMATION,
        _P.REQUEST_RESPONSE_INFORMATION,
        _P.RECEIVE_MAXIMUM,
        _P.TOPIC_ALIAS_MAXIMUM,
        _P.USER_PROPERTY,
        _P.MAXIMUM_PACKET_SIZE,
    }
)
_CONNACK: Final = frozenset(
    {
        _P.SESSION_EXPIRY,
        _P.ASSIGNED_CLIENT_ID,
        _P.SERVER_KEEP_ALIVE,
        _P.AUTHENTICATION_METHOD,
        _P.AUTHENTICATION_DATA,
        _P.RESPONSE_INFORMATION,
        _P.SERVER_REFERENCE,
        _P.REASON_STRING,
        _P.RECEIVE_MAXIMUM,
        _P.TOPIC_ALIAS_MAXIMUM,
        _P.MAXIMUM_QOS,
        _P.RETAIN_AVAILABLE,
        _P.USER_PROPERTY,
        _P.MAXIMUM_PACKET_SIZE,
        _P.WILDCARD_AVAILABLE,
        _P.SUBSCRIPTION_ID_AVAILABLE,
        _P.SHARED_AVAILABLE,
    }
)
_SUBSCRIBE: Final = frozenset({_P.SUBSCRIPTION_ID, _P.USER_PROPERTY})
_USER: Final = frozenset({_P.USER_PROPERTY})
_DISCONNECT: Final = frozenset({_P.SESSION_EXPIRY, _P.SERVER_REFERENCE, _P.REASON_STRING, _P.USER_PROPERTY})

_ACKS: Final[dict[int, type[PubAck] | type[PubRec] | type[PubRel] | type[PubComp]]] = {
    PacketType.PUBACK: PubAck,
    PacketType.PUBREC: PubRec,
    PacketType.PUBREL: PubRel,
    PacketType.PUBCOMP: PubComp,
}
# MQTT 5 §2.1.3: the lower four bits of the first byte.
_FLAGS: Final[dict[int, int]] = {PacketType.PUBREL: 2, PacketType.SUBSCRIBE: 2, PacketType.UNSUBSCRIBE: 2}


def frame(buffer: Buffer, start: int, end: int) -> tuple[int, int] | None:
    """Find the body of the packet that begins at ``start``.

    Returns:
        ``(body position, body length)``, or ``None`` while the header is not complete.

    Raises:
        PacketError: the remaining length has more than four bytes.
    """
    value = shift = 0
    for at in range(start + 1, min(start + 5, end)):
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return at + 1, value
        shift += 7
    if end - start >= 5:
        raise malformed("remaining length is longer than four bytes")
    return None


def decode(first: int, body: Buffer, version: int) -> Packet:
    """Decode one packet; a PUBLISH payload is a slice of ``body`` without a copy if that is a memoryview.

    Args:
        first: the packet's first byte.
        body: exactly the bytes of the remaining length.
        version: `V3` or `V5`, as the connection's CONNECT said; CONNECT itself carries its own.

    Raises:
        PacketError: the packet breaks a rule; its code says which.
    """
    kind, flags = first >> 4, first & 0x0F
    if kind == PacketType.PUBLISH:
        return decode_publish(flags, body, version)
    if flags != _FLAGS.get(kind, 0):
        raise malformed("reserved flags are set")
    match kind:
        case PacketType.CONNECT:
            return _decode_connect(body)
        case PacketType.CONNACK:
            return _decode_connack(body, version)
        case PacketType.PUBACK | PacketType.PUBREC | PacketType.PUBREL | PacketType.PUBCOMP:
            return _decode_ack(kind, body, version)
        case PacketType.SUBSCRIBE:
            return _decode_subscribe(body, version)
        case PacketType.SUBACK:
            return _decode_suback(body, version)
        case PacketType.UNSUBSCRIBE:
            return _decode_unsubscribe(body, version)
        case PacketType.UNSUBACK:
            return _decode_unsuback(body, version)
        case PacketType.PINGREQ | PacketType.PINGRESP:
            _require_end(body, 0)
            return PingReq() if kind == PacketType.PINGREQ else PingResp()
        case PacketType.DISCONNECT:
            return _decode_disconnect(body, version)
    raise PacketError(ReasonCode.PROTOCOL_ERROR, f"packet type {kind} is not spoken here")


def _require_end(body: Buffer, at: int) -> None:
    if at != len(body):
        raise malformed("bytes after the end of the packet")


def _packet_id(body: Buffer, at: int) -> tuple[int, int]:
    value, at = read_short(body, at)
    if value == 0:
        raise PacketError(ReasonCode.PROTOCOL_ERROR, "packet identifier 0")
    return value, at


def decode_publish(flags: int, body: Buffer, version: int) -> Publish:
    """Decode the body of a PUBLISH whose first byte has these lower four bits."""
    qos = flags >> 1 & 3
    if qos == 3 or (qos == 0 and flags & 8):
        raise malformed("impossible QoS")
    topic, at = read_text(body, 0)
    if "#" in topic or "+" in topic:
        raise PacketError(ReasonCode.TOPIC_NAME_INVALID, "wildcard in a topic name")
    packet_id = 0
    if qos:
        packet_id, at = _packet_id(body, at)
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, PUBLISH_PROPERTIES)
    # An empty name is legal in MQTT 5 with a topic alias only; the broker offers no alias.
    if not topic and Property.TOPIC_ALIAS not in properties:
        raise PacketError(ReasonCode.TOPIC_NAME_INVALID, "empty topic name")
    return Publish(
        topic=topic,
        payload=body[at:],
        qos=qos,
        retain=bool(flags & 1),
        dup=bool(flags & 8),
        packet_id=packet_id,
        properties=properties,
    )


def _decode_connect(body: Buffer) -> Connect:
    name, at = read_text(body, 0)
    if at + 4 > len(body):
        raise malformed("truncated CONNECT")
    version, flags = body[at], body[at + 1]
    if name != "MQTT" or version not in (V3, V5):
        raise PacketError(ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, f"protocol {name[:8]!r} level {version}")
    keepalive, at = read_short(body, at + 2)
    if flags & 1:
        raise malformed("reserved flag of CONNECT is set")
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, _CONNECT)
    client_id, at = read_text(body, at)
    will = None
    will_qos, will_retain = flags >> 3 & 3, bool(flags & 0x20)
    if flags & 4:
        if will_qos == 3:
            raise malformed("will with QoS 3")
        will_properties = NO_PROPERTIES
        if version == V5:
            will_properties, at = read_properties(body, at, _WILL)
        topic, at = read_text(body, at)
        payload, at = read_binary(body, at)
        if not topic or "#" in topic or "+" in topic:
            raise PacketError(ReasonCode.TOPIC_NAME_INVALID, "will topic")
        will = Will(topic=topic, payload=payload, qos=will_qos, retain=will_retain, properties=will_properties)
    elif will_qos or will_retain:
        raise malformed("will flags without a will")
    username: str | None = None
    password: bytes | None = None
    if flags & 0x80:
        username, at = read_text(body, at)
    elif flags & 0x40 and version == V3:
        raise malformed("password without user name")  # MQTT 3.1.1 §3.1.2.9
    if flags & 0x40:
        password, at = read_binary(body, at)
    _require_end(body, at)
    return Connect(
        version=version,
        client_id=client_id,
        clean_start=bool(flags & 2),
        keepalive=keepalive,
        username=username,
        password=password,
        will=will,
        properties=properties,
    )


def _decode_connack(body: Buffer, version: int) -> ConnAck:
    if len(body) < 2 or body[0] > 1:
        raise malformed("CONNACK")
    properties, at = read_properties(body, 2, _CONNACK) if version == V5 else (NO_PROPERTIES, 2)
    _require_end(body, at)
    return ConnAck(session_present=bool(body[0]), code=body[1], properties=properties)


def _decode_ack(kind: int, body: Buffer, version: int) -> Acknowledgement:
    packet_id, at = _packet_id(body, 0)
    code, properties = 0, NO_PROPERTIES
    if version == V5 and at < len(body):
        code, at = body[at], at + 1
        if at < len(body):
            properties, at = read_properties(body, at, _REASON)
    _require_end(body, at)
    return _ACKS[kind](packet_id=packet_id, code=code, properties=properties)


def _decode_subscribe(body: Buffer, version: int) -> Subscribe:
    packet_id, at = _packet_id(body, 0)
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, _SUBSCRIBE)
    subscriptions: list[Subscription] = []
    while at < len(body):
        topic_filter, at = read_text(body, at)
        if at >= len(body):
            raise malformed("truncated SUBSCRIBE")
        options, at = body[at], at + 1
        if options & 3 == 3 or options & (0xC0 if version == V5 else 0xFC) or options >> 4 & 3 == 3:
            raise malformed("subscription options")
        subscriptions.append(
            Subscription(
                topic_filter=topic_filter,
                qos=options & 3,
                no_local=bool(options & 4),
                retain_as_published=bool(options & 8),
                retain_handling=options >> 4 & 3,
            )
        )
    if not subscriptions:
        raise PacketError(ReasonCode.PROTOCOL_ERROR, "SUBSCRIBE without a filter")
    return Subscribe(packet_id=packet_id, subscriptions=tuple(subscriptions), properties=properties)


def _decode_suback(body: Buffer, version: int) -> SubAck:
    packet_id, at = _packet_id(body, 0)
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, _REASON)
    return SubAck(packet_id=packet_id, codes=tuple(body[at:]), properties=properties)


def _decode_unsubscribe(body: Buffer, version: int) -> Unsubscribe:
    packet_id, at = _packet_id(body, 0)
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, _USER)
    filters: list[str] = []
    while at < len(body):
        topic_filter, at = read_text(body, at)
        filters.append(topic_filter)
    if not filters:
        raise PacketError(ReasonCode.PROTOCOL_ERROR, "UNSUBSCRIBE without a filter")
    return Unsubscribe(packet_id=packet_id, filters=tuple(filters), properties=properties)


def _decode_unsuback(body: Buffer, version: int) -> UnsubAck:
    packet_id, at = _packet_id(body, 0)
    properties = NO_PROPERTIES
    if version == V5:
        properties, at = read_properties(body, at, _REASON)
        return UnsubAck(packet_id=packet_id, codes=tuple(body[at:]), properties=properties)
    _require_end(body, at)
    return UnsubAck(packet_id=packet_id)


def _decode_disconnect(body: Buffer, version: int) -> Disconnect:
    at, code, properties = 0, 0, NO_PROPERTIES
    if version == V5 and body:
        code, at = body[0], 1
        if at < len(body):
            properties, at = read_properties(body, at, _DISCONNECT)
    _require_end(body, at)
    return Disconnect(code=code, properties=properties)


def encode(packet: Packet, version: int) -> bytes:
    """Encode one packet.

    Raises:
        LocalProtocolError: a value does not fit its field.
    """
    v5 = version == V5
    match packet:
        case Publish():
            flags = packet.dup << 3 | packet.qos << 1 | packet.retain
            body = write_text(packet.topic)
            if packet.qos:
                body += packet.packet_id.to_bytes(2)
            if v5:
                body += write_properties(packet.properties)
            return _whole(PacketType.PUBLISH, b"".join((body, packet.payload)), flags)
        case Connect():
            return _whole(PacketType.CONNECT, _encode_connect(packet))
        case ConnAck():
            body = bytes((packet.session_present, packet.code))
            return _whole(PacketType.CONNACK, body + write_properties(packet.properties) if v5 else body)
        case PubAck():
            return _whole(PacketType.PUBACK, _encode_ack(packet, v5))
        case PubRec():
            return _whole(PacketType.PUBREC, _encode_ack(packet, v5))
        case PubRel():
            return _whole(PacketType.PUBREL, _encode_ack(packet, v5), 2)
        case PubComp():
            return _whole(PacketType.PUBCOMP, _encode_ack(packet, v5))
        case Subscribe():
            body = packet.packet_id.to_bytes(2) + (write_properties(packet.properties) if v5 else b"")
            for item in packet.subscriptions:
                options = item.qos
                if v5:
                    options |= item.no_local << 2 | item.retain_as_published << 3 | item.retain_handling << 4
                body += write_text(item.topic_filter) + bytes((options,))
            return _whole(PacketType.SUBSCRIBE, body, 2)
        case SubAck():
            body = packet.packet_id.to_bytes(2) + (write_properties(packet.properties) if v5 else b"")
            return _whole(PacketType.SUBACK, body + bytes(packet.codes))
        case Unsubscribe():
            body = packet.packet_id.to_bytes(2) + (write_properties(packet.properties) if v5 else b"")
            return _whole(PacketType.UNSUBSCRIBE, body + b"".join(write_text(item) for item in packet.filters), 2)
        case UnsubAck():
            body = packet.packet_id.to_bytes(2)
            return _whole(
                PacketType.UNSUBACK, body + write_properties(packet.properties) + bytes(packet.codes) if v5 else body
            )
        case PingReq():
            return b"\xc0\0"
        case PingResp():
            return b"\xd0\0"
        case Disconnect():
            if not v5 or (packet.code == 0 and not packet.properties):
                return b"\xe0\0"
            body = bytes((packet.code,))
            return _whole(
                PacketType.DISCONNECT, body + write_properties(packet.properties) if packet.properties else body
            )


def _whole(kind: PacketType, body: bytes, flags: int = 0) -> bytes:
    return b"".join((bytes((kind << 4 | flags,)), write_varint(len(body)), body))


def _encode_ack(packet: Acknowledgement, v5: bool) -> bytes:
    body = packet.packet_id.to_bytes(2)
    if v5 and (packet.code or packet.properties):
        body += bytes((packet.code,))
        if packet.properties:
            body += write_properties(packet.properties)
    return body


def _encode_connect(packet: Connect) -> bytes:
    flags = packet.clean_start << 1
    tail = write_text(packet.client_id)
    v5 = packet.version == V5
    if packet.will is not None:
        will = packet.will
        flags |= 4 | will.qos << 3 | will.retain << 5
        if v5:
            tail += write_properties(will.properties)
        tail += write_text(will.topic) + write_binary(will.payload)
    if packet.username is not None:
        flags |= 0x80
        tail += write_text(packet.username)
    if packet.password is not None:
        flags |= 0x40
        tail += write_binary(packet.password)
    head = write_text("MQTT") + bytes((packet.version, flags)) + packet.keepalive.to_bytes(2)
    return head + (write_properties(packet.properties) if v5 else b"") + tail
