"""Projections: linear, the same for every tier, refused where they do not fit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.projection import Subspace, check_projection
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Plan, Quantization
from fleetfed.shared.wire.projection import Factor, Projection

SIZES = (12, 5, 40)
"""A tensor that is taken as 4 x 3, one that travels whole, one as 8 x 5."""
SEED = bytes(range(16))
FIRST = Factor(tensor=0, rows=4, rank=2)
LAST = Factor(tensor=2, rows=8, rank=3)
PROJECTION = Projection(seed=SEED, factors=(FIRST, LAST), sizes=(6, 5, 15))
SUBSPACE = Subspace(PROJECTION, SIZES)


def dense(projection: Projection = PROJECTION) -> np.ndarray:
    """The whole projection as one matrix, drawn bit by bit."""
    rows, at = [], 0
    factors = {factor.tensor: factor for factor in projection.factors}
    for tensor, size in enumerate(SIZES):
        factor = factors.get(tensor)
        if factor is None:
            block = np.eye(size)
        else:
            stream = hashlib.shake_128(b"ff-signs" + projection.seed + tensor.to_bytes(4, "little")).digest(1000)
            bits = [stream[i // 8] >> i % 8 & 1 for i in range(factor.rows * factor.rank)]
            signs = (2 * np.array(bits) - 1).reshape(factor.rows, factor.rank) / np.sqrt(factor.rows)
            block = np.kron(signs.T, np.eye(size // factor.rows))
        full = np.zeros((len(block), sum(SIZES)))
        full[:, at : at + size] = block
        rows.append(full)
        at += size
    return np.concatenate(rows)


def test_it_is_the_matrix_that_the_document_defines() -> None:
    delta = np.random.default_rng(1).normal(size=sum(SIZES))
    np.testing.assert_allclose(SUBSPACE.project(delta), dense() @ delta, atol=1e-6)
    numbers = np.random.default_rng(2).normal(size=PROJECTION.dimension)
    np.testing.assert_allclose(SUBSPACE.expand(numbers), dense().T @ numbers, atol=1e-6)
    np.testing.assert_allclose(SUBSPACE.lift(numbers), np.linalg.pinv(dense(), rcond=1e-6) @ numbers, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_lies_in_the_subspace_comes_back_whole(seed: int) -> None:
    numbers = np.random.default_rng(seed).normal(size=PROJECTION.dimension)
    update = SUBSPACE.expand(numbers)
    np.testing.assert_allclose(SUBSPACE.lift(SUBSPACE.project(update)), update, atol=1e-9)
    longer = Subspace(PROJECTION, SIZES, by_rows=True).expand(numbers)
    np.testing.assert_allclose(SUBSPACE.lift(SUBSPACE.project(longer)), longer, atol=1e-9)


def test_the_rest_is_lost_and_nothing_in_the_subspace_is_nearer() -> None:
    delta = np.random.default_rng(1).normal(size=sum(SIZES))
    error = delta - SUBSPACE.lift(SUBSPACE.project(delta))
    assert np.abs(error).max() > 0.1
    np.testing.assert_allclose(SUBSPACE.project(error), 0, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8))
def test_a_sum_of_projections_is_the_projection_of_the_sum(seed: int, count: int) -> None:
    deltas = np.random.default_rng(seed).normal(size=(count, sum(SIZES)))
    parts = sum(SUBSPACE.project(delta) for delta in deltas)
    np.testing.assert_allclose(parts, SUBSPACE.project(deltas.sum(axis=0)), atol=1e-9)


def test_bases_are_drawn_alike_by_everybody_and_differ_by_round_and_tensor() -> None:
    wide = Projection(seed=SEED, factors=(Factor(tensor=0, rows=256, rank=32),), sizes=(32 * 32,))
    sizes = (256 * 32,)
    numbers = np.random.default_rng(1).normal(size=32 * 32)
    made = Subspace(wide, sizes).expand(numbers)
    assert np.array_equal(made, Subspace(replace(wide), sizes).expand(numbers))
    assert not np.array_equal(made, Subspace(replace(wide, seed=bytes(16)), sizes).expand(numbers))
    # Nearly orthogonal: about as long as what it is made of.
    assert 0.8 < np.linalg.norm(made) / np.linalg.norm(numbers) < 1.2


@pytest.mark.parametrize(
    "wrong",
    [
        replace(PROJECTION, sizes=(6, 5, 14)),
        replace(PROJECTION, factors=(LAST, FIRST)),
        replace(PROJECTION, factors=(FIRST, FIRST)),
        replace(PROJECTION, factors=(replace(FIRST, rank=4), LAST), sizes=(12, 5, 15)),
        replace(PROJECTION, factors=(replace(FIRST, rows=5), LAST), sizes=(4, 5, 15)),
        replace(PROJECTION, factors=(FIRST, replace(LAST, rows=20, rank=5)), sizes=(6, 5, 10)),
        replace(PROJECTION, factors=(FIRST, replace(LAST, tensor=3))),
        replace(PROJECTION, sizes=(6, 5)),
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
    fields: dict[str, Any] = {"round": 1, "model_version": 1, "model_sha256": bytes(32), "dimension": 57}
    fields |= {"quantization": quantization, "opened": 0, "deadline": 1, "expires": 2, "nonce": bytes(16)}
    return Plan(**fields | changes)


def test_the_scheme_is_over_what_travels() -> None:
    made = plan(projection=PROJECTION)
    raw = codec.encode(made)
    scheme = scheme_of(codec.decode(Plan, raw, limit=len(raw)), SIZES)
    assert scheme.ring.layout.dimension == scheme.grid.dimension == 26
    delta = np.arange(57.0)
    assert np.array_equal(scheme.travelling(delta), SUBSPACE.project(delta))
    assert np.array_equal(scheme.lifted(np.arange(26.0)), SUBSPACE.lift(np.arange(26.0)))
    assert scheme_of(plan(), SIZES).travelling(delta) is delta


def test_error_feedback_does_not_go_with_it() -> None:
    made = plan(projection=PROJECTION)
    feedback = replace(made, quantization=replace(made.quantization, error_feedback=True))
    with pytest.raises(RemoteProtocolError, match="error feedback"):
        scheme_of(feedback, SIZES)
