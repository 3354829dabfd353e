"""Brokers without sockets: retained messages, sessions, wills, QoS 1 with duplicates, and links that break.

What is guaranteed is what MQTT guarantees and no more. Messages of one publisher on one topic arrive in order; all
others in any. What a client published and the broker has not taken yet is lost with the connection; what the broker
delivered and the client has not confirmed comes again. `Network.moves` lists what could happen next; the world chooses.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import SessionLostError
from fleetfed.shared.mqtt.meter import ByteMeter


@dataclass(frozen=True, slots=True)
class Message:
    """One message on its way to a subscriber."""

    publisher: str
    topic: str
    payload: bytes
    retained: bool = False


@dataclass(eq=False)
class Link:
    """A connection, until it breaks; the client's requests wait in ``uplink`` for the broker to take them."""

    client: Client
    session: BrokerSession
    uplink: deque[Request] = field(default_factory=deque)
    alive: bool = True


@dataclass(eq=False)
class Request:
    """What a client wants of its broker."""

    topic: str = ""
    payload: bytes = b""
    retain: bool = False
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    done: Callable[[bool], None] = lambda _: None
    """Called with whether the broker took it."""


class Client(Protocol):
    """What a broker sees of a client."""

    config: ConnectionConfig
    will: Will | None
    link: Link | None

    def filters(self) -> list[str]:
        """Subscribed on every connect."""

    def dropped(self) -> list[str]:
        """Unsubscribed on every connect."""

    def linked(self, link: Link, *, session_present: bool) -> None:
        """There is a connection."""

    def lost(self, link: Link) -> None:
        """There is none any more."""

    def receive(self, link: Link, message: Message) -> None:
        """A message came."""


@dataclass(eq=False)
class BrokerSession:
    """What a broker keeps for one client id."""

    name: str
    persistent: bool
    filters: dict[str, None] = field(default_factory=dict)
    lanes: dict[tuple[str, str], deque[Message]] = field(default_factory=dict)
    unconfirmed: list[Message] = field(default_factory=list)
    last: dict[str, Message] = field(default_factory=dict)
    link: Link | None = None

    def put(self, message: Message) -> None:
        """Queue behind what came before from the same publisher on the same topic."""
        self.lanes.setdefault((message.publisher, message.topic), deque()).append(message)

    def confirm(self, message: Message) -> None:
        """The client has handled it."""
        if message in self.unconfirmed:
            self.unconfirmed.remove(message)

    def back(self) -> None:
        """What was not confirmed comes again, in its old order."""
        for message in reversed(self.unconfirmed):
            self.lanes.setdefault((message.publisher, message.topic), deque()).appendleft(message)
        self.unconfirmed.clear()

    def waiting(self) -> int:
        """Messages not confirmed."""
        return sum(map(len, self.lanes.values())) + len(self.unconfirmed)


class Broker:
    """See the module.

    Args:
        heard: called with every message that the broker takes.
    """

    def __init__(self, heard: Callable[[Message], None]) -> None:
        self.retained: dict[str, Message] = {}
        self.sessions: dict[str, BrokerSession] = {}
        self._heard = heard

    def publish(self, message: Message, *, retain: bool) -> None:
        """Take a message."""
        self._heard(message)
        if retain:
            self.retained.pop(message.topic, None)
            if message.payload:
                self.retained[message.topic] = replace(message, retained=True)
        self.spread(message)

    def spread(self, message: Message) -> None:
        """Queue a message for all who subscribed, without keeping it."""
        for session in self.sessions.values():
            if any(matches(each, message.topic) for each in session.filters) and (session.link or session.persistent):
                session.put(message)

    def subscribe(self, session: BrokerSession, filters: tuple[str, ...]) -> None:
        """Grant filters; retained messages come again, as MQTT has it, in the order of the filters."""
        for each in filters:
            session.filters[each] = None
            for topic, message in self.retained.items():
                if matches(each, topic):
                    session.put(message)

    def open(self, client: Client) -> None:
        """A client connects; one with the same name is thrown out."""
        name, persistent = client.config.client_id, client.config.session_expiry > 0
        session = self.sessions.get(name)
        if session is not None and session.link is not None:
            self.close(session.link, clean=False)
        present = session is not None and persistent
        if session is None or not persistent:
            session = self.sessions[name] = BrokerSession(name, persistent)
        link = session.link = Link(client, session)
        for each in client.dropped():
            session.filters.pop(each, None)
        client.linked(link, session_present=present)
        self.subscribe(session, tuple(client.filters()))

    def close(self, link: Link, *, clean: bool) -> None:
        """A connection ends; unless in good order, the will is published."""
        if not link.alive:
            return
        link.alive = False
        session = link.session
        session.link = None
        session.back()
        if not session.persistent:
            self.sessions.pop(session.name, None)
        for request in link.uplink:
            request.done(False)
        link.uplink.clear()
        will = link.client.will
        if will is not None and not clean:
            self.publish(Message(session.name, will.topic, will.payload), retain=will.retain)
        link.client.lost(link)

    def crash(self, *, lose: bool) -> None:
        """The broker's process ends, with its wills; with ``lose`` it kept nothing on disk."""
        for session in list(self.sessions.values()):
            if session.link is not None:
                link, session.link = session.link, None
                link.alive = False
                session.back()
                for request in link.uplink:
                    request.done(False)
                link.uplink.clear()
                link.client.lost(link)
        if lose:
            self.retained.clear()
            self.sessions.clear()

    def take(self, link: Link) -> None:
        """Take the oldest request of a client."""
        request = link.uplink.popleft()
        for each in request.unsubscribe:
            link.session.filters.pop(each, None)
        self.subscribe(link.session, request.subscribe)
        if request.topic:
            message = Message(link.session.name, request.topic, request.payload)
            self.publish(message, retain=request.retain)
        request.done(True)

    def deliver(self, link: Link, lane: tuple[str, str]) -> None:
        """Hand a client the next message of one publisher on one topic."""
        session = link.session
        message = session.lanes[lane].popleft()
        if not session.lanes[lane]:
            del session.lanes[lane]
        session.unconfirmed.append(message)
        session.last[message.topic] = message
        link.client.receive(link, message)


