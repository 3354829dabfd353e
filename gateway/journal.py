"""What the gateway has promised, on disk: one SQLite file in WAL mode, one transaction and one fsync for many records.

A record is made by one of the ``…_rows`` functions, which only build statements; `Journal.write` performs a batch of
them in one transaction and returns when it is durable. It may run in another thread than the readers, who have a
connection of their own. The bodies are here and nowhere else, so memory does not grow with the number
of devices. A round's rows are deleted when it is over; of its updates only the receipts stay until the next one is.

Bodies and the secrets of a round of masked updates go earlier, with the reveal. Secrets are overwritten, and the log
that still had them is cut off, so that a stolen disk opens no message that was recorded before.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

from fleetfed.gateway import events as ev
from fleetfed.gateway.record import Accepted, Child, RoundRecord, RoundSecrets, Sent
from fleetfed.gateway.state import Previous
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest, MessageId, open_body, parse_head
from fleetfed.shared.wire.messages import Commit, Plan, Proposal

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS updates (message_id BLOB PRIMARY KEY, device TEXT NOT NULL UNIQUE, serial TEXT NOT NULL,
    hash BLOB NOT NULL, head BLOB NOT NULL, body BLOB NOT NULL, receipt BLOB NOT NULL,
    owner TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS declines (device TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS children (gateway TEXT PRIMARY KEY, message_id BLOB NOT NULL, proposal BLOB NOT NULL,
    receipt BLOB NOT NULL, reveal_id BLOB, reveal BLOB, reveal_receipt BLOB);
CREATE TABLE IF NOT EXISTS previous (message_id BLOB PRIMARY KEY, device TEXT NOT NULL, hash BLOB NOT NULL,
    receipt BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS secrets (value BLOB NOT NULL);
"""
_FORMAT: Final = 2
_PAGE: Final = 32_768
_LOG: Final = 16 << 20
"""Bytes in the log from which it is put into the file."""
_FROM_FORMAT_1: Final = "ALTER TABLE updates ADD COLUMN owner TEXT NOT NULL DEFAULT ''"
_LAST: Final = ("last_round", "last_hash")
_COUNTED: Final = "counted:"
"""And a coordinator's key in hex: the highest round of its plans."""

Statement = tuple[str, tuple[object, ...]]
Rows = list[Statement]
T = TypeVar("T")

_FACT: Final = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
_ERASE: Final = "DELETE FROM secrets"
_UPDATE: Final = "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ANOTHER: Final = ", (?, ?, ?, ?, ?, ?, ?, ?)"
_TOGETHER: Final = (32, 8, 2)
"""Updates that one statement stores; few sizes, so that all are prepared once."""


def round_rows(event: ev.StoreRound, *, secrets: bytes = b"", cosign: bytes = b"") -> Rows:
    """A round begins, perhaps with secrets and the message that makes their public half known."""
    return [
        *_clear(),
        (_FACT, ("plan", event.raw)),
        (_FACT, ("plan_hash", event.hash)),
        (_FACT, ("sizes", json.dumps(event.sizes).encode())),
        (_FACT, ("last_round", str(event.round).encode())),
        (_FACT, (_COUNTED + parse_head(event.raw).header.sender.hex(), str(event.round).encode())),
        # Of the round before: only its receipts, which `forget_rows` has put aside.
        *([("INSERT INTO secrets VALUES (?)", (secrets,))] if secrets else []),
        *([(_FACT, ("cosign", cosign))] if cosign else []),
    ]


def update_rows(event: ev.UpdateArrived, *, head: bytes, body: bytes | memoryview, receipt: bytes) -> Rows:
    """An accepted update with the receipt that says so."""
    values = (event.message_id, event.device, str(event.serial), event.head, head, body, receipt, event.owner)
    return [(_UPDATE, values)]


def decline_rows(event: ev.StoreDecline) -> Rows:
    """A device declined."""
    return [("INSERT OR REPLACE INTO declines VALUES (?, ?)", (event.device, event.reason))]


def child_proposal_rows(event: ev.ChildProposed, receipt: bytes) -> Rows:
    """A gateway below proposed."""
    values = (event.gateway, event.message_id, event.raw, receipt)
    return [("INSERT INTO children (gateway, message_id, proposal, receipt) VALUES (?, ?, ?, ?)", values)]


