"""The broker without I/O, on a clock that the test turns, and clients at the other end of its connections."""

from __future__ import annotations

import itertools
from typing import TypeVar

from fleetfed.broker.acl import Acl
from fleetfed.broker.codec import decode, encode, frame
from fleetfed.broker.config import Limits
from fleetfed.broker.core import Broker
from fleetfed.broker.packets import (
    V3,
    ConnAck,
    Connect,
    Packet,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    Will,
)

T = TypeVar("T")
KB = 1024


class Peer:
    """A client on the other end of a `Connection`, as slow as the test wants it."""

    def __init__(
        self,
        world: World,
        name: str,
        *,
        version: int = V3,
        clean: bool = True,
        keepalive: int = 0,
        will: Will | None = None,
        properties: dict[int, int] | None = None,
        identity: str | None = None,
    ) -> None:
        self.world, self.version = world, version
        self.connection = world.broker.open(identity, world.now)
        self.received: list[Packet] = []
        self.buffer = b""
        self.send(
            Connect(
                version=version,
                client_id=name,
                clean_start=clean,
                keepalive=keepalive,
                will=will,
                properties=properties or {},
            )
        )

    def send(self, *packets: Packet) -> None:
        self.connection.receive_data(b"".join(encode(item, self.version) for item in packets), self.world.now)

    def read(self) -> list[Packet]:
        """Everything that the broker has for us, without acknowledging any of it."""
        while chunk := self.connection.data_to_send():
            self.buffer += b"".join(chunk)
        at = 0
        found = []
        while (header := frame(self.buffer, at, len(self.buffer))) is not None:
            start, length = header
            found.append(decode(self.buffer[at], self.buffer[start : start + length], self.version))
            at = start + length
        self.buffer = self.buffer[at:]
        self.received += found
        return found

    def get(self, kind: type[T]) -> list[T]:
        return [item for item in self.read() if isinstance(item, kind)]

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        self.send(Subscribe(packet_id=1, subscriptions=(Subscription(topic_filter=topic_filter, qos=qos),)))
        assert self.get(SubAck)

    def publish(
        self, topic: str, payload: bytes = b"x", *, qos: int = 1, packet_id: int = 1, retain: bool = False
    ) -> None:
        packet_id = packet_id if qos else 0
        self.send(Publish(topic=topic, payload=payload, qos=qos, packet_id=packet_id, retain=retain))

    def lose(self) -> None:
        self.connection.connection_lost(self.world.now)


class World:
    """A broker and the time by its clock."""

    def __init__(self, limits: Limits | None = None, acl: Acl | None = None) -> None:
        self.now = 1000.0
        ids = itertools.count(1)
        self.broker = Broker(
            limits=limits or Limits(), acl=acl, make_id=lambda: f"made-{next(ids)}", now=self.now, sys_interval=0
        )

    def pass_time(self, seconds: float) -> None:
        """Turn the clock on, calling the broker when it asked to be."""
        end = self.now + seconds
        while (deadline := self.broker.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.broker.handle_timer(self.now)
        self.now = end

    def peer(self, name: str, **options: object) -> Peer:
        peer = Peer(self, name, **options)  # type: ignore[arg-type]
        (connack,) = peer.get(ConnAck)
        assert connack.code == 0
        return peer

    @property
    def statistics(self) -> dict[str, int]:
        return self.broker.statistics()


def check(world: World) -> None:
    """What must hold whatever happened: all sums are those of the parts."""
    broker = world.broker
    online = [item for item in broker._sessions.values() if item.connection is not None]
    offline = [item for item in broker._sessions.values() if item.connection is None]
    for session in (*online, *offline):
        assert session.pending_bytes == sum(item.message.size for item in session.deliveries())
    messages = {id(item.message): item.message for session in online for item in session.deliveries()}
    retained = {id(message) for _, message in broker.router.retained._tree.items()}
    assert broker.router.memory == sum(item.size for key, item in messages.items() if key not in retained)
    assert broker.router.offline_bytes == sum(session.pending_bytes for session in offline)
