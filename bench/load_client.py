"""A thin MQTT 5 client for `bench/load.py`: TLS with a client certificate, QoS 1, a persistent session, no more."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from fleetfed.broker.codec import decode, encode, frame
from fleetfed.broker.packets import (
    V5,
    ConnAck,
    Connect,
    PingReq,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    Will,
)
from fleetfed.broker.properties import Property
from fleetfed.shared.mqtt.tls import TlsFiles, client_context
from fleetfed.shared.trust.identity import TLS_DIRECTORY
from fleetfed.shared.wire.limits import MAX_PACKET

HOST = "127.0.0.1"
KEEPALIVE = 60
_SESSION_EXPIRY = 86400

OnMessage = Callable[[str, memoryview], None]


class Line(asyncio.Protocol):
    """One session. `connect` it once; ``on_message`` gets topic and payload, which it must not keep.

    Attributes:
        acknowledged: publishes that the broker confirmed.
        refused: of those, with a reason code that says no.
    """

    def __init__(
        self,
        client_id: str,
        filters: Sequence[str],
        on_message: OnMessage,
        *,
        will: Will | None = None,
        receive_maximum: int = 16,
        window: int = 8,
    ) -> None:
        self.acknowledged = self.refused = 0
        self._filters = filters
        self._on_message = on_message
        self._receive_maximum = receive_maximum
        self._window = window
        self._connect = Connect(
            version=V5,
            client_id=client_id,
            clean_start=False,
            keepalive=KEEPALIVE,
            will=will,
            properties={
                Property.SESSION_EXPIRY: _SESSION_EXPIRY,
                Property.RECEIVE_MAXIMUM: receive_maximum,
                Property.MAXIMUM_PACKET_SIZE: MAX_PACKET,
            },
        )
        self._buffer = bytearray()
        self._packet_id = 0
        self._open = 0
        self._queue: deque[tuple[str, bytes, bool]] = deque()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted = 0
        self._confirmed = asyncio.Event()
        self.closing = False

    async def confirmed(self, count: int) -> None:
        """Return once so many publishes have been confirmed since the start."""
        self._wanted = count
        while self.acknowledged < count:
            self._confirmed.clear()
            await self._confirmed.wait()

    async def connect(self, port: int, identity: Path) -> None:
        """TCP, TLS, CONNECT, SUBSCRIBE."""
        tls = identity / TLS_DIRECTORY
        context = client_context(TlsFiles(tls / "ca.pem", tls / "cert.pem", tls / "key.pem"))
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, HOST, port, ssl=context, ssl_handshake_timeout=120)
        await self.ready

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send now, or as soon as the window of unconfirmed messages has room."""
        self._queue.append((topic, payload, retain))
        self._pump()

    def ping(self) -> None:
        self._transport.write(encode(PingReq(), V5))

    def close(self) -> None:
        self.closing = True
        self._transport.abort()

    def _pump(self) -> None:
        while self._queue and self._open < self._window:
            topic, payload, retain = self._queue.popleft()
            self._packet_id = self._packet_id % 65535 + 1
            self._open += 1
            packet = Publish(topic=topic, payload=payload, qos=1, retain=retain, packet_id=self._packet_id)
            self._transport.write(encode(packet, V5))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(encode(self._connect, V5))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closing:
            # Whoever measures must not go on with fewer.
            raise SystemExit(f"{self._connect.client_id} lost its connection: {exc}")

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at, end, answers = 0, len(buffer), bytearray()
        view = memoryview(buffer)
        while end - at >= 2:
            header = frame(view, at, end)
            if header is None or header[0] + header[1] > end:
                break
            body, size = header
            answers += self._packet(view[at], view[body : body + size])
            at = body + size
        view.release()
        del buffer[:at]
        if answers:
            self._transport.write(answers)

    def _packet(self, first: int, body: memoryview) -> bytes:
        match decode(first, body, V5):
            case Publish(topic=topic, payload=payload, packet_id=packet_id):
                self._on_message(topic, memoryview(payload))
                return encode(PubAck(packet_id=packet_id), V5) if packet_id else b""
            case PubAck(code=code):
                self._open -= 1
                self.acknowledged += 1
                self.refused += code >= 0x80
                if self.acknowledged >= self._wanted:
                    self._confirmed.set()
                self._pump()
            case ConnAck(code=code):
                assert code == 0, f"{self._connect.client_id} refused with {code}"
                subscriptions = tuple(Subscription(topic_filter=each, qos=1) for each in self._filters)
                return encode(Subscribe(packet_id=65535, subscriptions=subscriptions), V5)
            case SubAck(codes=codes):
                assert max(codes) <= 1, f"{self._connect.client_id} may not subscribe: {codes}"
                if not self.ready.done():
                    self.ready.set_result(None)
        return b""


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_megabytes(pid: int) -> float:
    """Most resident memory that a process has had, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
