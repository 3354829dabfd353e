from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire.blobs import Fetch, part_count, part_size, publishable, unwrap
from fleetfed.shared.wire.download import Ask, Download, Store, Subscribe, Unsubscribe


@settings(max_examples=40)
@given(raw=st.binary(min_size=1, max_size=5000), chunk=st.integers(1, 700), seed=st.randoms(use_true_random=False))
def test_an_object_is_whole_after_its_chunks_came_in_any_order(raw: bytes, chunk: int, seed) -> None:
    item = publishable(raw, chunk=chunk)
    order = list(range(part_count(item.ref)))
    seed.shuffle(order)
    fetch = Fetch(item.ref)
    data = bytearray(item.ref.size)
    for index in order:
        part = item.chunk(index)
        assert len(part) == part_size(item.ref, index)
        assert fetch.accept(index, part)
        assert not fetch.accept(index, part)
        data[index * chunk : index * chunk + len(part)] = part
    assert fetch.complete
    assert unwrap(item.ref, bytes(data)) == raw


def test_a_forged_chunk_is_refused_and_stays_wanted() -> None:
    item = publishable(os.urandom(1000), chunk=300)
    fetch = Fetch(item.ref)
    with pytest.raises(RemoteProtocolError) as caught:
        fetch.accept(0, b"x" * 300)
    assert caught.value.reason is RejectReason.BODY_MISMATCH
    assert 0 in fetch.missing


def test_a_reference_whose_numbers_do_not_fit_is_refused() -> None:
    ref = publishable(os.urandom(1000), chunk=300).ref
    for bad in (
        dataclasses.replace(ref, size=ref.size + 300),
        dataclasses.replace(ref, parts=ref.parts[:-1]),
        dataclasses.replace(ref, chunk=1),
    ):
        with pytest.raises(RemoteProtocolError):
            Fetch(bad)


def test_nothing_is_no_object() -> None:
    with pytest.raises(LocalProtocolError):
        publishable(b"")


def test_a_download_keeps_its_window_and_resumes_where_it_stopped() -> None:
    item = publishable(os.urandom(2000), chunk=200)
    count = part_count(item.ref)
    download = Download(item.ref, have={0, 1}, window=3)
    open_ = {action.index for action in download.begin(now=0) if isinstance(action, Subscribe)}
    assert open_ == {2, 3, 4}
    stored = set()
    while not download.complete:
        index = min(open_)
        for action in download.chunk(index, item.chunk(index), now=1):
            match action:
                case Store(got, offset, data):
                    assert (offset, data) == (got * 200, item.chunk(got))
                    stored.add(got)
                case Unsubscribe(done):
                    open_.discard(done)
                case Subscribe(more):
                    open_.add(more)
        assert len(open_) <= 3
    assert stored == set(range(2, count))
    assert open_ == set()
    assert download.next_deadline() is None


def test_a_silent_broker_is_asked_again_and_then_the_node_is() -> None:
    item = publishable(os.urandom(1000), chunk=300)
    download = Download(item.ref, window=2, patience=100)
    download.begin(now=0)
    assert download.timer(now=99) == []
    assert download.timer(now=100) == [Subscribe(0), Subscribe(1)]
    deadline = download.next_deadline()
    assert deadline == 300  # the patience doubles
    actions = download.timer(now=deadline)
    assert actions[0] == Ask(tuple(range(part_count(item.ref))))
    download.chunk(0, item.chunk(0), now=301)
    assert download.next_deadline() == 401


def test_a_cancelled_download_ends_its_subscriptions() -> None:
    item = publishable(os.urandom(1000), chunk=300)
    download = Download(item.ref, window=2)
    download.begin(now=0)
    assert download.cancel() == [Unsubscribe(0), Unsubscribe(1)]
    assert download.next_deadline() is None
