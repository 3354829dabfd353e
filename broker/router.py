"""From publishers to subscribers: who gets a message, what waits for whom, and how much may wait. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from fleetfed.broker.acl import Access, Acl
from fleetfed.broker.config import Limits
from fleetfed.broker.counters import Counters
from fleetfed.broker.packets import SubAck, Subscribe, UnsubAck, Unsubscribe
from fleetfed.broker.properties import PacketError, ReasonCode
from fleetfed.broker.retained import RetainedStore
from fleetfed.broker.sessions import Delivery, Grant, Message, Session
from fleetfed.broker.store import Store
from fleetfed.broker.timers import Timers
from fleetfed.broker.topictree import SubscriptionTree, split_shared

if TYPE_CHECKING:
    from fleetfed.broker.connection import Connection

_CACHED_TOPICS: Final = 4096
_NONE: Final[list[Session]] = []


class _Target(NamedTuple):
    session: Session
    qos: int
    no_local: bool
    retain_as_published: bool


class _Route(NamedTuple):
    targets: tuple[_Target, ...]
    groups: tuple[dict[Session, Grant], ...]


class Router:
    """Subscriptions, retained messages and queues, and the flow control between publishers and subscribers.

    A message for a connected subscriber is never dropped at QoS 1 and 2. Instead its publisher waits: while a
    subscriber has more than ``high_water`` bytes to take, acknowledgements of messages for it are held back; while all
    of them together have more than ``memory_high_water``, clients that have nothing to acknowledge are not read; and a
    subscriber that takes nothing at all for ``stall_timeout`` is disconnected, so that nobody waits for ever.

    Attributes:
        limits: every bound.
        counters: what happened.
        store: where durable state goes.
        now: the time of the call that is being handled.
        timers: what is to be done later.
        connections: all that are open.
        retained: the retained messages.
        memory: bytes of messages queued for connected subscribers, each message counted once.
        offline_bytes: bytes queued for offline sessions.
        memory_paused: connections that are not read because ``memory`` is above its mark.
        urgent: set when connections must stop being read at once, before anything else is; the caller resets it.
    """

    def __init__(self, limits: Limits, acl: Acl | None, store: Store, now: float) -> None:
        self.limits = limits
        self.counters = Counters()
        self.store = store
        self.now = now
        self.timers = Timers()
        self.connections: dict[Connection, None] = {}
        self.retained = RetainedStore(limits, store)
        self.memory = 0
        self.offline_bytes = 0
        self.memory_paused: dict[Connection, None] = {}
        self.urgent = False
        self._acl = acl
        self._tree: SubscriptionTree[Session, Grant] = SubscriptionTree()
        self._routes: dict[str, _Route] = {}
        self._may_write: dict[tuple[str | None, str, str], bool] = {}
        self._dirty: list[Connection] = []
        self._share_turn = 0

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

    def set_acl(self, acl: Acl | None) -> None:
        """Use other access rules, at once and for live connections too."""
        self._acl = acl
        self._routes.clear()
        self._may_write.clear()

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
                self.store.save_subscription(session.client_id, item.topic_filter, grant)
            codes.append(item.qos)
            if group is None and (item.retain_handling == 0 or (item.retain_handling == 1 and not known)):
                replay.append((topic_filter, grant))
        self._routes.clear()
        connection.send(SubAck(packet_id=packet.packet_id, codes=tuple(codes)))
        for topic_filter, grant in replay:
            if len(session.queue) > self.limits.max_queued_messages:
                raise PacketError(ReasonCode.QUOTA_EXCEEDED, "subscribes on without taking what is retained")
            for message in self.retained.match(topic_filter, self.now):
                if self.may(Access.READ, message.topic, session):
                    self.deliver(session, message, min(message.qos, grant.qos), True)
                else:
                    self.counters.denied_delivery += 1

    def unsubscribe(self, connection: Connection, session: Session, packet: Unsubscribe) -> None:
        """Drop the filters and acknowledge."""
        codes: list[int] = []
        for text in packet.filters:
            if session.subscriptions.pop(text, None) is None:
                codes.append(ReasonCode.NO_SUBSCRIPTION_EXISTED)
                continue
            self.drop_filter(session, text)
            if session.durable:
                self.store.delete_subscription(session.client_id, text)
            codes.append(ReasonCode.SUCCESS)
        connection.send(UnsubAck(packet_id=packet.packet_id, codes=tuple(codes)))

    def add_filter(self, session: Session, text: str, grant: Grant) -> None:
        """Put a restored subscription into the tree; ``text`` was checked when it was made."""
        split = split_shared(text)
        assert split is not None
        self._tree.add(split[1], session, grant, split[0])

    def drop_filter(self, session: Session, text: str) -> None:
        """Take a subscription out of the tree."""
        split = split_shared(text)
        assert split is not None
        self._tree.remove(split[1], session, split[0])
        self._routes.clear()

    def may(self, access: Access, topic: str, session: Session) -> bool:
        """Whether the session's client may read or write ``topic``."""
        if self._acl is None:
            return not (access is Access.WRITE and topic.startswith("$SYS"))
        return self._acl.allows(access, topic, username=session.username, client_id=session.client_id)

    # ------------------------------------------------------------------------------------------ routing

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
        if message.retain and not self.retained.put(message, self.now):
            self.counters.retained_refused += 1
            return ReasonCode.QUOTA_EXCEEDED, _NONE
        route = self._routes.get(topic) or self._find_route(topic)
        congested, taken, lost = _NONE, 0, 0
        high_water = self.limits.high_water
        for session, granted, no_local, as_published in route.targets:
            if no_local and session is origin:
                continue
            if self.deliver(session, message, min(message.qos, granted), message.retain and as_published):
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
            if self.deliver(
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

    def deliver(self, session: Session, message: Message, qos: int, retain: bool) -> bool:
        """Queue a message for a session; ``False`` if it should have been and there was no room."""
        connection = session.connection
        size = message.size
        if connection is None:
            if qos == 0:
                return True
            if (
                len(session.queue) >= self.limits.max_queued_messages
                or session.pending_bytes + size > self.limits.max_queued_bytes
                or self.offline_bytes + size > self.limits.max_offline_bytes
            ):
                self.counters.dropped_offline += 1
                return False
            self.offline_bytes += size
        else:
            if session.pending_bytes > self.limits.high_water:
                if qos == 0:
                    self.counters.dropped_qos0 += 1
                    return True
                if not session.stall_armed:
                    session.stall_armed = True
                    self.timers.call_at(self.now + self.limits.stall_timeout, lambda: self._check_stall(session))
            if session.pending_bytes == 0:
                session.progress_at = self.now
                if connection in self.memory_paused:
                    # It has something to acknowledge now.
                    del self.memory_paused[connection]
                    connection.memory_available()
            self.hold(message)
            if not connection.dirty:
                connection.dirty = True
                self._dirty.append(connection)
        item = Delivery(message, qos, retain)
        if qos and session.durable:
            self.store.add_delivery(session.client_id, item, self.now)
        session.queue.append(item)
        session.pending_bytes += size
        return True

    # ------------------------------------------------------------------------------------------ flow control

    def released(self, session: Session, item: Delivery) -> None:
        """A delivery is over: acknowledged, sent at QoS 0, expired or dropped."""
        message = item.message
        session.pending_bytes -= message.size
        if item.row:
            self.store.delete_delivery(item)
        if session.connection is None:
            self.offline_bytes -= message.size
            return
        session.progress_at = self.now
        self.unhold(message)
        if session.tickets and session.pending_bytes <= self.limits.high_water >> 1:
            self.redeem(session)

    def redeem(self, session: Session) -> None:
        """Nobody has to wait for this session any more."""
        tickets, session.tickets = session.tickets, []
        for ticket in tickets:
            ticket.waiting -= 1
            if not ticket.waiting:
                ticket.connection.redeem()

    def relieve_memory(self, publisher: Connection) -> None:
        """Too much is queued for connected subscribers: leave what publishers send in their sockets.

        All of them at once, not only ``publisher``: a thousand that send one message each are stopped by nothing else.
        """
        for connection in (publisher,) if self.memory_paused else list(self.connections):
            if connection not in self.memory_paused and connection.memory_short():
                self.memory_paused[connection] = None
                self.urgent = True

    def hold(self, message: Message) -> None:
        """One more connected session has the message queued."""
        if message.holders == 0:
            self.memory += message.size
        message.holders += 1

    def unhold(self, message: Message) -> None:
        """One connected session less has the message queued."""
        message.holders -= 1
        if message.holders == 0:
            self.memory -= message.size
            if self.memory_paused and self.memory <= self.limits.memory_high_water >> 1:
                paused, self.memory_paused = self.memory_paused, {}
                for connection in paused:
                    connection.memory_available()

    def is_stalled(self, session: Session) -> bool:
        """Whether the session's client has taken nothing for too long although there is something to take."""
        return session.pending_bytes > 0 and self.now >= session.progress_at + self.limits.stall_timeout

    def _check_stall(self, session: Session) -> None:
        session.stall_armed = False
        connection = session.connection
        if connection is None or session.pending_bytes <= self.limits.high_water:
            return
        if self.is_stalled(session):
            self.counters.stalled_disconnected += 1
            connection.close(ReasonCode.QUOTA_EXCEEDED)
        else:
            session.stall_armed = True
            self.timers.call_at(session.progress_at + self.limits.stall_timeout, lambda: self._check_stall(session))
