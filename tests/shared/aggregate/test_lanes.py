from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.aggregate.lanes import LaneLayout, choose_lane_bits, levels
from fleetfed.shared.errors import RejectReason, RemoteProtocolError


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[LaneLayout, list[np.ndarray], list[np.ndarray]]:
    """Contributions of which no lane overflows, values up to the very limits."""
    bits = draw(st.integers(2, 16))
    n = draw(st.integers(1, 12))
    guard = draw(st.integers(0, 2))
    layout = LaneLayout(draw(st.integers(1, 70)), choose_lane_bits(bits, n, guard), draw(st.integers(0, 5)))
    limit = levels(bits)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = [rng.integers(-limit, limit + 1, layout.dimension, dtype=np.int16) for _ in range(n)]
    if draw(st.booleans()):
        values = [np.full(layout.dimension, limit if rng.random() < 0.5 else -limit, dtype=np.int16)] * n
    metas = [rng.integers(0, 2**60, layout.meta_words, dtype=np.uint64) for _ in range(n)]
    return layout, values, metas


@given(cohorts())
def test_unpacking_the_sum_of_packed_vectors_gives_the_sum(
    cohort: tuple[LaneLayout, list[np.ndarray], list[np.ndarray]],
) -> None:
    layout, values, metas = cohort
    total = layout.zeros()
    for value, meta in zip(values, metas, strict=True):
        total = total + layout.pack(value, meta)
    sums, meta_sum = layout.unpack(total)
    assert np.array_equal(sums, np.sum([v.astype(np.int64) for v in values], axis=0))
    assert np.array_equal(meta_sum, np.sum(metas, axis=0, dtype=np.uint64))


@given(cohorts())
def test_streaming_adds_equal_packing_and_subtracting_undoes_them(
    cohort: tuple[LaneLayout, list[np.ndarray], list[np.ndarray]],
) -> None:
    layout, values, metas = cohort
    words = layout.zeros()
    for value, meta in zip(values, metas, strict=True):
        before = words.copy()
        layout.add(words, value, meta)
        assert np.array_equal(words, before + layout.pack(value, meta))
    layout.add(words, values[-1], metas[-1], negate=True)
    assert np.array_equal(words, before)


def test_the_layout_is_planar_with_meta_words_at_the_end() -> None:
    layout = LaneLayout(dimension=10, lane_bits=16, meta_words=4)
    words = layout.pack(np.arange(-100, 126, 25), np.array([1, 3, 0, 0], dtype=np.uint64))
    # The specification's known answer: three value words of four lanes, then the meta words.
    assert [f"{int(word):016x}" for word in words[:3]] == ["007d0031ffe6ff9c", "0000004affffffb5", "000000640018ffce"]
    assert words[3:].tolist() == [1, 3, 0, 0]
    assert layout.lanes == 4
    assert layout.value_words == 3
    assert layout.n_words == 7


@pytest.mark.parametrize("lane_bits", [4, 7, 8, 9, 16, 21, 32, 33, 64])
def test_more_coordinates_than_one_step_and_every_boundary_value(lane_bits: int) -> None:
    layout = LaneLayout(dimension=50_001, lane_bits=lane_bits)
    edge = np.array([layout.lane_min, layout.lane_max, 0, -1, 1])
    values = np.resize(edge, layout.dimension)
    back, meta = layout.unpack(layout.pack(values, np.empty(0, dtype=np.uint64)))
    assert np.array_equal(back, values)
    assert meta.size == 0


def test_an_overflowing_lane_wraps_and_moves_only_its_neighbour_by_one() -> None:
    layout = LaneLayout(dimension=4, lane_bits=16)
    none = np.empty(0, dtype=np.uint64)
    first = np.array([5, 32767, 7, -8], dtype=np.int16)
    total = layout.pack(first, none) + layout.pack(np.array([0, 1, 0, 0], dtype=np.int16), none)
    assert layout.unpack(total)[0].tolist() == [5, -32768, 8, -8]


@pytest.mark.parametrize(
    ("bits", "cap", "guard", "expected"),
    [
        (4, 20, 1, 10),  # 140 needs 9 bits, 10 with the guard: six lanes of 10
        (4, 20, 0, 9),  # seven lanes of 9
        (8, 128, 1, 16),
        (16, 16, 1, 21),
        (16, 100_000, 1, 64),
        (2, 1, 0, 4),
    ],
)
def test_lane_bits_follow_the_overflow_rule(bits: int, cap: int, guard: int, expected: int) -> None:
    k = choose_lane_bits(bits, cap, guard)
    assert k == expected
    assert cap * levels(bits) <= 2 ** (k - 1 - guard) - 1


@given(st.integers(2, 16), st.integers(1, 100_000), st.integers(0, 4))
def test_no_wider_lane_is_free_and_none_overflows(bits: int, cap: int, guard: int) -> None:
    k = choose_lane_bits(bits, cap, guard)
    assert cap * levels(bits) <= 2 ** (k - 1 - guard) - 1
    assert 64 // (k + 1) < 64 // k
    more_lanes = 64 // (64 // k + 1)
    assert more_lanes < 4 or cap * levels(bits) > 2 ** (more_lanes - 1 - guard) - 1


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        choose_lane_bits(16, 2**60)
    with pytest.raises(ValueError, match="cohort_cap"):
        choose_lane_bits(4, 0)
    with pytest.raises(ValueError, match="bits"):
        levels(17)
    for bad in ((0, 16, 0), (5, 3, 0), (5, 65, 0), (5, 16, -1)):
        with pytest.raises(ValueError, match="layout"):
            LaneLayout(*bad)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    layout = LaneLayout(dimension=5, lane_bits=8, meta_words=1)
    words, meta = layout.zeros(), np.array([1], dtype=np.uint64)
    for values, given_meta, reason in (
        (np.array([0, 0, 0, 0, 128], dtype=np.int16), meta, RejectReason.OUT_OF_RANGE),
        (np.array([0, 0, 0, 0, -129], dtype=np.int16), meta, RejectReason.OUT_OF_RANGE),
        (np.zeros(4, dtype=np.int8), meta, RejectReason.WRONG_SHAPE),
        (np.zeros(5, dtype=np.uint8), meta, RejectReason.WRONG_SHAPE),
        (np.zeros(5), meta, RejectReason.WRONG_SHAPE),
        (np.zeros(5, dtype=np.int8), np.zeros(2, dtype=np.uint64), RejectReason.WRONG_SHAPE),
        (np.zeros(5, dtype=np.int8), np.zeros(1, dtype=np.int64), RejectReason.WRONG_SHAPE),
    ):
        with pytest.raises(RemoteProtocolError) as error:
            layout.add(words, values, given_meta)
        assert error.value.reason is reason
        assert not words.any()
    for wrong in (np.zeros(3, dtype=np.uint64), np.zeros(layout.n_words, dtype=np.int64)):
        with pytest.raises(RemoteProtocolError) as error:
            layout.unpack(wrong)
        assert error.value.reason is RejectReason.WRONG_SHAPE
