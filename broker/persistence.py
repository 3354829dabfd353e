"""Durable broker state in SQLite: retained messages, durable sessions, their subscriptions and queues.

One row per message body, one per entry of a queue. The database is in WAL mode with ``synchronous=NORMAL``: every
commit survives the death of the process at any instruction; the last ones may be lost when the machine loses power,
and the database stays intact then. What is in flight is redelivered after a restart with a new packet identifier.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fleetfed.broker.sessions import Delivery, Grant, Message, Session
from fleetfed.shared.errors import StorageError

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE message (
  row INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
  retain INTEGER NOT NULL, properties BLOB NOT NULL, expires_at REAL
);
CREATE TABLE retained (
  topic TEXT PRIMARY KEY, payload BLOB NOT NULL, qos INTEGER NOT NULL, properties BLOB NOT NULL, expires_at REAL
) WITHOUT ROWID;
CREATE TABLE session (
  client_id TEXT PRIMARY KEY, username TEXT, expiry REAL NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE subscription (
  client_id TEXT NOT NULL, filter TEXT NOT NULL, qos INTEGER NOT NULL, no_local INTEGER NOT NULL,
  retain_as_published INTEGER NOT NULL, PRIMARY KEY (client_id, filter)
) WITHOUT ROWID;
CREATE TABLE delivery (
  row INTEGER PRIMARY KEY, client_id TEXT NOT NULL, message INTEGER NOT NULL, qos INTEGER NOT NULL,
  retain INTEGER NOT NULL
);
CREATE INDEX delivery_client ON delivery (client_id, row);
"""


