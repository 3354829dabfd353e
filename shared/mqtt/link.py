"""One connection to a broker, for asyncio: the only module that imports aiomqtt.

A `Link` lives from one connect to the loss of that connection and is never used again. So nothing that paho-mqtt
still holds can be sent on a later connection behind the caller's back.

aiomqtt brings the context manager, subscribe and unsubscribe, and the glue between paho and the event loop. What it
lacks is added here: the reason code of a PUBACK, whether a session was present, confirmation after handling instead of
on arrival, a window of confirmations that respects the broker's, prompt failure when a broker closes instead of
answering, and a write path that needs no trip through the selector.

Messages of QoS 1 and their confirmations, of which a gateway sees thousands per round, do not pass through paho at all
(`stream`).

It reaches into these private members of aiomqtt 2.5 and paho 2.2, nothing else in the project does:
``Client._client``, ``_connected``, ``_disconnected``, ``_on_*`` (aiomqtt), ``_create_socket``, ``_sock_close``,
``_mid_generate``, and in `stream` ``_sock_send``, ``_sock_recv`` and ``_last_bytes_received`` (paho).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import PACKET_TOO_LARGE, PublishRefusedError, SessionLostError, SubscribeRefusedError
from fleetfed.shared.mqtt.frames import Publish, puback, publish
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.mqtt.properties import connect_properties
from fleetfed.shared.mqtt.sockets import open_socket
from fleetfed.shared.mqtt.stream import Stream
from fleetfed.shared.mqtt.tls import TlsFiles, client_context

T = TypeVar("T")

_FILTERS_PER_PACKET: Final = 8
"""The strictest managed broker takes no more in one SUBSCRIBE."""

_PUBLISH_OVERHEAD: Final = 16
"""Bytes around topic and payload in a PUBLISH without properties, rounded up."""

_ANY_SIZE: Final = 1 << 28
"""Bytes that MQTT can say; an MQTT 3.1.1 broker cannot be told of less."""

_GOODBYE: Final = 1.0
"""Seconds to get a DISCONNECT out before the socket is just closed."""

_log = logging.getLogger(__name__)

# paho and aiomqtt describe every packet at debug, and call an error what is the life of a mobile client.
_client_log = logging.getLogger("fleetfed.mqtt.client")
_client_log.setLevel(logging.CRITICAL)


class LinkError(Exception):
    """A connection could not be made.

    Attributes:
        code: the broker's reason code (MQTT 5 numbering); None if it never answered.
        reached: whether TCP and TLS worked, so that the broker closed instead of answering.
    """

    def __init__(self, text: str, *, code: int | None = None, reached: bool = False) -> None:
        self.code = code
        self.reached = reached
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Incoming:
    """One received message; ``link.confirm(message)`` after it was handled."""

    link: Link
    mid: int
    qos: int
    topic: str
    payload: bytes
    retained: bool


class Link(aiomqtt.Client):
    """One connection: `open`, then publish and subscribe until `lost` is done, then `shut`.

    Args:
        config: where and as whom.
        version5: MQTT 5, or else 3.1.1.
        will: what the broker says when we vanish.
        meter: counts the connection.
        on_accepted: called when the broker accepted, before the first message.
        on_message: called with every message.
        on_malformed: called for a message whose topic is not text.

    Attributes:
        lost: done when the connection is gone; its result says why.
        session_present: whether the broker had kept this client's session.
    """

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        version5: bool,
        will: Will | None,
        meter: ByteMeter,
        on_accepted: Callable[[Link], None],
        on_message: Callable[[Incoming], None],
        on_malformed: Callable[[], None],
    ) -> None:
        super().__init__(
            config.host,
            config.port,
            identifier=config.client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if version5 else aiomqtt.ProtocolVersion.V311,
            will=None if will is None else aiomqtt.Will(will.topic, will.payload, will.qos, will.retain),
            # MQTT 5 section 3.1.2.4 and 3.1.2.11.2: the session survives only if it is neither started clean nor
            # without expiry; 3.1.1 has the one flag.
            clean_session=None if version5 else False,
            clean_start=False if version5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=connect_properties(config) if version5 else None,
            keepalive=config.keepalive,
            timeout=config.connect_timeout,
            # Our own window decides; paho must not hold messages back that would then die in its queue.
            max_inflight_messages=0,
            logger=_client_log,
        )
        self.session_present = False
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.pending_calls_threshold = 1 << 16
        self._config = config
        self._version5 = version5
        self._meter = meter
        self._accepted = on_accepted
        self._deliver = on_message
        self._malformed = on_malformed
        self._thread = threading.get_ident()
        self._window = asyncio.Semaphore(config.max_inflight)
        self._unconfirmed: dict[int, asyncio.Future[int]] = {}
        self._max_packet = config.max_packet
        self._refused: int | None = None
        self._reached = False
        self._abandoned = False
        self._stream = Stream(
            self._client,
            self._loop,
            version5=version5,
            most=config.max_packet if version5 else _ANY_SIZE,
            window=config.receive_maximum,
            on_publish=self._received,
            on_puback=self._settle,
            on_broken=self._abandon,
        )
        self._client.manual_ack_set(True)
        self._client.connect_timeout = config.connect_timeout
        self._client._create_socket = self._create_socket  # type: ignore[method-assign]

    async def open(self) -> None:
        """Connect; blocks the event loop nowhere.

        Raises:
            LinkError: not reachable, refused, or closed without an answer.
        """
        try:
            await self.__aenter__()
        except aiomqtt.MqttError as error:
            self._abandon(str(error))
            raise LinkError(str(error), code=self._refused, reached=self._reached) from error
        except BaseException:
            self._abandon("cancelled")
            raise

    async def wait_lost(self) -> str:
        """Wait until the connection is gone; returns why."""
        # A plain await would cancel the future together with the caller.
        await asyncio.wait((self.lost,))
        return self.lost.result()

    async def shut(self) -> None:
        """Say goodbye, so that the broker discards the will, and close."""
        if not self.lost.done():
            self._client.disconnect()
            await asyncio.wait((self.lost,), timeout=_GOODBYE)
        self._abandon("closed by us")

    async def publish_confirmed(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        """Publish; returns when the broker confirmed (QoS 0: when it is on its way to the kernel).

        Raises:
            SessionLostError: the connection ended first.
            PublishRefusedError: the broker refused it, or it is larger than the broker takes.
            LocalProtocolError: the topic is not one to publish on.
        """
        code = await (await self._begin(topic, payload, qos, retain))
        if code < 0:
            raise SessionLostError(self.lost.result())
        if code >= 0x80:
            raise PublishRefusedError(topic, code)
        self._meter.add_payload(sent=len(payload))

    async def _begin(self, topic: str, payload: bytes, qos: int, retain: bool) -> asyncio.Future[int]:
        """Queue a message as soon as the broker's window allows; the future gets its reason code, -1 for a loss.

        Raises:
            SessionLostError, PublishRefusedError, LocalProtocolError: as `publish_confirmed`.
        """
        try:
            name = topic.encode()
        except UnicodeEncodeError as error:
            raise LocalProtocolError(f"{topic!r} is no topic to publish on") from error
        if len(payload) + len(name) + _PUBLISH_OVERHEAD > self._max_packet:
            raise PublishRefusedError(topic, PACKET_TOO_LARGE)
        if not 0 < len(name) < 1 << 16 or any(each in topic for each in "+#\0"):
            raise LocalProtocolError(f"{topic!r} is no topic to publish on")
        await self._window.acquire()
        if self.lost.done():
            self._window.release()
            raise SessionLostError(self.lost.result())
        if qos == 1:
            while (mid := self._client._mid_generate()) in self._unconfirmed:
                # A confirmation may be that late: there are 65535 numbers, and far fewer in the window.
                pass
            self._stream.send(publish(name, payload, mid, retain=retain, version5=self._version5))
        else:
            info = self._client.publish(topic, payload, qos, retain)
            if info.rc != paho.MQTT_ERR_SUCCESS:
                self._window.release()
                raise SessionLostError(paho.error_string(info.rc))
            mid = info.mid
        # What was queued is written in a later turn of the loop, so that the answer cannot come before this line.
        answer = self._unconfirmed[mid] = self._loop.create_future()
        return answer

    async def subscribe_all(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1; the effective quality is the publisher's where that is lower.

        Raises:
            SessionLostError: the connection ended first.
            SubscribeRefusedError: the broker did not grant one.
        """
        for start in range(0, len(filters), _FILTERS_PER_PACKET):
            part = filters[start : start + _FILTERS_PER_PACKET]
            if self._version5:
                codes = await self._or_lost(self.subscribe([(each, SubscribeOptions(qos=1)) for each in part]))
            else:
                codes = await self._or_lost(self.subscribe([(each, 1) for each in part]))
            for each, code in zip(part, codes, strict=True):
                value = code.value if isinstance(code, ReasonCode) else int(code)
                if value >= 0x80:
                    raise SubscribeRefusedError(each, value)

    async def unsubscribe_all(self, filters: Sequence[str]) -> None:
        """Unsubscribe.

        Raises:
            SessionLostError: the connection ended first.
        """
        for start in range(0, len(filters), _FILTERS_PER_PACKET):
            await self._or_lost(self.unsubscribe(list(filters[start : start + _FILTERS_PER_PACKET])))

    def confirm(self, message: Incoming) -> None:
        """Tell the broker that ``message`` was handled; harmless once the connection is gone."""
        if self.lost.done():
            return
        self._stream.handled()
        if message.qos == 1:
            self._stream.send_along(puback(message.mid))
        elif message.qos:
            self._client.ack(message.mid, message.qos)

    def pause_reading(self) -> None:
        """Leave what the broker sends in the kernel's buffer, so that TCP holds it back."""
        if not self.lost.done():
            self._stream.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if not self.lost.done():
            self._stream.resume_reading()

    @property
    def awaiting(self) -> int:
        """Own messages that the broker has not confirmed."""
        return len(self._unconfirmed)

    async def _or_lost(self, call: Any) -> Any:
        """The result of an aiomqtt call, or `SessionLostError` as soon as the connection is gone."""
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait((task, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise SessionLostError(self.lost.result())
            try:
                return task.result()
            except aiomqtt.MqttError as error:
                raise SessionLostError(str(error)) from error
        finally:
            task.cancel()

    def _create_socket(self) -> socket.socket:
        # Runs in aiomqtt's executor thread. Reading the files anew lets a renewed certificate work without a restart.
        context: ssl.SSLContext | None = None
        if self._config.tls is not None:
            context = _context(self._config.tls)
        sock = open_socket(
            self._config.host,
            self._config.port,
            timeout=self._config.connect_timeout,
            context=context,
            meter=self._meter,
        )
        if self._abandoned:
            self._meter.closing(sock)
            sock.close()
            raise ConnectionAbortedError("no longer wanted")
        self._reached = True
        return sock

    # The callbacks of paho, all on the event loop's thread but the first two, which may run in the executor.

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        def start() -> None:
            if sock.fileno() >= 0 and not self._abandoned:
                self._stream.start(sock.fileno())
                self._misc_task = self._loop.create_task(self._misc_loop())

        self._loop.call_soon_threadsafe(start)

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._stream.write_soon()

    def _on_socket_unregister_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._loop.remove_writer(sock.fileno())

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._meter.closing(sock)
        fd = sock.fileno()
        if fd >= 0 and threading.get_ident() == self._thread:
            self._stream.stop(fd)
        if self._misc_task is not None:
            self._misc_task.cancel()

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self.session_present = flags.session_present
        if reason_code.is_failure:
            self._refused = reason_code.value
        # MQTT 5 section 3.2.2.3.3: more unconfirmed messages than this are a protocol error.
        self._window = asyncio.Semaphore(min(self._config.max_inflight, getattr(properties, "ReceiveMaximum", 65535)))
        self._max_packet = min(self._config.max_packet, getattr(properties, "MaximumPacketSize", 1 << 28))
        if not reason_code.is_failure:
            # Here and not after `open`: the session's first messages may be in the same read.
            self._accepted(self)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttError("the broker closed the connection before it answered"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self._lose(str(reason_code))

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        self._settle(mid, reason_code.value)

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            # Not confirming it would bring it back for ever.
            self._malformed()
            self._client.ack(message.mid, message.qos)
            return
        payload = bytes(message.payload)
        self._meter.add_payload(received=len(payload))
        self._stream.taken()
        self._deliver(Incoming(self, message.mid, message.qos, topic, payload, message.retain))

    def _received(self, message: Publish) -> None:
        topic, mid, qos, retained, payload = message
        self._meter.add_payload(received=len(payload))
        self._deliver(Incoming(self, mid, qos, topic, payload, retained))

    def _settle(self, mid: int, code: int) -> None:
        answer = self._unconfirmed.pop(mid, None)
        if answer is None:
            return
        # The slot was taken for the message, not for who waits: it stays taken if the caller was cancelled.
        self._window.release()
        if not answer.done():
            answer.set_result(code)

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        if not self._connected.done():
            # aiomqtt would wait for its timeout.
            self._connected.set_exception(aiomqtt.MqttError(reason))
        for future in (self._connected, self._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # marked as seen
        for mid in list(self._unconfirmed):
            self._settle(mid, -1)

    def _abandon(self, reason: str) -> None:
        """Close without a word; afterwards nothing of this link is left in the loop."""
        self._abandoned = True
        self._client._sock_close()
        self._lose(reason)


def _context(files: TlsFiles) -> ssl.SSLContext:
    try:
        return client_context(files)
    except Exception as error:
        raise OSError(str(error)) from error
