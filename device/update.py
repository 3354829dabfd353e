"""From a trained delta to the bytes of an update: quantized on the plan's grid, packed, masked in split mode, signed.

Works in place and tensor by tensor where it can: beside the delta there is one more float vector (the error that is
carried to the next round) and one of small integers. In split mode the words are masked where they stand, so that the
unmasked ones are gone with that; beside them there is the encrypted body.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.device.trainer import Trained
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.projection import check_projection
from fleetfed.shared.aggregate.quantize import NonFiniteDeltaError, quantize
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire.envelope import Digest, Header, MessageKind
from fleetfed.shared.wire.messages import Mode, Plan, Weighting
from fleetfed.shared.wire.privacy import Privacy
from fleetfed.shared.wire.update import EXTENSION_SIZE, PLAIN, SPLIT, UpdateExtension, box_size

if TYPE_CHECKING:
    from fleetfed.shared.secure.box import Reader

Residual = NDArray[np.float32]

_NOISE_KEY: Final = 32

__all__ = ["NonFiniteDeltaError", "Prepared", "Seals", "check_plan", "prepare", "sign"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """An update that needs only a signature.

    Attributes:
        body: in plain mode, what `aggregate.body` makes of values and meta words; empty in split mode.
        words: in split mode, values and meta words as the ring packs them; None in plain mode. `sign` masks them in
            place.
        dimension: values in it.
        meta_words: how many of them.
        residual: float32 of shape (parameters,) for the next round; None without error feedback.
        weight: what the update weighs.
        clipped: fraction of coordinates beyond their clip; under differential privacy 1 or 0, whether the whole was.
    """

    body: bytes = b""
    words: Words | None = None
    dimension: int
    meta_words: int
    residual: Residual | None
    weight: int
    clipped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seals:
    """What an update of split mode is sealed with.

    Attributes:
        gateway, coordinator: keys of the round, of the plan's suite.
        helper: the helper's; empty where the coordinator alone holds seeds.
        hedge: the device's own secret, `Store.hedge`.
        randomness: returns so many unpredictable bytes.
    """

    gateway: bytes
    coordinator: bytes
    helper: bytes = b""
    hedge: bytes
    randomness: Callable[[int], bytes] = os.urandom

    @property
    def seed_keys(self) -> tuple[tuple[Reader, bytes], ...]:
        """Who holds a seed of the update's mask, and their keys, in the order of the extension."""
        # Imported late: a device in plain rounds carries nothing of this.
        from fleetfed.shared.secure.box import Reader

        helper = ((Reader.HELPER, self.helper),) if self.helper else ()
        return ((Reader.COORDINATOR, self.coordinator), *helper)


def check_plan(plan: Plan, card: ModelCard) -> None:
    """Refuse a plan that does not fit its model.

    Raises:
        LocalProtocolError: other tensors or parameters than the card's, or a projection that does not fit them.
    """
    if plan.dimension != card.parameters or len(plan.quantization.clips) != len(card.tensors):
        raise LocalProtocolError(
            f"the plan is for {plan.dimension} values in {len(plan.quantization.clips)} tensors, "
            f"the model has {card.parameters} in {len(card.tensors)}"
        )
    if plan.projection is not None:
        try:
            check_projection(plan.projection, tuple(slot.size for slot in card.tensors))
        except ValueError as error:
            raise LocalProtocolError(f"the plan's projection: {error}") from error


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

    Under differential privacy the residual is left alone, and the noise is the system's, not of ``rng``.

    Raises:
        NonFiniteDeltaError: NaN or infinity.
        RemoteProtocolError: a plan of which no scheme can be made.
    """
    if plan.privacy is not None:
        return _prepare_private(trained, plan, plan.privacy, card, rng=rng)
    settings = plan.quantization
    scheme = scheme_of(plan, tuple(slot.size for slot in card.tensors))
    grid, layout = scheme.grid, scheme.ring.meta
    uniform = plan.weighting is Weighting.UNIFORM
    weight = settings.weight_cap if uniform else min(max(trained.examples, 1), settings.weight_cap)
    if not settings.error_feedback:
        residual = None
    elif residual is None:
        residual = np.zeros(grid.dimension, dtype=np.float32)
    quantized = quantize(scheme.travelling(trained.delta), grid, weight=weight, rng=rng, residual=residual)
    # As large as the model, and what follows needs room.
    del residual
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
    body, words = _pack(plan, scheme.ring, quantized.values, layout.encode(contribution), limit=grid.limit)
    return Prepared(
        body=body,
        words=words,
        dimension=grid.dimension,
        meta_words=layout.words,
        residual=quantized.residual,
        weight=weight,
        clipped=sum(quantized.clipped) / grid.dimension,
    )


def _prepare_private(
    trained: Trained, plan: Plan, privacy: Privacy, card: ModelCard, *, rng: np.random.Generator
) -> Prepared:
    """As `prepare`, with a bounded norm, the device's share of the noise, and no number beside the values."""
    # Imported late: a device in other rounds carries nothing of this.
    from fleetfed.shared.privacy.clipping import clip_and_round
    from fleetfed.shared.privacy.mechanism import add_device_noise

    scheme = scheme_of(plan, tuple(slot.size for slot in card.tensors))
    ring = scheme.ring
    clipped = clip_and_round(trained.delta, scheme.grid, clip=privacy.clip, rng=rng)
    # A key of the system's own, not of ``rng``: whoever guesses it reads the update.
    values, meta = add_device_noise(
        clipped.values, ring.meta.encode_private(beyond=clipped.beyond), ring, privacy, os.urandom(_NOISE_KEY)
    )
    body, words = _pack(plan, ring, values, meta, limit=ring.own_limit)
    return Prepared(
        body=body,
        words=words,
        dimension=scheme.grid.dimension,
        meta_words=ring.meta.words,
        residual=None,
        weight=1,
        clipped=float(clipped.beyond),
    )


