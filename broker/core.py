"""The broker without I/O: connections, sessions, wills and time.

Time is an argument (seconds of any steady clock), randomness is one (`make_id`), bytes go through
`fleetfed.broker.connection.Connection`. A program that serves clients with it looks like this::

    broker = Broker(limits=Limits(), acl=acl, make_id=..., now=0.0)
    connection = broker.open("d-07", now)             # a client whose certificate says d-07
    connection.receive_data(data, now)
    for each in broker.take_dirty():
        write(each, each.data_to_send())
    ...
    broker.handle_timer(now)                          # not later than broker.next_deadline()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from fleetfed.broker.acl import Access, Acl
from fleetfed.broker.config import Limits
from fleetfed.broker.connection import Connection
from fleetfed.broker.counters import system_topics
from fleetfed.broker.packets import ConnAck, Connect, Disconnect, Will
from fleetfed.broker.properties import PacketError, Properties, Property, PropertyValue, ReasonCode, write_property_list
from fleetfed.broker.router import Router
from fleetfed.broker.sessions import FORWARDED, Message, Session
from fleetfed.broker.store import NO_STORE, Store

_NEVER: Final = 0xFFFF_FFFF
"""A session expiry of MQTT 5 that means "does not expire"."""
_SWEEP_SECONDS: Final = 60.0
_PATROL_SECONDS: Final = 1.0

# MQTT 3.1.1 §3.2.2.3 has five refusals.
_RETURN_CODES: Final[dict[int, int]] = {
    ReasonCode.UNSUPPORTED_PROTOCOL_VERSION: 1,
    ReasonCode.CLIENT_ID_NOT_VALID: 2,
    ReasonCode.SERVER_UNAVAILABLE: 3,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.QUOTA_EXCEEDED: 3,
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
}


class Broker:
    """All sessions of one broker, from CONNECT to their end.

    Attributes:
        router: subscriptions, queues and flow control.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        acl: Acl | None,
        make_id: Callable[[], str],
        now: float,
        store: Store = NO_STORE,
        sys_interval: float = 0.0,
    ) -> None:
        """Start with what ``store`` has kept.

        Args:
            limits: every bound.
            acl: access rules; ``None`` allows everything.
            make_id: makes the id of a client that does not bring one.
            now: the present time.
            store: where durable state goes.
            sys_interval: seconds between publications of ``$SYS``; 0 for none.
        """
        self.router = Router(limits, acl, store, now)
        self._limits = limits
        self._counters = self.router.counters
        self._timers = self.router.timers
        self._started = now
        self._make_id = make_id
        self._store = store
        self._sessions: dict[str, Session] = {}
        self._patrolling = False
        self._sys_interval = sys_interval
        self._sys_last: dict[str, str] = {}
        self._restore()
        self._timers.call_at(now + _SWEEP_SECONDS, self._sweep)
        if sys_interval:
            self._timers.call_at(now, self._publish_sys)

    # ------------------------------------------------------------------------------------------ for the adapter

    def open(self, identity: str | None, now: float) -> Connection:
        """A transport has connected; ``identity`` is what its certificate proves."""
        self.router.now = now
        connection = Connection(self, self.router, identity, now)
        self.router.connections[connection] = None
        self._counters.connections += 1
        if len(self.router.connections) > self._limits.max_connections:
            self._counters.connections_refused += 1
            connection.close(ReasonCode.SERVER_BUSY)
        elif not self._patrolling:
            self._patrolling = True
            self._timers.call_at(now + _PATROL_SECONDS, self._patrol)
        return connection

    def take_dirty(self) -> list[Connection]:
        """The connections that have something to send or to change, each once."""
        return self.router.take_dirty()

    def take_urgent(self) -> bool:
        """Whether connections must stop being read at once, before anything else is; asking resets it."""
        urgent, self.router.urgent = self.router.urgent, False
        return urgent

    def next_deadline(self) -> float | None:
        """When `handle_timer` is to be called at the latest."""
        return self._timers.next_deadline()

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self.router.now = now
        self._timers.run(now)

    def set_acl(self, acl: Acl | None) -> None:
        """Use other access rules, at once and for live connections too."""
        self.router.set_acl(acl)

    def commit(self) -> None:
        """Make everything durable that was decided so far; call it before sending acknowledgements."""
        self._store.commit()

    def shut_down(self, now: float) -> None:
        """End all connections because the broker stops; durable sessions stay."""
        self.router.now = now
        for connection in list(self.router.connections):
            connection.close(ReasonCode.SERVER_SHUTTING_DOWN)

    def statistics(self) -> dict[str, int]:
        """Counters and present sizes, by name."""
        values = {item.name: getattr(self._counters, item.name) for item in fields(self._counters)}
        values["clients_connected"] = sum(1 for item in self._sessions.values() if item.connection is not None)
        values["sessions"] = len(self._sessions)
        values["subscriptions"] = sum(len(item.subscriptions) for item in self._sessions.values())
        values["retained_messages"] = len(self.router.retained)
        values["retained_bytes"] = self.router.retained.size
        values["queued_messages"] = sum(len(item.queue) + len(item.in_flight) for item in self._sessions.values())
        values["queued_bytes"] = self.router.memory
        values["offline_bytes"] = self.router.offline_bytes
        values["dropped"] = values["dropped_offline"] + values["dropped_qos0"]
        return values

    # ------------------------------------------------------------------------------------------ CONNECT

    def connect(self, connection: Connection, packet: Connect) -> None:
        """Open or resume the session that CONNECT asks for, or refuse it."""
        v5 = connection.v5 = packet.version == 5
        properties: dict[int, PropertyValue] = {}
        if connection.identity is not None:
            # The certificate's name is user name and client id, whatever the client calls itself.
            client_id = username = connection.identity
        else:
            username = packet.username  # type: ignore[assignment]
            client_id = packet.client_id
        if not client_id:
            if not packet.clean_start and not v5:
                self._refuse_connect(connection, ReasonCode.CLIENT_ID_NOT_VALID)
                return
            client_id = self._make_id()
        if v5 and client_id != packet.client_id and not packet.client_id:
            properties[Property.ASSIGNED_CLIENT_ID] = client_id
        if Property.AUTHENTICATION_METHOD in packet.properties:
            self._refuse_connect(connection, ReasonCode.BAD_AUTHENTICATION_METHOD)
            return
        session = self._sessions.get(client_id)
        if session is not None and session.username != username:
            self._counters.theft_refused += 1
            self._refuse_connect(connection, ReasonCode.CLIENT_ID_NOT_VALID)
            return
        if session is None and len(self._sessions) >= self._limits.max_sessions:
            self._refuse_connect(connection, ReasonCode.QUOTA_EXCEEDED)
            return
        if session is not None and session.connection is not None:
            self._take_over(session, session.connection, clean=packet.clean_start)
            session = self._sessions.get(client_id)
        if session is not None and packet.clean_start:
            self._remove_session(session)
            session = None
        present = session is not None
        if session is None:
            session = self._sessions[client_id] = Session(client_id, username)
        session.will_due = None
        session.will = packet.will
        session.expiry = self._expiry(packet, properties)
        session.expires_at = None
        keepalive = packet.keepalive
        if v5 and not 0 < keepalive <= self._limits.max_keepalive:
            keepalive = self._limits.max_keepalive
            properties[Property.SERVER_KEEP_ALIVE] = keepalive
        connection.keepalive = keepalive
        asked = packet.properties.get(Property.RECEIVE_MAXIMUM, self._limits.max_inflight)
        connection.send_quota = min(int(asked), self._limits.max_inflight)  # type: ignore[arg-type]
        connection.max_packet = int(packet.properties.get(Property.MAXIMUM_PACKET_SIZE, _NEVER))  # type: ignore[arg-type]
        properties[Property.RECEIVE_MAXIMUM] = self._limits.receive_maximum
        properties[Property.MAXIMUM_PACKET_SIZE] = self._limits.max_packet
        properties[Property.SUBSCRIPTION_ID_AVAILABLE] = 0
        connection.send(ConnAck(session_present=present, code=0, properties=properties))
        self._attach(session, connection)
        if session.durable:
            session.stored = True
            self._store.save_session(session, self.router.now)

    def _expiry(self, packet: Connect, properties: dict[int, PropertyValue]) -> float:
        longest = self._limits.max_session_expiry
        if packet.version != 5:
            return 0.0 if packet.clean_start else float(longest)
        asked = packet.properties.get(Property.SESSION_EXPIRY, 0)
        assert isinstance(asked, int)
        if asked > longest:
            properties[Property.SESSION_EXPIRY] = longest
            return float(longest)
        return float(asked)

    def _refuse_connect(self, connection: Connection, code: ReasonCode) -> None:
        self._counters.connections_refused += 1
        number = int(code) if connection.v5 else _RETURN_CODES.get(code, 5)
        connection.send(ConnAck(session_present=False, code=number))
        connection.close(code)

    def _attach(self, session: Session, connection: Connection) -> None:
        for item in session.deliveries():
            self.router.offline_bytes -= item.message.size
            self.router.hold(item.message)
        for item in session.in_flight.values():
            item.sent = False
        connection.resend.extend(session.in_flight)
        session.connection = connection
        session.progress_at = self.router.now
        connection.session = session

    def _take_over(self, session: Session, old: Connection, *, clean: bool) -> None:
        self._counters.takeovers += 1
        if session.will is not None and not clean and _seconds(session.will.properties, Property.WILL_DELAY):
            session.will = None  # MQTT 5 §3.1.3.2.2: the session goes on before the delay has passed
        old.close(ReasonCode.SESSION_TAKEN_OVER)

    # ------------------------------------------------------------------------------------------ the end of one

    def client_disconnects(self, connection: Connection, session: Session, packet: Disconnect) -> None:
        """DISCONNECT came: the will is dropped unless the client says otherwise."""
        asked = packet.properties.get(Property.SESSION_EXPIRY)
        if isinstance(asked, int):
            if asked and not session.expiry:
                raise PacketError(ReasonCode.PROTOCOL_ERROR, "session expiry raised from zero")
            session.expiry = float(min(asked, self._limits.max_session_expiry))
        if packet.code != ReasonCode.DISCONNECT_WITH_WILL:
            session.will = None
        # No DISCONNECT is due in return.
        connection.v5 = False
        connection.close(ReasonCode.SUCCESS)

    def detach(self, connection: Connection) -> None:
        """The connection is over: settle its session, its will and those who waited for it."""
        self.router.memory_paused.pop(connection, None)
        session = connection.session
        if session is None:
            return
        connection.session = None
        session.connection = None
        session.pending_bytes = sum(item.message.size for item in session.deliveries())
        self.router.redeem(session)
        for item in session.deliveries():
            self.router.unhold(item.message)
            self.router.offline_bytes += item.message.size
        will = session.will
        if will is not None:
            delay = min(_seconds(will.properties, Property.WILL_DELAY), session.expiry)
            if delay > 0:
                session.will_due = self.router.now + delay
            else:
                self._send_will(session)
        if not session.durable:
            self._remove_session(session)
            return
        session.expires_at = self.router.now + session.expiry
        session.stored = True
        self._store.save_session(session, self.router.now)
        self._trim_offline(session)
        self._arm(session)

    def forget_connection(self, connection: Connection) -> None:
        """The transport is gone for good."""
        self.router.connections.pop(connection, None)

    def _trim_offline(self, session: Session) -> None:
        """Nothing of QoS 0 waits for an offline session, and no more than its bounds allow."""
        keep = [item for item in session.queue if item.qos]
        for item in session.queue:
            if not item.qos:
                self._counters.dropped_qos0 += 1
                self.router.released(session, item)
        session.queue.clear()
        session.queue.extend(keep)
        while session.queue and (
            len(session.queue) > self._limits.max_queued_messages
            or session.pending_bytes > self._limits.max_queued_bytes
            or self.router.offline_bytes > self._limits.max_offline_bytes
        ):
            self._counters.dropped_offline += 1
            self.router.released(session, session.queue.pop())

    def _remove_session(self, session: Session) -> None:
        if self._sessions.get(session.client_id) is not session:
            return
        del self._sessions[session.client_id]
        if session.will is not None and session.will_due is not None:
            self._send_will(session)
        for text in session.subscriptions:
            self.router.drop_filter(session, text)
        for item in session.deliveries():
            self.router.released(session, item)
        session.queue.clear()
        session.in_flight.clear()
        if session.stored:
            self._store.delete_session(session.client_id)

    def _send_will(self, session: Session) -> None:
        will, session.will, session.will_due = session.will, None, None
        if will is None:
            return
        if not self.router.may(Access.WRITE, will.topic, session):
            self._counters.denied_publish += 1
            return
        self._counters.wills += 1
        self.router.publish(_will_message(will, self.router.now), session, checked=True)

    # ------------------------------------------------------------------------------------------ time

    def _patrol(self) -> None:
        """Look for silent clients.

        One round over all connections instead of a timer for each: a timer would keep a closed connection in memory
        until it fires, and reconnecting clients would pile them up.
        """
        for connection in list(self.router.connections):
            if connection.closing:
                continue
            silent = self.router.now - connection.last_received
            if connection.session is None:
                if self.router.now >= connection.opened_at + self._limits.connect_timeout:
                    connection.close(ReasonCode.KEEP_ALIVE_TIMEOUT)
            elif self.router.memory_paused and self.router.is_stalled(connection.session):
                self._counters.stalled_disconnected += 1
                connection.close(ReasonCode.QUOTA_EXCEEDED)
            elif not connection.wants_read:
                # We do not read it, so its silence proves nothing.
                connection.last_received = self.router.now
            elif connection.keepalive and silent >= connection.keepalive * 1.5:
                self._counters.keepalive_timeouts += 1
                connection.close(ReasonCode.KEEP_ALIVE_TIMEOUT)
        self._patrolling = bool(self.router.connections)
        if self._patrolling:
            self._timers.call_at(self.router.now + _PATROL_SECONDS, self._patrol)

    def _arm(self, session: Session) -> None:
        """See to an offline session's will and end; looked at once a minute, so that no timer outlives it for long."""
        due = min(filter(None, (session.will_due, session.expires_at)), default=None)
        if due is None:
            return
        when = min(due, self.router.now + _SWEEP_SECONDS)
        # A timer of an earlier absence may still be under way: it serves if it fires in time.
        if session.timer_at is None or when < session.timer_at:
            session.timer_at = when
            self._timers.call_at(when, lambda: self._check_session(session))

    def _check_session(self, session: Session) -> None:
        if session.timer_at is None or self.router.now < session.timer_at:
            return  # an earlier timer has taken this one's place
        session.timer_at = None
        if session.connection is not None or self._sessions.get(session.client_id) is not session:
            return
        if session.will_due is not None and self.router.now >= session.will_due:
            self._send_will(session)
        if session.expires_at is not None and self.router.now >= session.expires_at:
            self._remove_session(session)
        else:
            self._arm(session)

    def _sweep(self) -> None:
        self.router.retained.expire(self.router.now)
        self._timers.call_at(self.router.now + _SWEEP_SECONDS, self._sweep)

    def _publish_sys(self) -> None:
        for topic, text in system_topics(self.statistics(), self.router.now - self._started):
            if self._sys_last.get(topic) != text:
                self._sys_last[topic] = text
                self.router.publish(Message(topic, text.encode(), 0, True), None)
        self._timers.call_at(self.router.now + self._sys_interval, self._publish_sys)

    # ------------------------------------------------------------------------------------------ durable state

    def _restore(self) -> None:
        for session in self._store.load_sessions(self.router.now):
            self._sessions[session.client_id] = session
            for text, grant in session.subscriptions.items():
                self.router.add_filter(session, text, grant)
            self.router.offline_bytes += session.pending_bytes
            self._arm(session)
        for message in self._store.load_retained(self.router.now):
            self.router.retained.restore(message)


def _seconds(properties: Properties, name: Property) -> int:
    value = properties.get(name, 0)
    assert isinstance(value, int)
    return value


def _will_message(will: Will, now: float) -> Message:
    properties: Properties = {key: will.properties[key] for key in FORWARDED if key in will.properties}
    expiry = will.properties.get(Property.MESSAGE_EXPIRY)
    expires_at = now + expiry if isinstance(expiry, int) else None
    return Message(will.topic, will.payload, will.qos, will.retain, write_property_list(properties), expires_at)
