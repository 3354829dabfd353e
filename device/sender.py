"""Publishes answers in chunks, a window of them at a time, and small messages at once.

Nothing here is durable, and nothing is repeated: after a disconnect everything unconfirmed is forgotten, and the
machine says again what still matters.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

from fleetfed.device.mqtt import DeviceSession, PublishDone
from fleetfed.shared.mqtt.errors import SessionBusyError
from fleetfed.shared.wire.chunks import split

_log = logging.getLogger(__name__)

_WINDOW: Final = 8
"""Chunks handed to the session and not confirmed; about 1 MB."""


class Sender:
    """See the module.

    Args:
        session: started by the caller.
    """

    def __init__(self, session: DeviceSession) -> None:
        self._session = session
        self._chunks: deque[bytes] = deque()
        self._topic = ""
        self._message_id = b""
        self._open: set[int] = set()
        self._online = False
        self.refused = 0

    def once(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish one small message; without a connection it is forgotten."""
        if not self._online:
            return
        try:
            self._session.publish(topic, payload, qos=qos, retain=retain)
        except SessionBusyError as error:
            _log.warning("not published: %s: %s", topic, error)

    def message(self, topic: str, message_id: bytes, message: bytes) -> None:
        """Publish a message in chunks, from its first; one that is under way makes room."""
        if not self._online:
            return
        self._topic, self._message_id = topic, message_id
        self._chunks = deque(split(message_id, message))
        self._pump()

    def abandon(self, message_id: bytes) -> None:
        """Publish no further chunk of this message."""
        if message_id == self._message_id:
            self._chunks.clear()

    @property
    def online(self) -> bool:
        """Whether there is a connection."""
        return self._online

    def connected(self) -> None:
        """There is a connection."""
        self._online = True

    def disconnected(self) -> None:
        """Forget what is under way."""
        self._online = False
        self._chunks.clear()
        self._open.clear()

    def done(self, event: PublishDone) -> None:
        """The broker confirmed or refused one message."""
        if event.refused_code is not None:
            self.refused += 1
            _log.warning("the broker refused a message of ours: reason code 0x%02x", event.refused_code)
        self._open.discard(event.token)
        self._pump()

    def _pump(self) -> None:
        while self._chunks and len(self._open) < _WINDOW:
            try:
                self._open.add(self._session.publish(self._topic, self._chunks[0]))
            except SessionBusyError:
                # Every message that ends comes back here.
                return
            self._chunks.popleft()