def _pack(plan: Plan, ring: Ring, values: Values, meta: Words, *, limit: int) -> tuple[bytes, Words | None]:
    """The body of plain mode, or the words of split mode, for which ``values`` are erased."""
    if plan.mode is not Mode.SPLIT:
        return encode_body(values, meta, limit=limit), None
    # Values are within their lanes, but for noise, which wraps as the sum would.
    words = ring.layout.pack(values, meta, wrap=plan.privacy is not None)
    # The words are masked before they leave; what they were made of is not to outlive them.
    values.fill(0)
    return b"", words


def sign(
    prepared: Prepared, plan: Plan, plan_hash: Digest, *, signer: Signer, now: int, seals: Seals | None = None
) -> Message:
    """The signed message. It expires with the round.

    Args:
        prepared: from `prepare`; in split mode its words are masked in place, so it is signed once.
        plan: what it answers.
        plan_hash: head hash of the plan.
        signer: in the device's name.
        now: unix milliseconds.
        seals: in split mode, and only there.

    Raises:
        RemoteProtocolError: `BAD_BOX`: a key of ``seals`` is none.
    """
    assert (plan.split is None) == (seals is None) == (prepared.words is None)
    extension = UpdateExtension(
        mode=PLAIN if plan.split is None else SPLIT,
        suite=0 if plan.split is None else plan.split.suite,
        bits=plan.quantization.bits,
        lane_bits=plan.quantization.lane_bits,
        dimension=prepared.dimension,
        meta_words=prepared.meta_words,
        plan=plan_hash,
        model_sha256=plan.model_sha256,
    )
    lifetime = max(plan.expires - now, 1)
    if seals is not None and prepared.words is not None:
        return _sign_masked(prepared.words, extension, seals, signer=signer, now=now, round=plan.round, life=lifetime)
    return signer.sign_raw(
        MessageKind.UPDATE,
        prepared.body,
        raw_size=len(prepared.body),
        compressed=False,
        now=now,
        round=plan.round,
        lifetime=lifetime,
        extension=extension.encode(),
    )


def _sign_masked(
    words: Words, extension: UpdateExtension, seals: Seals, *, signer: Signer, now: int, round: int, life: int
) -> Message:
    from fleetfed.shared.secure import split

    fixed, seed_keys = extension.fixed(), seals.seed_keys

    def fill(header: Header) -> tuple[bytes, bytes]:
        body, boxes = split.mask(
            words,
            split.binding(header, fixed),
            gateway_key=seals.gateway,
            seed_keys=seed_keys,
            randomness=seals.randomness,
            hedge=seals.hedge,
            suite=extension.suite,
        )
        return body, fixed + b"".join(boxes)

    return signer.sign_bound(
        MessageKind.UPDATE,
        fill,
        body_size=split.body_size(words.size),
        extension_size=EXTENSION_SIZE + box_size(extension.suite) * (1 + len(seed_keys)),
        now=now,
        round=round,
        lifetime=life,
    )
