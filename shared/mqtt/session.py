"""An MQTT session for asyncio that is there for as long as the program runs.

Rules:

- Events arrive through one queue and are handled one at a time, in order: ``on_connect``, the messages of that
  connection, ``on_disconnect``, the next ``on_connect``.
- A message is confirmed to the broker after its handler returned (paho's manual acknowledgement), so a crash loses
  nothing that the broker believes delivered. The broker stops at ``receive_maximum`` unconfirmed messages: that is
  the back-pressure. Reading goes on, so that confirmations of our own messages and pings get through and a handler may
  publish and wait. A broker that ignores the window (MQTT 3.1.1 has no say in it) runs into the second bound: at
  ``queue_messages`` or ``queue_bytes`` reading stops until half of it is handled, unless somebody waits for a
  confirmation. QoS 0 is dropped there, and counted.
- After a loss, whatever was not confirmed either way is unknown: `publish` raises `SessionLostError`, and what was
  received and not handled is handled and comes again. Receivers deduplicate.

Example::

    session = Session(config, subscriptions=filters, on_connect=hello, on_message=handle)
    async with asyncio.TaskGroup() as group:
        group.create_task(session.run())
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from fleetfed.shared.mqtt.addresses import Addresses
from fleetfed.shared.mqtt.backoff import Backoff
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError, SubscribeRefusedError
from fleetfed.shared.mqtt.granting import ask_again
from fleetfed.shared.mqtt.link import Incoming, Link, LinkError
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.mqtt.tls import client_context
from fleetfed.shared.mqtt.unsaved import Unsaved
from fleetfed.shared.mqtt.versions import VersionChoice

_log = logging.getLogger(__name__)

OnConnect = Callable[[bool], Awaitable[None]]
OnMessage = Callable[[str, bytes, bool], Awaitable[None]]
OnDisconnect = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """How a session fared.

    Attributes:
        connected: whether there is a connection now.
        version5: whether it speaks MQTT 5.
        connects: connections made.
        failed_connects: attempts that failed.
        received: messages handled.
        dropped_qos0: QoS 0 messages that found the queue full.
        malformed: messages whose topic is not text.
        published: messages confirmed by the broker.
        refused: messages refused by the broker.
        lost: publishes that ended in `SessionLostError`.
        pauses: times that reading stopped because the queue was full.
        queue_messages: messages waiting now; ``queue_bytes``: their payload; ``*_high``: the most ever.
        awaiting: own messages that the broker has not confirmed now.
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
    pauses: int
    queue_messages: int
    queue_messages_high: int
    queue_bytes: int
    queue_bytes_high: int
    awaiting: int


@dataclass(frozen=True, slots=True)
class _Connected:
    link: Link


@dataclass(frozen=True, slots=True)
class _Lost:
    link: Link
    reason: str


