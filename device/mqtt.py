"""The device's MQTT session: one thread, no event loop.

Rules:

- The session's own thread is the only one that touches paho. The caller's thread leaves commands in a queue and wakes
  it; what happens comes back as events on the caller's inbox. So no callback can block keep-alive, and paho's locks
  and its ``select``, which stops working at 1024 open files, are not used.
- Every connection gets a fresh paho client: nothing unconfirmed is sent again behind the caller's back. `Disconnected`
  ends every token that is not done; a publish before the next `Connected` is lost as well. Keep what matters and
  publish it again after `Connected`; receivers deduplicate.
- A received message is confirmed by `DeviceSession.ack`, after it was handled, in order of arrival. A crash before that
  brings it back. The broker stops at ``receive_maximum`` unconfirmed messages.
- An inbox that is full drops QoS 0 and makes everything else wait here, up to a bound; beyond it the session
  disconnects and comes back when the inbox has room.

Example::

    inbox: queue.Queue[Event] = queue.Queue(256)
    session = DeviceSession(config, will=will, subscriptions=filters, inbox=inbox)
    session.start()
    while True:
        match inbox.get():
            case Connected(): token = session.publish(topic, b"...")
            case Received() as message: handle(message); session.ack(message)
            case PublishDone(token, refused_code): ...
            case Disconnected(): ...
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fleetfed.device.link import BACKLOG_POLL, Ack, Command, Link, Publish, Received, Subscribe
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.mqtt.addresses import Addresses
from fleetfed.shared.mqtt.backoff import Backoff
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import SessionBusyError
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.mqtt.tls import client_context
from fleetfed.shared.mqtt.versions import VersionChoice

__all__ = [
    "MAX_QUEUED",
    "Connected",
    "DeviceSession",
    "DeviceStatistics",
    "Disconnected",
    "Event",
    "Inbox",
    "PublishDone",
    "Received",
]

_log = logging.getLogger(__name__)

MAX_QUEUED: Final = 64
"""Messages of ours that may wait, confirmed or not yet sent; about 8 MB at most."""

_MAX_TOPIC: Final = 1024


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted and granted the subscriptions; ``session_present``: it had kept our session."""

    session_present: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone, and with it every token that is not done."""

    reason: str


@dataclass(frozen=True, slots=True)
class PublishDone:
    """The broker confirmed ``token``, or refused it with a reason code of 0x80 or above."""

    token: int
    refused_code: int | None = None


Event = Connected | Disconnected | Received | PublishDone


class Inbox(Protocol):
    """Where events go: a `queue.Queue` with a ``maxsize``, or anything with this method of it."""

    def put_nowait(self, item: Event, /) -> None:
        """Take ``item`` or raise `queue.Full`; never block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatistics:
    """How a session fared.

    Attributes:
        connected: whether there is a connection now; ``version5``: whether it speaks MQTT 5.
        connects: connections made; ``failed_connects``: attempts that failed.
        received: messages; ``dropped_qos0``: those that found the inbox full; ``malformed``: topic not text.
        published: messages confirmed; ``refused``: refused by the broker; ``lost``: ended by a disconnect.
        backlog: events that wait for the inbox now; ``backlog_high``: the most ever.
        queued: messages of ours that wait now, to be sent or to be confirmed.
    """

    connected: bool
    version5: bool
    connects: int
    failed_connects: int
    received: int
    dropped_qos0: int
    malformed: int
    published: int
    refused: int
    lost: int
    backlog: int
    backlog_high: int
    queued: int