class SqliteStore:
    """The `Store` of the embedded broker.

    Times are kept as Unix time and given as the caller's clock, so that they mean the same after a restart.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database.

        Raises:
            StorageError: it cannot be opened, is damaged, or was written by another version.
        """
        self._path = path
        self._failure: sqlite3.Error | None = None
        with contextlib.ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._db = sqlite3.connect(path, isolation_level=None, timeout=5)
                opened.callback(self._db.close)
                self._prepare()
            except (sqlite3.Error, OSError) as error:
                raise StorageError(f"{path}: {error}") from error
            opened.pop_all()
        (last,) = self._db.execute(
            "SELECT max((SELECT coalesce(max(row), 0) FROM message), (SELECT coalesce(max(row), 0) FROM delivery))"
        ).fetchone()
        self._next_row: int = last + 1
        self._open = False

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")
        elif version != _VERSION:
            raise StorageError(f"{self._path}: schema {version}, this program knows {_VERSION}; move the file away")

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        if self._failure is not None:
            return
        try:
            if not self._open:
                self._open = True
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            # In the middle of routing nobody can act on it; before the acknowledgements are sent, `commit` tells.
            self._failure = error

    def load_sessions(self, now: float) -> Iterable[Session]:
        """The sessions that have not expired, with their subscriptions and queues."""
        offset = now - time.time()
        messages: dict[int, Message] = {}
        sessions: dict[str, Session] = {}
        for client_id, username, expiry, expires_at in self._db.execute(
            "SELECT client_id, username, expiry, expires_at FROM session"
        ).fetchall():
            if expires_at + offset <= now:
                self.delete_session(client_id)
                continue
            session = sessions[client_id] = Session(client_id, username)
            session.expiry, session.expires_at, session.stored = expiry, expires_at + offset, True
        for client_id, text, *options in self._db.execute("SELECT * FROM subscription"):
            if client_id in sessions:
                qos, no_local, as_published = options
                sessions[client_id].subscriptions[text] = Grant(qos, bool(no_local), bool(as_published))
        self._write("DELETE FROM delivery WHERE client_id NOT IN (SELECT client_id FROM session)", ())
        self._write("DELETE FROM message WHERE row NOT IN (SELECT message FROM delivery)", ())
        for row, client_id, key, qos, retain in self._db.execute("SELECT * FROM delivery ORDER BY row").fetchall():
            session = sessions[client_id]
            message = messages.get(key)
            if message is None:
                topic, payload, sent_qos, sent_retain, properties, expires_at = self._db.execute(
                    "SELECT topic, payload, qos, retain, properties, expires_at FROM message WHERE row = ?", (key,)
                ).fetchone()
                expires_at = expires_at + offset if expires_at is not None else None
                message = messages[key] = Message(topic, payload, sent_qos, bool(sent_retain), properties, expires_at)
                message.row = key
            message.uses += 1
            session.queue.append(Delivery(message, qos, bool(retain), row))
            session.pending_bytes += message.size
        self.commit()
        return sessions.values()

    def load_retained(self, now: float) -> Iterable[Message]:
        """The retained messages that have not expired."""
        offset = now - time.time()
        kept = []
        for topic, payload, qos, properties, expires_at in self._db.execute(
            "SELECT topic, payload, qos, properties, expires_at FROM retained"
        ).fetchall():
            expires_at = expires_at + offset if expires_at is not None else None
            if expires_at is not None and expires_at <= now:
                self.delete_retained(topic)
            else:
                kept.append(Message(topic, payload, qos, True, properties, expires_at))
        self.commit()
        return kept

    def save_session(self, session: Session, now: float) -> None:
        """Keep a durable session (not its queue)."""
        # A connected session is stored with the end that it would have if the broker died now.
        self._write(
            "INSERT OR REPLACE INTO session VALUES (?, ?, ?, ?)",
            (session.client_id, session.username, session.expiry, time.time() + session.expiry),
        )

    def delete_session(self, client_id: str) -> None:
        """Forget a session and its subscriptions; the caller has deleted its deliveries."""
        self._write("DELETE FROM session WHERE client_id = ?", (client_id,))
        self._write("DELETE FROM subscription WHERE client_id = ?", (client_id,))

    def save_subscription(self, client_id: str, topic_filter: str, grant: Grant) -> None:
        """Keep one subscription of a durable session."""
        self._write(
            "INSERT OR REPLACE INTO subscription VALUES (?, ?, ?, ?, ?)",
            (client_id, topic_filter, grant.qos, grant.no_local, grant.retain_as_published),
        )

    def delete_subscription(self, client_id: str, topic_filter: str) -> None:
        """Forget one subscription."""
        self._write("DELETE FROM subscription WHERE client_id = ? AND filter = ?", (client_id, topic_filter))

    def add_delivery(self, client_id: str, item: Delivery, now: float) -> None:
        """Keep one queued delivery and set its ``row``."""
        message = item.message
        if not message.row:
            message.row = self._take_row()
            expires_at = time.time() + message.expires_at - now if message.expires_at is not None else None
            self._write(
                "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    message.row,
                    message.topic,
                    message.payload,
                    message.qos,
                    message.retain,
                    message.properties,
                    expires_at,
                ),
            )
        message.uses += 1
        item.row = self._take_row()
        self._write(
            "INSERT INTO delivery VALUES (?, ?, ?, ?, ?)", (item.row, client_id, message.row, item.qos, item.retain)
        )

    def delete_delivery(self, item: Delivery) -> None:
        """Forget one delivery, and its message when it was the last."""
        self._write("DELETE FROM delivery WHERE row = ?", (item.row,))
        item.row = 0
        message = item.message
        message.uses -= 1
        if message.uses == 0:
            self._write("DELETE FROM message WHERE row = ?", (message.row,))
            message.row = 0

    def save_retained(self, message: Message, now: float) -> None:
        """Keep a retained message."""
        expires_at = time.time() + message.expires_at - now if message.expires_at is not None else None
        self._write(
            "INSERT OR REPLACE INTO retained VALUES (?, ?, ?, ?, ?)",
            (message.topic, message.payload, message.qos, message.properties, expires_at),
        )

    def delete_retained(self, topic: str) -> None:
        """Forget a retained message."""
        self._write("DELETE FROM retained WHERE topic = ?", (topic,))

    def commit(self) -> None:
        """Make everything durable.

        Raises:
            StorageError: something since the last commit could not be written, such as when the disk is full.
        """
        if self._open and self._failure is None:
            self._open = False
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._failure = error
        if self._failure is not None:
            raise StorageError(f"{self._path}: {self._failure}") from self._failure

    def close(self) -> None:
        """Commit and close.

        Raises:
            StorageError: as for `commit`.
        """
        try:
            self.commit()
        finally:
            self._db.close()

    def _take_row(self) -> int:
        self._next_row += 1
        return self._next_row - 1
