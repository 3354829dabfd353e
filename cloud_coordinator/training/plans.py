"""A round's plan from the settings and the model that it starts from."""

from __future__ import annotations

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.privacy.settings import quantization_of
from fleetfed.cloud_coordinator.storage.records import VersionRecord
from fleetfed.cloud_coordinator.training.basis import choose
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Eligibility, Plan, Quantization, Quorum
from fleetfed.shared.wire.privacy import Privacy


def make_plan(
    settings: RoundSettings,
    *,
    number: int,
    base: VersionRecord,
    dimension: int,
    tiers: int,
    now: int,
    nonce: bytes,
    split: Split | None = None,
    policy: int = 0,
    privacy: Privacy | None = None,
    quarantined: tuple[str, ...] = (),
    card: ModelCard | None = None,
) -> Plan:
    """Return the plan of round ``number``.

    Args:
        settings: how rounds run.
        number: of the round.
        base: the version that devices start from; it carries the clips.
        dimension: trainable values in the model.
        tiers: gateways between a device and the coordinator, at most.
        now: unix milliseconds.
        nonce: 16 unpredictable bytes.
        split: how updates are masked, in split mode.
        policy: version of the pinned policy in force.
        privacy: what the settings' privacy comes to for this model; None without it.
        quarantined: devices that are set aside.
        card: of the model, where updates have a budget.

    Raises:
        ConfigError: an update cannot be made as small as the settings ask for.
        ValueError: no lane is wide enough for so many contributions of so many bits.
    """
    quantization = _quantization(settings, base, dimension=dimension, privacy=privacy)
    projection = None
    if settings.update_bytes and card is not None:
        projection = choose(card, budget=settings.update_bytes, lane_bits=quantization.lane_bits, seed=nonce)
    return Plan(
        round=number,
        model_version=base.version,
        model_sha256=base.sha256,
        dimension=dimension,
        quantization=quantization,
        training=settings.training,
        eligibility=Eligibility(
            fraction=settings.fraction,
            labels=settings.labels,
            minimum_examples=settings.minimum_examples,
            quarantined=quarantined,
        ),
        quorum=Quorum(
            fraction=settings.quorum_fraction, minimum=settings.quorum_minimum, cohort_cap=settings.cohort_cap
        ),
        weighting=settings.weighting,
        tiers=tiers,
        opened=now,
        deadline=now + round(settings.deadline * 1000),
        expires=now + round(settings.expires * 1000),
        nonce=nonce,
        mode=settings.mode,
        split=split,
        policy=policy,
        privacy=privacy,
        projection=projection,
        defence=settings.defence,
    )


def _quantization(
    settings: RoundSettings, base: VersionRecord, *, dimension: int, privacy: Privacy | None
) -> Quantization:
    if settings.privacy is not None and privacy is not None:
        # Not the clips, which follow what devices reported before there was privacy, or without being paid for.
        adapted = base.clips.norm if settings.privacy.quantile else 0.0
        return quantization_of(
            settings.privacy,
            privacy,
            dimension=dimension,
            tensors=len(base.clips.clips),
            cohort_cap=settings.cohort_cap,
            norm=adapted or settings.privacy.clip,
        )
    return Quantization(
        bits=base.clips.bits,
        lane_bits=choose_lane_bits(base.clips.bits, settings.cohort_cap),
        clips=base.clips.clips,
        weight_cap=settings.plan_weight_cap,
        error_feedback=settings.error_feedback,
    )
