"""One connection of a device to its broker: the only device module that imports paho-mqtt.

A `Link` lives from one connect to the loss of that connection, on the thread of the session that made it, and is never
used again. It reaches into two private members of paho 2.2: ``_create_socket``, because there is no public hook before
the TLS handshake, and ``_sock_close``.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import PACKET_TOO_LARGE
from fleetfed.shared.mqtt.granting import ask_again
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.mqtt.properties import connect_properties
from fleetfed.shared.mqtt.sockets import open_socket
from fleetfed.shared.mqtt.tls import client_context

_log = logging.getLogger(__name__)

MAX_BACKLOG: Final = 1024
"""Events that wait for a full inbox before the session gives up its connection."""

BACKLOG_POLL: Final = 0.05
"""Seconds between attempts to hand the backlog over; a queue cannot call back when it has room."""

_FILTERS_PER_PACKET: Final = 8
"""The strictest managed broker takes no more in one SUBSCRIBE."""

_PUBLISH_OVERHEAD: Final = 16
"""Bytes around topic and payload in a PUBLISH without properties, rounded up."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message; give it to `DeviceSession.ack` after it was handled.

    Attributes:
        retained: a copy that the broker had kept, not one that was just published.
        connection: number of the connection it came on; with ``mid`` and ``qos`` what the confirmation needs.
    """

    topic: str
    payload: bytes
    retained: bool
    connection: int = 0
    mid: int = 0
    qos: int = 0


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish; ``token`` is told when it is done."""

    token: int
    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to ``filters``, or unsubscribe."""

    filters: tuple[str, ...]
    add: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """Confirm a message that came on the connection with that number."""

    connection: int
    mid: int
    qos: int


Command = Publish | Subscribe | Ack


class Owner(Protocol):
    """What a `Link` asks of the session that made it; everything is called on the session's thread."""

    @property
    def config(self) -> ConnectionConfig:
        """Where and as whom."""

    @property
    def meter(self) -> ByteMeter:
        """Counts the connection."""

    @property
    def will(self) -> Will | None:
        """What the broker says when we vanish."""

    @property
    def backlog(self) -> int:
        """Events that wait for the inbox."""

    @property
    def closing(self) -> bool:
        """Whether to say the last word and leave."""

    @property
    def wake_socket(self) -> socket.socket:
        """Readable when there are commands or when `closing` changed."""

    def swallow_wake(self) -> None:
        """Empty `wake_socket`."""

    def drain(self) -> None:
        """Hand over as much of the backlog as the inbox takes."""

    def farewell(self) -> bytes | None:
        """The last word."""

    def filters(self) -> list[str]:
        """What to subscribe to on connect."""

    def take_command(self) -> Command | None:
        """The next command."""

    def put_back(self, command: Publish) -> None:
        """The window is full: this one first, later."""

    def announce(self, *, session_present: bool) -> None:
        """The connection is usable."""

    def done(self, token: int, refused_code: int | None) -> None:
        """A message of ours met its end."""

    def receive(self, message: Received) -> None:
        """A message came in."""

    def count_malformed(self) -> None:
        """A message's topic was not text."""


class _Client(paho.Client):
    """paho with our socket under it; it has no public hook before the TLS handshake."""

    link: Link

    def _create_socket(self) -> socket.socket:
        return self.link.make_socket()


