"""Settings become a plan's grid and noise; a clip follows the noised count of those beyond it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fleetfed.cloud_coordinator.privacy.settings import (
    PrivacySettings,
    next_norm,
    norm_of,
    privacy_of,
    quantization_of,
)
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.privacy.clipping import clip_and_round, squared_norm
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Mode, Plan, Quorum, Weighting
from fleetfed.shared.wire.privacy import Mechanism

pytest.importorskip("dp_accounting")

EXTRA: dict[Mechanism, dict[str, Any]] = {
    Mechanism.CENTRAL: {},
    Mechanism.SPLIT_CENTRAL: {},
    Mechanism.MATRIX: {"band": 4, "separation": 4},
    Mechanism.SKELLAM: {"honest": 20},
}


SPLIT = (Mechanism.SKELLAM, Mechanism.SPLIT_CENTRAL)


def plan_of(settings: PrivacySettings, *, sizes: tuple[int, ...] = (3000, 62), cohort: int = 100) -> Plan:
    privacy = privacy_of(settings, sum(sizes))
    quantization = quantization_of(
        settings, privacy, dimension=sum(sizes), tensors=len(sizes), cohort_cap=cohort, norm=settings.clip
    )
    split = Split(seal_key=bytes(32), minimum_cohort=25) if settings.mechanism in SPLIT else None
    return Plan(
        round=1,
        model_version=1,
        model_sha256=bytes(32),
        dimension=sum(sizes),
        quantization=quantization,
        quorum=Quorum(cohort_cap=cohort),
        mode=Mode.PLAIN if split is None else Mode.SPLIT,
        split=split,
        weighting=Weighting.UNIFORM,
        opened=1,
        deadline=2,
        expires=3,
        nonce=bytes(16),
        privacy=privacy,
    )


@pytest.mark.parametrize("mechanism", list(Mechanism))
@pytest.mark.parametrize("dimension", [70, 3062, 582_026])
def test_settings_make_a_plan_that_devices_accept(mechanism: Mechanism, dimension: int) -> None:
    settings = PrivacySettings(mechanism=mechanism, clip=0.7, **EXTRA[mechanism])
    plan = plan_of(settings, sizes=(dimension - 7, 7))
    scheme = scheme_of(plan, (dimension - 7, 7))
    assert scheme.ring.capacity >= 100
    assert norm_of(plan) == pytest.approx(0.7, rel=1e-6)
    assert plan.privacy is not None
    assert plan.privacy.epsilon <= settings.epsilon
    # A delta as long as the clip passes whole, and one of ten times its length as long as the clip.
    rng = np.random.default_rng(1)
    delta = rng.normal(size=dimension)
    delta *= 0.699 / np.linalg.norm(delta)
    for factor, beyond in ((1.0, False), (10.0, True)):
        made = clip_and_round(delta * factor, scheme.grid, clip=plan.privacy.clip, rng=rng)
        assert made.beyond is beyond
        real = made.values * np.repeat([clip / scheme.grid.limit for clip in scheme.grid.clips], scheme.grid.sizes)
        assert np.linalg.norm(real) == pytest.approx(0.7, rel=0.02)
        assert squared_norm(made.values) <= plan.privacy.clip**2


def test_a_given_multiplier_is_kept_and_its_cost_is_stated() -> None:
    privacy = privacy_of(PrivacySettings(noise_multiplier=5.0, participations=50), 582_026)
    assert privacy.noise_multiplier == 5.0
    assert privacy.epsilon == pytest.approx(7.286, abs=2e-3)


def test_the_noise_covers_the_clip_after_rounding() -> None:
    privacy = privacy_of(PrivacySettings(resolution=0.75), 10_000)
    assert privacy.clip > 0.75 * 100 * 1.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantile": 0.5}, "flag_noise"),
        ({"flag_noise": 5.0}, "quantile"),
        ({"mechanism": Mechanism.MATRIX}, "band"),
        ({"mechanism": Mechanism.MATRIX, "band": 8, "separation": 4}, "band"),
        (
            {"mechanism": Mechanism.MATRIX, "band": 4, "separation": 4, "quantile": 0.5, "flag_noise": 5.0},
            "fixed clip",
        ),
        ({"band": 4, "separation": 4}, "band is for"),
        ({"mechanism": Mechanism.SKELLAM}, "honest"),
        ({"honest": 4}, "honest is for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PrivacySettings(**change)


def meta(beyond: float | None) -> MetaSum:
    return MetaSum(
        count=100,
        weight=100,
        examples=0,
        training_loss=None,
        holdout_examples=0,
        holdout_accuracy=None,
        holdout_loss=None,
        clipped=(),
        log2_rms=(),
        beyond=beyond,
    )


def test_the_clip_finds_the_quantile() -> None:
    settings = PrivacySettings(noise_multiplier=5.0, quantile=0.5, flag_noise=5.0, clip=10.0)
    lengths = np.random.default_rng(2).lognormal(mean=-1.0, sigma=0.5, size=400)
    norm, rng = settings.clip, np.random.default_rng(3)
    for _ in range(80):
        plan = plan_of(replace(settings, clip=norm))
        beyond = float((lengths > norm).mean()) + rng.normal() * 5 / 400
        norm = next_norm(plan, meta(beyond), settings)
    assert norm == pytest.approx(math.exp(-1.0), rel=0.15)


def test_a_fixed_clip_stays_and_noise_cannot_throw_an_adapting_one_far() -> None:
    fixed = PrivacySettings(clip=0.3)
    assert next_norm(plan_of(fixed), meta(None), fixed) == pytest.approx(0.3, rel=1e-6)
    adapting = PrivacySettings(clip=0.3, quantile=0.5, flag_noise=5.0, clip_rate=0.2)
    for beyond in (-3.0, 7.0):
        assert 0.3 * math.exp(-0.11) < next_norm(plan_of(adapting), meta(beyond), adapting) < 0.3 * math.exp(0.11)