def child_reveal_rows(event: ev.ChildRevealed, receipt: bytes) -> Rows:
    """A gateway below revealed."""
    values = (event.message_id, event.raw, receipt, event.gateway)
    return [("UPDATE children SET reveal_id = ?, reveal = ?, reveal_receipt = ? WHERE gateway = ?", values)]


def fact_rows(name: str, value: bytes) -> Rows:
    """An own message (``proposal``, ``reveal``), the ``commit``, or that all is ``answered``."""
    return [(_FACT, (name, value))]


def reveal_rows(raw: bytes) -> Rows:
    """The own reveal; nothing that it was made from is left."""
    return [*fact_rows("reveal", raw), *_erase()]


def answered_rows() -> Rows:
    """The tier above needs nothing more."""
    return [*fact_rows("answered", b"\x01"), *_erase()]


def aborted_rows(event: ev.StoreAborted, refusal: bytes) -> Rows:
    """A commit that was refused, and the message that says why; nothing of which a sum could be made is left."""
    facts = (("commit", event.raw), ("aborted", event.reason.encode()), ("reveal", refusal))
    return [*(row for name, value in facts for row in fact_rows(name, value)), *_erase()]


def drop_rows(message_ids: Iterable[MessageId]) -> Rows:
    """Updates that are void after all."""
    return [("DELETE FROM updates WHERE message_id = ?", (message_id,)) for message_id in message_ids]


def forget_rows(event: ev.ForgetRound) -> Rows:
    """A round is over: only its number, its hash and its receipts stay."""
    return [
        ("DELETE FROM previous", ()),
        ("INSERT INTO previous SELECT message_id, device, hash, receipt FROM updates", ()),
        *_clear(),
        (_FACT, ("last_round", str(event.round).encode())),
        (_FACT, ("last_hash", event.hash)),
    ]


def lower_rows(event: ev.LowerRound) -> Rows:
    """Coordinators are listed no more: what they counted is void, and what is left of their last round."""
    above = "(SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'last_round') > ?"
    return [
        *(("DELETE FROM facts WHERE name = ?", (_COUNTED + key.hex(),)) for key in sorted(event.forget)),
        (f"DELETE FROM previous WHERE {above}", (event.round,)),  # noqa: S608
        (f"DELETE FROM facts WHERE name = 'last_hash' AND {above}", (event.round,)),  # noqa: S608
        (_FACT, ("last_round", str(event.round).encode())),
    ]


def _erase() -> Rows:
    return [("UPDATE updates SET body = x''", ()), (_ERASE, ())]


