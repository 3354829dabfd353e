"""What a helper must not forget, and what it must: one SQLite file in WAL mode, an fsync per transaction.

A deleted secret is overwritten (``secure_delete``) and the write-ahead log emptied after it, so that a copy of the
folder that is taken later opens nothing. Used from one thread at a time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator.helper.events import Claim, Key
from fleetfed.shared.errors import StorageError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import suite_of

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS keys (public BLOB PRIMARY KEY, secret BLOB NOT NULL, message BLOB NOT NULL,
    issued INTEGER NOT NULL, expires INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS answers (round INTEGER NOT NULL, gateway TEXT NOT NULL, question BLOB NOT NULL,
    plan BLOB NOT NULL, key BLOB NOT NULL, message BLOB NOT NULL, PRIMARY KEY (round, gateway));
CREATE TABLE IF NOT EXISTS devices (round INTEGER NOT NULL, device TEXT NOT NULL, gateway TEXT NOT NULL,
    PRIMARY KEY (round, device)) WITHOUT ROWID;
"""
_FORMAT: Final = 1


class Store:
    """See the module.

    Args:
        path: the file; made where it is missing.

    Raises:
        StorageError: it is damaged or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as opened:
            try:
                # Before SQLite makes it with the permissions that everybody has.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                opened.callback(self._file.close)
                self._prepare()
            except (sqlite3.Error, OSError) as error:
                raise StorageError(
                    f"{path}: {error}; never start without it in an open round: answers would repeat"
                ) from error
            opened.pop_all()
        # A process before us may have died between a deletion and the emptying of the log.
        self._wipe()

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            self._file.execute(f"PRAGMA {pragma}")
        (check,) = self._file.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = self._file.execute("PRAGMA user_version").fetchone()
        if check != "ok" or version not in (0, _FORMAT):
            raise StorageError(f"{self._path}: {check if check != 'ok' else f'format {version}, this is {_FORMAT}'}")
        self._file.executescript(_SCHEMA)
        self._file.execute(f"PRAGMA user_version = {_FORMAT}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> list[Key]:
        """Keys whose secrets are here."""
        rows = self._rows("SELECT public, message, issued, expires FROM keys")
        return [Key(public=row[0], message=row[1], issued=row[2], expires=row[3]) for row in rows]

    def secret(self, public: bytes) -> SealSecret:
        """The secret of a key.

        Raises:
            StorageError: it is not here.
        """
        rows = self._rows("SELECT secret FROM keys WHERE public = ?", public)
        if not rows:
            raise StorageError(f"{self._path}: the secret of key {public.hex()[:16]} is missing")
        return SealSecret.from_bytes(rows[0][0], suite_of(public))

    def add_key(self, key: Key, secret: SealSecret) -> None:
        """Store a key; durable on return."""
        values = (key.public, secret.encode(), key.message, key.issued, key.expires)
        self._write([("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", values)])

    def destroy(self, keys: Iterable[bytes]) -> None:
        """Delete secrets and what was answered with them; nothing is left of either on return."""
        statements: list[tuple[str, tuple[object, ...]]] = []
        for public in keys:
            statements += [
                ("DELETE FROM answers WHERE key = ?", (public,)),
                ("DELETE FROM keys WHERE public = ?", (public,)),
            ]
        statements.append(("DELETE FROM devices WHERE round NOT IN (SELECT round FROM answers)", ()))
        self._write(statements)
        self._wipe()

    def claims(self) -> list[Claim]:
        """What was answered."""
        devices: dict[tuple[int, str], set[str]] = {}
        for round, device, gateway in self._rows("SELECT round, device, gateway FROM devices"):
            devices.setdefault((round, gateway), set()).add(device)
        rows = self._rows("SELECT round, gateway, question, plan, key FROM answers")
        return [
            Claim(
                question=Digest(question),
                round=round,
                plan=Digest(plan),
                gateway=gateway,
                key=key,
                devices=frozenset(devices.get((round, gateway), ())),
            )
            for round, gateway, question, plan, key in rows
        ]

    def add_answer(self, claim: Claim, message: bytes) -> None:
        """Store an answer with what it used up; durable on return."""
        values = (claim.round, claim.gateway, claim.question, claim.plan, claim.key, message)
        devices = [(claim.round, device, claim.gateway) for device in sorted(claim.devices)]
        self._write(
            [
                ("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", values),
                *(("INSERT INTO devices VALUES (?, ?, ?)", row) for row in devices),
            ]
        )

    def answer(self, round: int, gateway: str) -> bytes:
        """The stored answer.

        Raises:
            StorageError: there is none.
        """
        rows = self._rows("SELECT message FROM answers WHERE round = ? AND gateway = ?", round, gateway)
        if not rows:
            raise StorageError(f"{self._path}: the answer of round {round} to {gateway} is missing")
        return bytes(rows[0][0])

    def _write(self, statements: Iterable[tuple[str, tuple[object, ...]]]) -> None:
        try:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in statements:
                    self._file.execute(statement, values)
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error

    def _wipe(self) -> None:
        try:
            self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error
