"""A small MQTT client that does nothing on its own: what a probe of a broker needs."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, ClassVar, TypeVar

from fleetfed_testing.waiting import PATIENCE

from fleetfed.broker.codec import decode, encode
from fleetfed.broker.packets import (
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
    Will,
)
from fleetfed.broker.properties import Properties

T = TypeVar("T")


class RawClient:
    everyone: ClassVar[list[RawClient]] = []
    """All that were opened; a fixture closes what a test leaves open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: int) -> None:
        self.reader, self.writer, self.version = reader, writer, version
        self.inbox: deque[Packet] = deque()
        self.connack: ConnAck | None = None
        self.next_id = 0
        self.everyone.append(self)

    @classmethod
    async def open(
        cls, port: int, *, version: int = 4, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> RawClient:
        options: dict[str, Any] = {"ssl": tls, "server_hostname": "localhost"} if tls is not None else {}
        reader, writer = await asyncio.open_connection(host, port, limit=2**20, **options)
        return cls(reader, writer, version)

    @classmethod
    async def connect(
        cls,
        port: int,
        name: str,
        *,
        version: int = 4,
        tls: ssl.SSLContext | None = None,
        clean: bool = True,
        keepalive: int = 60,
        will: Will | None = None,
        properties: Properties | None = None,
        username: str | None = None,
    ) -> RawClient:
        client = await cls.open(port, version=version, tls=tls)
        packet = Connect(
            version=version,
            client_id=name,
            clean_start=clean,
            keepalive=keepalive,
            will=will,
            properties=properties or {},
            username=username,
        )
        await client.send(packet)
        client.connack = await client.expect(ConnAck)
        return client

    async def send(self, *packets: Packet) -> None:
        self.writer.write(b"".join(encode(packet, self.version) for packet in packets))
        await self.writer.drain()

    async def read(self) -> Packet:
        first = (await self.reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return decode(first, await self.reader.readexactly(length), self.version)

    async def expect(self, kind: type[T], timeout: float = PATIENCE) -> T:
        """The next packet of this kind; others are kept for later."""
        for packet in self.inbox:
            if isinstance(packet, kind):
                self.inbox.remove(packet)
                return packet
        async with asyncio.timeout(timeout):
            while True:
                packet = await self.read()
                if isinstance(packet, kind):
                    return packet
                self.inbox.append(packet)

    def take_id(self) -> int:
        self.next_id += 1
        return self.next_id

    async def publish(
        self,
        topic: str,
        payload: bytes = b"x",
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Properties | None = None,
    ) -> int:
        """Publish, wait for the acknowledgement, return its code."""
        packet_id = self.take_id() if qos else 0
        await self.send(
            Publish(
                topic=topic, payload=payload, qos=qos, retain=retain, packet_id=packet_id, properties=properties or {}
            )
        )
        if qos == 1:
            return (await self.expect(PubAck)).code
        if qos == 2:
            received = await self.expect(PubRec)
            assert received.packet_id == packet_id
            await self.send(PubRel(packet_id=packet_id))
            return (await self.expect(PubComp)).code
        return 0

    async def subscribe(self, *filters: str, qos: int = 1, **options: Any) -> tuple[int, ...]:
        items = tuple(Subscription(topic_filter=item, qos=qos, **options) for item in filters)
        await self.send(Subscribe(packet_id=self.take_id(), subscriptions=items))
        return (await self.expect(SubAck)).codes

    async def unsubscribe(self, *filters: str) -> tuple[int, ...]:
        await self.send(Unsubscribe(packet_id=self.take_id(), filters=filters))
        return (await self.expect(UnsubAck)).codes

    async def message(self, timeout: float = PATIENCE, *, ack: bool = True) -> Publish:
        packet = await self.expect(Publish, timeout)
        if ack and packet.qos == 1:
            await self.send(PubAck(packet_id=packet.packet_id))
        elif ack and packet.qos == 2:
            await self.send(PubRec(packet_id=packet.packet_id))
            await self.expect(PubRel)
            await self.send(PubComp(packet_id=packet.packet_id))
        return packet

    async def messages(self, count: int, *, ack: bool = True) -> list[Publish]:
        return [await self.message(ack=ack) for _ in range(count)]

    async def ping(self) -> None:
        """A round trip: what the broker had for us before is here afterwards."""
        await self.send(PingReq())
        await self.expect(PingResp)

    async def waiting(self, settle: float = 0.05) -> list[Publish]:
        """The messages that have arrived; one round trip and a moment prove that there are no more."""
        await self.ping()
        await asyncio.sleep(settle)
        await self.ping()
        found = [item for item in self.inbox if isinstance(item, Publish)]
        self.inbox = deque(item for item in self.inbox if not isinstance(item, Publish))
        return found

    async def closed(self, timeout: float = PATIENCE) -> int | None:
        """Wait until the broker closes; the reason code of its DISCONNECT, if it sent one."""
        code = None
        try:
            async with asyncio.timeout(timeout):
                while True:
                    packet = await self.read()
                    if isinstance(packet, Disconnect):
                        code = packet.code
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            return code

    async def disconnect(self, code: int = 0, properties: Properties | None = None) -> None:
        await self.send(Disconnect(code=code, properties=properties or {}))
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        try:
            await asyncio.wait_for(self.writer.wait_closed(), 2)
        except (OSError, ssl.SSLError, TimeoutError):
            self.writer.transport.abort()

    def abort(self) -> None:
        """Break the connection without a word."""
        self.writer.transport.abort()
