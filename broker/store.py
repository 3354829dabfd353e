"""The port through which the broker's core makes its state durable, and the store that keeps nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from fleetfed.broker.sessions import Delivery, Grant, Message, Session


class Store(Protocol):
    """Durable retained messages, sessions, subscriptions and queues.

    Nothing need be durable before `commit` returns; the caller sends no acknowledgement before that. Only `commit`
    raises, and then the caller must stop: what it has in memory is not what a restart would find.
    """

    def load_sessions(self, now: float) -> Iterable[Session]:
        """The sessions that have not expired, with their subscriptions and queues."""

    def load_retained(self, now: float) -> Iterable[Message]:
        """The retained messages that have not expired."""

    def save_session(self, session: Session, now: float) -> None:
        """Keep a durable session (not its queue)."""

    def delete_session(self, client_id: str) -> None:
        """Forget a session and its subscriptions; the caller has deleted its deliveries."""

    def save_subscription(self, client_id: str, topic_filter: str, grant: Grant) -> None:
        """Keep one subscription of a durable session."""

    def delete_subscription(self, client_id: str, topic_filter: str) -> None:
        """Forget one subscription."""

    def add_delivery(self, client_id: str, item: Delivery, now: float) -> None:
        """Keep one queued delivery and set its ``row``."""

    def delete_delivery(self, item: Delivery) -> None:
        """Forget one delivery."""

    def save_retained(self, message: Message, now: float) -> None:
        """Keep a retained message."""

    def delete_retained(self, topic: str) -> None:
        """Forget a retained message."""

    def commit(self) -> None:
        """Make everything durable."""


class _NoStore:
    def load_sessions(self, now: float) -> Iterable[Session]:
        return ()

    def load_retained(self, now: float) -> Iterable[Message]:
        return ()

    def save_session(self, session: Session, now: float) -> None:
        pass

    def delete_session(self, client_id: str) -> None:
        pass

    def save_subscription(self, client_id: str, topic_filter: str, grant: Grant) -> None:
        pass

    def delete_subscription(self, client_id: str, topic_filter: str) -> None:
        pass

    def add_delivery(self, client_id: str, item: Delivery, now: float) -> None:
        pass

    def delete_delivery(self, item: Delivery) -> None:
        pass

    def save_retained(self, message: Message, now: float) -> None:
        pass

    def delete_retained(self, topic: str) -> None:
        pass

    def commit(self) -> None:
        pass


NO_STORE: Final[Store] = _NoStore()
"""Keeps nothing: state ends with the process."""
