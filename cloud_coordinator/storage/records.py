"""Rows of the coordinator's tables as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.training.clips import ClipState
from fleetfed.shared.wire.messages import BlobRef


class Origin(StrEnum):
    """What a version was made by."""

    PUBLISHED = "published"
    ROUND = "round"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """One version of the model.

    Attributes:
        version: its number.
        parent: the version before it; 0 for none.
        origin: what made it.
        source: for a rollback, the version whose file it has again; else 0.
        name, size: of the model and its file.
        sha256: SHA-256 of the file.
        file: the file in the blob store; None once it is no longer kept.
        card: the model card in the blob store; ``card_ref`` is its compressed form as published.
        full_ref: the compressed file as published; None where this version was not published whole.
        patch_ref: the patch from ``parent`` as published; None where there is none.
        round, plan_hash, contributors, weight: of the round that made it; zeros and None otherwise.
        metrics: what evaluations said.
        created: unix milliseconds.
        state: the server's state after it (`step.ServerState`), in the blob store; None for the initial one.
        clips: of the plan after it.
    """

    version: int
    parent: int
    origin: Origin
    source: int = 0
    name: str
    sha256: bytes
    size: int
    file: bytes | None
    card: bytes
    card_ref: BlobRef
    full_ref: BlobRef | None = None
    patch_ref: BlobRef | None = None
    round: int = 0
    plan_hash: bytes | None = None
    contributors: int = 0
    weight: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    created: int
    state: bytes | None = None
    clips: ClipState


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One round.

    Attributes:
        number: grows by one.
        plan_hash, plan: the signed plan.
        base: the version that devices start from.
        awaited: gateways that it waits for.
        opened, expires: unix milliseconds.
        outcome: empty while open, else of `messages.Outcome`.
        reason: why it was aborted.
        closed: unix milliseconds, 0 while open.
        version: that it made; 0 for none.
        participants, weight: that are in the version.
        update_bytes: of all participants' updates as sent.
        patch_bytes: of the patch as published.
        accuracy: what a target is compared with.
        report: more numbers, as operators see them.
    """

    number: int
    plan_hash: bytes
    plan: bytes
    base: int
    awaited: frozenset[str]
    opened: int
    expires: int
    outcome: str = ""
    reason: str = ""
    closed: int = 0
    version: int = 0
    participants: int = 0
    weight: int = 0
    update_bytes: int = 0
    patch_bytes: int = 0
    accuracy: float | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealResult:
    """What a gateway's reveal came to.

    Attributes:
        failed: why none of it counts, of `RejectReason`; empty for a good one.
        buckets: sums that were revealed apart; 0 for one sum.
        buckets_lost: of these, sums that were dropped.
        lost: message ids of those who were in them.
    """

    failed: str = ""
    buckets: int = 0
    buckets_lost: int = 0
    lost: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRecord:
    """What passed between the coordinator and one gateway in a round; messages are their exact bytes.

    Attributes:
        round, gateway: which.
        proposal_head, commit_head: hashes of the two heads.
        proposal, commit: the messages.
        members: whom the commit has.
        declined, rejected: what the subtree counted, by reason.
        excluded: reason to number of heads that were left out.
        reveal_head: hash of the partial's head; None until it is here.
        receipt: the signed receipt of the partial.
        result: what the partial came to.
    """

    round: int
    gateway: str
    proposal_head: bytes
    proposal: bytes
    commit_head: bytes
    commit: bytes
    members: tuple[Member, ...]
    declined: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    reveal_head: bytes | None = None
    receipt: bytes | None = None
    result: RevealResult = RevealResult()

    @property
    def contributors(self) -> tuple[Member, ...]:
        """Whom the stored partial holds."""
        if self.reveal_head is None or self.result.failed:
            return ()
        lost = frozenset(self.result.lost)
        return tuple(member for member in self.members if member.message_id not in lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """A device that contributed."""

    id: str
    site: str
    first_round: int
    last_round: int
    contributions: int
