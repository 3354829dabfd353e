"""The broker without I/O: sessions, routing, retained messages, wills and time.

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

import heapq
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final, NamedTuple

from fleetfed.broker.acl import Access, Acl
from fleetfed.broker.config import Limits
from fleetfed.broker.connection import Connection
from fleetfed.broker.packets import ConnAck, Connect, Disconnect, SubAck, Subscribe, UnsubAck, Unsubscribe, Will
from fleetfed.broker.properties import PacketError, Properties, Property, PropertyValue, ReasonCode, write_property_list
from fleetfed.broker.retained import RetainedStore
from fleetfed.broker.sessions import FORWARDED, Delivery, Grant, Message, Session
from fleetfed.broker.store import NO_STORE, Store
from fleetfed.broker.topictree import SubscriptionTree, split_shared

_CACHED_TOPICS: Final = 4096
_NEVER: Final = 0xFFFF_FFFF
"""A session expiry of MQTT 5 that means "does not expire"."""
_SWEEP_SECONDS: Final = 60.0
_PATROL_SECONDS: Final = 1.0
_NONE: Final[list[Session]] = []

# MQTT 3.1.1 §3.2.2.3 has five refusals.
_RETURN_CODES: Final[dict[int, int]] = {
    ReasonCode.UNSUPPORTED_PROTOCOL_VERSION: 1,
    ReasonCode.CLIENT_ID_NOT_VALID: 2,
    ReasonCode.SERVER_UNAVAILABLE: 3,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.QUOTA_EXCEEDED: 3,
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
}


@dataclass(slots=True)
class Counters:
    """What happened since the broker started; each only grows."""

    connections: int = 0
    connections_refused: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    messages_sent: int = 0
    dropped_offline: int = 0
    """QoS 1 and 2 messages for an offline session beyond its bounds."""
    dropped_qos0: int = 0
    """QoS 0 messages for a subscriber that is too slow."""
    dropped_too_large: int = 0
    """Messages larger than the subscriber takes."""
    expired: int = 0
    denied_publish: int = 0
    denied_delivery: int = 0
    retained_refused: int = 0
    acknowledgements_delayed: int = 0
    stalled_disconnected: int = 0
    keepalive_timeouts: int = 0
    protocol_errors: int = 0
    rate_limited: int = 0
    takeovers: int = 0
    theft_refused: int = 0
    wills: int = 0


class _Target(NamedTuple):
    session: Session
    qos: int
    no_local: bool
    retain_as_published: bool


class _Route(NamedTuple):
    targets: tuple[_Target, ...]
    groups: tuple[dict[Session, Grant], ...]


class Broker:
    """All sessions and messages of one broker.

    Attributes:
        limits: every bound.
        counters: what happened.
        now: the time of the call that is being handled.
        memory: bytes of messages queued for connected subscribers, each message counted once.
        memory_paused: connections that are not read because ``memory`` is above its mark.
        urgent: set when connections must stop being read at once, before anything else is; the caller resets it.
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
        self.limits = limits
        self.counters = Counters()
        self.now = self._started = now
        self.memory = 0
        self.memory_paused: dict[Connection, None] = {}
        self.urgent = False
        self._acl = acl
        self._make_id = make_id
        self._store = store
        self._sessions: dict[str, Session] = {}
        self._connections: dict[Connection, None] = {}
        self._tree: SubscriptionTree[Session, Grant] = SubscriptionTree()
        self._routes: dict[str, _Route] = {}
        self._may_write: dict[tuple[str | None, str, str], bool] = {}
        self._retained = RetainedStore(limits, store)
        self._offline_bytes = 0
        self._dirty: list[Connection] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._share_turn = 0
        self._patrolling = False
        self._sys_interval = sys_interval
        self._sys_last: dict[str, str] = {}
        self._restore()
        self.call_at(now + _SWEEP_SECONDS, self._sweep)
        if sys_interval:
            self.call_at(now, self._publish_sys)

    # ------------------------------------------------------------------------------------------ for the adapter

    def open(self, identity: str | None, now: float) -> Connection:
        """A transport has connected; ``identity`` is what its certificate proves."""
        self.now = now
        connection = Connection(self, identity, now)
        self._connections[connection] = None
        self.counters.connections += 1
        if len(self._connections) > self.limits.max_connections:
            self.counters.connections_refused += 1
            connection.close(ReasonCode.SERVER_BUSY)
        elif not self._patrolling:
            self._patrolling = True
            self.call_at(now + _PATROL_SECONDS, self._patrol)
        return connection

    def take_dirty(self) -> list[Connection]:
        """The connections that have something to send or to change, each once."""
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.dirty = False
        return dirty

    def mark_dirty(self, connection: Connection) -> None:
        """Put ``connection`` into the next `take_dirty`."""
        if not connection.dirty:
            connection.dirty = True
            self._dirty.append(connection)

    def next_deadline(self) -> float | None:
        """When `handle_timer` is to be called at the latest."""
        return self._timers[0][0] if self._timers else None

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self.now = now
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def call_at(self, when: float, action: Callable[[], None]) -> None:
        """Have `handle_timer` call ``action`` at ``when``."""
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, action))

    def set_acl(self, acl: Acl | None) -> None:
        """Use other access rules, at once and for live connections too."""
        self._acl = acl
        self._routes.clear()
        self._may_write.clear()

    def commit(self) -> None:
        """Make everything durable that was decided so far; call it before sending acknowledgements."""
        self._store.commit()

    def shut_down(self, now: float) -> None:
        """End all connections because the broker stops; durable sessions stay."""
        self.now = now
        for connection in list(self._connections):
            connection.close(ReasonCode.SERVER_SHUTTING_DOWN)

    def connections_of(self, username: str) -> list[Connection]:
        """The open connections of a user."""
        return [item for item in self._connections if item.session is not None and item.session.username == username]

    def statistics(self) -> dict[str, int]:
        """Counters and present sizes, by name."""
        values = {item.name: getattr(self.counters, item.name) for item in fields(self.counters)}
        values["clients_connected"] = sum(1 for item in self._sessions.values() if item.connection is not None)
        values["sessions"] = len(self._sessions)
        values["subscriptions"] = sum(len(item.subscriptions) for item in self._sessions.values())
        values["retained_messages"] = len(self._retained)
        values["retained_bytes"] = self._retained.size
        values["queued_messages"] = sum(len(item.queue) + len(item.in_flight) for item in self._sessions.values())
        values["queued_bytes"] = self.memory
        values["offline_bytes"] = self._offline_bytes
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
            self.counters.theft_refused += 1
            self._refuse_connect(connection, ReasonCode.CLIENT_ID_NOT_VALID)
            return
        if session is None and len(self._sessions) >= self.limits.max_sessions:
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
        if v5 and not 0 < keepalive <= self.limits.max_keepalive:
            keepalive = self.limits.max_keepalive
            properties[Property.SERVER_KEEP_ALIVE] = keepalive
        connection.keepalive = keepalive
        asked = packet.properties.get(Property.RECEIVE_MAXIMUM, self.limits.max_inflight)
        connection.send_quota = min(int(asked), self.limits.max_inflight)  # type: ignore[arg-type]
        connection.max_packet = int(packet.properties.get(Property.MAXIMUM_PACKET_SIZE, _NEVER))  # type: ignore[arg-type]
        properties[Property.RECEIVE_MAXIMUM] = self.limits.receive_maximum
        properties[Property.MAXIMUM_PACKET_SIZE] = self.limits.max_packet
        properties[Property.SUBSCRIPTION_ID_AVAILABLE] = 0
        connection.send(ConnAck(session_present=present, code=0, properties=properties))
        self._attach(session, connection)
        if session.durable:
            session.stored = True
            self._store.save_session(session, self.now)

    def _expiry(self, packet: Connect, properties: dict[int, PropertyValue]) -> float:
        longest = self.limits.max_session_expiry
        if packet.version != 5:
            return 0.0 if packet.clean_start else float(longest)
        asked = packet.properties.get(Property.SESSION_EXPIRY, 0)
        assert isinstance(asked, int)
        if asked > longest:
            properties[Property.SESSION_EXPIRY] = longest
            return float(longest)
        return float(asked)

    def _refuse_connect(self, connection: Connection, code: ReasonCode) -> None:
        self.counters.connections_refused += 1
        number = int(code) if connection.v5 else _RETURN_CODES.get(code, 5)
        connection.send(ConnAck(session_present=False, code=number))
        connection.close(code)

    def _attach(self, session: Session, connection: Connection) -> None:
        for item in session.deliveries():
            self._offline_bytes -= item.message.size
            self._hold(item.message)
        for item in session.in_flight.values():
            item.sent = False
        connection.resend.extend(session.in_flight)
        session.connection = connection
        session.progress_at = self.now
        connection.session = session

    def _take_over(self, session: Session, old: Connection, *, clean: bool) -> None:
        self.counters.takeovers += 1
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
            session.expiry = float(min(asked, self.limits.max_session_expiry))
        if packet.code != ReasonCode.DISCONNECT_WITH_WILL:
            session.will = None
        # No DISCONNECT is due in return.
        connection.v5 = False
        connection.close(ReasonCode.SUCCESS)

    def detach(self, connection: Connection) -> None:
        """The connection is over: settle its session, its will and those who waited for it."""
        self.memory_paused.pop(connection, None)
        session = connection.session
        if session is None:
            return
        connection.session = None
        session.connection = None
        session.pending_bytes = sum(item.message.size for item in session.deliveries())
        self._redeem(session)
        for item in session.deliveries():
            self._unhold(item.message)
            self._offline_bytes += item.message.size
        will = session.will
        if will is not None:
            delay = min(_seconds(will.properties, Property.WILL_DELAY), session.expiry)
            if delay > 0:
                session.will_due = self.now + delay
            else:
                self._send_will(session)
        if not session.durable:
            self._remove_session(session)
            return
        session.expires_at = self.now + session.expiry
        session.stored = True
        self._store.save_session(session, self.now)
        self._trim_offline(session)
        self._arm(session)

    def forget_connection(self, connection: Connection) -> None:
        """The transport is gone for good."""
        self._connections.pop(connection, None)

    def _trim_offline(self, session: Session) -> None:
        """Nothing of QoS 0 waits for an offline session, and no more than its bounds allow."""
        keep = [item for item in session.queue if item.qos]
        for item in session.queue:
            if not item.qos:
                self.counters.dropped_qos0 += 1
                self.released(session, item)
        session.queue.clear()
        session.queue.extend(keep)
        while session.queue and (
            len(session.queue) > self.limits.max_queued_messages
            or session.pending_bytes > self.limits.max_queued_bytes
            or self._offline_bytes > self.limits.max_offline_bytes
        ):
            self.counters.dropped_offline += 1
            self.released(session, session.queue.pop())

    def _remove_session(self, session: Session) -> None:
        if self._sessions.get(session.client_id) is not session:
            return
        del self._sessions[session.client_id]
        if session.will is not None and session.will_due is not None:
            self._send_will(session)
        for text in session.subscriptions:
            self._remove_from_tree(session, text)
        for item in session.deliveries():
            self.released(session, item)
        session.queue.clear()
        session.in_flight.clear()
        if session.stored:
            self._store.delete_session(session.client_id)

    def _send_will(self, session: Session) -> None:
        will, session.will, session.will_due = session.will, None, None
        if will is None:
            return
        if not self.may(Access.WRITE, will.topic, session):
            self.counters.denied_publish += 1
            return
        self.counters.wills += 1
        self.publish(_will_message(will, self.now), session, checked=True)

    # ------------------------------------------------------------------------------------------ subscriptions

    def subscribe(self, connection: Connection, session: Session, packet: Subscribe) -> None:
        """Grant the filters, acknowledge, then deliver what is retained."""
        codes: list[int] = []
        replay: list[tuple[str, Grant]] = []
        for item in packet.subscriptions:
            split = split_shared(item.topic_filter)
            if split is None:
                codes.append(ReasonCode.TOPIC_FILTER_INVALID if connection.v5 else 0x80)
                continue
            group, topic_filter = split
            if group is not None and item.no_local:
                raise PacketError(ReasonCode.PROTOCOL_ERROR, "no-local on a shared subscription")
            known = item.topic_filter in session.subscriptions
            if not known and len(session.subscriptions) >= self.limits.max_subscriptions:
                codes.append(ReasonCode.QUOTA_EXCEEDED if connection.v5 else 0x80)
                continue
            grant = Grant(item.qos, item.no_local, item.retain_as_published)
            session.subscriptions[item.topic_filter] = grant
            self._tree.add(topic_filter, session, grant, group)
            if session.durable:
                self._store.save_subscription(session.client_id, item.topic_filter, grant)
            codes.append(item.qos)
            if group is None and (item.retain_handling == 0 or (item.retain_handling == 1 and not known)):
                replay.append((topic_filter, grant))
        self._routes.clear()
        connection.send(SubAck(packet_id=packet.packet_id, codes=tuple(codes)))
        for topic_filter, grant in replay:
            if len(session.queue) > self.limits.max_queued_messages:
                raise PacketError(ReasonCode.QUOTA_EXCEEDED, "subscribes on without taking what is retained")
            for message in self._retained.match(topic_filter, self.now):
                if self.may(Access.READ, message.topic, session):
                    self._deliver(session, message, min(message.qos, grant.qos), True)
                else:
                    self.counters.denied_delivery += 1

    def unsubscribe(self, connection: Connection, session: Session, packet: Unsubscribe) -> None:
        """Drop the filters and acknowledge."""
        codes: list[int] = []
        for text in packet.filters:
            if session.subscriptions.pop(text, None) is None:
                codes.append(ReasonCode.NO_SUBSCRIPTION_EXISTED)
                continue
            self._remove_from_tree(session, text)
            if session.durable:
                self._store.delete_subscription(session.client_id, text)
            codes.append(ReasonCode.SUCCESS)
        connection.send(UnsubAck(packet_id=packet.packet_id, codes=tuple(codes)))

    def _remove_from_tree(self, session: Session, text: str) -> None:
        split = split_shared(text)
        assert split is not None
        self._tree.remove(split[1], session, split[0])
        self._routes.clear()

    def may(self, access: Access, topic: str, session: Session) -> bool:
        """Whether the session's client may read or write ``topic``."""
        if self._acl is None:
            return not (access is Access.WRITE and topic.startswith("$SYS"))
        return self._acl.allows(access, topic, username=session.username, client_id=session.client_id)

    # ------------------------------------------------------------------------------------------ messages

    def publish(self, message: Message, origin: Session | None, *, checked: bool = False) -> tuple[int, list[Session]]:
        """Route a message.

        Returns:
            the reason code for the publisher, and the connected subscribers that are congested: the
            acknowledgement waits for all of them.
        """
        topic = message.topic
        if origin is not None and not checked:
            key = (origin.username, origin.client_id, topic)
            allowed = self._may_write.get(key)
            if allowed is None:
                if len(self._may_write) >= _CACHED_TOPICS:
                    self._may_write.clear()
                allowed = self._may_write[key] = self.may(Access.WRITE, topic, origin)
            if not allowed:
                self.counters.denied_publish += 1
                return ReasonCode.NOT_AUTHORIZED, _NONE
        if message.retain and not self._retained.put(message, self.now):
            self.counters.retained_refused += 1
            return ReasonCode.QUOTA_EXCEEDED, _NONE
        route = self._routes.get(topic) or self._find_route(topic)
        congested, taken, lost = _NONE, 0, 0
        high_water = self.limits.high_water
        for session, granted, no_local, as_published in route.targets:
            if no_local and session is origin:
                continue
            if self._deliver(session, message, min(message.qos, granted), message.retain and as_published):
                taken += 1
                if session.pending_bytes > high_water and session.connection is not None:
                    congested = [*congested, session]
            else:
                lost += 1
        for group in route.groups:
            chosen = self._choose(group, topic)
            if chosen is None:
                continue
            session, grant = chosen
            if self._deliver(
                session, message, min(message.qos, grant.qos), message.retain and grant.retain_as_published
            ):
                taken += 1
                if session.pending_bytes > high_water and session.connection is not None:
                    congested = [*congested, session]
            else:
                lost += 1
        if taken:
            return ReasonCode.SUCCESS, congested
        return (ReasonCode.QUOTA_EXCEEDED if lost else ReasonCode.NO_MATCHING_SUBSCRIBERS), _NONE

    def _find_route(self, topic: str) -> _Route:
        plain, groups = self._tree.match(topic)
        merged: dict[Session, _Target] = {}
        for subscribers in plain:
            for session, grant in subscribers.items():
                old = merged.get(session)
                if old is None:
                    if not self.may(Access.READ, topic, session):
                        self.counters.denied_delivery += 1
                        continue
                    merged[session] = _Target(session, grant.qos, grant.no_local, grant.retain_as_published)
                else:
                    # MQTT 5 §3.3.4 allows one copy with the highest QoS for overlapping subscriptions.
                    merged[session] = _Target(
                        session,
                        max(old.qos, grant.qos),
                        old.no_local and grant.no_local,
                        old.retain_as_published or grant.retain_as_published,
                    )
        if len(self._routes) >= _CACHED_TOPICS:
            self._routes.clear()
        route = self._routes[topic] = _Route(tuple(merged.values()), tuple(groups))
        return route

    def _choose(self, group: dict[Session, Grant], topic: str) -> tuple[Session, Grant] | None:
        """The member of a shared group whose turn it is: one with room before a congested, an offline one last."""
        members = [item for item in group.items() if self.may(Access.READ, topic, item[0])]
        online = [item for item in members if item[0].connection is not None]
        free = [item for item in online if item[0].pending_bytes <= self.limits.high_water]
        candidates = free or online or members
        if not candidates:
            return None
        self._share_turn += 1
        return candidates[self._share_turn % len(candidates)]

    def _deliver(self, session: Session, message: Message, qos: int, retain: bool) -> bool:
        """Queue a message for a session; ``False`` if it should have been and there was no room."""
        connection = session.connection
        size = message.size
        if connection is None:
            if qos == 0:
                return True
            if (
                len(session.queue) >= self.limits.max_queued_messages
                or session.pending_bytes + size > self.limits.max_queued_bytes
                or self._offline_bytes + size > self.limits.max_offline_bytes
            ):
                self.counters.dropped_offline += 1
                return False
            self._offline_bytes += size
        else:
            if session.pending_bytes > self.limits.high_water:
                if qos == 0:
                    self.counters.dropped_qos0 += 1
                    return True
                if not session.stall_armed:
                    session.stall_armed = True
                    self.call_at(self.now + self.limits.stall_timeout, lambda: self._check_stall(session))
            if session.pending_bytes == 0:
                session.progress_at = self.now
                if connection in self.memory_paused:
                    # It has something to acknowledge now.
                    del self.memory_paused[connection]
                    connection.memory_available()
            if message.holders == 0:
                self.memory += size
            message.holders += 1
            if not connection.dirty:
                connection.dirty = True
                self._dirty.append(connection)
        item = Delivery(message, qos, retain)
        if qos and session.durable:
            self._store.add_delivery(session.client_id, item, self.now)
        session.queue.append(item)
        session.pending_bytes += size
        return True

    def released(self, session: Session, item: Delivery) -> None:
        """A delivery is over: acknowledged, sent at QoS 0, expired or dropped."""
        message = item.message
        session.pending_bytes -= message.size
        if item.row:
            self._store.delete_delivery(item)
        if session.connection is None:
            self._offline_bytes -= message.size
            return
        session.progress_at = self.now
        self._unhold(message)
        if session.tickets and session.pending_bytes <= self.limits.high_water >> 1:
            self._redeem(session)

    def _redeem(self, session: Session) -> None:
        tickets, session.tickets = session.tickets, []
        for ticket in tickets:
            ticket.waiting -= 1
            if not ticket.waiting:
                ticket.connection.redeem()

    def relieve_memory(self, publisher: Connection) -> None:
        """Too much is queued for connected subscribers: leave what publishers send in their sockets.

        All of them at once, not only ``publisher``: a thousand that send one message each are stopped by nothing else.
        """
        for connection in (publisher,) if self.memory_paused else list(self._connections):
            if connection not in self.memory_paused and connection.memory_short():
                self.memory_paused[connection] = None
                self.urgent = True

    def _hold(self, message: Message) -> None:
        if message.holders == 0:
            self.memory += message.size
        message.holders += 1

    def _unhold(self, message: Message) -> None:
        message.holders -= 1
        if message.holders == 0:
            self.memory -= message.size
            if self.memory_paused and self.memory <= self.limits.memory_high_water >> 1:
                paused, self.memory_paused = self.memory_paused, {}
                for connection in paused:
                    connection.memory_available()

    # ------------------------------------------------------------------------------------------ time

    def _patrol(self) -> None:
        """Look for silent clients.

        One round over all connections instead of a timer for each: a timer would keep a closed connection in memory
        until it fires, and reconnecting clients would pile them up.
        """
        for connection in list(self._connections):
            if connection.closing:
                continue
            silent = self.now - connection.last_received
            if connection.session is None:
                if self.now >= connection.opened_at + self.limits.connect_timeout:
                    connection.close(ReasonCode.KEEP_ALIVE_TIMEOUT)
            elif self.memory_paused and self._is_stalled(connection.session):
                self.counters.stalled_disconnected += 1
                connection.close(ReasonCode.QUOTA_EXCEEDED)
            elif not connection.wants_read:
                # We do not read it, so its silence proves nothing.
                connection.last_received = self.now
            elif connection.keepalive and silent >= connection.keepalive * 1.5:
                self.counters.keepalive_timeouts += 1
                connection.close(ReasonCode.KEEP_ALIVE_TIMEOUT)
        self._patrolling = bool(self._connections)
        if self._patrolling:
            self.call_at(self.now + _PATROL_SECONDS, self._patrol)

    def _is_stalled(self, session: Session) -> bool:
        return session.pending_bytes > 0 and self.now >= session.progress_at + self.limits.stall_timeout

    def _check_stall(self, session: Session) -> None:
        session.stall_armed = False
        connection = session.connection
        if connection is None or session.pending_bytes <= self.limits.high_water:
            return
        if self._is_stalled(session):
            self.counters.stalled_disconnected += 1
            connection.close(ReasonCode.QUOTA_EXCEEDED)
        else:
            session.stall_armed = True
            self.call_at(session.progress_at + self.limits.stall_timeout, lambda: self._check_stall(session))

    def _arm(self, session: Session) -> None:
        """See to an offline session's will and end; looked at once a minute, so that no timer outlives it for long."""
        due = min(filter(None, (session.will_due, session.expires_at)), default=None)
        if due is None:
            return
        when = min(due, self.now + _SWEEP_SECONDS)
        # A timer of an earlier absence may still be under way: it serves if it fires in time.
        if session.timer_at is None or when < session.timer_at:
            session.timer_at = when
            self.call_at(when, lambda: self._check_session(session))

    def _check_session(self, session: Session) -> None:
        if session.timer_at is None or self.now < session.timer_at:
            return  # an earlier timer has taken this one's place
        session.timer_at = None
        if session.connection is not None or self._sessions.get(session.client_id) is not session:
            return
        if session.will_due is not None and self.now >= session.will_due:
            self._send_will(session)
        if session.expires_at is not None and self.now >= session.expires_at:
            self._remove_session(session)
        else:
            self._arm(session)

    def _sweep(self) -> None:
        self._retained.expire(self.now)
        self.call_at(self.now + _SWEEP_SECONDS, self._sweep)

    def _publish_sys(self) -> None:
        values = self.statistics()
        shown = {
            "uptime": f"{int(self.now - self._started)} seconds",
            "clients/connected": values["clients_connected"],
            "clients/disconnected": values["sessions"] - values["clients_connected"],
            "clients/total": values["sessions"],
            "subscriptions/count": values["subscriptions"],
            "bytes/received": values["bytes_received"],
            "bytes/sent": values["bytes_sent"],
            "publish/messages/received": values["messages_received"],
            "publish/messages/sent": values["messages_sent"],
            "publish/messages/dropped": values["dropped"],
            "publish/messages/denied": values["denied_publish"],
            "retained messages/count": values["retained_messages"],
            "store/messages/count": values["queued_messages"],
            "store/messages/bytes": values["queued_bytes"] + values["offline_bytes"],
        }
        for name, value in shown.items():
            text = str(value)
            if self._sys_last.get(name) != text:
                self._sys_last[name] = text
                self.publish(Message(f"$SYS/broker/{name}", text.encode(), 0, True), None)
        self.call_at(self.now + self._sys_interval, self._publish_sys)

    # ------------------------------------------------------------------------------------------ durable state

    def _restore(self) -> None:
        for session in self._store.load_sessions(self.now):
            self._sessions[session.client_id] = session
            for text, grant in session.subscriptions.items():
                split = split_shared(text)
                assert split is not None
                self._tree.add(split[1], session, grant, split[0])
            self._offline_bytes += session.pending_bytes
            self._arm(session)
        for message in self._store.load_retained(self.now):
            self._retained.restore(message)


def _seconds(properties: Properties, name: Property) -> int:
    value = properties.get(name, 0)
    assert isinstance(value, int)
    return value


def _will_message(will: Will, now: float) -> Message:
    properties: Properties = {key: will.properties[key] for key in FORWARDED if key in will.properties}
    expiry = will.properties.get(Property.MESSAGE_EXPIRY)
    expires_at = now + expiry if isinstance(expiry, int) else None
    return Message(will.topic, will.payload, will.qos, will.retain, write_property_list(properties), expires_at)
