"""What a device decides: pure, no clock, no randomness, no I/O. `fleetfed.device.runtime` performs what it says.

Rules (`docs/protocol.md`, "Device"):

1. One answer per plan, ever: an update or a decline. It is durable before it is sent, and sent again as the same bytes
   after every connect, whenever the gateway announces itself, and with back-off, until its receipt or its round's end.
2. A plan waits for its model; the model that training needs may be the newest or the one before it.
3. A later plan, the end of the round, or the plan's deadline stops training; a stopped plan is not answered.
4. A refusal brings the old residual back, except where it only means "not now" (`RejectReason.OVERLOADED`).
5. What a plan asks is judged in this order: policy, selection, labels, privacy ledger, the gateway's cosignature (split
   mode: without it the plan waits), model. Policy and ledger are asked again when training is done.
6. Nothing that a peer says stops the device: it is counted with its reason, and the device goes on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final

from fleetfed.device.cosign import Cosigns
from fleetfed.device.events import (
    AbandonSending,
    Announce,
    Answer,
    AnswerKind,
    AnswerStored,
    CancelTraining,
    CardInstalled,
    ChunkArrived,
    Connected,
    CosignArrived,
    CountRejection,
    Debit,
    Disconnected,
    Fate,
    HeldModel,
    InstallFailed,
    ManifestArrived,
    ModelInstalled,
    NodeBorn,
    PartsFound,
    PlanArrived,
    ReceiptArrived,
    RecordRound,
    RoundEnded,
    SendAnswer,
    SettleAnswer,
    Stop,
    StopRequested,
    StoreDecline,
    StoreUpdate,
    Train,
    TrainingDeclined,
    TrainingDone,
    Verdict,
)
from fleetfed.device.ledger import Account
from fleetfed.device.sync import ModelSync
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import Edge, Machine, TimerFired
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.messages import DeclineReason, Outcome, Plan
from fleetfed.shared.wire.selection import takes

FIRST_RESEND: Final = 20_000
"""Milliseconds without a receipt until the first repetition; it doubles after each.

