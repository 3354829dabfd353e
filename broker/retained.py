"""The retained messages, within their bounds."""

from __future__ import annotations

from collections.abc import Iterator

from fleetfed.broker.config import Limits
from fleetfed.broker.sessions import Message
from fleetfed.broker.store import Store
from fleetfed.broker.topictree import RetainedTree


class RetainedStore:
    """The last retained message of every topic.

    Attributes:
        size: bytes of all of them.
    """

    def __init__(self, limits: Limits, store: Store) -> None:
        self._limits = limits
        self._store = store
        self._tree: RetainedTree[Message] = RetainedTree()
        self.size = 0

    def __len__(self) -> int:
        return len(self._tree)

    def put(self, message: Message, now: float) -> bool:
        """Keep ``message`` in place of the one before it, or clear the topic if it is empty.

        Returns:
            ``False`` if a bound forbids it; what was kept before stays.
        """
        topic = message.topic
        old = self._tree.get(topic)
        before = old.size if old is not None else 0
        # $SYS changes all the time and is made anew after a restart.
        durable = topic[:1] != "$"
        if not message.payload:
            if old is not None:
                self._tree.remove(topic)
                self.size -= before
                if durable:
                    self._store.delete_retained(topic)
            return True
        if old is None and len(self._tree) >= self._limits.max_retained_messages:
            return False
        if self.size - before + message.size > self._limits.max_retained_bytes:
            return False
        # A copy of its own, because deliveries of the live message are counted as queued memory and those of the
        # kept one are not: it is in memory anyway.
        kept = Message(topic, message.payload, message.qos, True, message.properties, message.expires_at)
        kept.holders = 1
        self._tree.set(topic, kept)
        self.size += kept.size - before
        if durable:
            self._store.save_retained(kept, now)
        return True

    def restore(self, message: Message) -> None:
        """Put back what the store has kept."""
        message.holders = 1
        self._tree.set(message.topic, message)
        self.size += message.size

    def match(self, topic_filter: str, now: float) -> Iterator[Message]:
        """The live retained messages that ``topic_filter`` selects."""
        for _, message in self._tree.match(topic_filter):
            if message.expires_at is None or message.expires_at > now:
                yield message

    def expire(self, now: float) -> None:
        """Drop what has expired."""
        for topic, message in list(self._tree.items()):
            if message.expires_at is not None and message.expires_at <= now:
                self._tree.remove(topic)
                self.size -= message.size
                self._store.delete_retained(topic)
