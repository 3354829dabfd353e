"""Verifies the heads that a gateway proposes: the coordinator believes devices, not the gateway that passes them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fleetfed.cloud_coordinator.events import Member
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import Digest, MessageKind, digest, parse_head
from fleetfed.shared.wire.messages import Plan
from fleetfed.shared.wire.selection import takes
from fleetfed.shared.wire.update import PLAIN, UpdateExtension

THREAD_FROM: Final = 64
"""Heads from which verifying is worth a thread: each costs about 0.1 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInForce:
    """A signed plan with what heads are compared to.

    Attributes:
        plan: the plan.
        hash: its head hash.
        ring: its arithmetic, which gives the number of meta words.
    """

    plan: Plan
    hash: Digest
    ring: Ring


def verify_heads(
    heads: Sequence[bytes], *, current: PlanInForce, verifier: Verifier, now: int
) -> tuple[tuple[Member, ...], dict[str, RejectReason]]:
    """Verify every head for itself.

    Args:
        heads: as the proposal lists them.
        current: the plan that they must answer.
        verifier: of the fleet; its certificate cache is changed, nothing else.
        now: unix milliseconds.

    Returns:
        The good ones in the given order, and for each bad one its hash in hex and why.
    """
    members = []
    excluded = {}
    for raw in heads:
        try:
            members.append(verify_head(raw, current=current, verifier=verifier, now=now))
        except RemoteProtocolError as error:
            excluded[_name(raw)] = error.reason
    return tuple(members), excluded


def verify_head(raw: bytes, *, current: PlanInForce, verifier: Verifier, now: int) -> Member:
    """Verify one update's head against the plan.

    Raises:
        RemoteProtocolError: the first check that fails.
    """
    head = parse_head(raw)
    if head.size != len(raw):
        raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(raw) - head.size} bytes after the head")
    certificate = verifier.head(head, kind=MessageKind.UPDATE, now=now)
    plan = current.plan
    if head.header.round != plan.round:
        raise RemoteProtocolError(RejectReason.WRONG_ROUND, f"round {head.header.round}")
    extension = UpdateExtension.decode(head)
    if extension.plan != current.hash:
        raise RemoteProtocolError(RejectReason.WRONG_PLAN)
    if extension.model_sha256 != plan.model_sha256:
        raise RemoteProtocolError(RejectReason.WRONG_MODEL)
    shape = (extension.mode, extension.suite, extension.bits, extension.lane_bits, extension.dimension)
    wanted = (PLAIN, 0, plan.quantization.bits, plan.quantization.lane_bits, current.ring.layout.dimension)
    if shape != wanted or extension.meta_words != current.ring.layout.meta_words:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{shape}, the plan says {wanted}")
    if not takes(current.hash, certificate.id, plan.eligibility):
        raise RemoteProtocolError(RejectReason.NOT_SELECTED, certificate.id)
    return Member(
        device=certificate.id,
        site=certificate.site,
        message_id=head.header.message_id,
        head=head.hash,
        size=head.message_size,
    )


def _name(raw: bytes) -> str:
    """The hash that a receipt would name the message by; of all the bytes where they are no head."""
    try:
        return parse_head(raw).hash.hex()
    except RemoteProtocolError:
        return digest(raw).hex()
