"""What a plan is answered with, as it is kept and as it is told. Pure."""

from __future__ import annotations

from typing import Final

from fleetfed.device.events import Answer, AnswerKind
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import DeclineReason, Plan

_OF_DATA: Final = (DeclineReason.TOO_FEW_EXAMPLES, DeclineReason.TRAINING_FAILED, DeclineReason.DIVERGED)
"""Reasons whose details may say how many examples there are, or how far a loss went."""


def told(plan: Plan, reason: DeclineReason, detail: str) -> str:
    """What a decline says beside its reason: in a private round nothing of what the device's data are like."""
    return "" if plan.privacy is not None and reason in _OF_DATA else detail[:2000]


def answer_of(
    message: Message, kind: AnswerKind, plan: Plan, plan_hash: Digest, *, signer: bytes, reason: str = ""
) -> Answer:
    """What is remembered of a signed message until its receipt."""
    head = message.head
    return Answer(
        round=plan.round,
        plan=plan_hash,
        kind=kind,
        message_id=message.id,
        head=head.hash,
        expires=plan.expires,
        size=head.message_size,
        reason=reason,
        signer=signer,
    )
