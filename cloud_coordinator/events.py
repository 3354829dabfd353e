"""What the coordinator's machine hears and what it asks for.

Events report what was verified (and, where they say so, stored) before; instructions are performed in their order, so
that whatever is sent is durable first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.envelope import Digest, MessageId

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.config import RoundSettings

# --- Parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One verified head of an update.

    Attributes:
        device, site, owner: from its certificate.
        message_id: names the update.
        head: hash of the head.
        size: bytes of the update as it was sent.
        seed: hash of its mask's seed, in split mode; never stored.
    """

    device: str
    site: str
    owner: str = ""
    message_id: MessageId
    head: Digest
    size: int
    seed: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A verified message of a gateway, as receipts name it."""

    gateway: str
    message_id: MessageId
    head: Digest


# --- Events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The machine was restored from the database; the first event of every run of the program."""


@dataclass(frozen=True, slots=True)
class ModelStored:
    """A version was stored outside a round: the first one, an operator's, or a rollback."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetChanged:
    """What presence and censuses say now.

    Attributes:
        gateways: direct gateways that are ready.
        stopped: direct gateways that stopped for good.
        devices: devices that are ready or asleep, in all their subtrees.
        known: devices that the gateways know, in whatever state; also behind gateways that are away.
        helper: whether a helper is there, with a key.
    """

    gateways: frozenset[str]
    stopped: frozenset[str] = frozenset()
    devices: int
    known: int = 0
    helper: bool = False


@dataclass(frozen=True, slots=True)
class CertificatesRevoked:
    """The revocation list in force names so many certificates that the one before did not."""

    count: int


@dataclass(frozen=True, slots=True)
class StartRequested:
    """An operator, or the configuration, wants rounds."""

    settings: RoundSettings


@dataclass(frozen=True, slots=True)
class PauseRequested:
    """No further rounds; an open one goes on to its end."""


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """Go on where `PauseRequested` or `AbortRequested` stopped."""


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """End the open round without a version, and pause."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOpened:
    """The plan that `OpenRound` asked for is signed and stored."""

    plan: Digest
    expires: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRefused:
    """The round that `OpenRound` asked for cannot be opened.

    Attributes:
        reason: what an operator should know and do.
        passing: whether it may be possible later without anybody's doing.
    """

    reason: str
    passing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalVerified:
    """A gateway's proposal, each of its heads verified.

    Attributes:
        message: the proposal.
        plan: the plan that it names.
        members: good heads, in the proposal's order.
        excluded: hash of each bad head (hex) to its reason.
        sites: hash of each bad head (hex) that its leaf gateway may have admitted in good faith, to its site.
        declined, rejected: what the subtree counted, by reason.
    """

    message: Named
    plan: Digest
    members: tuple[Member, ...]
    excluded: dict[str, RejectReason] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitStored:
    """The commit that `StoreCommit` asked for is signed and stored with its proposal."""

    gateway: str
    commit: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealVerified:
    """A gateway's partial, its sums checked against their own counts.

    Attributes:
        message: the reveal.
        plan, commit: that it names.
        count: contributors that it says.
        lost: of these, contributors whose bucket was dropped.
        failed: why none of it counts although it answers the commit; None for a good one.
    """

    message: Named
    plan: Digest
    commit: Digest
    count: int
    lost: int = 0
    failed: RejectReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStored:
    """The round's version is stored; ``accuracy`` is what the target is compared with, if anything measured it."""

    version: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """No version can be made of the round."""

    reason: str


# --- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRound:
    """Sign and store a plan; answer with `RoundOpened` or `OpenRefused`.

    Attributes:
        number: of the round.
        awaited: gateways that the round waits for.
    """

    number: int
    settings: RoundSettings
    awaited: frozenset[str]


@dataclass(frozen=True, slots=True)
class PublishPlan:
    """Publish the stored plan of this round, retained."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCommit:
    """Sign a commit and store it together with its proposal; answer with `CommitStored`."""

    message: Named
    members: tuple[Member, ...]
    excluded: dict[str, RejectReason]
    declined: dict[str, int]
    rejected: dict[str, int]


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Send the stored commit to this gateway."""

    gateway: str


@dataclass(frozen=True, slots=True)
class StoreReveal:
    """Store the partial and sign its receipt with it."""

    message: Named


@dataclass(frozen=True, slots=True)
class SendStoredReceipt:
    """Send the stored receipt of this gateway's reveal."""

    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Sign and send a receipt with this reason; nothing changed."""

    message: Named
    reason: RejectReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StartStep:
    """Compute the version of this round from its stored partials, store it, answer `StepStored` or `StepFailed`."""

    number: int


@dataclass(frozen=True, slots=True)
class StoreAbort:
    """Store that the round ended without a version."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class PublishEnd:
    """Publish the stored end of this round in its plan's place."""

    number: int


@dataclass(frozen=True, slots=True)
class PublishModel:
    """Publish the manifest of the newest version and the objects that it names."""


@dataclass(frozen=True, slots=True)
class StoreAwaited:
    """Store that the round waits for these gateways only, so that a restart closes it with the same members."""

    number: int
    awaited: frozenset[str]


@dataclass(frozen=True, slots=True)
class StoreRun:
    """Store what the operator wants (`state.Run`)."""


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """Publish the status, retained."""


Event = (
    Started
    | ModelStored
    | FleetChanged
    | CertificatesRevoked
    | StartRequested
    | PauseRequested
    | ResumeRequested
    | AbortRequested
    | RoundOpened
    | OpenRefused
    | ProposalVerified
    | CommitStored
    | RevealVerified
    | StepStored
    | StepFailed
)

Instruction = (
    OpenRound
    | PublishPlan
    | StoreCommit
    | SendCommit
    | StoreReveal
    | SendStoredReceipt
    | Refuse
    | StartStep
    | StoreAbort
    | PublishEnd
    | PublishModel
    | StoreAwaited
    | StoreRun
    | PublishStatus
)
