"""What happens to a device, and what it then does: the vocabulary of `fleetfed.device.state`.

Everything in an event was verified before: signatures by the runtime, hashes by the store. Times are unix
milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fleetfed.device.ledger import Account
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.policy import PrivacyFloor
from fleetfed.shared.wire.codec import Length
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.fields import Bytes16, Bytes32, Count, Millis, Positive
from fleetfed.shared.wire.messages import BlobRef, DeclineReason, Manifest, PatchRef, Plan, Receipt, RoundEnd

# --- Facts that the store keeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A model file on disk whose hash was checked.

    Attributes:
        version: of the manifest that it came with.
        sha256: of the file.
        card: digest of the card's object, which names the card's file.
    """

    version: Positive
    sha256: Bytes32
    card: Bytes32


class Fate(StrEnum):
    """What became of an answer."""

    PENDING = "pending"
    """Made, durable, not receipted."""
    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNANSWERED = "unanswered"
    """The round ended, or its time passed, without a receipt."""
    VOID = "void"
    """Accepted, but its round was aborted."""


class AnswerKind(StrEnum):
    """What a plan was answered with."""

    UPDATE = "update"
    DECLINE = "decline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The one answer to a plan.

    Attributes:
        round, plan: what it answers; ``plan`` is the plan's head hash.
        kind: an update or a decline.
        message_id, head: name the signed message.
        expires: when the plan's round is over at the latest.
        size: bytes of the signed message.
        fate: what became of it.
        reason: why it was refused, or declined; empty otherwise.
        signer: key of the coordinator whose plan it answers; empty where that was not remembered.
    """

    round: Positive
    plan: Bytes32
    kind: AnswerKind
    message_id: Bytes16
    head: Bytes32
    expires: Millis
    size: Count
    fate: Fate = Fate.PENDING
    reason: Annotated[str, Length(0, 100)] = ""
    signer: Annotated[bytes, Length(0, 16)] = b""


# --- What trust says --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the pinned trust says of a plan at the time that it is asked; by itself it has nothing against one.

    Attributes:
        reason: why no update may be made for the plan; None where one may.
        detail: which rule the plan breaks.
        helper_key: X25519 key of the helper whose signed word the plan carries; empty for none.
        floor: the policy's bounds on differential privacy; None for none.
    """

    reason: RejectReason | None = None
    detail: str = ""
    helper_key: bytes = b""
    floor: PrivacyFloor | None = None


# --- Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us and granted the subscriptions."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; what was not confirmed may be lost."""


@dataclass(frozen=True, slots=True)
class NodeBorn:
    """The gateway of our site says that it is ready: it started, or has a connection again.

    Attributes:
        retained: it said so earlier; this is the broker's copy.
    """

    retained: bool


@dataclass(frozen=True, slots=True)
class ManifestArrived:
    """A verified manifest."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class PlanArrived:
    """A verified plan.

    Attributes:
        plan: verified.
        plan_hash: its head's.
        verdict: what trust says of it.
        signer: key of the coordinator that signed it.
    """

    plan: Plan
    plan_hash: Digest
    verdict: Verdict = Verdict()
    signer: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class CosignArrived:
    """A verified cosignature of our own gateway.

    Attributes:
        round: that its head names.
        plan: head hash of the plan that it is for.
        seal_key: the gateway's X25519 key of the round.
        expires: unix milliseconds after which it is void; 0 for never.
    """

    round: int
    plan: bytes
    seal_key: bytes
    expires: int


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A verified end of a round."""

    end: RoundEnd