def _clear() -> Rows:
    return [
        (_ERASE, ()),
        ("DELETE FROM updates", ()),
        ("DELETE FROM declines", ()),
        ("DELETE FROM children", ()),
        ("DELETE FROM facts WHERE name NOT IN (?, ?) AND name NOT LIKE ?", (*_LAST, f"{_COUNTED}%")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the journal holds at start.

    Attributes:
        last_round: the highest round ever opened or ended.
        previous: what the devices of the last round may still ask about.
        record: the round that is on, if any.
        plan: its message; empty for none.
        sizes: values per tensor of its model.
        secrets: of that round, as long as it has any.
        cosign: the own word for the plan; empty for none.
        counted: the highest round of each coordinator's key.
    """

    last_round: int
    previous: Previous
    record: RoundRecord | None
    plan: bytes
    sizes: tuple[int, ...]
    secrets: RoundSecrets | None = None
    cosign: bytes = b""
    counted: dict[bytes, int] = field(default_factory=dict)


class Journal:
    """See the module.

    Args:
        path: the file; made where it is missing.

    Raises:
        StorageError: it is damaged or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with ExitStack() as opened:
            try:
                self._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                opened.callback(self._writer.close)
                self._prepare()
                # What a process before us erased and died before it could cut off.
                self._log_cut = self._cut_log()
                self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            except sqlite3.Error as error:
                raise StorageError(f"{path}: {error}; move it away to start without the round that it holds") from error
            opened.pop_all()

    def _prepare(self) -> None:
        # Of a new file: a body of 100 KB takes 4 pages in place of 25, and a third less processor time.
        self._writer.execute(f"PRAGMA page_size = {_PAGE}")
        self._writer.execute("PRAGMA journal_mode = WAL")
        # FULL: a commit returns after the log is on the disk, not merely handed to the system.
        self._writer.execute("PRAGMA synchronous = FULL")
        (page,) = self._writer.execute("PRAGMA page_size").fetchone()
        self._writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG // page}")
        # FAST: what is deleted within a page is overwritten. Whole pages that get free are not, which would write
        # every body twice: a body is nothing without the secret that it was sealed to.
        self._writer.execute("PRAGMA secure_delete = FAST")
        (check,) = self._writer.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if check != "ok" or version not in (0, 1, _FORMAT):
            raise StorageError(f"{self._path}: {check if check != 'ok' else f'format {version}, this is {_FORMAT}'}")
        old = [_FROM_FORMAT_1] if version == 1 else []
        steps = [each for each in _SCHEMA.split(";") if each.strip()]
        self._writer.execute("BEGIN IMMEDIATE")
        for step in (*old, *steps, f"PRAGMA user_version = {_FORMAT}"):
            self._writer.execute(step)
        self._writer.execute("COMMIT")

    def _cut_log(self) -> bool:
        """Put the log into the database file and make it empty; False if a reader was in the way."""
        busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def close(self) -> None:
        """Close both connections."""
        self._reader.close()
        self._writer.close()

    def write(self, batch: Sequence[Statement]) -> None:
        """Perform all statements in one transaction; on return they are durable.

        Raises:
            StorageError: the disk is full or broken; nothing of the batch is kept.
        """
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in _joined(batch):
                    done = self._writer.execute(statement, values)
                    self._log_cut &= statement != _ERASE or not done.rowcount
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            if not self._log_cut:
                self._log_cut = self._cut_log()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error

    def load(self) -> Stored:
        """Everything but the bodies.

        Raises:
            StorageError: it does not parse.
        """
        try:
            facts = dict(self._reader.execute("SELECT name, value FROM facts").fetchall())
            rows = self._reader.execute("SELECT device, message_id, hash FROM previous").fetchall()
            previous = Previous(
                round=int(facts.get("last_round", b"0")),
                hash=Digest(facts["last_hash"]) if "last_hash" in facts else None,
                accepted={device: (MessageId(id_), Digest(hash_)) for device, id_, hash_ in rows},
            )
            record = self._record(facts) if "plan" in facts else None
            sizes = tuple(int(size) for size in json.loads(facts.get("sizes", b"[]")))
            found = self._reader.execute("SELECT value FROM secrets").fetchall()
            secrets = RoundSecrets.decode(found[0][0]) if found else None
        except (sqlite3.Error, RemoteProtocolError, KeyError, ValueError) as error:
            raise StorageError(f"{self._path}: {error}") from error
        last_round = max(previous.round, record.plan.round if record else 0)
        return Stored(
            last_round=last_round,
            previous=previous,
            record=record,
            plan=facts.get("plan", b""),
            sizes=sizes,
            secrets=secrets,
            cosign=facts.get("cosign", b""),
            counted=_counted(facts, last_round),
        )

    def _record(self, facts: dict[str, bytes]) -> RoundRecord:
        plan = decode_stored(Plan, facts["plan"])
        record = RoundRecord(plan=plan, hash=Digest(facts["plan_hash"]))
        query = "SELECT device, message_id, hash, serial, length(head) + length(body), owner FROM updates"
        for device, message_id, hash_, serial, size, owner in self._reader.execute(query):
            record.accepted[device] = Accepted(MessageId(message_id), Digest(hash_), int(serial), size, owner)
        record.declined = dict(self._reader.execute("SELECT device, reason FROM declines").fetchall())
        query = "SELECT gateway, message_id, proposal, reveal_id FROM children"
        for gateway, message_id, raw, reveal_id in self._reader.execute(query):
            proposal = decode_stored(Proposal, raw)
            members = frozenset(parse_head(head).header.message_id for head in proposal.heads)
            record.children[gateway] = Child(
                MessageId(message_id), members, proposal.declined, proposal.rejected, reveal_id
            )
        if "proposal" in facts:
            record.proposal = _sent(facts["proposal"])
        if "commit" in facts:
            record.commit = commit_event(facts["commit"], decode_stored(Commit, facts["commit"]))
            for gateway, child in record.children.items():
                if child.reveal is not None:
                    count = len(child.members & record.commit.members)
                    record.children[gateway] = Child(
                        child.proposal, child.members, child.declined, child.rejected, child.reveal, count
                    )
        if "reveal" in facts:
            record.reveal = _sent(facts["reveal"])
        record.aborted = facts.get("aborted", b"").decode()
        record.answered = "answered" in facts
        return record

    def heads(self) -> dict[MessageId, bytes]:
        """The heads of the stored updates."""
        return {MessageId(id_): head for id_, head in self._rows("SELECT message_id, head FROM updates")}

    def child_proposals(self) -> dict[str, bytes]:
        """The proposals of gateways below."""
        return dict(self._rows("SELECT gateway, proposal FROM children"))

    def updates(self, message_ids: Iterable[MessageId]) -> Iterator[tuple[bytes, bytes]]:
        """The heads and bodies of stored updates, one at a time."""
        for message_id in message_ids:
            head, body = self._one("SELECT head, body FROM updates WHERE message_id = ?", message_id)
            yield head, body

    def scratch(self) -> BinaryIO:
        """An empty file beside the journal, gone once it is closed."""
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self._path.parent))

    def reveals(self) -> Iterator[bytes]:
        """The stored reveals of gateways below, one message at a time."""
        names = self._rows("SELECT gateway FROM children WHERE reveal IS NOT NULL")
        for (gateway,) in names:
            yield self._one("SELECT reveal FROM children WHERE gateway = ?", gateway)[0]

    def fact(self, name: str) -> bytes | None:
        """What `fact_rows` stored; None once the round is over."""
        found = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return bytes(found[0][0]) if found else None

    def receipt(self, message_id: MessageId) -> bytes | None:
        """The receipt stored with a message of this round or the one before."""
        queries = (
            "SELECT receipt FROM updates WHERE message_id = ?",
            "SELECT receipt FROM children WHERE message_id = ?",
            "SELECT reveal_receipt FROM children WHERE reveal_id = ?",
            "SELECT receipt FROM previous WHERE message_id = ?",
        )
        for query in queries:
            found = self._rows(query, message_id)
            if found:
                return bytes(found[0][0])
        return None

    def _one(self, query: str, key: object) -> tuple[Any, ...]:
        found = self._rows(query, key)
        if not found:
            raise StorageError(f"{self._path}: a row is missing: {query}")
        return found[0]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}") from error


