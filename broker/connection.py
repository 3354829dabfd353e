"""One client's connection, without I/O: bytes in, packets decided, bytes out.

After each call of `receive_data`, `buffer_filled`, `resume_writing` or `connection_lost`, and after
`Broker.handle_timer`, the caller must take every connection from `Broker.take_dirty`, send what its `data_to_send`
returns until that is empty, stop or resume reading as `wants_read` says, and close the transport when `closing`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from fleetfed.broker.codec import decode, decode_publish, encode, frame
from fleetfed.broker.packets import (
    V3,
    V5,
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
    Subscribe,
    Unsubscribe,
)
from fleetfed.broker.properties import Buffer, PacketError, Property, ReasonCode, malformed, write_property_list
from fleetfed.broker.sessions import FORWARDED, Message, Session, Stage, Ticket
from fleetfed.broker.topictree import is_valid_topic

if TYPE_CHECKING:
    from fleetfed.broker.core import Broker
    from fleetfed.broker.router import Router

_PUMP_BYTES: Final = 256 * 1024
"""Bytes that one call of `Connection.data_to_send` takes from the queue at least before it stops."""
_MAX_UNSENT: Final = 4096
"""Acknowledgements that may wait for a client that does not read, before it is not read either."""
_DIRECT: Final = 16 * 1024
"""Missing bytes of a packet from which they are received straight into its own buffer."""

# Why a connection is not read at the moment; any bit set stops it.
_PAUSE_MEMORY: Final = 1
_PAUSE_WINDOW: Final = 2
_PAUSE_OUTPUT: Final = 4
_PAUSE_RATE: Final = 8


class Connection:
    """One connection; made by `Broker.open`.

    Attributes:
        identity: name that the transport has proven (the certificate's CN), or ``None`` on a plain listener.
        version: protocol level, once CONNECT has come.
        session: its session, from CONNECT to the end.
        closing: send what there is, then close the transport.
        dirty: whether it is in the broker's list of connections to serve.
        last_received: when bytes last came.
    """

    __slots__ = (
        "_broker",
        "_have",
        "_out",
        "_partial",
        "_pauses",
        "_rate_bytes",
        "_rate_messages",
        "_rate_since",
        "_rest",
        "_router",
        "_tickets",
        "_unacknowledged",
        "_writable",
        "closing",
        "dirty",
        "identity",
        "keepalive",
        "last_received",
        "max_packet",
        "opened_at",
        "resend",
        "send_quota",
        "session",
        "v5",
    )

    def __init__(self, broker: Broker, router: Router, identity: str | None, now: float) -> None:
        self._broker = broker
        self._router = router
        self.identity = identity
        self.v5 = False
        self.session: Session | None = None
        self.closing = False
        self.dirty = False
        self.opened_at = self.last_received = now
        self.keepalive = 0
        self.max_packet = 0
        self.send_quota = 0
        self.resend: deque[int] = deque()
        self._unacknowledged = 0
        self._out: list[Buffer] = []
        self._rest = b""
        self._partial: bytearray | None = None
        self._have = 0
        self._pauses = 0
        self._writable = True
        self._tickets: deque[Ticket] = deque()
        self._rate_since = now
        self._rate_messages = 0.0
        self._rate_bytes = 0.0

    @property
    def wants_read(self) -> bool:
        """Whether the transport should go on reading."""
        return not self._pauses and not self.closing

    # ------------------------------------------------------------------------------------------ bytes in

    def receive_buffer(self) -> memoryview | None:
        """Where the next bytes are best received: the rest of a large packet, or ``None`` for the caller's buffer.

        Bytes received into it are reported with `buffer_filled`, all others with `receive_data`.
        """
        if self._partial is not None and len(self._partial) - self._have >= _DIRECT:
            return memoryview(self._partial)[self._have :]
        return None

    def buffer_filled(self, size: int, now: float) -> None:
        """Take ``size`` bytes that were received into `receive_buffer`."""
        router = self._router
        router.now = self.last_received = now
        router.counters.bytes_received += size
        self._have += size
        partial = self._partial
        if partial is not None and self._have == len(partial):
            self._partial = None
            try:
                self._packet_complete(partial)
            except PacketError as error:
                self._refuse(error)

    def receive_data(self, data: Buffer, now: float) -> None:
        """Take bytes from the transport; ``data`` may be reused by the caller afterwards.

        Never raises: what breaks a rule ends the connection with the fitting reason code and is counted.
        """
        router = self._router
        router.now = self.last_received = now
        router.counters.bytes_received += len(data)
        if self.closing:
            return
        try:
            self._consume(data)
        except PacketError as error:
            self._refuse(error)

    def resume_reading(self, now: float) -> None:
        """Go on with bytes that were received before reading was stopped."""
        self._router.now = now
        if self._rest and self.wants_read:
            self.receive_data(b"", now)

    def _consume(self, data: Buffer) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        view = memoryview(data)
        end = len(view)
        at = 0
        if self._partial is not None:
            partial, have = self._partial, self._have
            at = min(len(partial) - have, end)
            partial[have : have + at] = view[:at]
            self._have = have + at
            if self._have < len(partial):
                return
            self._partial = None
            self._packet_complete(partial)
        limit = self._router.limits.max_packet
        while at < end:
            if self._pauses or self.closing:
                if not self.closing:
                    self._rest = bytes(view[at:])
                return
            header = frame(data, at, end)
            if header is None:
                self._rest = bytes(view[at:])
                return
            start, length = header
            stop = start + length
            if stop - at > limit:
                raise PacketError(ReasonCode.PACKET_TOO_LARGE, f"{stop - at} bytes")
            if stop > end:
                # The first packet of a stranger is small, or it is not buffered at all.
                if self.session is None and data[at] >> 4 != PacketType.CONNECT:
                    raise PacketError(ReasonCode.PROTOCOL_ERROR, "the first packet is not CONNECT")
                partial = bytearray(stop - at)
                self._have = end - at
                partial[: self._have] = view[at:end]
                self._partial = partial
                return
            self._dispatch(data[at], view[start:stop], owned=False)
            at = stop

    def _packet_complete(self, packet: bytearray) -> None:
        header = frame(packet, 0, len(packet))
        assert header is not None
        self._dispatch(packet[0], memoryview(packet)[header[0] :], owned=True)

    def _dispatch(self, first: int, body: memoryview, *, owned: bool) -> None:
        """Decide on one packet; the payload is copied unless ``body`` lives in memory of its own."""
        kind = first >> 4
        if self.session is None:
            if kind != PacketType.CONNECT:
                raise PacketError(ReasonCode.PROTOCOL_ERROR, "the first packet is not CONNECT")
            packet = decode(first, body, V3)
            assert isinstance(packet, Connect)
            self._broker.connect(self, packet)
            return
        if kind == PacketType.PUBLISH:
            self._on_publish(decode_publish(first & 0x0F, body, V5 if self.v5 else V3), owned)
        elif kind == PacketType.PUBACK and len(body) == 2 and first == 0x40:
            self._on_acknowledged(body[0] << 8 | body[1])
        else:
            self._on_packet(decode(first, body, V5 if self.v5 else V3))

    def _on_packet(self, packet: Packet) -> None:
        router, session = self._router, self.session
        assert session is not None
        match packet:
            case PubAck():
                self._on_acknowledged(packet.packet_id)
            case PubRec():
                self._on_pubrec(packet)
            case PubComp():
                item = session.in_flight.get(packet.packet_id)
                if item is not None and item.stage is Stage.RELEASED:
                    self._forget(session, packet.packet_id)
            case PubRel():
                known = packet.packet_id in session.received
                session.received.discard(packet.packet_id)
                code = ReasonCode.SUCCESS if known else ReasonCode.PACKET_ID_NOT_FOUND
                self.send(PubComp(packet_id=packet.packet_id, code=code))
            case Subscribe():
                if Property.SUBSCRIPTION_ID in packet.properties:
                    raise PacketError(ReasonCode.SUBSCRIPTION_ID_NOT_SUPPORTED, "subscription identifier")
                router.subscribe(self, session, packet)
            case Unsubscribe():
                router.unsubscribe(self, session, packet)
            case PingReq():
                self.send(PingResp())
            case Disconnect():
                self._broker.client_disconnects(self, session, packet)
            case _:
                raise PacketError(ReasonCode.PROTOCOL_ERROR, f"{type(packet).__name__} from a client")

    # ------------------------------------------------------------------------------------------ QoS

    def _on_publish(self, packet: Publish, owned: bool) -> None:
        router, session = self._router, self.session
        assert session is not None
        router.counters.messages_received += 1
        qos = packet.qos
        properties = packet.properties
        encoded, expires_at = b"", None
        if properties:
            if Property.TOPIC_ALIAS in properties:
                raise PacketError(ReasonCode.TOPIC_ALIAS_INVALID, "no topic alias is offered")
            if Property.SUBSCRIPTION_ID in properties:
                raise malformed("subscription identifier from a client")
            expiry = properties.get(Property.MESSAGE_EXPIRY)
            if isinstance(expiry, int):
                expires_at = router.now + expiry
            encoded = write_property_list({key: properties[key] for key in FORWARDED if key in properties})
        if not is_valid_topic(packet.topic):
            raise PacketError(ReasonCode.TOPIC_NAME_INVALID, "topic name too long")
        limits = router.limits
        if qos:
            # A QoS 2 message whose PUBREC waits is among the received ones already.
            window = len(session.received) + sum(item.packet[0] == 0x40 for item in self._tickets)
            if qos == 2 and packet.packet_id in session.received:
                self.send(PubRec(packet_id=packet.packet_id))
                return
            if self.v5 and window >= limits.receive_maximum:
                raise PacketError(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, f"{window + 1} unacknowledged messages")
        payload = packet.payload if owned else bytes(packet.payload)
        message = Message(packet.topic, payload, qos, packet.retain, encoded, expires_at)
        code, congested = router.publish(message, session)
        if qos:
            if qos == 2 and code < 0x80:
                session.received.add(packet.packet_id)
            self._acknowledge(packet.packet_id, qos, code, congested)
            # A 3.1.1 client knows no receive maximum, so its window is enforced by not reading on.
            if not self.v5 and len(self._tickets) >= limits.receive_maximum:
                self.pause_reading(_PAUSE_WINDOW)
        if limits.max_message_rate or limits.max_byte_rate:
            self._meter(len(payload))
        if router.memory > limits.memory_high_water:
            router.relieve_memory(self)

    def _acknowledge(self, packet_id: int, qos: int, code: int, congested: list[Session]) -> None:
        if not self.v5 or code == 0:
            packet = (b"\x40\x02" if qos == 1 else b"\x50\x02") + packet_id.to_bytes(2)
        else:
            packet = (b"\x40\x03" if qos == 1 else b"\x50\x03") + packet_id.to_bytes(2) + bytes((code,))
        if congested or self._tickets:
            ticket = Ticket(self, packet, len(congested))
            for session in congested:
                session.tickets.append(ticket)
            self._tickets.append(ticket)
            self._router.counters.acknowledgements_delayed += bool(congested)
        else:
            self._append(packet)

    def redeem(self) -> None:
        """Send the acknowledgements at the head of the line that wait for nobody any more (MQTT 5 §4.6)."""
        tickets = self._tickets
        while tickets and not tickets[0].waiting:
            self._append(tickets.popleft().packet)
        if self._pauses & _PAUSE_WINDOW and len(tickets) < self._router.limits.receive_maximum:
            self.unpause_reading(_PAUSE_WINDOW)

    def _on_acknowledged(self, packet_id: int) -> None:
        session = self.session
        assert session is not None
        item = session.in_flight.get(packet_id)
        # An acknowledgement of what was never sent here is harmless and ignored (as Mosquitto does).
        if item is None or not item.sent or item.qos != 1:
            return
        self._router.released(session, item)
        self._forget(session, packet_id)

    def _on_pubrec(self, packet: PubRec) -> None:
        session = self.session
        assert session is not None
        item = session.in_flight.get(packet.packet_id)
        if item is None or item.qos != 2:
            self.send(PubRel(packet_id=packet.packet_id, code=ReasonCode.PACKET_ID_NOT_FOUND))
            return
        if item.stage is Stage.PUBLISHED:
            item.stage = Stage.RELEASED
            self._router.released(session, item)
        if packet.code >= 0x80:
            self._forget(session, packet.packet_id)
        else:
            self.send(PubRel(packet_id=packet.packet_id))

    def _forget(self, session: Session, packet_id: int) -> None:
        item = session.in_flight.pop(packet_id)
        if item.sent:
            self._unacknowledged -= 1
        self._router.mark_dirty(self)

    # ------------------------------------------------------------------------------------------ flow control

    def pause_reading(self, why: int) -> None:
        """Stop reading for one more reason."""
        self._pauses |= why
        self._router.mark_dirty(self)

    def unpause_reading(self, why: int) -> None:
        """Drop one reason not to read."""
        self._pauses &= ~why
        self._router.mark_dirty(self)

    def memory_short(self) -> bool:
        """Stop reading because the broker's memory is short, unless that would keep it short.

        Returns:
            whether reading has stopped: whoever has something to acknowledge must be read, or nothing would drain.
        """
        session = self.session
        if session is None or session.in_flight or session.queue or self.closing:
            return False
        self.pause_reading(_PAUSE_MEMORY)
        return True

    def memory_available(self) -> None:
        """The broker has room for messages again."""
        self.unpause_reading(_PAUSE_MEMORY)

    def rate_available(self) -> None:
        """The client's rate is below its limit again."""
        self.unpause_reading(_PAUSE_RATE)

    def _meter(self, size: int) -> None:
        limits, now = self._router.limits, self._router.now
        elapsed = now - self._rate_since
        self._rate_since = now
        wait = 0.0
        if limits.max_message_rate:
            self._rate_messages = max(0.0, self._rate_messages - elapsed * limits.max_message_rate) + 1
            wait = self._rate_messages / limits.max_message_rate - 10
        if limits.max_byte_rate:
            self._rate_bytes = max(0.0, self._rate_bytes - elapsed * limits.max_byte_rate) + size
            wait = max(wait, self._rate_bytes / limits.max_byte_rate - 10)
        if wait > 0:
            self._router.counters.rate_limited += 1
            self.pause_reading(_PAUSE_RATE)
            self._router.timers.call_at(now + wait, self.rate_available)

    def pause_writing(self) -> None:
        """The transport's buffer is full: nothing is taken from the queue until `resume_writing`."""
        self._writable = False

    def resume_writing(self, now: float) -> None:
        """The transport's buffer has drained."""
        self._router.now = now
        self._writable = True
        if self.session is not None:
            self.session.progress_at = now
        if self._pauses & _PAUSE_OUTPUT:
            self._pauses &= ~_PAUSE_OUTPUT
        self._router.mark_dirty(self)

    # ------------------------------------------------------------------------------------------ bytes out

    def send(self, packet: Packet) -> None:
        """Encode a packet for the next `data_to_send`."""
        self._append(encode(packet, V5 if self.v5 else V3))

    def _append(self, data: bytes) -> None:
        self._out.append(data)
        if not self.dirty:
            self._router.mark_dirty(self)
        if not self._writable and len(self._out) > _MAX_UNSENT:
            self._pauses |= _PAUSE_OUTPUT

    def data_to_send(self) -> list[Buffer]:
        """What to write now; call again until it is empty or writing is paused."""
        if not self._writable and not self.closing:
            return []
        session = self.session
        if session is not None and not self.closing and (session.queue or self.resend):
            self._pump(session)
        out = self._out
        if out:
            self._out = []
            self._router.counters.bytes_sent += sum(map(len, out))
        return out

    def _pump(self, session: Session) -> None:
        router, out, v5 = self._router, self._out, self.v5
        now, budget = router.now, _PUMP_BYTES
        queue, resend = session.queue, self.resend
        sent = 0
        while resend and self._unacknowledged < self.send_quota:
            packet_id = resend.popleft()
            item = session.in_flight.get(packet_id)
            if item is None:
                continue
            item.sent = True
            self._unacknowledged += 1
            if item.stage is Stage.RELEASED:
                self.send(PubRel(packet_id=packet_id))
            else:
                budget -= item.message.append_to(
                    out, v5=v5, qos=item.qos, retain=item.retain, packet_id=packet_id, now=now, dup=True
                )
        while queue and budget > 0 and not resend:
            item = queue[0]
            qos = item.qos
            if qos and self._unacknowledged >= self.send_quota:
                break
            queue.popleft()
            message = item.message
            if message.expires_at is not None and message.expires_at <= now:
                router.counters.expired += 1
                router.released(session, item)
                continue
            if message.wire_size(v5) > self.max_packet:
                # MQTT 5 §3.1.2.11.4: treat it as sent.
                router.counters.dropped_too_large += 1
                router.released(session, item)
                continue
            packet_id = 0
            if qos:
                packet_id = session.next_packet_id()
                session.in_flight[packet_id] = item
                item.sent = True
                self._unacknowledged += 1
            budget -= message.append_to(out, v5=v5, qos=qos, retain=item.retain, packet_id=packet_id, now=now)
            sent += 1
            if not qos:
                router.released(session, item)
        router.counters.messages_sent += sent

    # ------------------------------------------------------------------------------------------ the end

    def _refuse(self, error: PacketError) -> None:
        counters = self._router.counters
        counters.protocol_errors += 1
        if self.session is None and error.code is ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
            # In the form of 3.1.1, which every client understands.
            self._append(b"\x20\x02\0\x01")
        self.close(error.code)

    def revoke(self, now: float) -> None:
        """End the connection because its client's certificate was revoked."""
        self._router.now = now
        self.close(ReasonCode.NOT_AUTHORIZED)

    def close(self, code: ReasonCode) -> None:
        """End the connection from this side; an MQTT 5 client is told ``code``."""
        if self.closing:
            return
        if self.v5 and self.session is not None:
            self.send(Disconnect(code=code))
        self._end()

    def connection_lost(self, now: float) -> None:
        """The transport is gone."""
        self._router.now = now
        self._out = []
        self._end()
        self._broker.forget_connection(self)

    def _end(self) -> None:
        if not self.closing:
            self.closing = True
            self._rest, self._partial = b"", None
            self._tickets.clear()
            self._broker.detach(self)
        self._router.mark_dirty(self)
