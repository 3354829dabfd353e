"""The bodies of all signed messages, and the one unsigned one (`Presence`); `docs/wire.md` explains each in turn.

Every class here is a msgpack map on the wire (see `codec`). Times are unix milliseconds. A device id, site or
fleet follows `topics.check_id`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.defence import Defence
from fleetfed.shared.wire.fields import (
    Bytes16,
    Bytes32,
    Count,
    Fraction,
    Id,
    Label,
    Millis,
    Name,
    Positive,
    Tally,
    Text,
)
from fleetfed.shared.wire.masking import Bucket, NonceHash, Split
from fleetfed.shared.wire.privacy import Privacy
from fleetfed.shared.wire.projection import Projection

# --- Objects that are fetched by content -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """Where an object of any size is, cut into retained chunks, and how to know that it is whole.

    Attributes:
        digest: BLAKE2b-256 of the object as published (compressed); its first 16 bytes name its topics.
        size: bytes as published.
        raw_size: bytes once decompressed with zstd.
        chunk: bytes of every chunk but the last.
        parts: 16 bytes of BLAKE2b-256 of each chunk, end to end, so that one bad chunk is fetched again alone.
    """

    digest: Bytes32
    size: Annotated[int, Range(1, limits.MAX_BLOB)]
    raw_size: Annotated[int, Range(1, limits.MAX_BLOB)]
    chunk: Annotated[int, Range(1, limits.CHUNK_DATA)]
    parts: Annotated[bytes, Length(16, 16 * limits.MAX_CHUNKS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRef:
    """A delta patch from one version of the model file to the next."""

    base_version: Positive
    base_sha256: Bytes32
    target_version: Positive
    target_sha256: Bytes32
    blob: BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The current model. Signed by the coordinator, retained; ``version`` never decreases.

    Attributes:
        version: grows by one with every published model, also with a rollback.
        parent: the version it was made from; 0 for none.
        name: the model's name.
        sha256: SHA-256 of the .tflite file.
        size: bytes of that file.
        card: the model card (weight table, shapes, classes); changes only with the architecture.
        full: a whole file, which is not always this version's: that of ``full_version``. Publishing every version
            whole would send each site the whole file once per round, although only a newcomer needs it.
        full_version, full_sha256: the version that ``full`` holds, and its file's hash; ``size`` bytes like every
            version of one card.
        patches: consecutive patches, oldest first, that end at ``version``; possibly none. Where ``full_version`` is
            not ``version`` they begin at ``full_version`` or before, so that the file and the patches after it make
            ``version``.
        created: when it was published.
        metrics: the coordinator's evaluation, e.g. ``accuracy``.
    """

    version: Positive
    parent: Count
    name: Name
    sha256: Bytes32
    size: Annotated[int, Range(1, limits.MAX_BLOB)]
    card: BlobRef
    full: BlobRef
    full_version: Positive
    full_sha256: Bytes32
    patches: Annotated[tuple[PatchRef, ...], Length(0, limits.MAX_PATCH_CHAIN)] = ()
    created: Millis = 0
    metrics: Annotated[dict[str, float], Length(0, 64)] = field(default_factory=dict)


# --- The round -------------------------------------------------------------------------------------------------------


class Mode(StrEnum):
    """Whether updates are hidden from their gateway."""

    PLAIN = "plain"
    """The gateway reads every update."""
    SPLIT = "split"
    """Masked vector to the gateway, mask seed to the coordinator (`masking`): neither reads an update alone."""


class Optimizer(StrEnum):
    """What a device trains with."""

    SGD = "sgd"
    ADAM = "adam"


