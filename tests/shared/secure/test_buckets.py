"""The coin that deals a site's members into buckets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.buckets import check_nonce, commit_nonce, deal
from fleetfed.shared.wire.envelope import MessageId

nonces = st.binary(min_size=16, max_size=16)
members = st.lists(st.binary(min_size=16, max_size=16).map(MessageId), min_size=1, max_size=60, unique=True)


@given(members, st.integers(2, 20), nonces, nonces, st.randoms())
def test_every_member_is_in_one_bucket_of_at_least_the_size(
    ids: list[MessageId], size: int, ours: bytes, theirs: bytes, random: object
) -> None:
    dealt = deal(dict.fromkeys(ids, ""), size, minimum_owners=1, gateway_nonce=ours, coordinator_nonce=theirs)
    assert sorted(itertools.chain.from_iterable(dealt)) == sorted(ids)
    sizes = [len(bucket) for bucket in dealt]
    assert len(dealt) == max(len(ids) // size, 1)
    assert min(sizes) >= min(size, len(ids))
    assert max(sizes) - min(sizes) <= 1
    random.shuffle(ids)
    again = deal(dict.fromkeys(ids, ""), size, minimum_owners=1, gateway_nonce=ours, coordinator_nonce=theirs)
    assert again == dealt


def test_neither_side_alone_decides() -> None:
    owners = {MessageId(bytes([i]) * 16): "" for i in range(40)}
    dealt = {
        deal(owners, 4, minimum_owners=1, gateway_nonce=bytes([ours]) * 16, coordinator_nonce=bytes([theirs]) * 16)
        for ours in range(4)
        for theirs in range(4)
    }
    assert len(dealt) == 16


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(2, 8), st.integers(1, 3), nonces)
def test_every_bucket_has_enough_owners_or_there_is_one_bucket(
    names: list[str], size: int, minimum: int, coin: bytes
) -> None:
    owners = {MessageId(bytes([i]) * 16): name for i, name in enumerate(names)}
    settings = {"gateway_nonce": coin, "coordinator_nonce": bytes(16)}
    dealt = deal(owners, size, minimum_owners=minimum, **settings)
    assert sorted(itertools.chain.from_iterable(dealt)) == sorted(owners)
    plain = deal(owners, size, minimum_owners=1, **settings)
    assert [*itertools.chain.from_iterable(dealt)] == [*itertools.chain.from_iterable(plain)], "the coin is tossed once"
    if len(dealt) > 1:
        assert min(len({owners[member] for member in bucket}) for bucket in dealt) >= minimum
        assert min(map(len, dealt)) >= size
    enough = all(len({owners[member] for member in bucket}) >= minimum for bucket in plain)
    assert (dealt == plain) if enough or len(plain) == 1 else (len(dealt) < len(plain))


def test_a_nonce_that_was_not_committed_to() -> None:
    check_nonce(b"n" * 16, commit_nonce(b"n" * 16))
    with pytest.raises(RemoteProtocolError) as raised:
        check_nonce(b"m" * 16, commit_nonce(b"n" * 16))
    assert raised.value.reason is RejectReason.BAD_NONCE
