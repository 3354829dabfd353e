"""From a trained delta to the bytes of an update: quantized on the plan's grid, packed, signed.

Works in place and tensor by tensor where it can: beside the delta there is one more float vector (the error that is
carried to the next round) and one of small integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetfed.device.trainer import Trained
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.quantize import NonFiniteDeltaError, quantize
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire.envelope import Digest, MessageKind
from fleetfed.shared.wire.messages import Plan, Weighting
from fleetfed.shared.wire.update import UpdateExtension

Residual = NDArray[np.float32]

__all__ = ["NonFiniteDeltaError", "Prepared", "check_plan", "prepare", "sign"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """An update that needs only a signature.

    Attributes:
        body: what `aggregate.body` makes of values and meta words.
        dimension: values in it.
        meta_words: how many of them.
        residual: float32 of shape (parameters,) for the next round; None without error feedback.
        weight: what the update weighs.
        clipped: fraction of coordinates beyond their clip.
    """

    body: bytes
    dimension: int
    meta_words: int
    residual: Residual | None
    weight: int
    clipped: float


def check_plan(plan: Plan, card: ModelCard) -> None:
    """Refuse a plan that does not fit its model.

    Raises:
        LocalProtocolError: other tensors or parameters than the card's.
    """
    if plan.dimension != card.parameters or len(plan.quantization.clips) != len(card.tensors):
        raise LocalProtocolError(
            f"the plan is for {plan.dimension} values in {len(plan.quantization.clips)} tensors, "
            f"the model has {card.parameters} in {len(card.tensors)}"
        )


def prepare(
    trained: Trained, plan: Plan, card: ModelCard, *, rng: np.random.Generator, residual: Residual | None
) -> Prepared:
    """Quantize and pack.

    Args:
        trained: the result of training; its delta is not changed.
        plan: fits the card (`check_plan`).
        card: the model's.
        rng: source of the stochastic rounding.
        residual: error feedback in force; None starts it anew.

    Raises:
        NonFiniteDeltaError: NaN or infinity.
        RemoteProtocolError: a plan of which no scheme can be made.
    """
    settings = plan.quantization
    scheme = scheme_of(plan, tuple(slot.size for slot in card.tensors))
    grid, layout = scheme.grid, scheme.ring.meta
    uniform = plan.weighting is Weighting.UNIFORM
    weight = settings.weight_cap if uniform else min(max(trained.examples, 1), settings.weight_cap)
    if not settings.error_feedback:
        residual = None
    elif residual is None:
        residual = np.zeros(grid.dimension, dtype=np.float32)
    quantized = quantize(trained.delta, grid, weight=weight, rng=rng, residual=residual)
    contribution = Contribution(
        weight=weight,
        examples=trained.seen,
        training_loss=trained.training_loss,
        holdout_examples=trained.holdout_examples,
        holdout_correct=trained.holdout_correct,
        holdout_loss=trained.holdout_loss,
        clipped=quantized.clipped,
        log2_rms=quantized.log2_rms,
    )
    return Prepared(
        body=encode_body(quantized.values, layout.encode(contribution), limit=grid.limit),
        dimension=grid.dimension,
        meta_words=layout.words,
        residual=quantized.residual,
        weight=weight,
        clipped=sum(quantized.clipped) / grid.dimension,
    )


def sign(prepared: Prepared, plan: Plan, plan_hash: Digest, *, signer: Signer, now: int) -> Message:
    """The signed message. It expires with the round.

    Args:
        prepared: from `prepare`.
        plan: what it answers.
        plan_hash: head hash of the plan.
        signer: in the device's name.
        now: unix milliseconds.
    """
    extension = UpdateExtension(
        bits=plan.quantization.bits,
        lane_bits=plan.quantization.lane_bits,
        dimension=prepared.dimension,
        meta_words=prepared.meta_words,
        plan=plan_hash,
        model_sha256=plan.model_sha256,
    )
    return signer.sign_raw(
        MessageKind.UPDATE,
        prepared.body,
        raw_size=len(prepared.body),
        compressed=False,
        now=now,
        round=plan.round,
        lifetime=max(plan.expires - now, 1),
        extension=extension.encode(),
    )
