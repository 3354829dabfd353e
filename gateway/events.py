"""What the gateway's machines are told (events) and what they ask for (instructions).

Everything in an event was verified by the runtime: bytes have become values, and the sender is who it says. An
instruction list is performed in order, and whatever stands after an instruction that the journal keeps (``Store…``,
``Drop…``, ``Forget…``) leaves the gateway only after that is on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.messages import Census, Life, Plan, Presence
from fleetfed.shared.wire.topics import Kind

# --- Events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArrived:
    """A plan of the coordinator, retained at the upstream site; ``signer`` is its key."""

    plan: Plan
    hash: Digest
    raw: bytes
    signer: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEndArrived:
    """The end of a round, in the plan's place; ``signer`` is its coordinator's key."""

    round: int
    plan: bytes
    raw: bytes
    signer: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServed:
    """The manifest and what its followers need are published below.

    Attributes:
        version, sha256: of the model file.
        sizes: values per trainable tensor, from the model card.
    """

    version: int
    sha256: bytes
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceArrived:
    """A member's retained presence or its will; None: the presence was cleared."""

    kind: Kind
    member: str
    presence: Presence | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberChanged:
    """A member's life, as presence tells it, changed; None: it left for good, or was revoked."""

    kind: Kind
    member: str
    life: Life | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusArrived:
    """A gateway below counted its subtree."""

    gateway: str
    census: Census


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateArrived:
    """A device's update: admitted by its head, its body checked as far as the mode lets a gateway see it.

    Attributes:
        device: who signed it.
        serial, owner: of its certificate.
        plan: hash of the plan that it was admitted for.
        message_id, head: name the message.
        size: bytes of the message, which the journal will hold.
        parcel: the runtime's own: head, body and what the sum adds.
    """

    device: str
    serial: int
    plan: bytes
    message_id: MessageId
    head: Digest
    size: int
    owner: str = ""
    parcel: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclineArrived:
    """A selected device takes no part."""

    device: str
    plan: bytes
    message_id: MessageId
    head: Digest
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildProposed:
    """A gateway below closed its part of the round.

    Attributes:
        members: message ids of the updates whose heads it lists.
        declined, rejected: its subtree's counts.
        raw: the message.
    """

    gateway: str
    plan: bytes
    message_id: MessageId
    head: Digest
    members: tuple[MessageId, ...]
    declined: dict[str, int]
    rejected: dict[str, int]
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRevealed:
    """A gateway below sent its sum over the committed part of its proposal.

    Attributes:
        commit: head hash of the commit that it answers.
        count: contributors, by the message and, where that can be seen, by the sum's own count word.
        reason, detail: why it will never send a sum for that commit; None where it does.
        parcel: the runtime's own: what the sum adds.
        raw: the message.
    """

    gateway: str
    plan: bytes
    commit: bytes
    message_id: MessageId
    head: Digest
    count: int
    raw: bytes
    parcel: Any = None
    reason: RejectReason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitArrived:
    """The coordinator's final set for the direct gateway of this subtree, and its share of the coin."""

    plan: bytes
    gateway: str
    proposal: bytes
    head: Digest
    members: frozenset[MessageId]
    raw: bytes
    nonce: bytes = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptArrived:
    """The tier above answered a proposal or a reveal."""

    message_id: bytes
    reason: RejectReason | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatesJudged:
    """`JudgeUpdates` was performed: own updates that are left out, with their scores."""

    plan: bytes
    outliers: dict[MessageId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalMade:
    """`MakeProposal` was performed."""

    message_id: MessageId
    head: Digest
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealMade:
    """`MakeReveal` was performed for the commit named; ``raw`` is the signed message."""

    plan: bytes
    commit: bytes
    message_id: MessageId
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalMade:
    """`StoreAborted` was performed: this message says so to the tier above."""

    plan: bytes
    message_id: MessageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """A newer revocation list is in force."""

    serials: frozenset[int]


@dataclass(frozen=True, slots=True)
class CoordinatorsChanged:
    """Trust metadata lists other coordinators: whatever one said that is listed no more is void."""

    listed: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class SiteConnected:
    """The own site's broker is reached for the first time; by ``settled`` its retained presences are here."""

    settled: int


@dataclass(frozen=True, slots=True)
class UpstreamConnected:
    """There is a connection to the tier above again."""


@dataclass(frozen=True, slots=True)
class UpstreamLost:
    """The connection to the tier above is gone."""


# --- Instructions: durable ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRound:
    """A round begins: keep its plan and the sizes of the model's tensors; another model may come meanwhile.

    What the round's mode keeps secret, and says to the devices of its own, is made with it and kept in the same step.
    """

    round: int
    hash: Digest
    raw: bytes
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUpdate:
    """Keep an accepted update and its receipt, and add it to the sum."""

    update: UpdateArrived


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDecline:
    """Keep that a device declined."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChildProposal:
    """Keep a proposal from below and its receipt."""

    proposal: ChildProposed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChildReveal:
    """Keep a reveal from below and its receipt, and add it to the sum."""

    reveal: ChildRevealed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProposal:
    """Keep the own proposal."""

    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCommit:
    """Keep the coordinator's commit."""

    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReveal:
    """Keep the own reveal; sum, bodies and secrets are not needed any more and go in the same step."""

    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAnswered:
    """Keep that the tier above needs nothing more from us in this round; bodies and secrets go in the same step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAborted:
    """Keep a commit together with why it was refused, as signed for the tier above: no sum leaves us in this round.

    Bodies and secrets go in the same step; feed `RefusalMade`.
    """

    raw: bytes
    reason: RejectReason
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetRound:
    """Delete a round that is over; the receipts of its updates stay until the next one is over."""

    round: int
    hash: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerRound:
    """Forget how far coordinators counted that are listed no more; rounds above ``round`` were theirs alone."""

    round: int
    forget: frozenset[bytes]


# --- Instructions: work ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JudgeUpdates:
    """Find which of the stored updates do not look like the others; feed `UpdatesJudged`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeProposal:
    """Sign the heads of the stored updates and of the children's proposals; feed `ProposalMade`.

    Attributes:
        declined, rejected: in the whole subtree, by reason.
        outliers: own devices that were left out, with their scores.
    """

    declined: dict[str, int]
    rejected: dict[str, int]
    outliers: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropUpdates:
    """Take stored updates out of the sum; with ``forget`` out of the journal and the proposal as well."""

    message_ids: tuple[MessageId, ...]
    forget: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeReveal:
    """Sign the sum, which has ``count`` contributors; feed `RevealMade`."""

    commit: Digest
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardParcel:
    """The update was refused after all: free what was decoded."""

    update: UpdateArrived


# --- Instructions: messages -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReceipt:
    """Sign and send a receipt that is not kept: a refusal, or one whose fact can be told again."""

    kind: Kind
    member: str
    message_id: MessageId
    head: Digest
    reason: RejectReason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendStoredReceipt:
    """Send the receipt that was stored with a message, byte for byte."""

    kind: Kind
    member: str
    message_id: MessageId


@dataclass(frozen=True, slots=True)
class SendProposal:
    """Send the stored proposal up."""


@dataclass(frozen=True, slots=True)
class SendReveal:
    """Send the stored reveal up."""


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Pass the stored commit on to a gateway below, byte for byte."""

    gateway: str


@dataclass(frozen=True, slots=True)
class PublishPlan:
    """Publish a plan or a round's end below, retained, byte for byte."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class PublishCosign:
    """Publish the own word for the plan, made by `StoreRound`, below, retained."""


@dataclass(frozen=True, slots=True)
class PublishCensus:
    """Sign and publish the census upstream, retained."""

    census: Census


@dataclass(frozen=True, slots=True)
class RoundOver:
    """The round is over for this gateway: write the status, free what was being assembled for it."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Count and log a message that got no receipt of its own.

    Attributes:
        alarm: somebody in whom others trust has signed what breaks the rules; a person should look.
    """

    what: str
    reason: RejectReason
    detail: str = ""
    alarm: bool = False