class Weighting(StrEnum):
    """What an update weighs: ``examples`` trained on, capped by the plan, or ``uniform``."""

    EXAMPLES = "examples"
    UNIFORM = "uniform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a device does with its data.

    Attributes:
        epochs: passes over the local data.
        optimizer: its state begins anew in every round.
        learning_rate, momentum, beta1, beta2, epsilon: the optimizer's own; unused ones are ignored.
        proximal: FedProx's mu (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2).
        max_steps: stop after so many batches; 0 for no limit.
    """

    epochs: Annotated[int, Range(1, 1000)] = 1
    optimizer: Optimizer = Optimizer.SGD
    learning_rate: Annotated[float, Range(1e-9, 1e3)] = 0.05
    momentum: Annotated[float, Range(0.0, 0.9999)] = 0.9
    beta1: Annotated[float, Range(0.0, 0.9999)] = 0.9
    beta2: Annotated[float, Range(0.0, 0.999999)] = 0.999
    epsilon: Annotated[float, Range(1e-12, 1.0)] = 1e-7
    proximal: Annotated[float, Range(0.0, 1e3)] = 0.0
    max_steps: Annotated[int, Range(0, 10_000_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligibility:
    """Which devices take part.

    Attributes:
        fraction: each device is in with this probability; `selection.selected` draws it from the plan, so that
            device, gateway and coordinator agree.
        labels: what the device's own labels must contain.
        minimum_examples: fewest training examples.
        quarantined: devices that are set aside, whatever else holds, until an operator lifts it.
    """

    fraction: Fraction = 1.0
    labels: Annotated[dict[str, str], Length(0, 32)] = field(default_factory=dict)
    minimum_examples: Annotated[int, Range(0, 1e12)] = 1
    quarantined: Annotated[tuple[Id, ...], Length(0, limits.MAX_QUARANTINED)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The one scale on which every update of the round stands, so that integers can be added.

    Attributes:
        bits: signed bits of a coordinate, `secagg` section 3.2: values in ±(2^(bits-1)-1).
        lane_bits: bits of a lane of a uint64 word.
        clips: per tensor of the card, the largest magnitude a coordinate may have before it is clipped.
        weight_cap: weights are limited to this, and contributions scaled by weight / weight_cap.
        error_feedback: devices keep what quantization lost and add it next time they take part.
    """

    bits: Annotated[int, Range(2, 16)]
    lane_bits: Annotated[int, Range(4, 64)]
    clips: Annotated[tuple[Annotated[float, Range(1e-30, 1e30)], ...], Length(1, limits.MAX_TENSORS)]
    weight_cap: Annotated[int, Range(1, 2**31 - 1)]
    error_feedback: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """When a round closes, and whether its result counts.

    Attributes:
        fraction: a leaf gateway closes once this part of the devices that it expects has answered.
        minimum: fewest contributors, fleet-wide, for the result to become a version.
        cohort_cap: most contributors to one sum; the lanes are sized for it.
    """

    fraction: Fraction = 1.0
    minimum: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    cohort_cap: Annotated[int, Range(1, limits.MAX_COHORT)] = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One round. Signed by the coordinator, retained; everybody names it by its head's hash.

    Attributes:
        round: grows by one with every plan.
        model_version, model_sha256: what devices start from.
        dimension: trainable values in the model.
        tiers: gateways between a device and the coordinator, at most.
        opened: when devices may begin; one whose clock may be slow takes up to five minutes ahead for begun.
        deadline: when leaf gateways close.
        expires: when the coordinator closes; gateways above the leaves close in between.
        nonce: random; makes each round's selection its own.
        split: how updates are masked; present in split mode, and only there.
        privacy: the differential privacy that devices, gateways and coordinator uphold; None for none.
        projection: how updates travel as a few numbers for each large tensor; None for every value.
        defence: how leaf gateways meet outliers, in plain mode; None for not at all.
        policy: version of the pinned policy that it was made under; 0 where the fleet has none.
    """

    round: Positive
    model_version: Positive
    model_sha256: Bytes32
    dimension: Annotated[int, Range(1, limits.MAX_PARAMETERS)]
    quantization: Quantization
    training: Training = Training()
    eligibility: Eligibility = Eligibility()
    quorum: Quorum = Quorum()
    mode: Mode = Mode.PLAIN
    weighting: Weighting = Weighting.EXAMPLES
    tiers: Annotated[int, Range(1, 8)] = 1
    opened: Millis
    deadline: Millis
    expires: Millis
    nonce: Bytes16
    split: Split | None = None
    privacy: Privacy | None = None
    projection: Projection | None = None
    defence: Defence | None = None
    policy: Count = 0


class Outcome(StrEnum):
    """How a round ended."""

    COMMITTED = "committed"
    """A new version was made of it."""
    ABORTED = "aborted"
    """An operator, or too few contributors, ended it; no version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd:
    """Takes the plan's place on its retained topic when the round is over."""

    round: Positive
    plan: Bytes32
    outcome: Outcome
    reason: Text = ""
    version: Count = 0