def _joined(batch: Sequence[Statement]) -> Iterator[Statement]:
    """The same in fewer statements: between any two this thread waits its turn for an interpreter that is busy."""
    at = 0
    while at < len(batch):
        run = itertools.takewhile(lambda row: row[0] == _UPDATE, batch[at : at + _TOGETHER[0]])
        updates = [values for _, values in run]
        count = next((size for size in _TOGETHER if size <= len(updates)), 1)
        if count == 1:
            yield batch[at]
        else:
            yield _UPDATE + _ANOTHER * (count - 1), tuple(itertools.chain.from_iterable(updates[:count]))
        at += count


def commit_event(raw: bytes, commit: Commit) -> ev.CommitArrived:
    """A verified commit as the machine takes it."""
    ids = (MessageId(commit.members[at : at + 16]) for at in range(0, len(commit.members), 16))
    return ev.CommitArrived(
        plan=commit.plan,
        gateway=commit.gateway,
        proposal=commit.proposal,
        head=parse_head(raw).hash,
        members=frozenset(ids),
        raw=raw,
        nonce=commit.nonce,
    )


def _counted(facts: dict[str, bytes], last_round: int) -> dict[bytes, int]:
    counted = {
        bytes.fromhex(name.removeprefix(_COUNTED)): int(value)
        for name, value in facts.items()
        if name.startswith(_COUNTED)
    }
    # Of a journal from before keys were remembered nobody knows whose round it was.
    return counted if max(counted.values(), default=0) >= last_round else {**counted, b"": last_round}


def _sent(raw: bytes) -> Sent:
    head = parse_head(raw)
    return Sent(head.header.message_id, head.hash)


def decode_stored(cls: type[T], raw: bytes) -> T:
    """Decode a message that was verified before it was stored."""
    head = parse_head(raw)
    body = open_body(head.header, memoryview(raw)[head.size :])
    return codec.decode(cls, body, limit=len(body))
