"""The gateway's machine: which round is open, whose messages go to it, and what the tier above is told. No I/O.

Rules (docs/protocol.md, Gateway):

- A plan counts if its round exceeds every round before. It is published below only when the model that it names is
  served, and until then it waits (``waiting``).
- A later plan, or the end of the round, ends the round at once; its journal is deleted, and only the receipts of its
  updates are kept until the next round is over, because their devices may have missed them.
- How far each coordinator's key has counted is remembered by key. When the owners list a key no more, its rounds are
  void, and its count: whoever stole it may have counted as far as numbers go.
- The census is sent when it changes, but not more often than `CENSUS_EVERY`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Final

from fleetfed.gateway import events as ev
from fleetfed.gateway.members import Members
from fleetfed.gateway.record import Place, RoundRecord
from fleetfed.gateway.round import RoundMachine
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.machine import Edge, Machine, TimerFired
from fleetfed.shared.wire.envelope import Digest, Head, MessageId
from fleetfed.shared.wire.messages import Census
from fleetfed.shared.wire.topics import Kind
from fleetfed.shared.wire.update import UpdateExtension

CENSUS_SOON: Final = 100
"""Milliseconds after a change until the census is sent, so that many changes share one."""
CENSUS_EVERY: Final = 1_000
"""Milliseconds between two censuses."""


class GatewayState(StrEnum):
    """What the gateway does."""

    IDLE = "idle"
    """No round."""
    WAITING = "waiting"
    """A plan is here and its model is not."""
    ROUND = "round"
    """A round is on; `RoundMachine` says how far."""


_S = GatewayState
_ANY: Final = (_S.IDLE, _S.WAITING, _S.ROUND)
_ROUND_EVENTS: Final = (
    ev.UpdateArrived,
    ev.DeclineArrived,
    ev.ChildProposed,
    ev.ChildRevealed,
    ev.CommitArrived,
    ev.ReceiptArrived,
    ev.UpdatesJudged,
    ev.ProposalMade,
    ev.RevealMade,
    ev.RefusalMade,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """The round before: what its devices may still ask about.

    Attributes:
        round: its number; 0 for none.
        hash: its plan's.
        accepted: device to message id and head hash of what was accepted.
        mode, aborted: for the status: how it was done, and why it was aborted here; empty after a restart.
        opened: when its plan was, in unix milliseconds; 0 after a restart.
        answered, expected: devices; 0 after a restart.
        journalled: bytes of the updates; 0 after a restart.
    """

    round: int = 0
    hash: Digest | None = None
    accepted: dict[str, tuple[MessageId, Digest]]
    mode: str = ""
    aborted: str = ""
    opened: int = 0
    answered: int = 0
    expected: int = 0
    journalled: int = 0


class GatewayMachine(Machine[GatewayState]):
    """See the module.

    Args:
        site: the site that this gateway serves.
        place: where it stands; ``level`` is looked up anew for every round.
        members: who is there; owned by the machine.
        last_round: the highest round ever opened or ended here.
        previous: what the devices of the last round may still ask about.
        counted: the highest round of each coordinator's key.
    """

    NAME = "gateway"

    def __init__(
        self,
        site: str,
        place: Place,
        *,
        members: Members | None = None,
        last_round: int = 0,
        previous: Previous | None = None,
        counted: dict[bytes, int] | None = None,
    ) -> None:
        super().__init__(GatewayState.IDLE)
        self.site = site
        self.place = place
        self.members = members or Members()
        self.last_round = last_round
        self.previous = previous or Previous(accepted={})
        # What is there without a key was counted before keys were remembered; it stays.
        self.counted: dict[bytes, int] = {b"": last_round} if counted is None else dict(counted)
        self.round: RoundMachine | None = None
        self.served: ev.ModelServed | None = None
        self._pending: ev.PlanArrived | None = None
        self._published = b""
        self._serials: frozenset[int] = frozenset()
        self._connected = False
        self._census: Census | None = None
        self._census_due: int | None = None
        self._census_sent = 0

    def restore(self, record: RoundRecord, ring: Ring, now: int) -> RoundMachine:
        """Go on with a round that the journal holds; `resume` it once its sum is built.

        Raises:
            RemoteProtocolError: an older program than the one that opened it, which cannot go on with it.
        """
        assert self.state is GatewayState.IDLE
        rnd = self._begin(record, ring, now)
        self.last_round = max(self.last_round, record.plan.round)
        return rnd

    def resume(self, now: int) -> list[Any]:
        """What the restored round may have decided but not done."""
        return self.round.resume(now) if self.round else []

    def admit(self, head: Head, device: str, *, now: int) -> bool:
        """Whether an update with this verified head may come in; see `RoundMachine.admit`.

        Raises:
            RemoteProtocolError: the first rule that it breaks.
        """
        extension = UpdateExtension.decode(head)
        if self.round is not None and extension.plan == self.round.record.hash:
            return self.round.admit(head, extension, device, now=now)
        if extension.plan == self.previous.hash:
            if self.previous.accepted.get(device) == (head.header.message_id, head.hash):
                return False
            raise RemoteProtocolError(RejectReason.LATE, f"round {self.previous.round} is over")
        if self.round is not None and head.header.round == self.round.record.plan.round:
            raise RemoteProtocolError(RejectReason.WRONG_PLAN)
        raise RemoteProtocolError(RejectReason.WRONG_ROUND, f"{head.header.round}, last is {self.last_round}")

    def next_deadline(self) -> int | None:
        """The earlier of the round's and the census's."""
        # Without a connection there is nobody to tell: a census that is due would be due for ever.
        times = [self.round.next_deadline() if self.round else None, self._census_due if self._connected else None]
        return min((time for time in times if time is not None), default=None)

    def validate(self) -> None:
        """Assert every invariant."""
        assert (self.round is not None) == (self.state is GatewayState.ROUND)
        assert (self._pending is not None) == (self.state is GatewayState.WAITING)
        if self.round is not None:
            assert self.round.record.plan.round <= self.last_round
            self.round.validate()

    # --- Plans ---------------------------------------------------------------------------------------------------

    def _plan(self, event: ev.PlanArrived, now: int) -> list[Any]:
        current = self._pending.hash if self._pending else self.round.record.hash if self.round else b""
        if event.hash in (current, self.previous.hash):
            return []
        if event.plan.round <= self.last_round:
            same = event.plan.round == self.last_round
            reason = RejectReason.CONFLICT if same else RejectReason.REPLAYED
            return [ev.Refused(what=f"plan {event.plan.round}", reason=reason, detail=f"after {self.last_round}")]
        over = self._end()
        if now >= event.plan.expires:
            self.state = GatewayState.IDLE
            return [*over, ev.Refused(what=f"plan {event.plan.round}", reason=RejectReason.EXPIRED)]
        self._pending = event
        self._count(event.signer, event.plan.round)
        self.state = GatewayState.WAITING
        return [*over, *self._open_if_served(now)]

    def _open_if_served(self, now: int) -> list[Any]:
        pending, served = self._pending, self.served
        if pending is None or served is None or served.version < pending.plan.model_version:
            return []
        self._pending = None
        self.state = GatewayState.IDLE
        plan = pending.plan
        try:
            if now >= plan.expires:
                raise RemoteProtocolError(RejectReason.EXPIRED, "its model came too late")
            if served.version == plan.model_version and served.sha256 != plan.model_sha256:
                raise RemoteProtocolError(RejectReason.WRONG_MODEL, "the plan names another file of this version")
            ring = scheme_of(plan, served.sizes).ring
            rnd = self._begin(RoundRecord(plan=plan, hash=pending.hash), ring, now)
        except RemoteProtocolError as error:
            return [ev.Refused(what=f"plan {plan.round}", reason=error.reason, detail=error.detail)]
        self._published = pending.raw
        self._census_due = self._census_time(now)
        return [
            ev.StoreRound(round=plan.round, hash=pending.hash, raw=pending.raw, sizes=served.sizes),
            ev.PublishPlan(pending.raw),
            *([ev.PublishCosign()] if rnd.rules.cosigned else []),
            *self._to_round(TimerFired(), now),
        ]

    def _begin(self, record: RoundRecord, ring: Ring, now: int) -> RoundMachine:
        self.round = RoundMachine(
            record,
            ring,
            replace(self.place, level=self.members.level),
            devices=self.members.awaited_devices(),
            gateways=self.members.ready_gateways(),
            now=now,
            connected=self._connected,
        )
        self.round.handle(ev.Revoked(serials=self._serials), now)
        self.state = GatewayState.ROUND
        return self.round

    def _end(self) -> list[Any]:
        """Drop whatever is going on."""
        self._pending = None
        if self.round is None:
            return []
        rnd, self.round = self.round, None
        record = rnd.record
        self.previous = Previous(
            round=record.plan.round,
            hash=record.hash,
            accepted={name: (update.message_id, update.head) for name, update in record.accepted.items()},
            mode=str(record.plan.mode),
            aborted=record.aborted,
            opened=record.plan.opened,
            answered=rnd.answered,
            expected=len(rnd.expected),
            journalled=rnd.journalled,
        )
        return [ev.ForgetRound(round=record.plan.round, hash=record.hash), ev.RoundOver(record.plan.round)]

    def _round_end(self, event: ev.RoundEndArrived, now: int) -> list[Any]:
        if event.raw == self._published:
            return []
        if event.round < self.last_round:
            return [ev.Refused(what=f"end of round {event.round}", reason=RejectReason.REPLAYED)]
        record = self.round.record if self.round else None
        if record is not None and event.round == record.plan.round and event.plan != record.hash:
            return [ev.Refused(what=f"end of round {event.round}", reason=RejectReason.WRONG_PLAN)]
        over = self._end()
        self.state = GatewayState.IDLE
        self._count(event.signer, event.round)
        self._published = event.raw
        self._census_due = self._census_time(now)
        return [*over, ev.PublishPlan(event.raw)]

    def _count(self, signer: bytes, round: int) -> None:
        self.last_round = self.counted[signer] = round

    def _coordinators(self, event: ev.CoordinatorsChanged, now: int) -> list[Any]:
        gone = frozenset(key for key in self.counted if key and key not in event.listed)
        if not gone:
            return []
        for key in gone:
            del self.counted[key]
        floor = max(self.counted.values(), default=0)
        out: list[Any] = []
        if self.last_round > floor:
            # Rounds grow: one that is on is the last, and so it was theirs.
            out = [*self._end(), ev.PublishPlan(b"")]
            self.state = GatewayState.IDLE
            self._published = b""
            self._census_due = self._census_time(now)
            self.last_round = floor
            if self.previous.round > floor:
                self.previous = Previous(accepted={})
        return [*out, ev.LowerRound(round=floor, forget=gone)]

    def _model(self, event: ev.ModelServed, now: int) -> list[Any]:
        self.served = event
        self._census_due = self._census_time(now)
        return self._open_if_served(now)

    # --- Members -------------------------------------------------------------------------------------------------

    def _presence(self, event: ev.PresenceArrived, now: int) -> list[Any]:
        try:
            if event.presence is None:
                changed = self.members.gone(event.kind, event.member)
            else:
                changed = self.members.presence(event.kind, event.member, event.presence, now=now)
        except RemoteProtocolError as error:
            return [ev.Refused(what=f"presence of {event.member}", reason=error.reason, detail=error.detail)]
        if not changed:
            return []
        self._census_due = self._census_time(now)
        life = self.members.life(event.kind, event.member)
        return self._to_round(ev.MemberChanged(kind=event.kind, member=event.member, life=life), now)

    def _census_below(self, event: ev.CensusArrived, now: int) -> list[Any]:
        try:
            if self.members.census_of(event.gateway, event.census, now=now):
                self._census_due = self._census_time(now)
        except RemoteProtocolError as error:
            return [ev.Refused(what=f"census of {event.gateway}", reason=error.reason, detail=error.detail)]
        return []

    def _census_time(self, now: int) -> int:
        due = max(now + CENSUS_SOON, self._census_sent + CENSUS_EVERY)
        return due if self._census_due is None else min(due, self._census_due)

    def _send_census(self, now: int) -> list[Any]:
        if self._census_due is None or now < self._census_due or not self._connected:
            return []
        rnd = self.round
        census = self.members.census(
            self.site,
            model_version=self.served.version if self.served else 0,
            round=rnd.record.plan.round if rnd else 0,
            answered=rnd.answered if rnd else 0,
            expected=len(rnd.expected) if rnd else 0,
        )
        self._census_due = None
        if census == self._census:
            return []
        self._census, self._census_sent = census, now
        return [ev.PublishCensus(census)]

    # --- Everything else goes to the round -----------------------------------------------------------------------

    def _to_round(self, event: object, now: int) -> list[Any]:
        if self.round is None:
            return []
        before = self.round.answered
        instructions = self.round.handle(event, now)
        if self.round.answered != before:
            self._census_due = self._census_time(now)
        return instructions

    def _homeless(self, event: Any, now: int) -> list[Any]:
        """The message belongs to a round that is not, or no longer, here."""
        match event:
            case ev.UpdateArrived():
                return [ev.DiscardParcel(update=event), *self._answer_homeless(Kind.DEVICE, event.device, event)]
            case ev.DeclineArrived():
                return self._answer_homeless(Kind.DEVICE, event.device, event)
            case ev.ChildProposed() | ev.ChildRevealed():
                return self._answer_homeless(Kind.GATEWAY, event.gateway, event)
        return []

    def _answer_homeless(self, kind: Kind, member: str, event: Any) -> list[Any]:
        late = isinstance(event, ev.UpdateArrived) or event.plan == self.previous.hash
        reason = RejectReason.LATE if late else RejectReason.WRONG_ROUND
        return [
            ev.Refused(what=f"{type(event).__name__} of {member}", reason=reason),
            ev.SendReceipt(kind=kind, member=member, message_id=event.message_id, head=event.head, reason=reason),
        ]

    def _of_round(self, event: Any, now: int) -> list[Any]:
        assert self.round is not None
        plan = getattr(event, "plan", None)
        if plan is not None and plan != self.round.record.hash:
            if isinstance(event, ev.CommitArrived):
                return [ev.Refused(what="commit", reason=RejectReason.WRONG_PLAN)]
            return self._homeless(event, now)
        return self._to_round(event, now)

    def _timer(self, event: TimerFired, now: int) -> list[Any]:
        return [*self._to_round(event, now), *self._send_census(now)]

    def _site_connected(self, event: ev.SiteConnected, now: int) -> list[Any]:
        self.place = replace(self.place, settled=event.settled)
        return self._to_round(event, now)

    def _connect(self, event: ev.UpstreamConnected, now: int) -> list[Any]:
        self._connected = True
        # The broker may have lost the retained one.
        self._census, self._census_due = None, now + CENSUS_SOON
        return self._to_round(event, now)

    def _disconnect(self, event: ev.UpstreamLost, now: int) -> list[Any]:
        self._connected = False
        self._census_due = None
        return self._to_round(event, now)

    def _revoked(self, event: ev.Revoked, now: int) -> list[Any]:
        self._serials = event.serials
        out = self._to_round(event, now)
        for kind, member in self.members.revoke(event.serials):
            self._census_due = self._census_time(now)
            out += self._to_round(ev.MemberChanged(kind=kind, member=member, life=None), now)
        return out

    TABLE: ClassVar[dict[tuple[Any, type], Edge]] = {
        **{(state, ev.PlanArrived): Edge("_plan", *_ANY) for state in _ANY},
        **{(state, ev.RoundEndArrived): Edge("_round_end", _S.IDLE, _S.WAITING, _S.ROUND) for state in _ANY},
        (_S.IDLE, ev.ModelServed): Edge("_model"),
        (_S.WAITING, ev.ModelServed): Edge("_model", *_ANY),
        (_S.ROUND, ev.ModelServed): Edge("_model"),
        **{(state, ev.PresenceArrived): Edge("_presence") for state in _ANY},
        **{(state, ev.CensusArrived): Edge("_census_below") for state in _ANY},
        **{(state, ev.Revoked): Edge("_revoked") for state in _ANY},
        (_S.IDLE, ev.CoordinatorsChanged): Edge("_coordinators"),
        (_S.WAITING, ev.CoordinatorsChanged): Edge("_coordinators", _S.IDLE, _S.WAITING),
        (_S.ROUND, ev.CoordinatorsChanged): Edge("_coordinators", _S.IDLE, _S.ROUND),
        **{(state, ev.SiteConnected): Edge("_site_connected") for state in _ANY},
        **{(state, ev.UpstreamConnected): Edge("_connect") for state in _ANY},
        **{(state, ev.UpstreamLost): Edge("_disconnect") for state in _ANY},
        **{(state, TimerFired): Edge("_timer") for state in _ANY},
        **{(_S.ROUND, event): Edge("_of_round") for event in _ROUND_EVENTS},
        **{(_S.IDLE, event): Edge("_homeless") for event in _ROUND_EVENTS},
        **{(_S.WAITING, event): Edge("_homeless") for event in _ROUND_EVENTS},
    }
