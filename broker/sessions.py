"""Messages and sessions: what the broker holds for a client, and how much of it. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from fleetfed.broker.packets import Will
from fleetfed.broker.properties import Buffer, Property, write_property_list, write_varint

if TYPE_CHECKING:
    from fleetfed.broker.connection import Connection

_JOIN_BELOW: Final = 16 * 1024
"""Payloads up to this size are copied behind their header; larger ones are handed over as they are."""

FORWARDED: Final = (
    Property.PAYLOAD_FORMAT,
    Property.CONTENT_TYPE,
    Property.RESPONSE_TOPIC,
    Property.CORRELATION_DATA,
    Property.USER_PROPERTY,
)
"""Properties that a subscriber gets as the publisher wrote them (MQTT 5 §3.3.2.3). The expiry is rewritten; will
delay, topic alias and subscription identifier belong to the publisher's own connection and are never passed on."""


class Message:
    """One application message, shared by everyone who gets it; never changed once it is routed.

    Attributes:
        topic: topic name.
        payload: application bytes.
        qos: as published.
        retain: as published.
        properties: encoded properties to forward, without length and expiry.
        expires_at: time after which it is not delivered any more.
        size: bytes that it is counted with.
        holders: deliveries to connected sessions that have it.
        row: its key in the store, 0 when it is not stored.
        uses: queue entries in the store that refer to the row.
    """

    __slots__ = (
        "_wire",
        "expires_at",
        "holders",
        "payload",
        "properties",
        "qos",
        "retain",
        "row",
        "size",
        "topic",
        "uses",
    )

    def __init__(
        self,
        topic: str,
        payload: Buffer,
        qos: int,
        retain: bool = False,
        properties: bytes = b"",
        expires_at: float | None = None,
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties
        self.expires_at = expires_at
        self.size = len(payload) + len(topic) + len(properties) + 64
        self.holders = 0
        self.row = 0
        self.uses = 0
        self._wire: dict[int, tuple[bytes, bytes]] = {}

    def wire_size(self, v5: bool) -> int:
        """An upper bound of the bytes of its PUBLISH packet."""
        extra = 9 + len(self.properties) if v5 else 0
        return len(self.payload) + len(self.topic.encode()) + 9 + extra

    def append_to(
        self, out: list[Buffer], *, v5: bool, qos: int, retain: bool, packet_id: int, now: float, dup: bool = False
    ) -> int:
        """Append its PUBLISH packet to ``out`` and return the packet's size in bytes."""
        key = qos << 2 | retain << 1 | v5
        wire = self._wire.get(key)
        if wire is None:
            wire = self._prepare(v5, qos, retain, now)
            # An expiry that is rewritten at every delivery makes the bytes of this one useless to the next.
            if self.expires_at is None or not v5:
                self._wire[key] = wire
        head, tail = wire
        if dup:
            head = bytes((head[0] | 8,)) + head[1:]
        payload = self.payload
        if len(payload) <= _JOIN_BELOW:
            packet = b"".join((head, packet_id.to_bytes(2), tail)) if qos else head + tail
            out.append(packet)
            return len(packet)
        packet = b"".join((head, packet_id.to_bytes(2), tail)) if qos else head + tail
        out.append(packet)
        out.append(payload)
        return len(packet) + len(payload)

    def _prepare(self, v5: bool, qos: int, retain: bool, now: float) -> tuple[bytes, bytes]:
        topic = self.topic.encode()
        properties = b""
        if v5:
            inner = self.properties
            if self.expires_at is not None:
                # MQTT 5 §3.3.2.3.3: the received interval less the time that the message has waited here.
                left = max(1, round(self.expires_at - now))
                inner = write_property_list({Property.MESSAGE_EXPIRY: left}) + inner
            properties = write_varint(len(inner)) + inner
        length = 2 + len(topic) + (2 if qos else 0) + len(properties) + len(self.payload)
        head = b"".join((bytes((0x30 | qos << 1 | retain,)), write_varint(length), len(topic).to_bytes(2), topic))
        if len(self.payload) <= _JOIN_BELOW:
            return head, properties + bytes(self.payload)
        return head, properties


class Stage(IntEnum):
    """How far an outgoing message with an acknowledgement has come."""

    PUBLISHED = 1
    RELEASED = 2
    """QoS 2: the client has it (PUBREC); PUBCOMP is awaited."""


@dataclass(slots=True)
class Delivery:
    """One message on its way to one session.

    Attributes:
        message: what is delivered.
        qos: granted QoS.
        retain: the flag on the wire.
        row: its key in the store, 0 when it is not stored.
        stage: of a message in flight.
        sent: whether this connection has seen it.
    """

    message: Message
    qos: int
    retain: bool
    row: int = 0
    stage: Stage = Stage.PUBLISHED
    sent: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """One subscription of a session: how its messages are delivered."""

    qos: int
    no_local: bool = False
    retain_as_published: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """An acknowledgement that waits until every congested subscriber has room again.

    Attributes:
        connection: the publisher's.
        packet: the encoded acknowledgement.
        waiting: sessions that still have to drain.
    """

    connection: Connection
    packet: bytes
    waiting: int


class Session:
    """A client's state that may outlive its connection (MQTT 5 §4.1).

    Attributes:
        client_id: unique in the broker.
        username: whose it is; no other user may take it over.
        expiry: seconds that it lives on without a connection.
        expires_at: when it ends, while it has no connection.
        connection: the client's connection, if any.
        subscriptions: full filter text, with ``$share``, to how it was granted.
        queue: deliveries not yet sent, oldest first.
        in_flight: packet identifier to delivery, oldest first.
        received: packet identifiers of QoS 2 messages from the client that are not released.
        pending_bytes: bytes of ``queue`` and ``in_flight``.
        tickets: acknowledgements of publishers that wait for this session to drain.
        progress_at: when the client last took something.
        stored: whether the store has it.
        will: published if the connection breaks.
        will_due: when a delayed will is to be published.
    """

    __slots__ = (
        "client_id",
        "connection",
        "expires_at",
        "expiry",
        "in_flight",
        "last_packet_id",
        "pending_bytes",
        "progress_at",
        "queue",
        "received",
        "stall_armed",
        "stored",
        "subscriptions",
        "tickets",
        "timer_at",
        "username",
        "will",
        "will_due",
    )

    def __init__(self, client_id: str, username: str | None) -> None:
        self.client_id = client_id
        self.username = username
        self.expiry = 0.0
        self.expires_at: float | None = None
        self.connection: Connection | None = None
        self.subscriptions: dict[str, Grant] = {}
        self.queue: deque[Delivery] = deque()
        self.in_flight: dict[int, Delivery] = {}
        self.received: set[int] = set()
        self.pending_bytes = 0
        self.tickets: list[Ticket] = []
        self.progress_at = 0.0
        self.stall_armed = False
        self.stored = False
        self.timer_at: float | None = None
        self.will: Will | None = None
        self.will_due: float | None = None
        self.last_packet_id = 0

    @property
    def durable(self) -> bool:
        """Whether it outlives its connection."""
        return self.expiry > 0

    def next_packet_id(self) -> int:
        """A packet identifier that is not in flight; the window is smaller than their number, so there is one."""
        packet_id = self.last_packet_id
        while True:
            packet_id = packet_id % 0xFFFF + 1
            if packet_id not in self.in_flight:
                self.last_packet_id = packet_id
                return packet_id

    def deliveries(self) -> list[Delivery]:
        """Everything that the client has not acknowledged, oldest first."""
        return [item for item in self.in_flight.values() if item.stage is Stage.PUBLISHED] + list(self.queue)
