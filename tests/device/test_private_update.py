"""A private update: bounded, noised by the system's own randomness, and silent about everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device.trainer import Trained
from fleetfed.device.update import NonFiniteDeltaError, prepare
from fleetfed.shared.aggregate.body import decode_body
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.privacy.clipping import squared_norm
from fleetfed.shared.privacy.mechanism import device_sigma, ring_noise
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Mode, Plan, Quantization, Quorum, Weighting
from fleetfed.shared.wire.privacy import Mechanism, Privacy

CARD = small_model()[1]
SIZES = tuple(slot.size for slot in CARD.tensors)


def plan_of(mechanism: Mechanism, **given: Any) -> Plan:
    privacy = Privacy(
        mechanism=mechanism,
        clip=65.0,
        noise_multiplier=2.0,
        max_participations=3,
        honest=4 if mechanism is Mechanism.SKELLAM else 0,
        epsilon=8.0,
        delta=1e-6,
        **given,
    )
    noise = ring_noise(privacy)
    assert noise is not None
    split = Split(seal_key=bytes(32), minimum_cohort=5) if mechanism is Mechanism.SKELLAM else None
    return Plan(
        round=1,
        model_version=1,
        model_sha256=bytes(32),
        dimension=sum(SIZES),
        quantization=Quantization(
            bits=8,
            lane_bits=choose_lane_bits(8, 10, noise=noise.slack(10)),
            clips=(1.0,) * len(SIZES),
            weight_cap=1,
        ),
        quorum=Quorum(cohort_cap=10),
        mode=Mode.PLAIN if split is None else Mode.SPLIT,
        split=split,
        weighting=Weighting.UNIFORM,
        opened=1,
        deadline=2,
        expires=3,
        nonce=bytes(16),
        privacy=privacy,
    )


def trained(delta: np.ndarray[Any, np.dtype[np.float32]]) -> Trained:
    return Trained(delta=delta, examples=77, seen=154, steps=9, training_loss=0.25, holdout_examples=5)


@given(seed=st.integers(0, 2**32), length=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_what_leaves_is_never_longer_than_the_clip(seed: int, length: float) -> None:
    plan = plan_of(Mechanism.CENTRAL, flag_noise=3.0)
    ring = scheme_of(plan, SIZES).ring
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=sum(SIZES))
    delta = (delta / np.linalg.norm(delta) * length).astype(np.float32)
    made = prepare(trained(delta), plan, CARD, rng=rng, residual=None)
    values, meta = decode_body(made.body, dimension=sum(SIZES), limit=ring.own_limit, meta_words=ring.meta.words)
    assert squared_norm(values) <= 65**2
    # Nothing but the count, and whether it was beyond the clip: no losses, no examples, no weight.
    assert meta.tolist() == [1, 1 if made.clipped else 2**64 - 1]
    assert (made.weight, made.residual) == (1, None)


def test_a_share_of_the_noise_is_in_it_and_is_not_drawn_from_the_rounding() -> None:
    plan = plan_of(Mechanism.SKELLAM)
    assert plan.privacy is not None
    layout = scheme_of(plan, SIZES).ring.layout
    sent = []
    for _ in range(60):
        zero = trained(np.zeros(sum(SIZES), dtype=np.float32))
        made = prepare(zero, plan, CARD, rng=np.random.default_rng(1), residual=None)
        assert made.words is not None
        assert made.body == b""
        sent.append(layout.unpack(made.words)[0])
    assert np.stack(sent).std() == pytest.approx(device_sigma(plan.privacy)[0], rel=0.1)
    assert len({values.tobytes() for values in sent}) == 60


def test_a_delta_that_is_not_finite_is_refused_as_ever() -> None:
    delta = np.full(sum(SIZES), np.nan, dtype=np.float32)
    with pytest.raises(NonFiniteDeltaError):
        prepare(trained(delta), plan_of(Mechanism.CENTRAL), CARD, rng=np.random.default_rng(1), residual=None)


def test_what_was_carried_over_is_not_added() -> None:
    plan = plan_of(Mechanism.CENTRAL)
    residual = np.full(sum(SIZES), 5.0, dtype=np.float32)
    zero = trained(np.zeros(sum(SIZES), dtype=np.float32))
    made = prepare(zero, plan, CARD, rng=np.random.default_rng(1), residual=residual)
    bare = prepare(zero, replace(plan), CARD, rng=np.random.default_rng(1), residual=None)
    assert made.body == bare.body
