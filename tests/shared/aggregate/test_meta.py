from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.aggregate.meta import Contribution, MetaLayout, meta_words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError

LAYOUT = MetaLayout(sizes=(10, 4), weight_cap=8)
ONE = Contribution(
    weight=4,
    examples=600,
    training_loss=0.5,
    holdout_examples=20,
    holdout_correct=15,
    holdout_loss=0.25,
    clipped=(1, 0),
    log2_rms=(-7.5, -3.0),
)
#: Position of every word, as the module's table lists them.
COUNT, WEIGHT, EXAMPLES, TRAINING, HELD, CORRECT, LOSS, CLIPPED, RMS = 0, 1, 2, 3, 4, 5, 6, 7, 9


def test_words_are_as_the_table_says() -> None:
    assert LAYOUT.words == meta_words(2) == 11
    assert LAYOUT.encode(ONE).tolist() == [
        1,
        4,
        600,
        2 * 65536,
        20,
        15,
        5 * 65536,
        1,
        0,
        int(16.5 * 256),
        21 * 256,
    ]


def test_one_contribution_comes_back() -> None:
    meta = LAYOUT.decode(LAYOUT.encode(ONE), count=1)
    assert (meta.count, meta.weight, meta.examples) == (1, 4, 600)
    assert meta.training_loss == 0.5
    assert meta.holdout_examples == 20
    assert meta.holdout_accuracy == 0.75
    assert meta.holdout_loss == 0.25
    assert meta.clipped == (0.1, 0.0)
    assert meta.log2_rms == (-7.5, -3.0)


contributions = st.builds(
    lambda weight, examples, loss, held, share, held_loss, clipped, logs: Contribution(
        weight=weight,
        examples=examples,
        training_loss=loss,
        holdout_examples=held,
        holdout_correct=int(held * share),
        holdout_loss=held_loss,
        clipped=clipped,
        log2_rms=logs,
    ),
    st.integers(1, 8),
    st.integers(0, 10**6),
    st.floats(0, 100),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.floats(0, 100),
    st.tuples(st.integers(0, 10), st.integers(0, 4)),
    st.tuples(st.floats(-20, 5), st.floats(-20, 5)),
)


@given(st.lists(contributions, min_size=1, max_size=8))
def test_sums_decode_to_the_exact_totals_and_means(cohort: list[Contribution]) -> None:
    total = np.sum([LAYOUT.encode(c) for c in cohort], axis=0, dtype=np.uint64)
    meta = LAYOUT.decode(total, count=len(cohort))
    weight, held = sum(c.weight for c in cohort), sum(c.holdout_examples for c in cohort)
    assert meta.weight == weight
    assert meta.examples == sum(c.examples for c in cohort)
    unit = 2.0**-16
    wanted = sum(c.training_loss * c.weight for c in cohort) / weight
    assert meta.training_loss == pytest.approx(wanted, abs=len(cohort) * unit)
    assert meta.holdout_examples == held
    if held:
        assert meta.holdout_accuracy == sum(c.holdout_correct for c in cohort) / held
        wanted = sum(c.holdout_loss * c.holdout_examples for c in cohort) / held
        assert meta.holdout_loss == pytest.approx(wanted, abs=len(cohort) * unit)
    else:
        assert meta.holdout_accuracy is None
        assert meta.holdout_loss is None
    for i in range(2):
        assert meta.log2_rms[i] == pytest.approx(np.mean([c.log2_rms[i] for c in cohort]), abs=2.0**-8)


def test_tensors_that_did_not_move_and_absurd_ones_stay_within_a_word() -> None:
    words = LAYOUT.encode(replace(ONE, log2_rms=(-math.inf, math.inf), holdout_loss=1e300, training_loss=math.inf))
    meta = LAYOUT.decode(words, count=1)
    assert meta.log2_rms == (-24.0, 8.0)
    assert int(words.max()) < 2**46


def test_the_largest_cohort_cannot_overflow_a_word() -> None:
    words = [int(w) for w in LAYOUT.encode(replace(ONE, holdout_loss=1e300, examples=2**60))]
    assert max(words) * 100_000 < 2**63


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": 0},
        {"weight": 9},
        {"examples": -1},
        {"training_loss": math.nan},
        {"training_loss": -0.1},
        {"holdout_loss": math.nan},
        {"holdout_correct": 21},
        {"holdout_correct": -1},
        {"clipped": (11, 0)},
        {"clipped": (1,)},
        {"log2_rms": (0.0, math.nan)},
        {"log2_rms": (0.0,)},
    ],
)
def test_nonsense_is_not_encoded(bad: dict) -> None:
    with pytest.raises(ValueError):
        LAYOUT.encode(replace(ONE, **bad))


@pytest.mark.parametrize(
    ("word", "value", "name"),
    [
        (COUNT, 2, "count"),
        (WEIGHT, 0, "weight"),
        (WEIGHT, 9, "weight"),
        (EXAMPLES, 2**46, "examples"),
        (TRAINING, 2**63, "training_loss"),
        (HELD, 2**46, "holdout_examples"),
        (CORRECT, 21, "holdout_correct"),
        (LOSS, 2**64 - 1, "holdout_loss"),
        (CLIPPED, 11, r"clipped\[0\]"),
        (CLIPPED + 1, 5, r"clipped\[1\]"),
        (RMS + 1, 32 * 256 + 1, r"log2_rms\[1\]"),
    ],
)
def test_each_impossible_word_is_refused_by_name(word: int, value: int, name: str) -> None:
    words = LAYOUT.encode(ONE)
    words[word] = value
    with pytest.raises(RemoteProtocolError, match=name) as error:
        LAYOUT.decode(words, count=1)
    assert error.value.reason is RejectReason.OUT_OF_RANGE


def test_an_empty_sum_and_a_wrong_number_of_words_are_refused() -> None:
    with pytest.raises(RemoteProtocolError) as error:
        LAYOUT.decode(np.zeros(LAYOUT.words, dtype=np.uint64))
    assert error.value.reason is RejectReason.BELOW_MINIMUM
    with pytest.raises(RemoteProtocolError) as error:
        LAYOUT.decode(np.zeros(LAYOUT.words + 1, dtype=np.uint64))
    assert error.value.reason is RejectReason.WRONG_SHAPE