class DeviceSession:
    """See the module.

    Args:
        config: where and as whom; a device's ``keepalive`` is 60.
        will: what the broker says when we vanish; `close` says its topic's last word.
        subscriptions: filters, subscribed at QoS 1 on every connect.
        inbox: where events go.
        rng: the source of the back-off's jitter.
        meter: shared with others to count them together.
        max_queued: messages of ours that may wait.

    Raises:
        ConfigError: the TLS files do not work.
    """

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        inbox: Inbox,
        will: Will | None = None,
        subscriptions: Sequence[str] = (),
        rng: random.Random | None = None,
        meter: ByteMeter | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        if config.tls is not None:
            client_context(config.tls)
        self._addresses = Addresses(config)
        self.config = self._addresses.config
        self.meter = meter if meter is not None else ByteMeter()
        self._will = will
        self._inbox = inbox
        self._max_queued = max_queued
        self._backoff = Backoff(rng if rng is not None else random.Random(), cap=config.reconnect_cap)  # noqa: S311
        self._version = VersionChoice(config)
        self._tokens = itertools.count(1)
        self._lock = threading.Lock()
        # Shared between threads, under the lock.
        self._subscriptions = list(dict.fromkeys(subscriptions))
        self._commands: deque[Command] = deque()
        self._queued = 0
        self._farewell: bytes | None = None
        self._closing = False
        self._connected = False
        # The session's thread alone.
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._backlog: deque[Event] = deque()
        self._backlog_high = 0
        self._connection = 0
        self._link: Link | None = None
        self._version5 = False
        self._connects = self._failed = self._received = self._dropped = self._malformed = 0
        self._published = self._refused = self._lost = 0
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{config.client_id}", daemon=True)

    def start(self) -> None:
        """Begin to connect, in a thread of its own; once."""
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        """Queue a message and return its token, which a `PublishDone` or a `Disconnected` ends. Any thread.

        Raises:
            SessionBusyError: ``max_queued`` messages wait already.
            LocalProtocolError: the topic is not one to publish on.
        """
        if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic) > _MAX_TOPIC:
            raise LocalProtocolError(f"{topic[:100]!r} is not a topic to publish on")
        with self._lock:
            if self._queued >= self._max_queued:
                raise SessionBusyError(f"{self._queued} messages wait already")
            token = next(self._tokens)
            self._queued += 1
            self._commands.append(Publish(token, topic, payload, qos, retain))
        self._wake()
        return token

    def subscribe(self, *filters: str) -> None:
        """Subscribe to more, now and after every reconnect. Any thread."""
        with self._lock:
            self._subscriptions += [each for each in filters if each not in self._subscriptions]
            self._commands.append(Subscribe(filters, add=True))
        self._wake()

    def unsubscribe(self, *filters: str) -> None:
        """Unsubscribe, now and for good. Any thread."""
        with self._lock:
            self._subscriptions = [each for each in self._subscriptions if each not in filters]
            self._commands.append(Subscribe(filters, add=False))
        self._wake()

    def ack(self, message: Received) -> None:
        """Tell the broker that ``message`` was handled; in order of arrival. Any thread, harmless when stale."""
        if message.qos:
            with self._lock:
                self._commands.append(Ack(message.connection, message.mid, message.qos))
            self._wake()

    def close(self, state_payload: bytes | None = None, *, timeout: float = 5.0) -> None:
        """Say ``state_payload`` on the will's topic, disconnect in good order and end the thread.

        Args:
            state_payload: the last word; None says nothing. It is not said when there is no connection.
            timeout: seconds for all of it; then the socket is just closed, and the broker sends the will.
        """
        with self._lock:
            self._farewell = state_payload
            self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout)
            link = self._link
            if self._thread.is_alive() and link is not None:
                link.abandon = True
                self._wake()
                self._thread.join(timeout)
        if not self._thread.is_alive():
            self._wake_read.close()
            self._wake_write.close()

    def statistics(self) -> DeviceStatistics:
        """How this session fared. Any thread."""
        with self._lock:
            return DeviceStatistics(
                connected=self._connected,
                version5=self._version5,
                connects=self._connects,
                failed_connects=self._failed,
                received=self._received,
                dropped_qos0=self._dropped,
                malformed=self._malformed,
                published=self._published,
                refused=self._refused,
                lost=self._lost,
                backlog=len(self._backlog),
                backlog_high=self._backlog_high,
                queued=self._queued,
            )

    def _wake(self) -> None:
        # A full pipe has woken it already, a closed one has nobody to wake.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    # Everything below runs on the session's thread.

    def _run(self) -> None:
        while not self._closing:
            again_at_once = self._connect_once()
            self._forget_commands()
            if not again_at_once:
                self._rest(self._backoff.delay())

    def _connect_once(self) -> bool:
        """Make one connection and see it end; returns whether to try again without a pause."""
        self._version5 = self._version.version5()
        self.config = self._addresses.config
        self._connection += 1
        link = Link(self, self._connection, version5=self._version5)
        self._link = link
        began = time.monotonic()
        try:
            reason = link.serve()
        finally:
            self._link = None
            self._connected = False
        if link.accepted:
            self._version.connected()
            self._backoff.connected_for(time.monotonic() - began)
        if link.announced:
            _log.info("%s: lost the broker: %s", self.config.client_id, reason)
            self.post(Disconnected(reason))
            return self._addresses.lost(time.monotonic() - began)
        self._failed += 1
        _log.info("%s: cannot connect to %s:%d: %s", self.config.client_id, self.config.host, self.config.port, reason)
        if link.accepted:
            return self._addresses.failed()
        if link.refused is not None:
            return self._version.refused(link.refused) or self._addresses.failed()
        if link.reached:
            return self._version.closed() or self._addresses.failed()
        self._version.unreachable()
        return self._addresses.failed()

    def _forget_commands(self) -> None:
        """What was queued for a connection that is gone is lost with it; the caller publishes it again."""
        with self._lock:
            # Subscriptions outlive connections: the broker keeps them in the session.
            self._commands = deque(each for each in self._commands if isinstance(each, Subscribe))
            self._lost += self._queued
            self._queued = 0

    def _rest(self, seconds: float) -> None:
        """Wait, handing over the backlog; until the inbox has room for everything, however long that takes."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._closing:
                self.drain()
                left = until - time.monotonic()
                if left <= 0 and not self._backlog:
                    return
                if selector.select(min(left, BACKLOG_POLL) if self._backlog else left):
                    self.swallow_wake()

    def swallow_wake(self) -> None:
        """Empty the pipe that commands wake us with."""
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def post(self, event: Event) -> None:
        """Put ``event`` on the inbox, or behind what waits for it already."""
        self._backlog.append(event)
        self.drain()
        self._backlog_high = max(self._backlog_high, len(self._backlog))

    def drain(self) -> None:
        """Hand over as much of the backlog as the inbox takes."""
        while self._backlog:
            try:
                self._inbox.put_nowait(self._backlog[0])
            except queue.Full:
                return
            self._backlog.popleft()

    # What `fleetfed.device.link.Owner` describes.

    @property
    def backlog(self) -> int:
        """Events that wait for the inbox."""
        return len(self._backlog)

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def wake_socket(self) -> socket.socket:
        """Readable when there are commands."""
        return self._wake_read

    @property
    def will(self) -> Will | None:
        """What the broker says when we vanish."""
        return self._will

    def farewell(self) -> bytes | None:
        """The last word that `close` was given."""
        return self._farewell

    def filters(self) -> list[str]:
        """What to subscribe to on connect."""
        with self._lock:
            return list(self._subscriptions)

    def take_command(self) -> Command | None:
        """The next command."""
        with self._lock:
            return self._commands.popleft() if self._commands else None

    def put_back(self, command: Publish) -> None:
        """The window is full: this one first, later."""
        with self._lock:
            self._commands.appendleft(command)

    def announce(self, *, session_present: bool) -> None:
        """The connection is usable."""
        # A command given before the caller could know of this connection belongs to none.
        self._forget_commands()
        self._connects += 1
        self._connected = True
        self.post(Connected(session_present))

    def done(self, token: int, refused_code: int | None) -> None:
        """A message of ours met its end."""
        with self._lock:
            self._queued -= 1
        if refused_code is None:
            self._published += 1
        else:
            self._refused += 1
        self.post(PublishDone(token, refused_code))

    def receive(self, message: Received) -> None:
        """A message came in."""
        self._received += 1
        if message.qos == 0 and self._backlog:
            self._dropped += 1
            return
        self.post(message)
        if message.qos == 0 and self._backlog:
            self._backlog.pop()
            self._dropped += 1

    def count_malformed(self) -> None:
        """A topic was not text."""
        self._malformed += 1
