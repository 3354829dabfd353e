"""The database and the blob store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.storage import tables
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord, Origin, RoundRecord, VersionRecord
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


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def store(tmp_path: Path, blobs: BlobStore) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'c.db'}", blobs)
    yield store
    store.close()


def reopened(tmp_path: Path, blobs: BlobStore) -> Store:
    return Store(f"sqlite:///{tmp_path / 'c.db'}", blobs)


def test_what_is_stored_comes_back_equal(store: Store, tmp_path: Path, blobs: BlobStore) -> None:
    store.add_version(VERSION)
    store.open_round(ROUND)
    store.add_exchange(EXCHANGE)
    store.add_reveal(round=3, gateway="g", head=b"r" * 32, words=b"words", receipt=b"receipt")
    again = reopened(tmp_path, blobs)
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


def test_a_transaction_is_durable_as_a_whole_or_not_at_all(store: Store, tmp_path: Path, blobs: BlobStore) -> None:
    def interrupted() -> None:
        with store.transaction():
            store.add_version(VERSION)
            with store.transaction():
                store.open_round(ROUND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    again = reopened(tmp_path, blobs)
    assert again.newest_version() is None
    assert again.round(3) is None
    again.close()
    store.add_version(VERSION)
    assert store.newest_version() == VERSION


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


def test_another_schema_is_refused_by_its_number(store: Store, tmp_path: Path, blobs: BlobStore) -> None:
    store.put_document("schema", b"99")
    with pytest.raises(StorageError, match=f"has schema 99, this program uses {tables.SCHEMA}"):
        reopened(tmp_path, blobs)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path, blobs: BlobStore) -> None:
    (tmp_path / "c.db").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        reopened(tmp_path, blobs)


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
