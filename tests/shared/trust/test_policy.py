"""Every rule of the pinned policy, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.policy import Policy, PrivacyFloor, check_plan
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Mode, Plan, Quantization
from fleetfed.shared.wire.privacy import Mechanism, Privacy

FLOOR = PrivacyFloor(
    mechanisms=(Mechanism.SPLIT_CENTRAL,),
    noise_multiplier=2.0,
    max_participations=50,
    min_separation=4,
    max_epsilon=8.0,
    max_delta=1e-6,
)
POLICY = Policy(
    version=3,
    modes=(Mode.SPLIT,),
    seed_holders=2,
    minimum_cohort=10,
    minimum_owners=3,
    minimum_lane_bits=10,
    maximum_bits=8,
    weight_cap=100,
    privacy=FLOOR,
)
SPLIT = Split(seal_key=bytes(32), helper=b"signed", minimum_cohort=10, minimum_owners=3, bucket=20)
PRIVACY = Privacy(
    mechanism=Mechanism.SPLIT_CENTRAL,
    clip=100.0,
    noise_multiplier=2.0,
    max_participations=50,
    min_separation=4,
    epsilon=8.0,
    delta=1e-6,
)
PLAN = Plan(
    round=1,
    model_version=1,
    model_sha256=bytes(32),
    dimension=4,
    quantization=Quantization(bits=8, lane_bits=10, clips=(1.0,), weight_cap=100),
    opened=0,
    deadline=1,
    expires=2,
    nonce=bytes(16),
    mode=Mode.SPLIT,
    split=SPLIT,
    privacy=PRIVACY,
    policy=3,
)


def with_(part: str, **changes: Any) -> Plan:
    return replace(PLAN, **{part: replace(getattr(PLAN, part), **changes)})


def test_a_plan_that_just_keeps_the_policy_is_good() -> None:
    check_plan(PLAN, POLICY)


def test_a_policy_by_default_forbids_nothing() -> None:
    check_plan(replace(PLAN, mode=Mode.PLAIN, split=None, privacy=None, policy=0), Policy())
    check_plan(PLAN, Policy())


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(PLAN, policy=2), "made under policy 2"),
        (replace(PLAN, mode=Mode.PLAIN, split=None), "mode plain"),
        (with_("quantization", lane_bits=9), "lanes of 9"),
        (with_("quantization", bits=9), "symbols of 9"),
        (with_("quantization", weight_cap=101), "weights up to 101"),
        (with_("split", suite=9), "suite 9"),
        (with_("split", helper=b""), "one seed holder"),
        (with_("split", minimum_cohort=9), "cohorts from 9"),
        (with_("split", minimum_owners=2), "owners from 2"),
        (with_("split", bucket=9), "buckets of 9"),
        (replace(PLAN, privacy=None), "no differential privacy"),
        (with_("privacy", mechanism=Mechanism.CENTRAL), "mechanism central"),
        (with_("privacy", noise_multiplier=1.9), "noise multiplier 1.9"),
        (with_("privacy", max_participations=51), "51 participations"),
        (with_("privacy", min_separation=3), "separation 3"),
        (with_("privacy", epsilon=8.1), "epsilon 8.1"),
        (with_("privacy", delta=1e-5), "delta 1e-05"),
    ],
)
def test_a_plan_below_any_rule_is_refused(plan: Plan, said: str) -> None:
    with pytest.raises(RemoteProtocolError, match=said) as caught:
        check_plan(plan, POLICY)
    assert caught.value.reason is RejectReason.BELOW_POLICY


def test_a_stronger_plan_is_good() -> None:
    check_plan(with_("privacy", noise_multiplier=9.0, min_separation=8, epsilon=1.0), POLICY)
    check_plan(with_("split", minimum_cohort=20, minimum_owners=9, bucket=0), POLICY)
    check_plan(replace(PLAN, policy=4), POLICY)
