"""The coordinator's database: every fact that a restart needs, each written before anybody is told of it.

All calls come from one thread. Writes inside one `Store.transaction` become durable together, when the outermost one
ends; a call outside of any is a transaction of its own::

    with store.transaction():
        store.add_version(record)
        store.close_round(number, ...)

The schema's version is stored with the data; a database of another version is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, StatementError
from sqlalchemy.pool import NullPool

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.storage import tables
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import (
    DeviceRecord,
    ExchangeRecord,
    RevealResult,
    RoundRecord,
    VersionRecord,
)
from fleetfed.cloud_coordinator.storage.rows import (
    GOOD,
    exchange_row,
    read_exchange,
    read_ref,
    read_round,
    read_version,
    result_column,
    round_row,
    version_row,
)
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.messages import BlobRef

NOISE: Final = "noise"
"""Document: the object with the noise that the next round's is correlated with, where it is."""
_SCHEMA_KEY: Final = "schema"
_INLINE: Final = 4 * limits.MIB
"""Bytes of a partial up to which it is kept in the database: one sync instead of three."""
_EXCHANGE: Final = tuple(
    column
    for column in tables.exchanges.c
    if column.name not in ("reveal_words", "reveal_blob", "update_bytes", "count")
)
_BATCH: Final = 500
"""Ids per query: PostgreSQL and SQLite both bound the parameters of a statement."""


_CLAIM: Final = int.from_bytes(b"fleetfed", "big")
"""The advisory lock of PostgreSQL that whoever writes a fleet's database holds."""
_ALIVE: Final = (
    "SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; "
    "SET tcp_user_timeout = 50000"
)
"""So that a machine that is gone without a word keeps its lock for less than a minute, with answers on the way too."""
_BUSY: Final = 5_000
_BUSY_SHORT: Final = 200
"""Milliseconds to wait for another program that uses the database."""


def _sqlite_settings(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL syncs the log at every commit: accept means durable.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY}")
    # What is deleted is overwritten: see `wipe`.
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _claim_postgresql(connection: Any, _record: Any) -> None:
    """One coordinator at a time, on whatever machine: the lock is the connection's that everything is written through.

    So whoever loses the connection, and with it the lock, does not write either: SQLAlchemy connects again by itself,
    and comes by here.
    """
    with connection.cursor() as cursor:
        cursor.execute(_ALIVE)
        cursor.execute("SELECT pg_try_advisory_lock(%s)", (_CLAIM,))
        (free,) = cursor.fetchone()
    connection.commit()
    if not free:
        connection.close()
        raise StorageError(
            "another coordinator uses this database, here or on another machine: stop that one first "
            "(one that died with its machine lets go within a minute)"
        )


