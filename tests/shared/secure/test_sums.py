"""Split mode adds up: whoever arrives, in whatever order, through whatever tree, the sum is the plain one, bit for bit.

The updates are masked, sealed and opened for real once; thousands of cases then differ in who is in, in which order
they come, how often, and who adds them.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.masked_round import MaskedRound, random_words
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.lanes import LaneLayout, Words
from fleetfed.shared.secure.buckets import deal
from fleetfed.shared.trust.signer import Message

DEVICES = 14
LAYOUTS = (LaneLayout(dimension=23, lane_bits=16, meta_words=3), LaneLayout(dimension=7, lane_bits=21, meta_words=2))


class Case:
    """A round's updates, what they hide, and what its gateway sees of them."""

    def __init__(self, layout: LaneLayout, *, helper: bool) -> None:
        rng = np.random.default_rng(layout.dimension)
        self.round = MaskedRound.of(layout, helper=helper)
        self.plain = [random_words(layout, rng) for _ in range(DEVICES)]
        self.updates = [self.round.update(f"d-{i}", words) for i, words in enumerate(self.plain)]
        self.masked = [self.round.opened(update) for update in self.updates]
        self.masks = [
            sum((self.round.mask_of(update.head, reader) for reader in self.round.holders), layout.zeros())
            for update in self.updates
        ]

    def total(self, members: set[int]) -> Words:
        """The plain sum."""
        return self.add(self.plain[i] for i in sorted(members))

    def add(self, parts: Any) -> Words:
        total = self.round.layout.zeros()
        for part in parts:
            total += part
        return total


@cache
def case(index: int, helper: bool) -> Case:
    return Case(LAYOUTS[index], helper=helper)


cases = st.builds(case, st.integers(0, len(LAYOUTS) - 1), st.booleans())
deliveries = st.lists(st.integers(0, DEVICES - 1), min_size=1, max_size=40)


def tree_sum(each: Case, members: list[int], rng: random.Random) -> Words:
    """The masked sum of members that any tree of gateways makes: leaves add updates, those above add sums."""
    nodes = [each.masked[i] for i in members]
    while len(nodes) > 1:
        rng.shuffle(nodes)
        width = rng.randint(2, max(2, len(nodes)))
        nodes = [each.add(nodes[start : start + width]) for start in range(0, len(nodes), width)]
    return nodes[0]


@settings(max_examples=1000, deadline=None)
@given(cases, deliveries, st.randoms(use_true_random=False))
def test_any_arrivals_through_any_tree(each: Case, arrivals: list[int], rng: random.Random) -> None:
    held: dict[bytes, int] = {}
    for i in arrivals:
        # What arrives again is known by its id and counts once.
        held.setdefault(each.updates[i].id, i)
    members = list(held.values())
    masked = tree_sum(each, members, rng)
    assert (masked - each.add(each.masks[i] for i in members) == each.total(set(members))).all()


@settings(max_examples=500, deadline=None)
@given(cases, deliveries, st.sets(st.integers(0, DEVICES - 1)))
def test_what_a_commit_leaves_out_is_subtracted(each: Case, arrivals: list[int], out: set[int]) -> None:
    proposed = set(arrivals)
    members = proposed - out
    masked = each.add(each.masked[i] for i in proposed)
    for i in proposed - members:
        masked -= each.masked[i]
    assert (masked - each.add(each.masks[i] for i in members) == each.total(members)).all()


@settings(max_examples=500, deadline=None)
@given(
    cases,
    st.sets(st.integers(0, DEVICES - 1), min_size=1),
    st.integers(2, DEVICES),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
)
def test_buckets(each: Case, members: set[int], size: int, ours: bytes, theirs: bytes) -> None:
    by_id = {each.updates[i].id: i for i in members}
    total = each.round.layout.zeros()
    owners = dict.fromkeys(by_id, "")
    for bucket in deal(owners, size, minimum_owners=1, gateway_nonce=ours, coordinator_nonce=theirs):
        inside = {by_id[member] for member in bucket}
        masked = each.add(each.masked[i] for i in inside)
        # Whoever holds seeds deals anew, from the ids alone.
        unmasked = masked - each.add(each.masks[i] for i in inside)
        assert (unmasked == each.total(inside)).all()
        total += unmasked
    assert (total == each.total(members)).all()


@settings(max_examples=200, deadline=None)
@given(cases, st.sets(st.integers(0, DEVICES - 1), min_size=1), st.integers(0, DEVICES - 1))
def test_any_other_set_unmasks_to_noise(each: Case, members: set[int], other: int) -> None:
    """A coordinator that takes away one mask more or less than the gateway added learns nothing."""
    masked = each.add(each.masked[i] for i in members)
    wrong = members ^ {other}
    unmasked = masked - each.add(each.masks[i] for i in wrong)
    assert (unmasked != each.total(members)).all()
    assert (unmasked != each.total(wrong)).all()


@pytest.mark.parametrize("helper", [False, True])
def test_one_seed_holder_of_two_learns_nothing(helper: bool) -> None:
    each = case(0, helper)
    rnd = each.round
    masked = each.add(each.masked)
    for reader in rnd.holders:
        left = masked - each.add(rnd.mask_of(update.head, reader) for update in each.updates)
        assert bool((left == each.total(set(range(DEVICES)))).all()) is not helper


small = st.builds(LaneLayout, dimension=st.integers(1, 40), lane_bits=st.sampled_from((8, 12, 16, 21, 32, 64)))


@settings(max_examples=60, deadline=None)
@given(small, st.booleans(), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_any_layout_and_values(layout: LaneLayout, helper: bool, seeds: list[int]) -> None:
    """The whole way anew for every case: device, gateway, seed holders, unpacking."""
    rnd = MaskedRound.of(layout, helper=helper)
    largest = layout.lane_max // len(seeds)
    rows = [np.random.default_rng(seed).integers(-largest, largest, layout.dimension, endpoint=True) for seed in seeds]
    empty = np.zeros(0, dtype=np.uint64)
    updates: list[Message] = [rnd.update(f"d-{i}", layout.pack(row, empty)) for i, row in enumerate(rows)]
    masked = layout.zeros()
    for update in updates:
        masked += rnd.opened(update)
    values, _ = layout.unpack(rnd.unmask(masked, [update.head for update in updates]))
    assert values.tolist() == np.sum(rows, axis=0).tolist()