class Link:
    """One connection: `serve` it once.

    Attributes:
        reached: TCP and TLS worked.
        refused: the broker's reason code, if it refused.
        accepted: the broker accepted.
        announced: the subscriptions are granted as well; the session knows of this connection.
        abandon: set from another thread to close without a word.
    """

    def __init__(self, session: Owner, number: int, *, version5: bool) -> None:
        self.accepted = False
        self.announced = False
        self.reached = False
        self.refused: int | None = None
        self.abandon = False
        self._session = session
        self._config = session.config
        self._number = number
        self._version5 = version5
        self._reason = "closed by us"
        self._present = False
        self._early: list[Received] = []
        self._pending_grants: set[int] = set()
        self._asked = 0.0
        self._tokens: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._window = self._config.max_inflight
        self._max_packet = self._config.max_packet
        self._goodbye_mid: int | None = None
        self._leaving = False
        self._client = self._make_client()

    def _make_client(self) -> _Client:
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._config.client_id,
            protocol=paho.MQTTv5 if self._version5 else paho.MQTTv311,
            clean_session=None if self._version5 else False,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.link = self
        client.connect_timeout = self._config.connect_timeout
        # Our own window decides; what paho held back would die in its queue.
        client.max_inflight_messages_set(0)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_socket_close = self._on_socket_close
        will = self._session.will
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        return client

    def make_socket(self) -> socket.socket:
        """Connect; the files are read anew, so that a renewed certificate works without a restart."""
        try:
            context = client_context(self._config.tls) if self._config.tls is not None else None
        except ConfigError as error:
            raise OSError(str(error)) from error
        sock = open_socket(
            self._config.host,
            self._config.port,
            timeout=self._config.connect_timeout,
            context=context,
            meter=self._session.meter,
        )
        self.reached = True
        return sock

    def serve(self) -> str:
        """Connect and stay until the connection is gone; returns why."""
        try:
            if self._version5:
                self._client.connect(
                    self._config.host,
                    self._config.port,
                    self._config.keepalive,
                    clean_start=False,
                    properties=connect_properties(self._config),
                )
            else:
                self._client.connect(self._config.host, self._config.port, self._config.keepalive)
            self._loop()
        except OSError as error:
            self._reason = str(error)
        except Exception as error:  # noqa: BLE001  # whatever paho trips over, the thread has to go on
            _log.exception("%s: the MQTT client failed", self._config.client_id)
            self._reason = repr(error)
        finally:
            self._client._sock_close()
        return self._reason

    def _loop(self) -> None:
        session = self._session
        answer_by = time.monotonic() + self._config.connect_timeout
        # paho pings when keepalive has passed at the time of a check; brokers wait for 1.5 times that.
        check_every = min(self._config.keepalive / 4, 5.0)
        check_at = time.monotonic() + check_every
        with selectors.DefaultSelector() as selector:
            selector.register(session.wake_socket, selectors.EVENT_READ)
            sock = cast("Any", self._client.socket())
            mask = selectors.EVENT_READ
            fd = sock.fileno()
            selector.register(fd, mask)
            while self._client.socket() is sock and not self.abandon:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
                if wanted != mask:
                    mask = wanted
                    selector.modify(fd, mask)
                until = check_at if self.announced else min(check_at, answer_by)
                timeout = max(0.0, until - time.monotonic())
                for key, ready in selector.select(min(timeout, BACKLOG_POLL) if session.backlog else timeout):
                    if key.fileobj != fd:
                        session.swallow_wake()
                    else:
                        self._serve_socket(sock, ready)
                session.drain()
                self._obey()
                now = time.monotonic()
                if now >= check_at:
                    check_at = now + check_every
                    self._client.loop_misc()
                if not self.announced and now >= answer_by:
                    self._reason = "no answer from the broker"
                    return
                if session.backlog > MAX_BACKLOG:
                    self._reason = "the inbox is full"
                    self._client.disconnect()

    def _serve_socket(self, sock: Any, ready: int) -> None:
        if ready & selectors.EVENT_READ:
            while True:
                self._client.loop_read()
                # Bytes that TLS already decrypted do not show as readable.
                if self._client.socket() is not sock or not isinstance(sock, ssl.SSLSocket) or not sock.pending():
                    break
        if ready & selectors.EVENT_WRITE and self._client.socket() is sock:
            self._client.loop_write()

    def _obey(self) -> None:
        """Perform what the caller asked for."""
        while self.announced and self._client.socket() is not None:
            command = self._session.take_command()
            match command:
                case None:
                    break
                case Publish():
                    if len(self._tokens) >= self._window:
                        self._session.put_back(command)
                        break
                    self._publish(command)
                case Subscribe(filters, add):
                    if add:
                        self._subscribe(filters)
                    else:
                        self._client.unsubscribe(list(filters))
                case Ack(connection, mid, qos):
                    if connection == self._number:
                        self._client.ack(mid, qos)
        if self._session.closing and not self._leaving:
            self._leave()

    def _publish(self, command: Publish) -> None:
        if len(command.payload) + 4 * len(command.topic) + _PUBLISH_OVERHEAD > self._max_packet:
            self._session.done(command.token, PACKET_TOO_LARGE)
            return
        # QoS 0 is done when it was written, which may be inside this call: on_publish then finds no token.
        info = self._client.publish(command.topic, command.payload, command.qos, command.retain)
        if command.qos == 0 and info.is_published():
            self._session.meter.add_payload(sent=len(command.payload))
            self._session.done(command.token, None)
            return
        self._tokens[info.mid] = command.token
        self._sizes[info.mid] = len(command.payload)

    def _leave(self) -> None:
        """The last word, then goodbye."""
        self._leaving = True
        word, will = self._session.farewell(), self._session.will
        if not self.announced or word is None or will is None:
            self._client.disconnect()
            return
        self._goodbye_mid = self._client.publish(will.topic, word, will.qos, will.retain).mid
        if will.qos == 0:
            self._client.disconnect()

    def _subscribe(self, filters: Sequence[str]) -> None:
        for start in range(0, len(filters), _FILTERS_PER_PACKET):
            part = filters[start : start + _FILTERS_PER_PACKET]
            if self._version5:
                _, mid = self._client.subscribe([(each, SubscribeOptions(qos=1)) for each in part])
            else:
                _, mid = self._client.subscribe([(each, 1) for each in part])
            if mid is not None and not self.announced:
                self._pending_grants.add(mid)

    # Callbacks of paho; all of them return at once.

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self.refused = code.value
            self._reason = str(code)
            return
        self.accepted = True
        self._present = flags.session_present
        # MQTT 5 section 3.2.2.3.3: more unconfirmed messages than this are a protocol error.
        self._window = min(self._window, getattr(properties, "ReceiveMaximum", 65535))
        self._max_packet = min(self._max_packet, getattr(properties, "MaximumPacketSize", 1 << 28))
        self._asked = time.monotonic()
        self._subscribe(self._session.filters())
        self._announce_if_granted()

    def _on_subscribe(
        self, client: paho.Client, userdata: Any, mid: int, codes: list[ReasonCode], properties: Properties
    ) -> None:
        refused = [code.value for code in codes if code.is_failure]
        if refused:
            _log.error("%s: the broker does not let us listen: 0x%02x", self._config.client_id, refused[0])
            if not self.announced:
                self._reason = f"subscription refused with reason code 0x{refused[0]:02x}"
                client.disconnect()
                return
        self._pending_grants.discard(mid)
        self._announce_if_granted()

    def _announce_if_granted(self) -> None:
        if self.announced or self._pending_grants:
            return
        self.announced = True
        self._session.announce(session_present=self._present)
        for message in self._early:
            self._session.receive(message)
        self._early.clear()
        self._subscribe(ask_again(self._session.filters(), seconds=time.monotonic() - self._asked))

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            # Not confirming it would bring it back for ever.
            self._session.count_malformed()
            client.ack(message.mid, message.qos)
            return
        payload = bytes(message.payload)
        self._session.meter.add_payload(received=len(payload))
        received = Received(topic, payload, message.retain, self._number, message.mid, message.qos)
        if self.announced:
            self._session.receive(received)
        else:
            self._early.append(received)

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, code: ReasonCode, properties: Properties
    ) -> None:
        if mid == self._goodbye_mid:
            client.disconnect()
            return
        token = self._tokens.pop(mid, None)
        if token is None:
            return
        size = self._sizes.pop(mid)
        if not code.is_failure:
            self._session.meter.add_payload(sent=size)
        self._session.done(token, code.value if code.is_failure else None)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._reason = str(code)

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._session.meter.closing(sock)
