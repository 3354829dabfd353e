"""The service's register in SQLite: tokens, certificates, answers and the log, changed together or not at all.

A token is spent, its certificate logged and the answer kept in one transaction: a crash leaves either none of it or an
answer that the same request gets again. Several processes may use one register; each write sees all before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetfed.shared.errors import StorageError

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE token (
    hash BLOB PRIMARY KEY, label TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, site TEXT NOT NULL, device TEXT NOT NULL,
    spent_rounds INTEGER, created INTEGER NOT NULL, expires INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0, used_by TEXT NOT NULL DEFAULT '', revoked INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE device (
    id TEXT PRIMARY KEY, public_key BLOB NOT NULL UNIQUE, tls_key BLOB NOT NULL UNIQUE, owner TEXT NOT NULL,
    site TEXT NOT NULL, hardware BLOB NOT NULL, spent_rounds INTEGER NOT NULL, enrolled INTEGER NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX device_hardware ON device (hardware);
CREATE TABLE certificate (
    serial INTEGER PRIMARY KEY, device TEXT NOT NULL REFERENCES device (id), not_before INTEGER NOT NULL,
    not_after INTEGER NOT NULL, encoded BLOB NOT NULL, tls BLOB NOT NULL, tls_serial TEXT NOT NULL,
    entry INTEGER NOT NULL UNIQUE
) STRICT;
CREATE INDEX certificate_device ON certificate (device, serial);
CREATE TABLE answer (request BLOB PRIMARY KEY, answer BLOB NOT NULL, serial INTEGER NOT NULL) STRICT;
CREATE TABLE log (entry INTEGER PRIMARY KEY, leaf BLOB NOT NULL) STRICT;
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token; the secret itself is nowhere.

    Attributes:
        label: names it, to people.
        owner, site: to whom and for which site it was given.
        device: the id that it stands for; empty: the id comes from the device's key.
        spent_rounds: participations that the ledger begins with; None: decided by whether the hardware is known.
        created, expires, used, revoked: unix milliseconds; 0 for not.
        used_by: the device's id.
    """

    label: str
    owner: str
    site: str
    device: str
    spent_rounds: int | None
    created: int
    expires: int
    used: int
    used_by: str
    revoked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One enrolled device; ``revoked`` is unix milliseconds, 0 for not."""

    id: str
    public_key: bytes
    tls_key: bytes
    owner: str
    site: str
    hardware: bytes
    spent_rounds: int
    enrolled: int
    revoked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """One certificate of a device, with its place in the log."""

    serial: int
    device: str
    not_before: int
    not_after: int
    encoded: bytes
    tls: bytes
    tls_serial: str
    entry: int


class Store:
    """An open register; use it from one thread at a time.

    Args:
        path: of the file, made where it is missing.

    Raises:
        StorageError: it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
                opened.callback(self._db.close)
                path.chmod(0o600)
                version = self._prepare()
            except (sqlite3.Error, OSError) as error:
                raise StorageError(f"{path}: {error}; restore the register from a backup") from error
            if version not in (0, _VERSION):
                raise StorageError(f"{path}: of version {version}, this program knows {_VERSION}; install a newer one")
            opened.pop_all()

    def _prepare(self) -> int:
        self._db.execute("PRAGMA journal_mode = WAL")
        # What was answered must not be forgotten by a power cut.
        self._db.execute("PRAGMA synchronous = FULL")
        with self.transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
        return int(version)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within happens, durably, or nothing of it.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def add_token(self, token_hash: bytes, token: Token) -> None:
        """Keep a new token's hash."""
        self._db.execute(
            "INSERT INTO token (hash, label, owner, site, device, spent_rounds, created, expires)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                token_hash,
                token.label,
                token.owner,
                token.site,
                token.device,
                token.spent_rounds,
                token.created,
                token.expires,
            ),
        )

    def token(self, token_hash: bytes) -> tuple[bytes, Token] | None:
        """The token with this hash, and the hash as it is stored."""
        row = self._db.execute(f"SELECT hash, {_TOKEN} FROM token WHERE hash = ?", (token_hash,)).fetchone()  # noqa: S608
        return None if row is None else (bytes(row[0]), _token(row[1:]))

    def tokens(self) -> list[Token]:
        """All tokens, newest first."""
        rows = self._db.execute(f"SELECT {_TOKEN} FROM token ORDER BY created DESC, label").fetchall()  # noqa: S608
        return [_token(row) for row in rows]

    def use_token(self, label: str, device: str, now: int) -> None:
        """Spend a token."""
        self._db.execute("UPDATE token SET used = ?, used_by = ? WHERE label = ?", (now, device, label))

    def revoke_token(self, label: str, now: int) -> bool:
        """Take a token back; whether there was one to take back."""
        done = self._db.execute(
            "UPDATE token SET revoked = ? WHERE label = ? AND used = 0 AND revoked = 0", (now, label)
        )
        return done.rowcount == 1

    # --- Devices and certificates -------------------------------------------------------------------------------------

    def add_device(self, device: Device) -> None:
        """Keep a new device."""
        self._db.execute(
            f"INSERT INTO device ({_DEVICE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                device.id,
                device.public_key,
                device.tls_key,
                device.owner,
                device.site,
                device.hardware,
                device.spent_rounds,
                device.enrolled,
                device.revoked,
            ),
        )

    def device(self, *, id: str | None = None, public_key: bytes | None = None) -> Device | None:
        """The device with this id, or with this key."""
        column, value = ("id", id) if id is not None else ("public_key", public_key)
        found = self._devices(f"WHERE {column} = ?", (value,))
        return found[0] if found else None

    def knows_tls_key(self, tls_key: bytes) -> bool:
        """Whether a device logs in, or ever logged in, with this key."""
        return bool(self._devices("WHERE tls_key = ?", (tls_key,)))

    def hardware(self, hardware: bytes) -> list[Device]:
        """Devices on this piece of hardware, oldest first."""
        return self._devices("WHERE hardware = ? ORDER BY enrolled, id", (hardware,))

    def devices(self) -> list[Device]:
        """All, oldest first."""
        return self._devices("ORDER BY enrolled, id", ())

    def _devices(self, where: str, values: tuple[object, ...]) -> list[Device]:
        rows = self._db.execute(f"SELECT {_DEVICE} FROM device {where}", values).fetchall()  # noqa: S608
        return [Device(**dict(zip(_DEVICE.split(", "), row, strict=True))) for row in rows]

    def revoke_device(self, id: str, now: int) -> None:
        """Mark a device as revoked."""
        self._db.execute("UPDATE device SET revoked = ? WHERE id = ? AND revoked = 0", (now, id))

    def add_certificate(self, issued: Issued) -> None:
        """Keep a certificate."""
        self._db.execute(
            f"INSERT INTO certificate ({_ISSUED}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                issued.serial,
                issued.device,
                issued.not_before,
                issued.not_after,
                issued.encoded,
                issued.tls,
                issued.tls_serial,
                issued.entry,
            ),
        )

    def certificates(self, device: str | None = None) -> list[Issued]:
        """All certificates, or a device's, oldest first."""
        where, values = ("", ()) if device is None else ("WHERE device = ?", (device,))
        rows = self._db.execute(f"SELECT {_ISSUED} FROM certificate {where} ORDER BY serial", values).fetchall()  # noqa: S608
        return [Issued(**dict(zip(_ISSUED.split(", "), row, strict=True))) for row in rows]

    def device_of(self, serial: int) -> str | None:
        """The id of the device that a serial number was given to."""
        row = self._db.execute("SELECT device FROM certificate WHERE serial = ?", (serial,)).fetchone()
        return None if row is None else str(row[0])

    def last_serial(self) -> int | None:
        """The highest serial number given out."""
        (serial,) = self._db.execute("SELECT max(serial) FROM certificate").fetchone()
        return None if serial is None else int(serial)

    # --- Answers, log, facts ------------------------------------------------------------------------------------------

    def answer(self, request: bytes) -> bytes | None:
        """What a request with this digest was answered."""
        row = self._db.execute("SELECT answer FROM answer WHERE request = ?", (request,)).fetchone()
        return None if row is None else bytes(row[0])

    def add_answer(self, request: bytes, answer: bytes, serial: int) -> None:
        """Keep an answer."""
        self._db.execute("INSERT INTO answer VALUES (?, ?, ?)", (request, answer, serial))

    def forget_answers(self, before: int) -> None:
        """Forget answers whose certificates ended before ``before``."""
        self._db.execute(
            "DELETE FROM answer WHERE serial IN (SELECT serial FROM certificate WHERE not_after < ?)", (before,)
        )

    def append(self, entry: int, leaf: bytes) -> None:
        """Add a leaf to the log."""
        self._db.execute("INSERT INTO log VALUES (?, ?)", (entry, leaf))

    def leaves(self, start: int = 0, limit: int = -1) -> list[bytes]:
        """Leaves of the log from ``start`` on."""
        rows = self._db.execute("SELECT leaf FROM log WHERE entry >= ? ORDER BY entry LIMIT ?", (start, limit))
        return [bytes(leaf) for (leaf,) in rows]

    def fact(self, name: str) -> bytes | None:
        """A value that was kept under this name."""
        row = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def put_fact(self, name: str, value: bytes) -> None:
        """Keep a value under a name."""
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))


_TOKEN: Final = "label, owner, site, device, spent_rounds, created, expires, used, used_by, revoked"  # noqa: S105
_DEVICE: Final = "id, public_key, tls_key, owner, site, hardware, spent_rounds, enrolled, revoked"
_ISSUED: Final = "serial, device, not_before, not_after, encoded, tls, tls_serial, entry"


def _token(row: tuple[object, ...]) -> Token:
    return Token(**dict(zip(_TOKEN.split(", "), row, strict=True)))  # type: ignore[arg-type]