class DeclineReason(StrEnum):
    """Why a selected device takes no part."""

    LABELS = "labels"
    TOO_FEW_EXAMPLES = "too_few_examples"
    NO_MODEL = "no_model"
    TRAINING_FAILED = "training_failed"
    DIVERGED = "diverged"
    BUSY = "busy"
    POLICY = "policy"
    """The plan is weaker than the pinned policy, or what pins it has expired."""
    SUITE = "suite"
    """The device cannot seal keys as the plan's suite wants; the detail says what to install."""
    PRIVACY_BUDGET = "privacy_budget"
    """The device has taken part as often as its privacy ledger allows."""
    TOO_SOON = "too_soon"
    """The device's last part in a round is nearer than the plan's privacy allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline:
    """A selected device will send no update in this round."""

    plan: Bytes32
    reason: DeclineReason
    detail: Text = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The fate of one message, from the tier that received it. ``reason`` is None for accepted.

    An accepted message is durable at the tier that says so; its sender may forget it.
    """

    message_id: Bytes16
    head: Bytes32
    reason: RejectReason | None = None
    detail: Text = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a gateway's subtree holds for a round: the signed heads of all accepted updates, without bodies.

    Attributes:
        nonces: of every leaf gateway in the subtree that deals masked updates into buckets, the hash of its nonce.
        outliers: devices whose updates the plan's defence left out, with their scores.
    """

    plan: Bytes32
    heads: Annotated[tuple[Annotated[bytes, Length(1, limits.MAX_HEAD)], ...], Length(0, limits.MAX_COHORT)]
    declined: Annotated[dict[Label, Tally], Length(0, 64)] = field(default_factory=dict)
    rejected: Annotated[dict[Label, Tally], Length(0, 64)] = field(default_factory=dict)
    nonces: Annotated[tuple[NonceHash, ...], Length(0, limits.MAX_COHORT)] = ()
    outliers: Annotated[dict[Id, float], Length(0, limits.MAX_COHORT)] = field(default_factory=dict)


def max_proposal(cohort_cap: int) -> int:
    """Bytes of a decompressed proposal of so many heads, at most."""
    return cohort_cap * (limits.MAX_HEAD + 3) + limits.MAX_SMALL_MESSAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The coordinator's final set for one direct gateway; there is one per round and gateway, ever.

    Attributes:
        proposal: head hash of the proposal that it answers.
        members: message ids (16 bytes each) of the updates to add, sorted, end to end.
        excluded: head hash to reason, for what was proposed and is left out.
        nonce: the coordinator's share of the coin that deals updates into buckets; drawn after the proposal came.
    """

    plan: Bytes32
    gateway: Id
    proposal: Bytes32
    members: Annotated[bytes, Length(0, 16 * limits.MAX_COHORT)]
    excluded: Annotated[dict[str, str], Length(0, limits.MAX_COHORT)] = field(default_factory=dict)
    nonce: Bytes16 = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """One partial over exactly the committed members of the subtree; or, in split mode, why there is none, ever.

    Attributes:
        commit: head hash of the commit.
        count: contributors in the sum; equals the sum's own count word.
        words: the sum's uint64 words: packed and compressed in plain mode (`aggregate.accumulator.encode_words`), the
            masked words themselves, little-endian, in split mode; empty where there are buckets.
        buckets: the sums apart, in split mode with buckets.
        reason, detail: why a gateway follows the commit in nothing; then there is no sum, and the count is 0.
    """

    plan: Bytes32
    commit: Bytes32
    count: Count
    words: Annotated[bytes, Length(0, limits.MAX_PARTIAL)]
    buckets: Annotated[tuple[Bucket, ...], Length(0, limits.MAX_COHORT)] = ()
    reason: RejectReason | None = None
    detail: Text = ""


# --- Presence and the fleet ------------------------------------------------------------------------------------------


