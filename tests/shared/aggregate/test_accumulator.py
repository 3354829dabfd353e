"""Flat equals tree, in any order, bit for bit; and nothing that a peer sends can bend a sum unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.accumulator import (
    Accumulator,
    Partial,
    Ring,
    check_partial,
    decode_masked,
    decode_words,
    encode_masked,
    encode_words,
    masked_size,
    max_words_body,
)
from fleetfed.shared.aggregate.lanes import choose_lane_bits, levels
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError, StorageError

Update = tuple[np.ndarray, np.ndarray]


def ring_for(sizes: tuple[int, ...] = (40, 3, 100), bits: int = 4, cap: int = 50, weight_cap: int = 8) -> Ring:
    return Ring.of(sizes, bits=bits, lane_bits=choose_lane_bits(bits, cap), weight_cap=weight_cap)


def update(ring: Ring, seed: int) -> Update:
    rng = np.random.default_rng(seed)
    limit = levels(ring.bits)
    values = rng.integers(-limit, limit + 1, ring.layout.dimension).astype(np.int8 if ring.bits <= 8 else np.int16)
    held = int(rng.integers(0, 30))
    meta = Contribution(
        weight=int(rng.integers(1, ring.meta.weight_cap + 1)),
        examples=int(rng.integers(0, 1000)),
        training_loss=float(rng.random()),
        holdout_examples=held,
        holdout_correct=int(rng.integers(0, held + 1)),
        holdout_loss=float(rng.random()),
        clipped=tuple(int(rng.integers(0, size + 1)) for size in ring.meta.sizes),
        log2_rms=tuple(float(rng.uniform(-20, 0)) for _ in ring.meta.sizes),
    )
    return values, ring.meta.encode(meta)


def flat(ring: Ring, updates: list[Update]) -> Partial:
    total = Accumulator(ring, capacity=ring.capacity)
    for values, meta in updates:
        total.accumulate(values, meta)
    return total.report()


def in_lanes(ring: Ring, updates: list[Update]) -> np.ndarray:
    """The words, by lanes alone."""
    words = ring.layout.zeros()
    for values, meta in updates:
        ring.layout.add(words, values, meta)
    return words


@pytest.mark.parametrize("bits", [2, 4, 7, 8, 9, 12])
def test_hundreds_of_contributions_are_what_their_lanes_add_up_to(bits: int) -> None:
    ring = ring_for((30, 7), bits, 700)
    rng = np.random.default_rng(bits)
    extreme = np.full(ring.layout.dimension, -levels(bits), dtype=np.int8 if bits <= 8 else np.int16)
    updates = [update(ring, int(seed)) for seed in rng.integers(0, 1 << 30, 20)]
    updates = [each for each in updates for _ in range(10)] + [(extreme, updates[0][1])] * 400
    total = Accumulator(ring, capacity=700)
    for number, (values, meta) in enumerate(updates):
        total.accumulate(values, meta)
        if number % 150 == 149:
            total = Accumulator.restore(total.snapshot(), ring)
    for values, meta in updates[:50]:
        total.subtract(values, meta)
    assert np.array_equal(total.report().words, in_lanes(ring, updates[50:]))


@given(st.data())
@settings(max_examples=60)
def test_what_is_taken_out_and_put_in_never_leaves_the_ring(data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, 8))
    # No lane wider than it must be: between two flushes the change may be larger than any sum.
    lane = data.draw(st.integers(max(4, bits), 16))
    ring = Ring.of((9,), bits=bits, lane_bits=lane, weight_cap=8)
    limit = levels(bits)
    edge = [np.full(9, sign * limit, dtype=np.int8) for sign in (-1, 1)]
    total, inside = Accumulator(ring, capacity=ring.capacity), list[Update]()
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["add", "add", "take", "flush"])):
            case "add" if len(inside) < ring.capacity:
                each = (data.draw(st.sampled_from(edge)), update(ring, 1)[1])
                total.accumulate(*each)
                inside.append(each)
            case "take" if inside:
                total.subtract(*inside.pop(data.draw(st.integers(0, len(inside) - 1))))
            case "flush":
                total.snapshot()
    assert np.array_equal(total.report().words, in_lanes(ring, inside))


def over_the_wire(partial: Partial) -> Partial:
    return decode_words(encode_words(partial), partial.ring, count=partial.count)


@st.composite
def trees(draw: st.DrawFn) -> tuple[Ring, list[Update], Callable[[list[Update]], Partial]]:
    """Any ring, any contributions, and any tree of tiers to add them in."""
    bits = draw(st.integers(2, 16))
    n = draw(st.integers(1, 10))
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    ring = ring_for(sizes, bits, n)
    updates = [update(ring, draw(st.integers(0, 2**32))) for _ in range(n)]
    rnd = draw(st.randoms(use_true_random=False))

    def tier(members: list[Update], depth: int) -> Partial:
        node = Accumulator(ring, capacity=ring.capacity)
        members = members[:]
        rnd.shuffle(members)
        while members:
            size = rnd.randint(1, len(members))
            group, members = members[:size], members[size:]
            if depth == 0 or rnd.random() < 0.4:
                for values, meta in group:
                    node.accumulate(values, meta)
            elif rnd.random() < 0.5:
                node.merge(over_the_wire(tier(group, depth - 1)))
            else:
                below = over_the_wire(tier(group, depth - 1))
                values, meta = ring.layout.unpack(below.words)
                node.accumulate(values, meta, count=below.count)
        return node.report()

    return ring, updates, lambda members: tier(members, draw(st.integers(0, 3)))


@given(trees())
@settings(max_examples=150)
def test_flat_equals_any_tree_in_any_order_bit_for_bit(
    case: tuple[Ring, list[Update], Callable[[list[Update]], Partial]],
) -> None:
    ring, updates, tree = case
    expected = flat(ring, updates)
    got = tree(updates)
    assert got.count == expected.count == len(updates)
    assert got.words.tobytes() == expected.words.tobytes()
    assert got.meta() == expected.meta()
    assert np.array_equal(expected.values(), np.sum([u[0].astype(np.int64) for u in updates], axis=0))


@given(trees(), st.data())
def test_subtracting_equals_never_having_added(
    case: tuple[Ring, list[Update], Callable[[list[Update]], Partial]], data: st.DataObject
) -> None:
    ring, updates, _ = case
    out = data.draw(st.sets(st.integers(0, len(updates) - 1)))
    total = Accumulator(ring, capacity=ring.capacity)
    for values, meta in updates:
        total.accumulate(values, meta)
    for i in out:
        total.subtract(*updates[i])
    kept = [u for i, u in enumerate(updates) if i not in out]
    assert total.count == len(kept)
    assert total.report().words.tobytes() == flat(ring, kept).words.tobytes()


@given(st.integers(0, 8), st.data())
def test_masked_words_add_merge_and_leave_like_plain_ones(members: int, data: st.DataObject) -> None:
    """Words that mean nothing: no order, no tier and no detour over the wire changes their sum; what leaves is gone."""
    ring = ring_for()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    words = [rng.integers(0, 2**64, ring.layout.n_words, dtype=np.uint64) for _ in range(members + 1)]
    out = data.draw(st.sets(st.integers(0, members - 1))) if members else set()
    total, below = Accumulator(ring, capacity=20), Accumulator(ring, capacity=20)
    for i, each in enumerate(words):
        (total if data.draw(st.booleans()) else below).merge(Partial(ring, each, 1))
        if i in out:
            total.merge(Partial(ring, each, 1))
            total.unmerge(Partial(ring, each, 1))
    if below.count:
        partial = below.report()
        total.merge(decode_masked(bytes(encode_masked(partial)), ring, count=partial.count))
    for i in out:
        total.unmerge(Partial(ring, words[i], 1))
    kept = [each for i, each in enumerate(words) if i not in out]
    assert total.count == len(kept)
    assert np.array_equal(total.report().words, np.sum(kept, axis=0, dtype=np.uint64))


def test_masked_words_are_not_copied_and_their_size_is_checked() -> None:
    ring = ring_for()
    partial = flat(ring, [update(ring, 1)])
    body = encode_masked(partial)
    assert len(body) == masked_size(ring) == 8 * ring.layout.n_words
    assert np.shares_memory(np.frombuffer(body, dtype=np.uint8), partial.words)
    raw = bytes(body)
    assert np.shares_memory(np.frombuffer(raw, dtype=np.uint8), decode_masked(raw, ring, count=1).words)
    for wrong in (raw[:-1], raw + b"\0", raw[:-8], b""):
        assert reason(lambda wrong=wrong: decode_masked(wrong, ring, count=1)) is RejectReason.WRONG_SHAPE
    assert reason(lambda: decode_masked(raw, ring, count=0)) is RejectReason.BELOW_MINIMUM
    assert reason(lambda: decode_masked(raw, ring, count=ring.capacity + 1)) is RejectReason.COHORT_FULL


def test_what_was_never_merged_cannot_be_taken_out() -> None:
    ring = ring_for()
    total = Accumulator(ring, capacity=5)
    partial = flat(ring, [update(ring, 1)])
    with pytest.raises(LocalProtocolError, match="cannot take 1"):
        total.unmerge(partial)
    other = ring_for(sizes=(40, 3))
    total.merge(partial)
    assert reason(lambda: total.unmerge(flat(other, [update(other, 1)]))) is RejectReason.WRONG_SHAPE
    assert total.count == 1


def test_extreme_values_of_a_full_cohort_do_not_overflow() -> None:
    ring = ring_for(bits=4, cap=50)
    values = np.full(ring.layout.dimension, -7, dtype=np.int8)
    values[::2] = 7
    _, meta = update(ring, 0)
    partial = flat(ring, [(values, meta)] * 50)
    assert partial.values()[:2].tolist() == [350, -350]
    check_partial(partial)


def test_a_report_consumes_the_sum() -> None:
    ring = ring_for()
    total = Accumulator(ring, capacity=5)
    one = update(ring, 1)
    assert not total.can_report(1)
    total.accumulate(*one)
    assert total.can_report(1)
    assert not total.can_report(2)
    partial = total.report()
    assert not total.can_report(0)
    for use in (
        total.report,
        total.snapshot,
        lambda: total.accumulate(*one),
        lambda: total.subtract(*one),
        lambda: total.merge(partial),
        lambda: total.unmerge(partial),
    ):
        with pytest.raises(LocalProtocolError, match="reported"):
            use()


def reason(call: Callable[[], object]) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as error:
        call()
    return error.value.reason


def test_a_refused_contribution_changes_nothing() -> None:
    ring = ring_for()
    total = Accumulator(ring, capacity=3)
    values, meta = update(ring, 1)
    total.accumulate(values, meta)
    before = total.snapshot()

    too_big = values.astype(np.int16)
    too_big[3] = 8
    doubled = meta.copy()
    doubled[0] = 2
    heavy = meta.copy()
    heavy[1] = 9
    assert reason(lambda: total.accumulate(too_big, meta)) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: total.accumulate(values, doubled)) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: total.accumulate(values, heavy)) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: total.accumulate(values[:-1], meta)) is RejectReason.WRONG_SHAPE
    assert reason(lambda: total.accumulate(values, meta[:-1])) is RejectReason.WRONG_SHAPE
    assert reason(lambda: total.accumulate(values, meta, count=0)) is RejectReason.BELOW_MINIMUM
    assert reason(lambda: total.accumulate(values, meta, count=3)) is RejectReason.COHORT_FULL
    assert reason(lambda: total.merge(Partial(ring, ring.layout.zeros(), 3))) is RejectReason.COHORT_FULL
    assert reason(lambda: total.merge(Partial(ring, ring.layout.zeros()[:-1], 1))) is RejectReason.WRONG_SHAPE
    other = ring_for(bits=5)
    assert reason(lambda: total.merge(flat(other, [update(other, 2)]))) is RejectReason.WRONG_SHAPE
    with pytest.raises(LocalProtocolError):
        total.subtract(values, meta, count=2)
    assert total.snapshot() == before


def test_capacity_is_what_the_lanes_can_hold() -> None:
    ring = ring_for(bits=4, cap=50)
    with pytest.raises(ValueError, match="capacity"):
        Accumulator(ring, capacity=ring.capacity + 1)
    with pytest.raises(ValueError, match="capacity"):
        Accumulator(ring, capacity=0)
    assert ring.capacity * 7 <= ring.layout.lane_max < (ring.capacity + 1) * 7


def test_a_snapshot_continues_where_it_was_taken() -> None:
    ring = ring_for()
    updates = [update(ring, i) for i in range(6)]
    total = Accumulator(ring, capacity=10)
    for u in updates[:3]:
        total.accumulate(*u)
    again = Accumulator.restore(total.snapshot(), ring)
    assert (again.count, again.capacity) == (3, 10)
    for u in updates[3:]:
        again.accumulate(*u)
    assert again.report().words.tobytes() == flat(ring, updates).words.tobytes()


def test_a_damaged_or_foreign_snapshot_is_refused() -> None:
    ring = ring_for()
    total = Accumulator(ring, capacity=10)
    total.accumulate(*update(ring, 0))
    snapshot = total.snapshot()
    for at in (0, 5, len(snapshot) // 2, len(snapshot) - 1):
        damaged = bytearray(snapshot)
        damaged[at] ^= 1
        with pytest.raises(StorageError, match="damaged"):
            Accumulator.restore(bytes(damaged), ring)
    for cut in (snapshot[:-1], snapshot[:10], b""):
        with pytest.raises(StorageError):
            Accumulator.restore(cut, ring)
    with pytest.raises(StorageError, match="another round"):
        Accumulator.restore(snapshot, ring_for(bits=5))


def test_the_callers_memory_is_used_in_place() -> None:
    ring = ring_for()
    words = ring.layout.zeros()
    total = Accumulator(ring, capacity=10, words=words)
    total.accumulate(*update(ring, 0))
    assert total.report().words is words
    assert words.any()


def test_a_wrong_sum_does_not_pass_for_a_partial() -> None:
    ring = ring_for()
    partial = flat(ring, [update(ring, i) for i in range(3)])
    wrong = partial.words.copy()
    wrong[0] += np.uint64(1 << 9)  # one lane beyond what three contributions can reach
    assert reason(lambda: check_partial(Partial(ring, wrong, 3))) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: check_partial(Partial(ring, partial.words, 4))) is RejectReason.OUT_OF_RANGE
    with pytest.raises(ValueError):
        encode_words(Partial(ring, wrong, 3))


def test_a_partial_body_is_bound_to_its_count() -> None:
    ring = ring_for()
    partial = flat(ring, [update(ring, i) for i in range(5)])
    body = encode_words(partial)
    assert len(body) <= max_words_body(ring, 5)
    assert decode_words(body, ring, count=5).words.tobytes() == partial.words.tobytes()
    assert reason(lambda: decode_words(body, ring, count=6)) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: decode_words(body, ring, count=1)) is RejectReason.OUT_OF_RANGE
    assert reason(lambda: decode_words(body, ring, count=0)) is RejectReason.BELOW_MINIMUM
    assert reason(lambda: decode_words(body, ring, count=10**6)) is RejectReason.COHORT_FULL
    assert reason(lambda: decode_words(body[:-1], ring, count=5)) is RejectReason.TRUNCATED
    assert reason(lambda: decode_words(body, ring_for((40, 3, 99)), count=5)) is RejectReason.DECOMPRESSION


def test_ring_parts_must_fit() -> None:
    ring = ring_for()
    with pytest.raises(ValueError, match="fit"):
        Ring(ring.layout, ring_for((40, 3)).meta, 4)