Move = tuple[Any, ...]
"""A function and its arguments."""


class Network:
    """All brokers and who wants to be connected to them.

    Args:
        heard: called with every message that a broker takes.
    """

    def __init__(self, heard: Callable[[int, Message], None]) -> None:
        self._heard = heard
        self.brokers: dict[int, Broker] = {}
        self.clients: list[Client] = []
        self.cut: set[tuple[str, int]] = set()

    def broker(self, port: int) -> Broker:
        """The broker on that port."""
        if port not in self.brokers:
            self.brokers[port] = Broker(lambda message: self._heard(port, message))
        return self.brokers[port]

    def links(self, name: str) -> list[Link]:
        """All connections of one member."""
        return [client.link for client in self.clients if client.config.client_id == name and client.link is not None]

    def drop(self, link: Link) -> None:
        """A connection breaks."""
        self.broker(link.client.config.port).close(link, clean=False)

    def moves(self) -> list[Move]:
        """All that could happen next: functions with their arguments, as few of so many are ever called."""
        moves: list[Move] = []
        for client in self.clients:
            link, broker = client.link, self.broker(client.config.port)
            if link is None:
                if (client.config.client_id, client.config.port) not in self.cut:
                    moves.append((broker.open, client))
                continue
            if link.uplink:
                moves.append((broker.take, link))
            moves += [(broker.deliver, link, lane) for lane in link.session.lanes]
        return moves


@functools.lru_cache(maxsize=1 << 16)
def matches(pattern: str, topic: str) -> bool:
    """Whether a filter of this project (``+`` only) covers a topic."""
    wanted, have = pattern.split("/"), topic.split("/")
    return len(wanted) == len(have) and all(a in ("+", b) for a, b in zip(wanted, have, strict=True))


class SimulatedSession:
    """In the place of `fleetfed.shared.mqtt.session.Session`, with its rules.

    Set `network` before any is made.
    """

    network: Network

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        subscriptions: Any = (),
        on_connect: Callable[[bool], Awaitable[None]] | None = None,
        on_message: Callable[[str, bytes, bool], Awaitable[None]] | None = None,
        on_disconnect: Callable[[str], Awaitable[None]] | None = None,
        will: Will | None = None,
        rng: Any = None,
        meter: ByteMeter | None = None,
    ) -> None:
        self.config = config
        self.will = will
        self.meter = meter if meter is not None else ByteMeter()
        self._filters = dict.fromkeys(subscriptions)
        self._unwanted: dict[str, None] = {}
        self._on_connect, self._on_message, self._on_disconnect = on_connect, on_message, on_disconnect
        self.link: Link | None = None
        self._greeted: Link | None = None
        self._queue: deque[tuple[Link, bool | Message | None]] = deque()
        self._arrived = asyncio.Event()

    # --- What the program calls ---------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.link is not None

    async def run(self) -> None:
        self.network.clients.append(self)
        try:
            while True:
                while not self._queue:
                    self._arrived.clear()
                    await self._arrived.wait()
                await self._handle(*self._queue.popleft())
        finally:
            if self in self.network.clients:
                self.network.clients.remove(self)
            if self.link is not None:
                # Cancelled by a program that stops. Who is killed was cut off before.
                self.network.broker(self.config.port).close(self.link, clean=True)

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        await self._ask(Request(topic=topic, payload=bytes(payload), retain=retain))

    async def subscribe(self, filters: list[str]) -> None:
        self._filters.update(dict.fromkeys(filters))
        for each in filters:
            self._unwanted.pop(each, None)
        await self._ask(Request(subscribe=tuple(filters)))

    async def unsubscribe(self, filters: list[str]) -> None:
        for each in filters:
            self._filters.pop(each, None)
            self._unwanted[each] = None
        await self._ask(Request(unsubscribe=tuple(filters)))
        for each in filters:
            self._unwanted.pop(each, None)

    async def _ask(self, request: Request) -> None:
        if self.link is None:
            raise SessionLostError("not connected")
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        request.done = lambda taken: None if answer.done() else answer.set_result(taken)
        self.link.uplink.append(request)
        if not await answer:
            raise SessionLostError("the connection broke")

    async def _handle(self, link: Link, item: bool | Message | None) -> None:
        try:
            if isinstance(item, Message):
                assert self._on_message is not None
                await self._on_message(item.topic, item.payload, item.retained)
                if link.alive:
                    link.session.confirm(item)
            elif item is not None:
                if self.link is link:
                    self._greeted = link
                    if self._on_connect is not None:
                        await self._on_connect(item)
            elif self._on_disconnect is not None and self._greeted is link:
                await self._on_disconnect("broke")
        except SessionLostError:
            if link.alive:
                raise

    # --- What the broker calls ----------------------------------------------------------------------------------------

    def filters(self) -> list[str]:
        return list(self._filters)

    def dropped(self) -> list[str]:
        dropped, self._unwanted = list(self._unwanted), {}
        return dropped

    def linked(self, link: Link, *, session_present: bool) -> None:
        self.link = link
        self._put(link, session_present)

    def lost(self, link: Link) -> None:
        self.link = None
        self._put(link, None)

    def receive(self, link: Link, message: Message) -> None:
        self._put(link, message)

    def _put(self, link: Link, item: bool | Message | None) -> None:
        self._queue.append((link, item))
        self._arrived.set()