class Life(StrEnum):
    """A member's state, as its retained presence tells."""

    READY = "ready"
    SLEEPING = "sleeping"
    """Went offline on purpose and will be back: counted among those a round waits for."""
    DISCONNECTED = "disconnected"
    """Stopped for good."""
    LOST = "lost"
    """The broker's word (last will): the connection broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """Unsigned, retained: also the last will, which could not be signed with its time. Decides only who is waited for.

    Attributes:
        session: random per process; a will with another session than the last birth is stale (Sparkplug's bdSeq).
        since: when the state began; 0 in a will.
        software: name and version of the program.
        labels: a device's own labels.
        serial: of the member's certificate, so that nobody waits for who is revoked; 0 for unknown.
        until: when that certificate ends, because no list names it any more then; 0 for unknown.
    """

    life: Life
    session: Count
    since: Millis = 0
    software: Annotated[str, Length(0, 100)] = ""
    labels: Annotated[dict[str, str], Length(0, 32)] = field(default_factory=dict)
    serial: Count = 0
    until: Millis = 0

    def outlived(self, now: int) -> bool:
        """Whether it is the last word of a member that no broker lets in any more.

        A will is not: it may be older than the certificate that its member has renewed since, and nobody waits for it.
        """
        return self.life is not Life.LOST and 0 < self.until < now


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSummary:
    """One device in a census."""

    id: Id
    site: Id
    life: Life
    since: Millis = 0
    software: Annotated[str, Length(0, 100)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """How many devices a gateway's subtree has; published, retained, when it changes.

    Attributes:
        site: the site that the gateway serves.
        level: 0 for a gateway that serves devices alone, else one more than the highest below it.
        devices, ready, sleeping, lost: devices in the whole subtree.
        members: as many of them as fit one packet.
        truncated: whether there are more.
        model_version: what the gateway serves.
        round, answered, expected: progress of the round that is open in the subtree; zeros for none.
    """

    site: Id
    level: Annotated[int, Range(0, 7)]
    devices: Tally
    ready: Tally
    sleeping: Tally
    lost: Tally
    members: Annotated[tuple[MemberSummary, ...], Length(0, limits.MAX_COHORT)] = ()
    truncated: bool = False
    model_version: Count = 0
    round: Count = 0
    answered: Tally = 0
    expected: Tally = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Unsigned: chunks of an object that a member cannot get from the broker."""

    digest: Bytes32
    missing: Annotated[tuple[Annotated[int, Range(0, limits.MAX_CHUNKS - 1)], ...], Length(1, 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocations:
    """Serial numbers that are void. Signed by the authority, retained; ``version`` never decreases."""

    version: Positive
    serials: Annotated[tuple[Count, ...], Length(0, limits.MAX_REVOKED)] = ()


# --- Control ---------------------------------------------------------------------------------------------------------


class Command(StrEnum):
    """What an operator may ask of the coordinator."""

    ROUND_START = "round.start"
    ROUND_PAUSE = "round.pause"
    ROUND_RESUME = "round.resume"
    ROUND_ABORT = "round.abort"
    ROUND_STATUS = "round.status"
    MODEL_PUBLISH = "model.publish"
    MODEL_LIST = "model.list"
    MODEL_SHOW = "model.show"
    MODEL_ROLLBACK = "model.rollback"
    FLEET_LIST = "fleet.list"
    FLEET_SHOW = "fleet.show"
    FLEET_ASIDE = "fleet.quarantine"
    FLEET_RELEASE = "fleet.release"
    KEYS_REVOKE = "keys.revoke"
    KEYS_PUBLISH = "keys.publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One command of an operator, with its arguments."""

    command: Command
    arguments: Annotated[dict[str, Any], Length(0, 64)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The answer to one request.

    Attributes:
        request: the request's message id.
        error: stable label of what went wrong; empty for success.
        detail: what happened and what to do.
        result: the answer's data, the same as ``--json`` prints.
    """

    request: Bytes16
    error: Annotated[str, Length(0, 64)] = ""
    detail: Text = ""
    result: Annotated[dict[str, Any], Length(0, limits.MAX_MSGPACK_ITEMS)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the coordinator is doing, retained, for whoever watches.

    Attributes:
        state: the coordinator machine's state.
        round: the current or last round.
        version: the current model version.
        accepted, expected: devices in the current round.
        waiting_for: why no round is open, or does not end; empty where nothing is waited for.
        history: the last rounds, oldest first, as `fleetfed round status --json` shows them.
    """

    state: Annotated[str, Length(1, 32)]
    round: Count
    version: Count
    accepted: Count = 0
    expected: Count = 0
    deadline: Millis = 0
    history: Annotated[tuple[dict[str, Any], ...], Length(0, 1000)] = ()
    waiting_for: Text = ""
