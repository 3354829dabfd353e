"""How far a version may be from the one before: what is measured, what is refused, and what counts as a way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fleetfed_testing.cloud import small_model
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.model.step import MOST_STEPS, StepBound, Walk, bound_of, step_rms
from fleetfed.shared.model.table import read_weights, write_weights
from fleetfed.shared.trust.policy import Policy

FILE, CARD = small_model()
TABLE = CARD.table
ONE, TWO, THREE, OWNED = b"1" * 32, b"2" * 32, b"3" * 32, b"o" * 32


def moved(by: float, file: bytes = FILE) -> bytes:
    """The file with every weight moved by so much: a root mean square of just that."""
    data = bytearray(file)
    write_weights(data, TABLE, read_weights(file, TABLE) + np.float32(by))
    return bytes(data)


def with_value(value: float) -> bytes:
    data = bytearray(FILE)
    weights = read_weights(FILE, TABLE)
    weights[-1] = value
    write_weights(data, TABLE, weights)
    return bytes(data)


def large(bound: StepBound, far: float, versions: int = 1) -> bool:
    try:
        bound.check(far, versions=versions, what="version 2")
    except RemoteProtocolError as error:
        return error.reason is RejectReason.LARGE_STEP
    return False


# --- What is measured -------------------------------------------------------------------------------------------------


def test_it_is_the_root_mean_square_over_all_values() -> None:
    data = bytearray(FILE)
    rng = np.random.default_rng(1)
    change = rng.normal(size=TABLE.parameters).astype(np.float32)
    write_weights(data, TABLE, read_weights(FILE, TABLE) + change)
    real = read_weights(data, TABLE).astype(np.float64) - read_weights(FILE, TABLE)
    assert step_rms(FILE, data, TABLE) == pytest.approx(float(np.sqrt(np.mean(real**2))), rel=1e-12)
    assert step_rms(FILE, FILE, TABLE) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_within_a_bound(value: float) -> None:
    far = step_rms(FILE, with_value(value), TABLE)
    assert math.isnan(far)
    assert large(StepBound(1e6), far)
    assert not large(StepBound(0.0), far)


def test_the_largest_numbers_do_not_wrap_around_into_a_small_step() -> None:
    top = float(np.finfo(np.float32).max)
    assert large(StepBound(1e6), step_rms(with_value(-top), with_value(top), TABLE))


def test_what_lies_around_the_weights_may_not_change() -> None:
    for at in (0, 9, len(FILE) - 1):
        data = bytearray(FILE)
        data[at] ^= 1
        with pytest.raises(RemoteProtocolError, match="more than its weights"):
            step_rms(FILE, data, TABLE)
    with pytest.raises(RemoteProtocolError, match="more than its weights"):
        step_rms(FILE, FILE + bytes(4), TABLE)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_step_of_just_the_bound_is_taken_and_a_hair_more_is_not() -> None:
    bound = StepBound(0.25)
    assert not large(bound, 0.25)
    assert not large(bound, 0.25 * (1 + 1e-12)), "the last digits are the machine's"
    assert large(bound, 0.25 * (1 + 1e-6))
    assert not large(bound, 0.75, versions=3)
    assert large(bound, 0.76, versions=3)


def test_a_number_far_ahead_buys_no_more_than_so_many_steps() -> None:
    bound = StepBound(1.0)
    assert not large(bound, float(MOST_STEPS), versions=2**60)
    assert large(bound, MOST_STEPS + 1.0, versions=2**60)
    assert large(bound, 1.5, versions=-4), "nor does one that goes back"


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_whoever_keeps_every_step_keeps_the_whole_way(steps: list[float]) -> None:
    bound, file = StepBound(1.0 + 1e-6), FILE
    for each in steps:
        after = moved(each, file)
        assert not large(bound, step_rms(file, after, TABLE))
        file = after
    assert not large(bound, step_rms(FILE, file, TABLE), len(steps))


def test_the_policy_says_what_is_bound() -> None:
    assert bound_of(Policy(largest_step=0.5, models=(OWNED,))) == StepBound(0.5, frozenset({OWNED}))
    assert bound_of(Policy()) == StepBound()


# --- The way ----------------------------------------------------------------------------------------------------------


def walk(start: bytes, *, held: int | None = 5, largest: float = 1.0) -> Walk:
    return Walk(StepBound(largest, frozenset({OWNED})), held=held, files=frozenset({ONE}), start=start)


def test_patches_from_the_file_held_are_bound_one_by_one_and_need_no_more() -> None:
    way = walk(ONE)
    way.step(FILE, moved(0.9), TABLE, base=5, target=6, sha256=TWO)
    assert not way.needs_whole(6, TWO)
    with pytest.raises(RemoteProtocolError, match="version 7"):
        way.step(FILE, moved(1.1), TABLE, base=6, target=7, sha256=THREE)


def test_patches_up_to_the_version_held_are_not_this_members_steps() -> None:
    way = walk(TWO)
    way.step(FILE, moved(9.0), TABLE, base=3, target=4, sha256=THREE)
    with pytest.raises(RemoteProtocolError, match="version 6"):
        way.step(FILE, moved(9.0), TABLE, base=5, target=6, sha256=THREE)


def test_a_whole_file_is_compared_with_the_one_held() -> None:
    way = walk(TWO)
    assert way.needs_whole(7, TWO)
    way.whole(FILE, TABLE.layout_hash(), moved(1.9), TABLE, version=7)
    with pytest.raises(RemoteProtocolError, match="for each of 2 versions"):
        way.whole(FILE, TABLE.layout_hash(), moved(2.1), TABLE, version=7)
    with pytest.raises(RemoteProtocolError, match="its tensors are not"):
        way.whole(FILE, bytes(32), moved(0.1), TABLE, version=7)


def test_what_the_owners_vouch_for_is_a_start_of_its_own() -> None:
    assert not walk(TWO).needs_whole(6, OWNED)
    way = walk(TWO)
    way.step(FILE, moved(50.0), TABLE, base=5, target=6, sha256=OWNED)
    assert not way.needs_whole(7, THREE)
    with pytest.raises(RemoteProtocolError, match="version 7"):
        way.step(FILE, moved(1.1), TABLE, base=6, target=7, sha256=THREE)
    # From a whole file that they named, too.
    way = walk(OWNED)
    with pytest.raises(RemoteProtocolError, match="version 3"):
        way.step(FILE, moved(1.1), TABLE, base=2, target=3, sha256=THREE)


def test_what_it_had_before_it_may_have_again() -> None:
    assert not walk(TWO).needs_whole(9, ONE)


@pytest.mark.parametrize("way", [walk(TWO, held=None), walk(TWO, largest=0.0)])
def test_the_first_version_and_a_fleet_without_a_bound(way: Walk) -> None:
    way.step(FILE, with_value(math.nan), TABLE, base=5, target=6, sha256=THREE)
    assert not way.needs_whole(6, THREE)


def test_a_version_above_what_is_offered_was_a_void_coordinators() -> None:
    assert not walk(TWO, held=2**50).needs_whole(6, THREE)