class Store:
    """See the module.

    Args:
        url: an SQLAlchemy URL.
        blobs: where large objects go.

    Raises:
        ConfigError: the URL is none, or names a driver that is not installed.
        StorageError: the database cannot be opened, has another schema, or another coordinator uses it (PostgreSQL).
    """

    def __init__(self, url: str, blobs: BlobStore) -> None:
        self._blobs = blobs
        try:
            self._engine: Engine = sa.create_engine(make_url(url), poolclass=NullPool)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(f"storage.database {url!r}: {error}") from error
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _sqlite_settings)
        elif self._engine.dialect.name == "postgresql":
            sa.event.listen(self._engine, "connect", _claim_postgresql)
        self._depth = 0
        with ExitStack() as opened:
            opened.callback(self._engine.dispose)
            try:
                self._connection: Connection = self._engine.connect()
                opened.callback(self._connection.close)
                tables.metadata.create_all(self._connection)
                self._connection.commit()
            except StatementError as error:
                raise StorageError(f"database {self._engine.url!r}: {error.orig}") from error
            except StorageError as error:
                raise StorageError(f"database {self._engine.url!r}: {error}") from None
            self._check_schema()
            opened.pop_all()

    def _check_schema(self) -> None:
        found = self.document(_SCHEMA_KEY)
        if found is None:
            self.put_document(_SCHEMA_KEY, str(tables.SCHEMA).encode())
            return
        if found.isdigit():
            found = self._migrate(int(found))
        if found != str(tables.SCHEMA).encode():
            raise StorageError(
                f"database {self._engine.url!r} has schema {found.decode(errors='replace')}, "
                f"this program uses {tables.SCHEMA}: start the version of FleetFed that wrote it"
            )

    def _migrate(self, found: int) -> bytes:
        """Bring an older schema up to date, each step in one transaction; returns the schema then."""
        binary = "BYTEA" if self._engine.dialect.name == "postgresql" else "BLOB"
        while found in tables.MIGRATIONS:
            with self.transaction():
                for statement in tables.MIGRATIONS[found]:
                    self._write(sa.text(statement.format(binary=binary)))
                found += 1
                self.put_document(_SCHEMA_KEY, str(found).encode())
        return str(found).encode()

    def close(self) -> None:
        """Close the connection; whatever was not committed is gone."""
        self._connection.close()
        self._engine.dispose()

    @property
    def in_transaction(self) -> bool:
        """Whether what was written last is not durable yet."""
        return self._depth > 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is written inside durable at once or not at all; may be nested.

        Raises:
            StorageError: the database refuses.
        """
        self._depth += 1
        try:
            yield
        except BaseException as error:
            self._depth = 0
            self._connection.rollback()
            if isinstance(error, StatementError):
                raise StorageError(f"database: {error.orig}") from error
            raise
        self._depth -= 1
        if self._depth == 0:
            self._commit()

    def _commit(self) -> None:
        try:
            self._connection.commit()
        except StatementError as error:
            raise StorageError(f"database: {error.orig}") from error

    def _write(self, statement: Any, parameters: Sequence[dict[str, Any]] | None = None) -> int:
        with self.transaction():
            result = (
                self._connection.execute(statement)
                if parameters is None
                else self._connection.execute(statement, list(parameters))
            )
            return result.rowcount

    def _read(self, statement: Any) -> Sequence[Any]:
        try:
            rows = self._connection.execute(statement).mappings().all()
            if not self._depth:
                # A read opens a transaction too; left open it would keep the log from being truncated.
                self._connection.rollback()
        except StatementError as error:
            raise StorageError(f"database: {error.orig}") from error
        return rows

    # --- Documents ----------------------------------------------------------------------------------------------------

    def document(self, name: str) -> bytes | None:
        """The stored value of ``name``."""
        t = tables.documents
        rows = self._read(sa.select(t.c.value).where(t.c.name == name))
        return bytes(rows[0]["value"]) if rows else None

    def put_document(self, name: str, value: bytes) -> None:
        """Store a value."""
        t = tables.documents
        with self.transaction():
            if not self._write(sa.update(t).where(t.c.name == name).values(value=value)):
                self._write(sa.insert(t).values(name=name, value=value))

    # --- Versions -----------------------------------------------------------------------------------------------------

    def add_version(self, record: VersionRecord) -> None:
        """Store a new version."""
        self._write(sa.insert(tables.versions).values(**version_row(record)))

    def version(self, number: int) -> VersionRecord | None:
        """One version."""
        t = tables.versions
        rows = self._read(sa.select(t).where(t.c.version == number))
        return read_version(rows[0]) if rows else None

    def newest_version(self) -> VersionRecord | None:
        """The current version."""
        rows = self.versions(limit=1)
        return rows[0] if rows else None

    def versions(self, *, limit: int, below: int | None = None) -> list[VersionRecord]:
        """The newest versions, newest first."""
        t = tables.versions
        query = sa.select(t).order_by(t.c.version.desc()).limit(limit)
        if below is not None:
            query = query.where(t.c.version < below)
        return [read_version(row) for row in self._read(query)]

    def newest_full(self) -> VersionRecord | None:
        """The newest version that was published whole."""
        t = tables.versions
        rows = self._read(sa.select(t).where(t.c.full_ref.is_not(None)).order_by(t.c.version.desc()).limit(1))
        return read_version(rows[0]) if rows else None

    def forget_files(self, *, below: int) -> None:
        """Mark the files and states of versions below this number as no longer kept."""
        t = tables.versions
        self._write(sa.update(t).where(t.c.version < below, t.c.file.is_not(None)).values(file=None, state=None))

    # --- Rounds -------------------------------------------------------------------------------------------------------

    def open_round(self, record: RoundRecord) -> None:
        """Store a new round."""
        self._write(sa.insert(tables.rounds).values(**round_row(record)))

    def update_round(self, record: RoundRecord) -> None:
        """Store what changed of a round."""
        t = tables.rounds
        self._write(sa.update(t).where(t.c.number == record.number).values(**round_row(record)))

    def round(self, number: int) -> RoundRecord | None:
        """One round."""
        t = tables.rounds
        rows = self._read(sa.select(t).where(t.c.number == number))
        return read_round(rows[0]) if rows else None

    def rounds(self, *, limit: int) -> list[RoundRecord]:
        """The last rounds, newest first."""
        t = tables.rounds
        return [read_round(row) for row in self._read(sa.select(t).order_by(t.c.number.desc()).limit(limit))]

    def made_since(self, first_round: int) -> int:
        """How many rounds from this one on made a version."""
        t = tables.rounds
        rows = self._read(sa.select(sa.func.count().label("made")).where(t.c.number >= first_round, t.c.version > 0))
        return int(rows[0]["made"])

    # --- Exchanges ----------------------------------------------------------------------------------------------------

    def add_exchange(self, record: ExchangeRecord) -> None:
        """Store a proposal with its commit."""
        self._write(sa.insert(tables.exchanges).values(**exchange_row(record)))

    def add_reveal(
        self,
        *,
        round: int,
        gateway: str,
        head: bytes,
        words: bytes,
        receipt: bytes,
        result: RevealResult = GOOD,
    ) -> None:
        """Store a partial, or that it failed, with its receipt."""
        t = tables.exchanges
        if len(words) <= _INLINE:
            kept: dict[str, bytes] = {"reveal_words": words}
        else:
            kept = {"reveal_blob": self._blobs.put(words)[0]}
        self._write(
            sa.update(t)
            .where(t.c.round == round, t.c.gateway == gateway)
            .values(reveal_head=head, receipt=receipt, result=result_column(result), **kept)
        )

    def words(self, round: int, gateway: str) -> bytes:
        """The words of a partial of a round that is not closed.

        Raises:
            StorageError: they are not here.
        """
        t = tables.exchanges
        query = sa.select(t.c.reveal_words, t.c.reveal_blob).where(t.c.round == round, t.c.gateway == gateway)
        for row in self._read(query):
            if row["reveal_words"] is not None:
                return bytes(row["reveal_words"])
            if row["reveal_blob"] is not None:
                return self._blobs.get(bytes(row["reveal_blob"]))
        raise StorageError(f"round {round} has no partial of {gateway}; abort the round")

    def forget_words(self, round: int) -> None:
        """Forget the partials of a round: it is closed."""
        t = tables.exchanges
        self._write(sa.update(t).where(t.c.round == round).values(reveal_words=None, reveal_blob=None))

    def exchange(self, round: int, gateway: str) -> ExchangeRecord | None:
        """What passed between the coordinator and one gateway."""
        t = tables.exchanges
        rows = self._read(sa.select(*_EXCHANGE).where(t.c.round == round, t.c.gateway == gateway))
        return read_exchange(rows[0]) if rows else None

    def exchanges(self, round: int) -> list[ExchangeRecord]:
        """All exchanges of a round, by gateway."""
        t = tables.exchanges
        rows = self._read(sa.select(*_EXCHANGE).where(t.c.round == round).order_by(t.c.gateway))
        return [read_exchange(row) for row in rows]

    def forget_exchanges(self, *, below: int) -> None:
        """Delete the messages of rounds below this number."""
        t = tables.exchanges
        self._write(sa.delete(t).where(t.c.round < below))

    # --- Seal secrets -------------------------------------------------------------------------------------------------

    def add_seal(self, round: int, secret: bytes) -> None:
        """Store the seal secret of a round."""
        self._write(sa.insert(tables.seals).values(round=round, secret=secret))

    def seal(self, round: int) -> bytes | None:
        """The seal secret of a round."""
        t = tables.seals
        rows = self._read(sa.select(t.c.secret).where(t.c.round == round))
        return bytes(rows[0]["secret"]) if rows else None

    def drop_seals(self, *, but: int = 0) -> int:
        """Delete all seal secrets but that of one round; return how many."""
        t = tables.seals
        return self._write(sa.delete(t).where(t.c.round != but))

    def wipe(self) -> bool:
        """Empty the write-ahead log, which still holds what was deleted; return whether that was possible.

        To be called outside of transactions. PostgreSQL keeps deleted rows until it vacuums, and its log as long as it
        is told to: who needs more there encrypts that disk.
        """
        assert not self._depth
        if self._engine.dialect.name != "sqlite":
            return True
        try:
            # Nobody waits long for a reader: the caller tries again another time.
            self._connection.exec_driver_sql(f"PRAGMA busy_timeout={_BUSY_SHORT}")
            busy = self._connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar_one()
            self._connection.exec_driver_sql(f"PRAGMA busy_timeout={_BUSY}")
            self._connection.rollback()
        except StatementError as error:
            raise StorageError(f"database: {error.orig}") from error
        return not busy

    # --- Devices ------------------------------------------------------------------------------------------------------

    def count_contributions(self, members: Sequence[Member], round: int) -> None:
        """Enter a round's contributors."""
        t = tables.devices
        with self.transaction():
            known: set[str] = set()
            for start in range(0, len(members), _BATCH):
                ids = [member.device for member in members[start : start + _BATCH]]
                known |= {row["id"] for row in self._read(sa.select(t.c.id).where(t.c.id.in_(ids)))}
            old = [{"b_id": m.device, "b_site": m.site} for m in members if m.device in known]
            new = [
                {"id": m.device, "site": m.site, "first_round": round, "last_round": round, "contributions": 1}
                for m in members
                if m.device not in known
            ]
            if old:
                self._write(
                    sa.update(t)
                    .where(t.c.id == sa.bindparam("b_id"))
                    .values(site=sa.bindparam("b_site"), last_round=round, contributions=t.c.contributions + 1),
                    old,
                )
            if new:
                self._write(sa.insert(t), new)

    def devices(self) -> list[DeviceRecord]:
        """All devices that ever contributed, by id."""
        rows = self._read(sa.select(tables.devices).order_by(tables.devices.c.id))
        return [DeviceRecord(**row) for row in rows]

    def device(self, device: str) -> DeviceRecord | None:
        """One device."""
        t = tables.devices
        rows = self._read(sa.select(t).where(t.c.id == device))
        return DeviceRecord(**rows[0]) if rows else None

    # --- Requests -----------------------------------------------------------------------------------------------------

    def response(self, message_id: MessageId) -> bytes | None:
        """The stored answer to a request."""
        t = tables.requests
        rows = self._read(sa.select(t.c.response).where(t.c.message_id == message_id))
        return bytes(rows[0]["response"]) if rows else None

    def answer(self, message_id: MessageId, *, operator: str, expires: int, response: bytes, now: int) -> None:
        """Store an answer; forget those to requests that have expired."""
        t = tables.requests
        with self.transaction():
            self._write(sa.delete(t).where(t.c.expires < now))
            self._write(
                sa.insert(t).values(message_id=message_id, operator=operator, expires=expires, response=response)
            )

    # --- What the broker holds ----------------------------------------------------------------------------------------

    def published(self) -> dict[Digest, BlobRef]:
        """Objects whose chunks the broker may hold."""
        rows = self._read(sa.select(tables.published))
        return {Digest(bytes(row["digest"])): read_ref(row["ref"]) for row in rows}

    def add_published(self, ref: BlobRef) -> None:
        """Enter an object before its first chunk is sent."""
        t = tables.published
        with self.transaction():
            if not self._read(sa.select(t.c.digest).where(t.c.digest == ref.digest)):
                self._write(sa.insert(t).values(digest=ref.digest, ref=codec.encode(ref)))

    def drop_published(self, digests: Sequence[bytes]) -> None:
        """Forget objects whose chunks were cleared."""
        t = tables.published
        if digests:
            self._write(sa.delete(t).where(t.c.digest.in_(list(digests))))

    # --- References ---------------------------------------------------------------------------------------------------

    def references(self) -> set[bytes]:
        """The names of all blobs that anything here refers to."""
        v, e = tables.versions, tables.exchanges
        names: set[bytes] = set()
        for row in self._read(sa.select(v.c.file, v.c.card, v.c.state)):
            names |= {bytes(value) for value in row.values() if value is not None}
        for row in self._read(sa.select(e.c.reveal_blob).where(e.c.reveal_blob.is_not(None))):
            names.add(bytes(row["reveal_blob"]))
        noise = self.document(NOISE)
        return names | set(self.published()) | (set() if noise is None else {noise})
