"""Scores and rules against a few hostile updates among honest ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.gateway import robust
from fleetfed.shared.wire.defence import Defence, Rule

D = 400


def honest(count: int, seed: int = 1) -> np.ndarray:
    """Updates that share a direction, as devices with different data have."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 3, D)
    return np.clip(np.rint(common + rng.normal(0, 3, (count, D))), -7, 7).astype(np.int8)


def test_honest_updates_are_left_alone() -> None:
    for seed in range(20):
        assert robust.outliers(honest(20, seed), Defence(outlier_score=6)) == ()


def test_a_long_update_is_an_outlier_by_its_norm() -> None:
    matrix = honest(12)
    matrix[4] = np.where(matrix[4] >= 0, 7, -7)
    found = robust.outliers(matrix, Defence(outlier_score=3.5))
    assert [(each.row, each.why) for each in found] == [(4, "norm")]


def test_a_flipped_update_is_an_outlier_by_its_direction() -> None:
    matrix = honest(12)
    matrix[7] = -matrix[7]
    found = robust.outliers(matrix, Defence(outlier_score=3.5))
    assert [(each.row, each.why) for each in found] == [(7, "direction")]
    assert found[0].score > 3.5


def test_updates_of_nothing_are_no_reason_to_divide_by_zero() -> None:
    assert robust.outliers(np.zeros((6, D), dtype=np.int8), Defence(outlier_score=3.5)) == ()


def test_krum_leaves_out_colluders_that_lie_close_together_but_far_from_the_rest() -> None:
    matrix = honest(15)
    matrix[:3] = -matrix[3]
    found = robust.outliers(matrix, Defence(rule=Rule.KRUM, hostile=0.2))
    assert {each.row for each in found} == {0, 1, 2}


def test_too_few_updates_are_all_added() -> None:
    matrix = honest(4)
    matrix[0] = 7
    assert robust.outliers(matrix, Defence(rule=Rule.KRUM, outlier_score=3.5)) == ()
    assert robust.combine(matrix, Defence(rule=Rule.MEDIAN)) is None


@pytest.mark.parametrize("rule", [Rule.TRIMMED_MEAN, Rule.MEDIAN])
def test_a_fifth_of_hostile_updates_hardly_moves_the_sum(rule: Rule) -> None:
    matrix = honest(20)
    clean = matrix[4:].astype(np.int64).sum(axis=0) * 20 / 16
    matrix[:4] = 127
    moved = robust.combine(matrix, Defence(rule=rule, hostile=0.2))
    assert moved is not None
    plain = matrix.astype(np.int64).sum(axis=0)
    assert np.linalg.norm(moved - clean) < 0.1 * np.linalg.norm(plain - clean)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(5, 12),
    rule=st.sampled_from([Rule.TRIMMED_MEAN, Rule.MEDIAN]),
    hostile=st.floats(0, 0.49),
    seed=st.integers(0, 2**32),
)
def test_a_rule_is_exact_bounded_and_blind_to_order(count: int, rule: Rule, hostile: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-7, 8, (count, 9)).astype(np.int8)
    defence = Defence(rule=rule, hostile=hostile)
    out = robust.combine(matrix, defence)
    assert out is not None
    assert np.array_equal(out, robust.combine(matrix[rng.permutation(count)], defence))
    assert np.abs(out).max() <= 7 * count
    cut = (count - 1) // 2 if rule is Rule.MEDIAN else int(hostile * count)
    exact = np.sort(matrix.astype(float), axis=0)[cut : count - cut].mean(axis=0) * count
    assert np.abs(out - exact).max() <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), bad=st.integers(0, 12))
def test_never_half_of_the_updates_are_left_out(seed: int, bad: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = honest(12, seed)
    matrix[:bad] = rng.integers(-7, 8, (bad, D))
    found = robust.outliers(matrix, Defence(rule=Rule.KRUM, outlier_score=3.0, hostile=0.4))
    assert len(found) < 6


def test_a_matrix_in_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, defence = honest(10), Defence(rule=Rule.MEDIAN, outlier_score=3.0)
    whole = robust.combine(matrix, defence), robust.outliers(matrix, defence)
    monkeypatch.setattr(robust, "_BLOCK", 70)
    assert np.array_equal(robust.combine(matrix, defence), whole[0])
    assert robust.outliers(matrix, defence) == whole[1]


def test_a_norm_is_in_levels() -> None:
    assert robust.norm(np.array([3, -4], dtype=np.int8)) == 5.0
