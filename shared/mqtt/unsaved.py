"""What a broker confirmed to retain and may not have on its disk yet.

MQTT 5 section 4.3.2: PUBACK makes the broker the message's owner; it does not say that a crash leaves it one.
Mosquitto writes its retained messages now and then. One that is killed comes back as it was some seconds before, with
the sessions that it had then, so that nobody sees from ``session present`` that something is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

WINDOW: Final = 10.0
"""Seconds: the broker's interval, and a slow disk's time on top."""
LIMIT: Final = 32 << 20
"""Bytes that are remembered at most; beyond it the oldest are believed to be safe."""

Retained = tuple[str, bytes, int]
"""Topic, payload, QoS."""


class Unsaved:
    """Remembers retained messages for as long as a crash of the broker could undo them. Pure.

    Args:
        window: seconds after its confirmation from which a message is safe.
        limit: bytes that are remembered.
    """

    def __init__(self, *, window: float = WINDOW, limit: int = LIMIT) -> None:
        self._window = window
        self._limit = limit
        # By topic, oldest first: a topic retains its last message only.
        self._fresh: OrderedDict[str, tuple[float, bytes, int]] = OrderedDict()
        self._size = 0
        self._doubtful: dict[str, tuple[bytes, int]] = {}

    def begun(self, topic: str) -> None:
        """Another message is on its way to the topic: the one before must not come after it."""
        self._doubtful.pop(topic, None)
        self._drop(topic)

    def confirmed(self, topic: str, payload: bytes, qos: int, now: float) -> None:
        """The broker confirmed a retained message; ``now`` in seconds of a clock that only goes forward."""
        self.begun(topic)
        self._fresh[topic] = (now, payload, qos)
        self._size += len(payload)
        self._forget(now)

    def lost(self, now: float) -> None:
        """The connection broke, at the latest now: what is fresh may be gone."""
        self._forget(now)
        for topic, (_, payload, qos) in self._fresh.items():
            self._doubtful[topic] = (payload, qos)
        self._fresh.clear()
        self._size = 0

    def doubtful(self) -> list[Retained]:
        """What to say again; each stays here until it is `confirmed`."""
        return [(topic, payload, qos) for topic, (payload, qos) in self._doubtful.items()]

    def _forget(self, now: float) -> None:
        while self._fresh:
            topic, (at, _, _) = next(iter(self._fresh.items()))
            if now - at <= self._window and self._size <= self._limit:
                break
            self._drop(topic)

    def _drop(self, topic: str) -> None:
        old = self._fresh.pop(topic, None)
        if old is not None:
            self._size -= len(old[1])
