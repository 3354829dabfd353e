"""The settings of differential privacy, and what they make of a plan: grid, lanes, noise.

The clip is an L2 norm in units of the weights; a grid is laid so that a delta as long as the clip has coordinates of
``resolution`` levels (root mean square). So the clip in *levels*, and with it the noise, depends on the number of
parameters alone and stays the same when the clip adapts: only the size of a level changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Final

from fleetfed.cloud_coordinator.privacy import accounting
from fleetfed.cloud_coordinator.privacy.accounting import Segment
from fleetfed.shared.aggregate.lanes import MAX_BITS, choose_lane_bits, levels
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.privacy.clipping import rounded_norm, unrounded_norm
from fleetfed.shared.privacy.mechanism import ring_noise
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Range
from fleetfed.shared.wire.fields import Count
from fleetfed.shared.wire.messages import Quantization
from fleetfed.shared.wire.privacy import Mechanism, Privacy

if TYPE_CHECKING:
    from fleetfed.shared.wire.messages import Plan

_PEAK: Final = 60.0
"""A coordinate may be so many times the rms of a delta as long as the clip, before it is clipped by itself."""
_LEAST_NORM: Final = 1e-6
_MOST_NORM: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySettings:
    """``[rounds.privacy]``: present, it makes every round of the run differentially private.

    Attributes:
        mechanism: who adds the noise (`wire.privacy.Mechanism`): central, split_central, matrix or skellam.
        epsilon: the budget: a round that would cost any device more in all is refused, and the rounds pause.
        delta: at most 1 over the number of enrolled devices to the power of 1.1.
        participations: rounds that one device may take part in, ever; its own ledger stops it.
        separation: fewest rounds from one of its rounds to the next.
        noise_multiplier: deviation of the noise over the clip; 0 for the least that keeps the budget when every
            device takes part as often as it may.
        clip: longest delta, as L2 norm in units of the weights; where it adapts, the first.
        quantile: part of the devices whose deltas should not be longer than the clip, which adapts to that; 0 keeps
            the clip. About 0.5 is usual (Andrew et al. 2021).
        flag_noise: with a quantile, deviation of the noise on how many devices were beyond the clip; a twentieth of
            the devices in a round is usual.
        clip_rate: with a quantile, how fast the clip moves: by a factor of at most ``exp(clip_rate)`` per round.
        resolution: levels of a typical coordinate: less makes lanes narrower and rounding louder.
        sums: with split_central, most sums that gateways reveal in one round.
        honest: with skellam, devices in every sum whose noise is certain; at most the plan's minimum cohort.
        band: with matrix, rounds over which noise is correlated; at most ``separation``.
    """

    mechanism: Mechanism = Mechanism.CENTRAL
    epsilon: Annotated[float, Range(1e-3, 1000.0)] = 8.0
    delta: Annotated[float, Range(1e-15, 0.01)] = 1e-6
    participations: Annotated[int, Range(1, 1_000_000)] = 100
    separation: Annotated[int, Range(1, 1_000_000)] = 1
    noise_multiplier: Annotated[float, Range(0.0, 1e6)] = 0.0
    clip: Annotated[float, Range(_LEAST_NORM, _MOST_NORM)] = 1.0
    quantile: Annotated[float, Range(0.0, 0.999)] = 0.0
    flag_noise: Annotated[float, Range(0.0, 1e6)] = 0.0
    clip_rate: Annotated[float, Range(0.0, 2.0)] = 0.2
    resolution: Annotated[float, Range(0.75, 1000.0)] = 8.0
    sums: Annotated[int, Range(1, limits.MAX_COHORT)] = 16
    honest: Count = 0
    band: Annotated[int, Range(1, 100_000)] = 1

    def __post_init__(self) -> None:
        if self.quantile and not self.flag_noise >= 2:
            raise ConfigError(
                "a clip that adapts (quantile) needs flag_noise of at least 2, about a twentieth of the devices in a "
                "round"
            )
        if self.flag_noise and not self.quantile:
            raise ConfigError("flag_noise has no use without quantile: set both, or neither for a fixed clip")
        if self.mechanism is Mechanism.MATRIX:
            if not 2 <= self.band <= self.separation:
                raise ConfigError(
                    f"the mechanism matrix needs a band of 2 up to the separation ({self.separation}), not {self.band}"
                )
            if self.quantile:
                raise ConfigError("the mechanism matrix needs a fixed clip: leave quantile out")
        elif self.band != 1:
            raise ConfigError("band is for the mechanism matrix")
        if self.mechanism is Mechanism.SKELLAM and self.honest < 2:
            raise ConfigError("the mechanism skellam needs honest, at least 2: devices in every sum whose noise counts")
        if self.honest and self.mechanism is not Mechanism.SKELLAM:
            raise ConfigError("honest is for the mechanism skellam")


def norm_levels(settings: PrivacySettings, dimension: int) -> float:
    """Length of a delta at the clip, in levels, before rounding."""
    return max(settings.resolution * math.sqrt(dimension), 1.0)


def privacy_of(settings: PrivacySettings, dimension: int) -> Privacy:
    """What plans say of privacy, for a model of so many parameters.

    Raises:
        ConfigError: no noise keeps the budget, or dp-accounting is not installed.
    """
    privacy = Privacy(
        mechanism=settings.mechanism,
        clip=rounded_norm(norm_levels(settings, dimension), dimension),
        noise_multiplier=settings.noise_multiplier or 1.0,
        max_participations=settings.participations,
        min_separation=settings.separation,
        sums=settings.sums if settings.mechanism is Mechanism.SPLIT_CENTRAL else 1,
        honest=settings.honest,
        band=settings.band,
        flag_noise=settings.flag_noise,
        epsilon=0.0,
        delta=settings.delta,
    )
    segment = Segment.of(privacy, dimension).full()
    if not settings.noise_multiplier:
        multiplier = accounting.calibrate(segment, settings.epsilon, settings.delta)
        privacy = replace(privacy, noise_multiplier=multiplier)
        segment = replace(segment, noise_multiplier=multiplier)
    return replace(privacy, epsilon=accounting.epsilon((segment,), settings.delta))


def quantization_of(
    settings: PrivacySettings, privacy: Privacy, *, dimension: int, tensors: int, cohort_cap: int, norm: float
) -> Quantization:
    """The grid of a round: one scale for all tensors, from public numbers only.

    Args:
        settings: resolution.
        privacy: from `privacy_of`.
        dimension, tensors: of the model.
        cohort_cap: most contributors.
        norm: the clip in units of the weights.
    """
    long = norm_levels(settings, dimension)
    needed = min(long, _PEAK * settings.resolution)
    bits = next((bits for bits in range(2, MAX_BITS) if levels(bits) >= needed), MAX_BITS)
    noise = ring_noise(privacy)
    assert noise is not None
    lane_bits = choose_lane_bits(bits, cohort_cap, noise=noise.slack(cohort_cap))
    v_max = min(max(levels(bits) * norm / long, 1e-30), 1e30)
    return Quantization(bits=bits, lane_bits=lane_bits, clips=(v_max,) * tensors, weight_cap=1)


def norm_of(plan: Plan) -> float:
    """The clip of a private plan in units of the weights."""
    assert plan.privacy is not None
    limit = levels(plan.quantization.bits)
    return plan.quantization.clips[0] / limit * unrounded_norm(plan.privacy.clip, plan.dimension)


def next_norm(plan: Plan, meta: MetaSum, settings: PrivacySettings) -> float:
    """The clip of the next round, from what the noised round said of this one (Andrew et al. 2021, algorithm 1)."""
    norm = norm_of(plan)
    if meta.beyond is None or not settings.quantile:
        return norm
    within = min(max(1.0 - meta.beyond, 0.0), 1.0)
    norm *= math.exp(-settings.clip_rate * (within - settings.quantile))
    return min(max(norm, _LEAST_NORM), _MOST_NORM)