class Session:
    """See the module. Create it on the event loop's thread; `run` it once.

    Args:
        config: where and as whom.
        subscriptions: filters, subscribed at QoS 1 on every connect.
        on_connect: awaited after the subscriptions are granted, with whether the broker had kept the session. It may
            publish and wait. A `SessionLostError` of this session may escape from it.
        on_message: awaited with topic, payload and whether it is a retained copy. Anything that escapes, but a
            `SessionLostError` while this session has no connection, ends `run`: catch what a peer can cause.
        on_disconnect: awaited with the reason.
        will: what the broker says when we vanish.
        rng: the source of the back-off's jitter.
        meter: shared with others to count them together.

    Raises:
        ConfigError: the TLS files do not work.
    """

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        subscriptions: Sequence[str] = (),
        on_connect: OnConnect | None = None,
        on_message: OnMessage | None = None,
        on_disconnect: OnDisconnect | None = None,
        will: Will | None = None,
        rng: random.Random | None = None,
        meter: ByteMeter | None = None,
    ) -> None:
        if config.tls is not None:
            client_context(config.tls)
        self._addresses = Addresses(config)
        self.config = self._addresses.config
        self.meter = meter if meter is not None else ByteMeter()
        self._subscriptions = list(dict.fromkeys(subscriptions))
        self._unwanted: set[str] = set()
        self._on_connect = on_connect
        self._on_message = on_message
        self._on_disconnect = on_disconnect
        self._will = will
        self._backoff = Backoff(rng if rng is not None else random.Random(), cap=config.reconnect_cap)  # noqa: S311
        self._version = VersionChoice(config)
        self._link: Link | None = None
        self._version5 = False
        self._queue: deque[Incoming | _Connected | _Lost] = deque()
        self._arrived = asyncio.Event()
        self._online = asyncio.Event()
        self._bytes = self._bytes_high = self._messages = self._messages_high = 0
        self._connects = self._failed = self._received = self._dropped = self._malformed = 0
        self._published = self._refused = self._lost = self._pauses = 0
        self._paused = False
        self._calls = 0
        self._greeted: Link | None = None
        self._unsaved = Unsaved()

    async def run(self) -> None:
        """Stay connected until cancelled; then close in good order, so that no will is sent.

        Raises:
            ExceptionGroup: of whatever a handler raised.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._dispatch(), name=f"mqtt-dispatch-{self.config.client_id}")
            group.create_task(self._stay_connected(), name=f"mqtt-connect-{self.config.client_id}")

    @property
    def connected(self) -> bool:
        """Whether publishing makes sense now."""
        return self._link is not None

    async def wait_connected(self) -> None:
        """Return as soon as there is a connection with its subscriptions."""
        await self._online.wait()

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish; returns when the broker confirmed (QoS 0: when it is on its way to the kernel).

        Many calls may wait at once; they leave in the order of the calls. There is no timeout: a broker that delays
        its confirmation holds us back on purpose, and a dead one is noticed by keep-alive. If the caller is
        cancelled the message may still arrive.

        Raises:
            SessionLostError: there is no connection, or it ended first; the broker may or may not have the message.
            PublishRefusedError: the broker refused it, or it is larger than the broker takes. An MQTT 3.1.1 broker
                cannot say so: even success is no proof that anybody may read it.
            LocalProtocolError: the topic is not one to publish on.
        """
        try:
            with self._call() as link:
                if retain:
                    self._unsaved.begun(topic)
                await link.publish_confirmed(topic, payload, qos=qos, retain=retain)
                if retain:
                    self._unsaved.confirmed(topic, payload, qos, time.monotonic())
        except PublishRefusedError:
            self._refused += 1
            raise
        except SessionLostError:
            self._lost += 1
            raise
        self._published += 1

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe to more, now and after every reconnect.

        Raises:
            SessionLostError: no connection, or it ended first; the filters are subscribed on the next connect.
            SubscribeRefusedError: the broker refused; the filters are forgotten.
        """
        new = [each for each in dict.fromkeys(filters) if each not in self._subscriptions]
        self._subscriptions += new
        self._unwanted.difference_update(filters)
        try:
            with self._call() as link:
                await link.subscribe_all(list(dict.fromkeys(filters)))
        except SubscribeRefusedError:
            self._subscriptions = [each for each in self._subscriptions if each not in new]
            raise

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """Unsubscribe, now and for good.

        Raises:
            SessionLostError: no connection, or it ended first; the filters are unsubscribed on the next connect.
        """
        self._unwanted |= set(filters)
        self._subscriptions = [each for each in self._subscriptions if each not in self._unwanted]
        with self._call() as link:
            await self._drop_unwanted(link)

    def statistics(self) -> SessionStatistics:
        """How this session fared."""
        return SessionStatistics(
            connected=self.connected,
            version5=self._version5,
            connects=self._connects,
            failed_connects=self._failed,
            received=self._received,
            dropped_qos0=self._dropped,
            malformed=self._malformed,
            published=self._published,
            refused=self._refused,
            lost=self._lost,
            pauses=self._pauses,
            queue_messages=self._messages,
            queue_messages_high=self._messages_high,
            queue_bytes=self._bytes,
            queue_bytes_high=self._bytes_high,
            awaiting=self._link.awaiting if self._link is not None else 0,
        )

    async def _drop_unwanted(self, link: Link) -> None:
        gone = list(self._unwanted)
        await link.unsubscribe_all(gone)
        self._unwanted.difference_update(gone)

    @contextlib.contextmanager
    def _call(self) -> Iterator[Link]:
        """Keep reading going while a call waits for its confirmation: a handler that waits would wait for ever."""
        if self._link is None:
            raise SessionLostError("not connected")
        self._calls += 1
        self._regulate()
        try:
            yield self._link
        finally:
            self._calls -= 1
            self._regulate()

    async def _stay_connected(self) -> None:
        while True:
            again_at_once = await self._connect_once()
            _heed_cancellation()
            if not again_at_once:
                await asyncio.sleep(self._backoff.delay())

    async def _connect_once(self) -> bool:
        """Make one connection and see it end; returns whether to try again without a pause."""
        self._version5 = self._version.version5()
        self.config = self._addresses.config
        link = Link(
            self.config,
            version5=self._version5,
            will=self._will,
            meter=self.meter,
            on_accepted=self._accepted,
            on_message=self._enqueue,
            on_malformed=self._count_malformed,
        )
        try:
            await link.open()
        except LinkError as error:
            self._failed += 1
            _log.info("%s: cannot connect to %s:%d: %s", *self._name(), error)
            if error.code is not None:
                return self._version.refused(error.code) or self._addresses.failed()
            if error.reached:
                return self._version.closed() or self._addresses.failed()
            self._version.unreachable()
            return self._addresses.failed()
        self._version.connected()
        began = time.monotonic()
        try:
            # The broker kept the session's filters, those too that were dropped while there was no connection.
            await self._drop_unwanted(link)
            await link.subscribe_all(self._subscriptions)
            await link.subscribe_all(ask_again(self._subscriptions, seconds=time.monotonic() - began))
            _heed_cancellation()
            await self._say_again(link)
            self._link = link
            self._connects += 1
            self._online.set()
            self._arrived.set()
            _log.info("%s: connected to %s:%d", *self._name())
            reason = await link.wait_lost()
        except SessionLostError as error:
            reason = str(error)
        except SubscribeRefusedError as error:
            reason = str(error)
            _log.error("%s: %s:%d does not let us listen: %s", *self._name(), error)
        finally:
            self._link = None
            self._online.clear()
            self._paused = False
            await link.shut()
        ended = time.monotonic()
        self._unsaved.lost(ended)
        lasted = ended - began
        self._backoff.connected_for(lasted)
        _log.info("%s: lost %s:%d: %s", *self._name(), reason)
        self._push(_Lost(link, reason))
        return self._addresses.lost(lasted)

    async def _say_again(self, link: Link) -> None:
        """Before anything new: a broker that was killed may have forgotten it."""
        for topic, payload, qos in self._unsaved.doubtful():
            with contextlib.suppress(PublishRefusedError):
                await link.publish_confirmed(topic, payload, qos=qos, retain=True)
            self._unsaved.confirmed(topic, payload, qos, time.monotonic())

    def _name(self) -> tuple[str, str, int]:
        return self.config.client_id, self.config.host, self.config.port

    def _accepted(self, link: Link) -> None:
        self._push(_Connected(link))

    def _count_malformed(self) -> None:
        self._malformed += 1

    def _enqueue(self, message: Incoming) -> None:
        full = self._messages >= self.config.queue_messages or self._bytes >= self.config.queue_bytes
        if full and message.qos == 0:
            self._dropped += 1
            message.link.confirm(message)
            return
        self._messages += 1
        self._bytes += len(message.payload)
        self._messages_high = max(self._messages_high, self._messages)
        self._bytes_high = max(self._bytes_high, self._bytes)
        self._push(message)
        self._regulate()

    def _push(self, item: Incoming | _Connected | _Lost) -> None:
        self._queue.append(item)
        self._arrived.set()

    def _regulate(self) -> None:
        """Stop reading where the queue is full and nobody waits for the broker; go on where half of it is handled."""
        link = self._link
        if link is None:
            return
        full = self._messages >= self.config.queue_messages or self._bytes >= self.config.queue_bytes
        low = 2 * self._messages <= self.config.queue_messages and 2 * self._bytes <= self.config.queue_bytes
        if not self._paused and full and not self._calls:
            self._paused = True
            self._pauses += 1
            link.pause_reading()
        elif self._paused and (low or self._calls):
            self._paused = False
            link.resume_reading()

    async def _dispatch(self) -> None:
        while True:
            _heed_cancellation()
            while not self._queue or not self._ready(self._queue[0]):
                self._arrived.clear()
                await self._arrived.wait()
            item = self._queue.popleft()
            match item:
                case Incoming():
                    await self._handle(item)
                case _Connected(link):
                    if self._link is link:
                        self._greeted = link
                        if self._on_connect is not None:
                            await self._forgiving(self._on_connect(link.session_present), link)
                case _Lost(link, reason):
                    if self._on_disconnect is not None and self._greeted is link:
                        await self._on_disconnect(reason)

    def _ready(self, item: Incoming | _Connected | _Lost) -> bool:
        """A connection counts once its subscriptions are granted; until then everything behind it waits."""
        return not isinstance(item, _Connected) or self._link is item.link or item.link.lost.done()

    async def _handle(self, message: Incoming) -> None:
        handled = self._on_message is None or await self._forgiving(
            self._on_message(message.topic, message.payload, message.retained), message.link
        )
        self._messages -= 1
        self._bytes -= len(message.payload)
        self._received += 1
        if handled:
            message.link.confirm(message)
        self._regulate()

    async def _forgiving(self, call: Awaitable[None], link: Link) -> bool:
        """Await a handler; returns whether it ended well. Losing its own connection is not its fault."""
        try:
            await call
        except SessionLostError:
            if not link.lost.done():
                raise
            return False
        return True


def _heed_cancellation() -> None:
    """End a task that was cancelled.

    Python 3.11's `asyncio.wait_for`, which aiomqtt waits with, loses a cancellation that meets the broker's answer.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
