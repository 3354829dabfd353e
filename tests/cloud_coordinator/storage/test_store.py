"""The database and the blob store."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import sqlalchemy as sa
from fleetfed_testing.postgresql import PostgreSQL

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.storage import tables
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import (
    ExchangeRecord,
    Origin,
    RevealResult,
    RoundRecord,
    VersionRecord,
)
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.clips import ClipState
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.wire.blobs import publishable
from fleetfed.shared.wire.envelope import Digest, MessageId

REF = publishable(b"card").ref
VERSION = VersionRecord(
    version=1,
    parent=0,
    origin=Origin.PUBLISHED,
    name="m",
    sha256=b"s" * 32,
    size=100,
    file=b"f" * 32,
    card=b"c" * 32,
    card_ref=REF,
    full_ref=REF,
    metrics={"accuracy": 0.25},
    created=7,
    clips=ClipState(bits=4, clips=(0.5,), multipliers=(8.0,)),
)
ROUND = RoundRecord(number=3, plan_hash=b"p" * 32, plan=b"plan", base=1, awaited=frozenset({"g"}), opened=1, expires=9)
MEMBER = Member(device="d", site="s", message_id=MessageId(b"m" * 16), head=Digest(b"h" * 32), size=50)
EXCHANGE = ExchangeRecord(
    round=3,
    gateway="g",
    proposal_head=b"a" * 32,
    proposal=b"proposal",
    commit_head=b"b" * 32,
    commit=b"commit",
    members=(MEMBER,),
    declined={"busy": 2},
)


# What is about the file, and nothing that a server has.
in_a_file = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
on_a_server = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


def reopened(store: Store, url: str, blobs: BlobStore) -> Store:
    """What another process finds after this one."""
    store.close()
    return Store(url, blobs)


def test_what_is_stored_comes_back_equal(store: Store, url: str, blobs: BlobStore) -> None:
    store.add_version(VERSION)
    store.open_round(ROUND)
    store.add_exchange(EXCHANGE)
    store.add_reveal(round=3, gateway="g", head=b"r" * 32, words=b"words", receipt=b"receipt")
    again = reopened(store, url, blobs)
    assert again.newest_version() == VERSION
    assert again.round(3) == ROUND
    assert again.exchange(3, "g") == replace(EXCHANGE, reveal_head=b"r" * 32, receipt=b"receipt")
    assert again.words(3, "g") == b"words"
    again.close()


def test_large_partials_are_kept_in_the_blob_store_until_the_round_is_closed(store: Store, blobs: BlobStore) -> None:
    words = bytes(5 * 1024 * 1024)
    store.open_round(ROUND)
    store.add_exchange(EXCHANGE)
    store.add_reveal(round=3, gateway="g", head=b"r" * 32, words=words, receipt=b"")
    assert store.words(3, "g") == words
    assert blobs.collect(store.references()) == 0
    store.forget_words(3)
    assert blobs.collect(store.references()) == 1
    with pytest.raises(StorageError, match="no partial of g"):
        store.words(3, "g")


def test_a_transaction_is_durable_as_a_whole_or_not_at_all(store: Store, url: str, blobs: BlobStore) -> None:
    def interrupted() -> None:
        with store.transaction():
            store.add_version(VERSION)
            with store.transaction():
                store.open_round(ROUND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.newest_version() is None, "the store goes on"
    again = reopened(store, url, blobs)
    assert again.newest_version() is None
    assert again.round(3) is None
    again.add_version(VERSION)
    assert again.newest_version() == VERSION
    again.close()


def test_contributions_are_counted_per_device(store: Store) -> None:
    for number in (1, 2):
        store.count_contributions([MEMBER, replace(MEMBER, device=f"new{number}")], number)
    device = store.device("d")
    assert device is not None
    assert (device.first_round, device.last_round, device.contributions) == (1, 2, 2)
    assert [each.id for each in store.devices()] == ["d", "new1", "new2"]


def test_many_contributors_are_counted(store: Store) -> None:
    members = [replace(MEMBER, device=f"d{i}") for i in range(1_203)]
    store.count_contributions(members, 1)
    store.count_contributions(members, 2)
    assert {each.contributions for each in store.devices()} == {2}
    assert len(store.devices()) == 1_203


def test_answers_are_forgotten_once_their_requests_have_expired(store: Store) -> None:
    store.answer(MessageId(b"1" * 16), operator="o", expires=10, response=b"one", now=1)
    store.answer(MessageId(b"2" * 16), operator="o", expires=30, response=b"two", now=20)
    assert store.response(MessageId(b"1" * 16)) is None
    assert store.response(MessageId(b"2" * 16)) == b"two"


def test_another_schema_is_refused_by_its_number(store: Store, url: str, blobs: BlobStore) -> None:
    store.put_document("schema", b"99")
    with pytest.raises(StorageError, match=f"has schema 99, this program uses {tables.SCHEMA}"):
        reopened(store, url, blobs)


@in_a_file
def test_a_file_that_is_no_database_is_refused(url: str, tmp_path: Path, blobs: BlobStore) -> None:
    (tmp_path / "c.db").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store(url, blobs)


@on_a_server
def test_a_second_coordinator_on_the_same_database_is_refused_until_the_first_has_ended(
    store: Store, url: str, blobs: BlobStore
) -> None:
    with pytest.raises(StorageError, match="another coordinator uses this database"):
        Store(url, blobs)
    store.add_version(VERSION)
    again = reopened(store, url, blobs)
    assert again.newest_version() == VERSION
    again.close()


@on_a_server
def test_who_lost_the_server_writes_nothing_once_another_has_taken_over(
    store: Store, url: str, blobs: BlobStore, postgresql: PostgreSQL
) -> None:
    postgresql.stop("immediate")
    postgresql.start()
    other = Store(url, blobs)
    for _ in range(2):
        with pytest.raises(StorageError):
            store.add_version(VERSION)
    assert other.newest_version() is None
    other.close()


@pytest.mark.parametrize("url", ["nonsense", "oracle9://x/y"])
def test_an_url_that_is_none_is_refused(url: str, blobs: BlobStore) -> None:
    with pytest.raises(ConfigError, match=r"storage\.database"):
        Store(url, blobs)


def test_the_same_object_is_stored_once(blobs: BlobStore) -> None:
    one, two, three = blobs.put(b"a", b"b", b"a")
    assert one == three != two
    assert blobs.get(two) == b"b"
    assert blobs.part(one, 0, 10) == b"a"


def test_a_damaged_or_missing_object_is_not_returned(blobs: BlobStore) -> None:
    (name,) = blobs.put(b"content")
    blobs.path(name).write_bytes(b"other")
    with pytest.raises(StorageError, match="damaged"):
        blobs.get(name)
    with pytest.raises(StorageError, match="restore the state folder"):
        blobs.get(b"x" * 32)


def test_collecting_keeps_what_is_named_and_clears_what_a_crash_left(blobs: BlobStore, tmp_path: Path) -> None:
    keep, _ = blobs.put(b"keep", b"drop")
    (tmp_path / "blobs" / ".new-0123").write_bytes(b"half")
    assert blobs.collect({keep}) == 2
    assert blobs.get(keep) == b"keep"


def test_what_a_reveal_came_to_comes_back_and_tells_who_contributed(store: Store) -> None:
    store.open_round(ROUND)
    names = [bytes([number]) * 16 for number in range(4)]
    members = tuple(
        replace(MEMBER, device=f"d{number}", message_id=MessageId(name), owner="acme")
        for number, name in enumerate(names)
    )
    store.add_exchange(replace(EXCHANGE, members=members))
    assert store.exchanges(3)[0].contributors == ()
    result = RevealResult(buckets=2, buckets_lost=1, lost=(names[0], names[2]))
    store.add_reveal(round=3, gateway="g", head=b"r" * 32, words=b"", receipt=b"", result=result)
    found = store.exchanges(3)[0]
    assert found.result == result
    assert found.members == members
    assert [member.device for member in found.contributors] == ["d1", "d3"]
    failed = RevealResult(failed="out_of_range")
    store.add_reveal(round=3, gateway="g", head=b"r" * 32, words=b"", receipt=b"", result=failed)
    assert store.exchanges(3)[0].contributors == ()


def test_a_database_of_the_first_schema_is_brought_up_to_date(store: Store, url: str, blobs: BlobStore) -> None:
    store.open_round(ROUND)
    store.add_exchange(EXCHANGE)
    store.close()
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as old:
        old.exec_driver_sql("ALTER TABLE exchanges DROP COLUMN result")
        old.exec_driver_sql("DROP TABLE seals")
        old.execute(sa.text("UPDATE documents SET value = :one WHERE name = 'schema'"), {"one": b"1"})
        members = msgpack.packb([["d", "s", b"m" * 16, b"h" * 32, 50]])
        old.execute(sa.text("UPDATE exchanges SET members = :members"), {"members": members})
    again = reopened(store, url, blobs)
    assert again.exchange(3, "g") == EXCHANGE
    assert again.document("schema") == str(tables.SCHEMA).encode()
    again.add_seal(3, b"s" * 32)
    again.close()


def test_a_secret_is_kept_for_the_open_round_alone(store: Store) -> None:
    for number in (1, 2, 3):
        store.add_seal(number, bytes([number]) * 32)
    assert store.drop_seals(but=2) == 2
    assert [store.seal(number) for number in (1, 2, 3)] == [None, b"\2" * 32, None]
    assert store.drop_seals() == 1
    assert store.drop_seals() == 0


@in_a_file
def test_after_wiping_no_byte_of_a_secret_is_in_any_file_of_the_database(store: Store, tmp_path: Path) -> None:
    secret = os.urandom(32)

    def traces() -> list[str]:
        return [path.name for path in tmp_path.glob("c.db*") if secret in path.read_bytes()]

    store.add_seal(1, secret)
    assert store.wipe()
    assert traces() == ["c.db"]
    store.drop_seals()
    assert traces()
    assert store.wipe()
    assert traces() == []


@in_a_file
def test_a_log_that_another_program_reads_is_not_emptied_and_that_is_said(store: Store, tmp_path: Path) -> None:
    store.add_seal(1, b"s" * 32)
    with sqlite3.connect(tmp_path / "c.db") as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM seals").fetchall()
        store.drop_seals()
        assert not store.wipe()
    reader.close()
    assert store.wipe()