@dataclass(frozen=True, slots=True)
class ReceiptArrived:
    """A verified receipt of our gateway."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk of an object; not yet checked."""

    digest: bytes
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class PartsFound:
    """The answer to `FindParts`: which chunks of the object are on disk already."""

    digest: bytes
    have: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CardInstalled:
    """The card of this object's digest is on disk and was checked."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class ModelInstalled:
    """A model is on disk, its hash checked; the one before it is kept."""

    model: HeldModel


@dataclass(frozen=True, slots=True)
class InstallFailed:
    """An object that is whole could not be used; nothing on disk has changed."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training for the plan ended well; the runtime holds its result.

    Attributes:
        plan_hash: of the plan.
        verdict: on the plan, asked again now: what trust says may have changed while the device trained.
    """

    plan_hash: Digest
    verdict: Verdict = Verdict()


@dataclass(frozen=True, slots=True)
class TrainingDeclined:
    """Training for the plan ended without a result."""

    plan_hash: Digest
    reason: DeclineReason
    detail: str


@dataclass(frozen=True, slots=True)
class AnswerStored:
    """The answer is durable."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The program is to end."""


# --- Instructions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Announce:
    """Publish our presence."""


@dataclass(frozen=True, slots=True)
class RaiseFloor:
    """Make it durable that no manifest below ``version`` will be taken any more."""

    version: int


@dataclass(frozen=True, slots=True)
class FindParts:
    """Look which chunks of the object are on disk, and answer with `PartsFound`."""

    ref: BlobRef


@dataclass(frozen=True, slots=True)
class SubscribeChunk:
    """Subscribe to one chunk, anew if the subscription stands."""

    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class UnsubscribeChunk:
    """End the subscription to one chunk."""

    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class StoreChunk:
    """Write a checked chunk into the object's partial file."""

    ref: BlobRef
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class AskChunks:
    """Ask the gateway to publish chunks again."""

    digest: bytes
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InstallCard:
    """Check and keep a card; answer with `CardInstalled` or `InstallFailed`."""

    ref: BlobRef


@dataclass(frozen=True, slots=True)
class InstallPatches:
    """Apply patches to the model held; answer with `ModelInstalled` or `InstallFailed`."""

    base: HeldModel
    patches: tuple[PatchRef, ...]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class InstallFull:
    """Apply patches to the full file; answer with `ModelInstalled` or `InstallFailed`."""

    patches: tuple[PatchRef, ...]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class DropParts:
    """Delete all partial files but those of ``keep``."""

    keep: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Train:
    """Train for the plan, from ``model``; answer with `TrainingDone` or `TrainingDeclined`."""

    plan: Plan
    plan_hash: Digest
    model: HeldModel


@dataclass(frozen=True, slots=True)
class CancelTraining:
    """Stop training; no answer is expected, and one that comes all the same is ignored."""


@dataclass(frozen=True, slots=True)
class Debit:
    """Make durable what is spent of the device's privacy, before anything else is done for the plan's update."""

    account: Account


@dataclass(frozen=True, slots=True)
class StoreUpdate:
    """Sign the result of training and make it durable; answer with `AnswerStored`.

    Attributes:
        plan, plan_hash: the plan.
        gateway_key, helper_key: X25519 keys of the round in split mode; empty where there is none.
    """

    plan: Plan
    plan_hash: Digest
    gateway_key: bytes = b""
    helper_key: bytes = b""


@dataclass(frozen=True, slots=True)
class StoreDecline:
    """Sign a decline and make it durable; answer with `AnswerStored`."""

    plan: Plan
    plan_hash: Digest
    reason: DeclineReason
    detail: str


@dataclass(frozen=True, slots=True)
class SendAnswer:
    """Publish the answer's bytes, as they were stored."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class AbandonSending:
    """Publish no further chunk of an answer."""

    message_id: MessageId


@dataclass(frozen=True, slots=True)
class SettleAnswer:
    """Make durable what became of the answer; a fate other than accepted brings the old residual back."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class CountRejection:
    """Count and log what was refused."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class RecordRound:
    """Note how a round went for us and write the status.

    Attributes:
        round: its number.
        outcome: ``sent``, ``accepted``, ``refused:REASON``, ``declined:REASON``, ``unanswered``, ``cancelled``,
            ``void``, ``missed`` (the model or the gateway's cosignature did not arrive in time) or ``conflict`` (the
            gateway cosigned another plan).
        detail: for people; why it was declined.
    """

    round: int
    outcome: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """Say goodbye and end."""