A connection or a gateway that began anew is answered at once; this is for what was lost in silence. A thousand devices
that answer at the same moment wait ten seconds for their receipts where the gateway is slow, and must not double its
work for that."""
LONGEST_RESEND: Final = 300_000
SLOW_CLOCK: Final = 300_000
"""Milliseconds by which our clock may be behind the coordinator's: a plan that begins so soon has begun. Whoever waited
for the own clock would hold up every round by what it is slow."""


class DeviceState(StrEnum):
    """Where a device stands in a round."""

    IDLE = "idle"
    """No plan that it could answer."""
    WAITING = "waiting"
    """A plan takes it; model or cosignature are not here, or the plan has not begun."""
    TRAINING = "training"
    SENDING = "sending"
    """The answer is durable; no receipt yet."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the store knew when the device started.

    Attributes:
        models: held, newest first.
        cards: digests of the cards on disk.
        floor: no manifest below it is taken.
        answer: the newest answer, whatever its fate.
        account: what is spent of the device's privacy in its fleet.
    """

    models: tuple[HeldModel, ...] = ()
    cards: frozenset[bytes] = frozenset()
    floor: int = 0
    answer: Answer | None = None
    account: Account = field(default_factory=Account)


_ANYWHERE: Final = (DeviceState.IDLE, DeviceState.WAITING, DeviceState.TRAINING, DeviceState.SENDING)

_EDGES: Final[dict[type, dict[DeviceState, Edge]]] = {
    Connected: dict.fromkeys(_ANYWHERE, Edge("_on_connected")),
    Disconnected: dict.fromkeys(_ANYWHERE, Edge("_on_disconnected")),
    NodeBorn: dict.fromkeys(_ANYWHERE, Edge("_on_node_born")),
    ManifestArrived: {
        DeviceState.IDLE: Edge("_on_manifest"),
        DeviceState.WAITING: Edge("_on_manifest", DeviceState.WAITING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_manifest"),
        DeviceState.SENDING: Edge("_on_manifest"),
    },
    PartsFound: dict.fromkeys(_ANYWHERE, Edge("_on_parts")),
    ChunkArrived: dict.fromkeys(_ANYWHERE, Edge("_on_chunk")),
    CardInstalled: dict.fromkeys(_ANYWHERE, Edge("_on_card")),
    InstallFailed: {
        DeviceState.IDLE: Edge("_on_install_failed"),
        DeviceState.WAITING: Edge("_on_install_failed", DeviceState.WAITING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_install_failed"),
        DeviceState.SENDING: Edge("_on_install_failed"),
    },
    ModelInstalled: {
        DeviceState.IDLE: Edge("_on_model"),
        DeviceState.WAITING: Edge("_on_model", DeviceState.WAITING, DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_model"),
        DeviceState.SENDING: Edge("_on_model"),
    },
    PlanArrived: {
        DeviceState.IDLE: Edge("_on_plan", DeviceState.IDLE, DeviceState.WAITING, DeviceState.TRAINING),
        DeviceState.WAITING: Edge("_on_plan", DeviceState.IDLE, DeviceState.WAITING, DeviceState.TRAINING),
        DeviceState.TRAINING: Edge("_on_plan", DeviceState.IDLE, DeviceState.WAITING, DeviceState.TRAINING),
        DeviceState.SENDING: Edge(
            "_on_plan", DeviceState.SENDING, DeviceState.IDLE, DeviceState.WAITING, DeviceState.TRAINING
        ),
    },
    CosignArrived: {
        DeviceState.IDLE: Edge("_on_cosign"),
        DeviceState.WAITING: Edge("_on_cosign", DeviceState.WAITING, DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_cosign", DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.SENDING: Edge("_on_cosign", DeviceState.SENDING, DeviceState.IDLE),
    },
    RoundEnded: {
        DeviceState.IDLE: Edge("_on_round_end"),
        DeviceState.WAITING: Edge("_on_round_end", DeviceState.WAITING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_round_end", DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.SENDING: Edge("_on_round_end", DeviceState.SENDING, DeviceState.IDLE),
    },
    # What arrives after training was stopped is not wanted any more.
    TrainingDone: {
        DeviceState.IDLE: Edge("_on_trained"),
        DeviceState.WAITING: Edge("_on_trained"),
        DeviceState.TRAINING: Edge("_on_trained", DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.SENDING: Edge("_on_trained"),
    },
    TrainingDeclined: dict.fromkeys(_ANYWHERE, Edge("_on_declined")),
    AnswerStored: {
        DeviceState.IDLE: Edge("_on_stored", DeviceState.SENDING, DeviceState.IDLE),
        DeviceState.WAITING: Edge("_on_stored", DeviceState.WAITING, DeviceState.SENDING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_stored", DeviceState.TRAINING, DeviceState.SENDING, DeviceState.IDLE),
        DeviceState.SENDING: Edge("_on_stored"),
    },
    ReceiptArrived: {
        DeviceState.IDLE: Edge("_on_receipt"),
        DeviceState.WAITING: Edge("_on_receipt"),
        DeviceState.TRAINING: Edge("_on_receipt"),
        DeviceState.SENDING: Edge("_on_receipt", DeviceState.SENDING, DeviceState.IDLE),
    },
    TimerFired: {
        DeviceState.IDLE: Edge("_on_timer"),
        DeviceState.WAITING: Edge("_on_timer", DeviceState.WAITING, DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.TRAINING: Edge("_on_timer", DeviceState.TRAINING, DeviceState.IDLE),
        DeviceState.SENDING: Edge("_on_timer", DeviceState.SENDING, DeviceState.IDLE),
    },
    StopRequested: dict.fromkeys(_ANYWHERE, Edge("_on_stop", DeviceState.STOPPED)),
}


class DeviceMachine(Machine[DeviceState]):
    """The device's machine.

    Args:
        device: this device's id.
        labels: its own labels, which a plan may ask for.
        facts: what the store knew at the start.
        largest: bytes of the largest model file that it takes.
    """

    NAME: ClassVar[str] = "device"
    TABLE: ClassVar[dict[tuple[Any, type], Edge]] = {
        (state, event): edge for event, row in _EDGES.items() for state, edge in row.items()
    }

    def __init__(self, *, device: str, labels: dict[str, str], facts: Facts, largest: int) -> None:
        answer = facts.answer
        sending = answer is not None and answer.fate is Fate.PENDING and answer.kind is AnswerKind.UPDATE
        super().__init__(DeviceState.SENDING if sending else DeviceState.IDLE)
        self.sync = ModelSync(facts.models, cards=facts.cards, floor=facts.floor, largest=largest)
        self.answer = answer
        self.account = facts.account
        self._device = device
        self._labels = labels
        self._plan: Plan | None = None
        self._plan_hash = Digest(b"")
        self._verdict = Verdict()
        self._signer = b""
        self._cosigns = Cosigns()
        self._detail = ""
        self._over = 0
        self._storing = False
        self._online = False
        self._resend_at: int | None = None
        self._resend_after = FIRST_RESEND

    @property
    def plan(self) -> Plan | None:
        """The latest plan."""
        return self._plan

    # --- Time ---------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When the machine next wants a `TimerFired`."""
        times = [self.sync.next_deadline()]
        plan = self._plan
        if self.state is DeviceState.WAITING and plan is not None:
            ready = self.sync.holds(plan.model_version, plan.model_sha256) is not None
            begins = plan.opened - SLOW_CLOCK
            # Whatever else is waited for comes as an event, or not at all.
            times.append(begins if ready and self._cosigned(begins) else plan.deadline)
        elif self.state is DeviceState.TRAINING and plan is not None:
            times.append(plan.deadline)
        elif self.state is DeviceState.SENDING and self.answer is not None:
            times.append(self.answer.expires)
            if self._online:
                times.append(self._resend_at)
        return min((time for time in times if time is not None), default=None)

    def _on_timer(self, _event: TimerFired, now: int) -> list[Any]:
        out = self.sync.timer(now)
        plan = self._plan
        if self.state is DeviceState.SENDING and self.answer is not None:
            if now >= self.answer.expires:
                return out + self._settle(Fate.UNANSWERED, "")
            if self._online and self._resend_at is not None and now >= self._resend_at:
                self._resend_at = now + self._resend_after
                self._resend_after = min(2 * self._resend_after, LONGEST_RESEND)
                out.append(SendAnswer(self.answer))
        elif self.state is DeviceState.TRAINING and plan is not None and now >= plan.deadline and not self._storing:
            out += self._drop_plan("cancelled")
        elif self.state is DeviceState.WAITING:
            out += self._begin(now)
        return out

    # --- Connection ---------------------------------------------------------------------------------------------------

    def _on_connected(self, _event: Connected, now: int) -> list[Any]:
        self._online = True
        return [Announce(), *self.sync.connected(now), *self._send_again(now)]

    def _on_disconnected(self, _event: Disconnected, _now: int) -> list[Any]:
        self._online = False
        return self.sync.disconnected()

    def _on_node_born(self, event: NodeBorn, now: int) -> list[Any]:
        # The broker's copy follows every connect of ours, for which everything was just sent. A gateway that has just
        # begun to listen knows us by what the broker kept, if it is one that hands that out on wildcards.
        return [] if event.retained or not self._online else [Announce(), *self._send_again(now)]

    def _send_again(self, now: int) -> list[Any]:
        answer = self.answer
        if answer is None or answer.fate is not Fate.PENDING or not self._online:
            return []
        # A decline needs no receipt: it is repeated only as long as its round may be open.
        if self.state is not DeviceState.SENDING and now >= answer.expires:
            return []
        self._resend_after = FIRST_RESEND
        self._resend_at = now + self._resend_after
        return [SendAnswer(answer)]

    # --- Model --------------------------------------------------------------------------------------------------------

    def _on_manifest(self, event: ManifestArrived, now: int) -> list[Any]:
        return self.sync.manifest(event.manifest, now) + self._reconsider(now)

    def _on_parts(self, event: PartsFound, now: int) -> list[Any]:
        return self.sync.parts(event.digest, event.have, now)

    def _on_chunk(self, event: ChunkArrived, now: int) -> list[Any]:
        return self.sync.chunk(event.digest, event.index, event.data, now)

    def _on_card(self, event: CardInstalled, now: int) -> list[Any]:
        return self.sync.card_installed(event.digest, now)

    def _on_install_failed(self, event: InstallFailed, now: int) -> list[Any]:
        return self.sync.failed(event.reason, event.detail, now) + self._reconsider(now)

    def _reconsider(self, now: int) -> list[Any]:
        return self._begin(now) if self.state is DeviceState.WAITING else []

    def _on_model(self, event: ModelInstalled, now: int) -> list[Any]:
        return self.sync.model_installed(event.model, now) + self._reconsider(now)

    # --- Round --------------------------------------------------------------------------------------------------------

    def _on_plan(self, event: PlanArrived, now: int) -> list[Any]:
        plan = event.plan
        if self._plan_hash == event.plan_hash or plan.round <= self._over:
            return []
        latest = max(self._plan.round if self._plan is not None else 0, self.answer.round if self.answer else 0)
        if plan.round <= latest:
            if self.answer is not None and self.answer.plan == event.plan_hash:
                return []
            reason = RejectReason.CONFLICT if plan.round == latest else RejectReason.WRONG_ROUND
            return [CountRejection(reason, f"plan of round {plan.round} after round {latest}")]
        out = self._leave()
        self._storing = False
        self._plan, self._plan_hash, self._verdict = plan, event.plan_hash, event.verdict
        self._signer = event.signer
        if event.verdict.reason is not None:
            out.append(self._refusal())
        if not takes(event.plan_hash, self._device, plan.eligibility):
            return out
        unfit = self._unfit(plan)
        if unfit is not None:
            return out if now >= plan.deadline else [*out, *self._decline(*unfit)]
        self.account = self.account.allowed(plan, event.verdict.floor)
        if self._cosigns.spoilt(plan.round, self._plan_hash):
            return [*out, self._conflict(plan.round), RecordRound(plan.round, "conflict")]
        self.state = DeviceState.WAITING
        return out + self._begin(now)

    def _unfit(self, plan: Plan) -> tuple[DeclineReason, str] | None:
        """Why this device, which the plan selects, takes no part; None if it may."""
        verdict = self._verdict
        if verdict.reason is not None:
            suite = verdict.reason is RejectReason.UNKNOWN_SUITE
            return DeclineReason.SUITE if suite else DeclineReason.POLICY, f"{verdict.reason}: {verdict.detail}"
        missing = {k: v for k, v in plan.eligibility.labels.items() if self._labels.get(k) != v}
        if missing:
            return DeclineReason.LABELS, f"not {missing}"[:200]
        return self.account.refusal(plan, self._plan_hash, verdict.floor)

    def _refusal(self) -> CountRejection:
        plan, reason = self._plan, self._verdict.reason
        assert plan is not None
        assert reason is not None
        return CountRejection(reason, f"plan of round {plan.round}: {self._verdict.detail}")

    def _leave(self) -> list[Any]:
        """Make room for a later plan."""
        if self.state is DeviceState.SENDING:
            return self._settle(Fate.UNANSWERED, "")
        if self.state in (DeviceState.TRAINING, DeviceState.WAITING):
            return self._drop_plan("cancelled" if self.state is DeviceState.TRAINING else "missed")
        return []

    def _begin(self, now: int) -> list[Any]:
        """Train if the plan has begun and its model is here."""
        plan = self._plan
        assert plan is not None
        if now >= plan.deadline:
            return self._drop_plan("missed")
        if now < plan.opened - SLOW_CLOCK or self._storing or not self._cosigned(now):
            return []
        model = self.sync.holds(plan.model_version, plan.model_sha256)
        if model is None:
            why = self.sync.hopeless(plan.model_version)
            return self._decline(DeclineReason.NO_MODEL, why) if why else []
        self.state = DeviceState.TRAINING
        return [Train(plan, self._plan_hash, model)]

    def _drop_plan(self, outcome: str) -> list[Any]:
        """Give the plan up without an answer."""
        plan = self._plan
        assert plan is not None
        out: list[Any] = [CancelTraining()] if self.state is DeviceState.TRAINING else []
        self.state = DeviceState.IDLE
        self._storing = False
        return [*out, RecordRound(plan.round, outcome)]

    # --- Cosignature --------------------------------------------------------------------------------------------------

    def _cosigned(self, now: int) -> bool:
        """Whether the plan needs no cosignature, or has it."""
        plan = self._plan
        assert plan is not None
        return plan.split is None or self._cosigns.key(plan, self._plan_hash, now) is not None

    def _on_cosign(self, event: CosignArrived, now: int) -> list[Any]:
        plan, answer = self._plan, self.answer
        if plan is not None and event.plan == self._plan_hash and event.round != plan.round:
            return [CountRejection(RejectReason.WRONG_ROUND, f"round {plan.round} cosigned as round {event.round}")]
        current = max(plan.round if plan is not None else 0, answer.round if answer is not None else 0)
        if event.round <= self._over or event.round < current:
            return []
        mine = None
        if plan is not None and plan.round == event.round:
            mine = self._plan_hash
        elif answer is not None and answer.round == event.round:
            mine = Digest(answer.plan)
        if self._cosigns.hear(event, current=current) and mine in (None, event.plan):
            return self._reconsider(now)
        return [self._conflict(event.round), *self._spoil(event.round)]

    def _conflict(self, round_: int) -> CountRejection:
        return CountRejection(RejectReason.CONFLICT, f"the gateway cosigned another plan of round {round_}")

    def _spoil(self, round_: int) -> list[Any]:
        """Make, and send, no update in a round for which the gateway gave its word twice."""
        plan, answer = self._plan, self.answer
        if self.state is DeviceState.SENDING and answer is not None and answer.round == round_:
            return self._settle(Fate.UNANSWERED, "")
        if self.state in (DeviceState.TRAINING, DeviceState.WAITING) and plan is not None and plan.round == round_:
            return self._drop_plan("conflict")
        return []

    # --- Answer -------------------------------------------------------------------------------------------------------

    def _on_trained(self, event: TrainingDone, now: int) -> list[Any]:
        if self.state is not DeviceState.TRAINING or event.plan_hash != self._plan_hash or self._storing:
            return []
        plan, plan_hash = self._plan, self._plan_hash
        assert plan is not None
        self._verdict = event.verdict
        unfit = self._unfit(plan)
        if unfit is not None:
            counted = [self._refusal()] if event.verdict.reason is not None else []
            return [*counted, *self._decline(*unfit)]
        gateway_key = b""
        if plan.split is not None:
            key = self._cosigns.key(plan, plan_hash, now)
            if key is None:
                return self._drop_plan("missed")
            gateway_key = key
        self._storing = True
        out: list[Any] = []
        if plan.privacy is not None:
            self.account = self.account.debited(plan, plan_hash, event.verdict.floor, self._signer)
            out.append(Debit(self.account))
        return [*out, StoreUpdate(plan, plan_hash, gateway_key, event.verdict.helper_key)]

    def _on_declined(self, event: TrainingDeclined, _now: int) -> list[Any]:
        if self.state is not DeviceState.TRAINING or event.plan_hash != self._plan_hash or self._storing:
            return []
        return self._decline(event.reason, event.detail)

    def _decline(self, reason: DeclineReason, detail: str) -> list[Any]:
        assert self._plan is not None
        self._storing = True
        self._detail = detail
        return [StoreDecline(self._plan, self._plan_hash, reason, detail)]

    def _on_stored(self, event: AnswerStored, now: int) -> list[Any]:
        answer = event.answer
        if answer.plan != self._plan_hash:
            # Its plan was left meanwhile: it may not go out, and is remembered as the one that was made.
            self.answer = dataclasses.replace(answer, fate=Fate.UNANSWERED)
            return [SettleAnswer(self.answer)]
        self._storing = False
        self.answer = answer
        if answer.kind is AnswerKind.DECLINE:
            self.state = DeviceState.IDLE
            return [RecordRound(answer.round, f"declined:{answer.reason}", self._detail[:300]), *self._send_again(now)]
        if answer.round <= self._over or self._cosigns.spoilt(answer.round, self._plan_hash):
            self.state = DeviceState.IDLE
            return self._settle(Fate.UNANSWERED, "")
        self.state = DeviceState.SENDING
        return self._send_again(now)

    def _on_receipt(self, event: ReceiptArrived, now: int) -> list[Any]:
        answer, receipt = self.answer, event.receipt
        if answer is None or receipt.message_id != answer.message_id or answer.fate is not Fate.PENDING:
            return []
        if receipt.head != answer.head:
            return [CountRejection(RejectReason.CONFLICT, "a receipt for another message under our message's id")]
        if receipt.reason is RejectReason.OVERLOADED and self.state is DeviceState.SENDING:
            self._resend_at = now + self._resend_after
            self._resend_after = min(2 * self._resend_after, LONGEST_RESEND)
            return []
        if receipt.reason is None:
            return self._settle(Fate.ACCEPTED, "")
        return self._settle(Fate.REFUSED, str(receipt.reason))

    def _settle(self, fate: Fate, reason: str) -> list[Any]:
        """The answer's fate is known: remember it, and be free for the next plan."""
        assert self.answer is not None
        answer = self.answer = dataclasses.replace(self.answer, fate=fate, reason=reason or self.answer.reason)
        self._resend_at = None
        if self.state is DeviceState.SENDING:
            self.state = DeviceState.IDLE
        out: list[Any] = [SettleAnswer(answer)]
        if fate is not Fate.ACCEPTED:
            out.append(AbandonSending(MessageId(answer.message_id)))
        if answer.kind is AnswerKind.UPDATE:
            out.append(RecordRound(answer.round, f"refused:{reason}" if fate is Fate.REFUSED else str(fate)))
        return out

    def _on_round_end(self, event: RoundEnded, _now: int) -> list[Any]:
        end = event.end
        if end.round <= self._over:
            return []
        self._over = end.round
        answer = self.answer
        if answer is not None and answer.round == end.round and answer.plan == end.plan:
            if answer.fate is Fate.ACCEPTED and end.outcome is Outcome.ABORTED and answer.kind is AnswerKind.UPDATE:
                return self._settle(Fate.VOID, end.reason[:100])
            return self._settle(Fate.UNANSWERED, "") if answer.fate is Fate.PENDING else []
        if self.state is DeviceState.SENDING and answer is not None and answer.round <= end.round:
            return self._settle(Fate.UNANSWERED, "")
        if self.state in (DeviceState.TRAINING, DeviceState.WAITING):
            assert self._plan is not None
            if self._plan.round <= end.round:
                return self._drop_plan("cancelled" if self.state is DeviceState.TRAINING else "missed")
        return []

    def _on_stop(self, _event: StopRequested, _now: int) -> list[Any]:
        out: list[Any] = [CancelTraining()] if self.state is DeviceState.TRAINING else []
        self.state = DeviceState.STOPPED
        return [*out, Stop()]

    # --- Invariants ---------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Assert every invariant."""
        self.sync.validate()
        working = (DeviceState.WAITING, DeviceState.TRAINING)
        assert self.state not in working or self._plan is not None, "work without a plan"
        if self.state is DeviceState.SENDING:
            assert self.answer is not None, "sending nothing"
            assert self.answer.fate is Fate.PENDING, "sending what is settled"
            assert self.answer.kind is AnswerKind.UPDATE, "waiting for the receipt of a decline"
        if self.state in working and self._plan is not None and self.answer is not None:
            assert self._plan.round > self.answer.round, "working on a plan that is answered"
        if self.state in working and self._plan is not None:
            assert self._plan.round > self._over, "working on a round that is over"
            assert not self._cosigns.spoilt(self._plan.round, self._plan_hash), "working on a plan not cosigned"
