"""Projections: linear, the same for every tier, refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.projection import basis_of, check_projection, lift, project
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Plan, Quantization
from fleetfed.shared.wire.projection import Factor, Projection, Side

SIZES = (12, 5, 20)
"""A tensor of 3 x 4, one that travels whole, one of 5 x 4."""
GIVEN = Factor(tensor=0, side=Side.ROWS, rows=3, rank=2, basis=bytes([127, 0, 0, 0, 127, 64]))
DRAWN = Factor(tensor=2, side=Side.COLUMNS, rows=4, rank=1, seed=b"nonce")
PROJECTION = Projection(factors=(GIVEN, DRAWN), sizes=(8, 5, 5))


def test_what_lies_in_the_basis_comes_back_and_the_rest_is_the_nearest() -> None:
    rng = np.random.default_rng(1)
    delta = rng.normal(size=sum(SIZES))
    back = lift(project(delta, PROJECTION, SIZES), PROJECTION, SIZES)
    assert np.array_equal(back[12:17], delta[12:17])
    again = lift(project(back, PROJECTION, SIZES), PROJECTION, SIZES)
    np.testing.assert_allclose(again, back, atol=1e-12)
    # The error is orthogonal to the basis: nothing in it is nearer.
    error = (delta - back)[:12].reshape(3, 4)
    np.testing.assert_allclose(basis_of(GIVEN).T @ error, 0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8))
def test_a_sum_of_projections_is_the_projection_of_the_sum(seed: int, count: int) -> None:
    deltas = np.random.default_rng(seed).normal(size=(count, sum(SIZES)))
    parts = sum(project(delta, PROJECTION, SIZES) for delta in deltas)
    np.testing.assert_allclose(parts, project(deltas.sum(axis=0), PROJECTION, SIZES), atol=1e-9)


def test_a_basis_of_signs_is_drawn_alike_by_everybody() -> None:
    signs = basis_of(DRAWN)
    assert np.array_equal(np.abs(signs), np.full((4, 1), 0.5))
    assert np.array_equal(signs, basis_of(replace(DRAWN)))
    wide = replace(DRAWN, rows=256, rank=32)
    gram = basis_of(wide).T @ basis_of(wide)
    assert np.abs(gram - np.eye(32)).max() < 0.35
    assert not np.array_equal(basis_of(wide), basis_of(replace(wide, seed=b"other")))
    assert not np.array_equal(basis_of(wide), basis_of(replace(wide, tensor=1)))


def test_a_basis_with_a_column_twice_or_of_nothing_lifts_without_trouble() -> None:
    twice = Projection(factors=(replace(GIVEN, basis=bytes([1, 0, 0, 1, 0, 0])),), sizes=(8, 5, 20))
    delta = np.arange(37.0)
    back = lift(project(delta, twice, SIZES), twice, SIZES)
    np.testing.assert_allclose(back[:4], delta[:4])
    empty = replace(twice, factors=(replace(GIVEN, basis=bytes(6)),))
    assert np.array_equal(lift(project(delta, empty, SIZES), empty, SIZES)[:12], np.zeros(12))


@pytest.mark.parametrize(
    "wrong",
    [
        replace(PROJECTION, sizes=(8, 5, 6)),
        replace(PROJECTION, factors=(DRAWN, GIVEN)),
        replace(PROJECTION, factors=(GIVEN, GIVEN)),
        replace(PROJECTION, factors=(replace(GIVEN, basis=bytes(5)),), sizes=(8, 5, 20)),
        replace(PROJECTION, factors=(replace(GIVEN, rank=3, basis=bytes(9)),), sizes=(12, 5, 20)),
        replace(PROJECTION, factors=(replace(GIVEN, rows=5, basis=bytes(10)),), sizes=(4, 5, 20)),
        replace(PROJECTION, factors=(replace(DRAWN, basis=b"xxxx"),), sizes=(12, 5, 5)),
        replace(PROJECTION, factors=(replace(GIVEN, tensor=3),), sizes=(8, 5, 20)),
    ],
)
def test_what_does_not_fit_the_model_is_refused(wrong: Projection) -> None:
    with pytest.raises(ValueError):
        check_projection(wrong, SIZES)
    with pytest.raises(RemoteProtocolError) as caught:
        scheme_of(plan(projection=wrong), SIZES)
    assert caught.value.reason is RejectReason.WRONG_SHAPE


def plan(**changes: Any) -> Plan:
    quantization = Quantization(bits=4, lane_bits=16, clips=(1.0, 1.0, 1.0), weight_cap=1)
    fields: dict[str, Any] = {"round": 1, "model_version": 1, "model_sha256": bytes(32), "dimension": 37}
    fields |= {"quantization": quantization, "opened": 0, "deadline": 1, "expires": 2, "nonce": bytes(16)}
    return Plan(**fields | changes)


def test_the_scheme_is_over_what_travels() -> None:
    made = plan(projection=PROJECTION)
    raw = codec.encode(made)
    scheme = scheme_of(codec.decode(Plan, raw, limit=len(raw)), SIZES)
    assert scheme.ring.layout.dimension == scheme.grid.dimension == 18
    delta = np.arange(37.0)
    assert np.array_equal(scheme.travelling(delta), project(delta, PROJECTION, SIZES))
    assert scheme_of(plan(), SIZES).travelling(delta) is delta


def test_error_feedback_does_not_go_with_it() -> None:
    made = plan(projection=PROJECTION)
    feedback = replace(made, quantization=replace(made.quantization, error_feedback=True))
    with pytest.raises(RemoteProtocolError, match="error feedback"):
        scheme_of(feedback, SIZES)
