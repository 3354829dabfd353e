"""The coordinator's machine: decides when rounds open and close, what counts, and when training is finished.

======================  ==============================================================================================
no_model                there is nothing to train yet
idle                    nobody has asked for rounds
waiting                 rounds are wanted; the fleet is not ready, or the interval is not over
opening                 a plan is being signed and stored
collecting              a round is open (`round.Round`)
stepping                the round is closed; its version is being computed
paused                  an operator stopped the rounds
finished                the rounds, or the accuracy, that were asked for are reached
======================  ==============================================================================================

What an operator wants (`Run`) is durable, and so is all that `round.Round` holds; the state follows from both. So a
restart needs no more than the database: `CoordinatorMachine` with what it says, then `events.Started`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Final

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.events import (
    AbortRequested,
    CertificatesRevoked,
    CommitStored,
    FleetChanged,
    Instruction,
    ModelStored,
    OpenRefused,
    OpenRound,
    PauseRequested,
    ProposalVerified,
    PublishEnd,
    PublishModel,
    PublishPlan,
    PublishStatus,
    Refuse,
    ResumeRequested,
    RevealVerified,
    RoundOpened,
    SendCommit,
    SendStoredReceipt,
    Started,
    StartRequested,
    StartStep,
    StepFailed,
    StepStored,
    StoreAbort,
    StoreAwaited,
    StoreCommit,
    StoreReveal,
    StoreRun,
)
from fleetfed.cloud_coordinator.round import Round, SiteRules
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import Edge, Machine, TimerFired
from fleetfed.shared.wire.messages import Mode

_RETRY_FIRST: Final = 1_000
_RETRY_MOST: Final = 60_000
"""Milliseconds between rounds that fail: a fleet of which nobody is selected must not be asked without end."""

_SETTLE: Final = 250
"""Milliseconds to wait after a gateway shows itself for the first time: after a start they come one by one, and a round
that opens with the first would be over before it waits for the second."""


class State(StrEnum):
    """See the module."""

    NO_MODEL = "no_model"
    IDLE = "idle"
    WAITING = "waiting"
    OPENING = "opening"
    COLLECTING = "collecting"
    STEPPING = "stepping"
    PAUSED = "paused"
    FINISHED = "finished"


class Wish(StrEnum):
    """What an operator wants."""

    NOTHING = "nothing"
    ROUNDS = "rounds"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What an operator wants, durable.

    Attributes:
        wish: rounds or none.
        settings: of the rounds.
        first_round: the rounds that count towards ``settings.rounds`` are this one and later.
        problem: why no round could be opened, or made a version of, when that was tried last; empty for nothing.
        revoked: certificates that were revoked since the rounds were asked for.
    """

    wish: Wish = Wish.NOTHING
    settings: RoundSettings
    first_round: int = 1
    problem: str = ""
    revoked: int = 0


class CoordinatorMachine(Machine[State]):
    """See the module.

    Args:
        run: what is wanted.
        has_model: whether there is a version.
        last_round: number of the last round, 0 for none.
        made: versions that this run's rounds have made.
        accuracy: what the last of them reached, if anything measured it.
        round_: the open round.
    """

    NAME = "coordinator"
    TABLE: ClassVar[dict[tuple[State, type], Edge]]

    def __init__(
        self,
        *,
        run: Run,
        has_model: bool,
        last_round: int = 0,
        made: int = 0,
        accuracy: float | None = None,
        round_: Round | None = None,
    ) -> None:
        super().__init__(State.COLLECTING if round_ is not None else State.NO_MODEL)
        self.run = run
        self.round = round_
        self.last_round = last_round
        self.made = made
        self.fleet = FleetChanged(gateways=frozenset(), devices=0)
        self._has_model = has_model
        self._accuracy = accuracy
        self._not_before = 0
        self._waits_since = 0
        self._failures = 0
        self._met: frozenset[str] = frozenset()
        if round_ is None:
            self.state = self._resting()

    def next_deadline(self) -> int | None:
        """When the open round expires, or the next may begin."""
        if self.state is State.COLLECTING and self.round is not None:
            return self.round.expires
        if self.state is State.WAITING and self._fleet_is_ready():
            return self._not_before
        return None

    @property
    def reached(self) -> bool:
        """Whether this run has the accuracy that it is for."""
        return 0 < self.run.settings.target_accuracy <= (self._accuracy or 0.0)

    @property
    def needed(self) -> int:
        """Devices that must be ready or asleep before a round opens.

        Whoever was revoked since ``start_when`` was given cannot come any more: it goes down to the devices that are
        left, by one per certificate at most, so that a gateway that knows few for a moment opens no round with those.
        """
        wanted = self.run.settings.start_when
        return max(1, wanted - self.run.revoked, min(wanted, self.fleet.known))

    def validate(self) -> None:
        """Assert every invariant."""
        assert (self.round is not None) == (self.state in (State.COLLECTING, State.STEPPING)), self.state
        assert self._has_model or self.state is State.NO_MODEL
        assert self.state is not State.WAITING or self.run.wish is Wish.ROUNDS
        assert self.state is not State.STEPPING or (self.round is not None and self.round.enough)
        if self.round is not None:
            assert self.round.number == self.last_round
            self.round.validate()

    # --- Whether and when ---------------------------------------------------------------------------------------------

    def _resting(self) -> State:
        """The state between rounds."""
        if not self._has_model:
            return State.NO_MODEL
        if self.run.wish is Wish.NOTHING:
            return State.IDLE
        if self.run.wish is Wish.PAUSE:
            return State.PAUSED
        if self.reached or 0 < self.run.settings.rounds <= self.made:
            return State.FINISHED
        return State.WAITING

    def _fleet_is_ready(self) -> bool:
        settings = self.run.settings
        enough = bool(self.fleet.gateways) and self.fleet.devices >= self.needed
        return enough and (self.fleet.helper or not settings.needs_helper)

    def _rest(self, now: int) -> list[Instruction]:
        """Go to the state between rounds, and on to the next round if all is ready."""
        self.round = None
        self.state = self._resting()
        self._heed_clock(now)
        if self.state is not State.WAITING or now < self._not_before or not self._fleet_is_ready():
            return [PublishStatus()]
        self.state = State.OPENING
        self.last_round += 1
        return [OpenRound(number=self.last_round, settings=self.run.settings, awaited=self.fleet.gateways)]

    def _heed_clock(self, now: int) -> None:
        """If the clock was put back, wait as long as was meant, and not until that time comes again."""
        if now < self._waits_since:
            self._not_before, self._waits_since = now + self._not_before - self._waits_since, now

    def _rest_later(self, now: int) -> list[Instruction]:
        """As `_rest`, after an interval."""
        wait = round(self.run.settings.interval * 1000)
        if self._failures:
            wait = max(wait, min(_RETRY_FIRST << min(self._failures - 1, 10), _RETRY_MOST))
        self._not_before, self._waits_since = now + wait, now
        return self._rest(now)

    def _close_if_complete(self, now: int) -> list[Instruction]:
        assert self.round is not None
        return self._close(now) if self.round.complete(self.fleet.gateways) else []

    def _close(self, now: int) -> list[Instruction]:
        assert self.round is not None
        if self.round.enough:
            self.state = State.STEPPING
            return [StartStep(self.round.number), PublishStatus()]
        have, need = self.round.revealed, self.round.minimum
        return self._abort(f"{RejectReason.BELOW_MINIMUM}: {have} of at least {need} contributors", now)

    def _abort(self, reason: str, now: int) -> list[Instruction]:
        assert self.round is not None
        number = self.round.number
        self._failures += 1
        return [StoreAbort(number, reason), PublishEnd(number), *self._rest_later(now)]

    # --- Edges --------------------------------------------------------------------------------------------------------

    def _started(self, event: Started, now: int) -> list[Instruction]:
        del event
        if self.round is None:
            return self._rest(now)
        again = [
            SendCommit(gateway)
            for gateway, exchange in sorted(self.round.exchanges.items())
            if exchange.commit is not None and not exchange.done
        ]
        if now >= self.round.expires:
            return self._close(now)
        return [*again, *self._close_if_complete(now)]

    def _model_stored(self, event: ModelStored, now: int) -> list[Instruction]:
        del event
        self._has_model = True
        # What another model had reached says nothing about this one.
        self._accuracy = None
        return [PublishModel(), *self._rest(now)]

    def _meet(self, event: FleetChanged, now: int) -> None:
        self.fleet = event
        self._heed_clock(now)
        if not event.gateways <= self._met:
            self._met |= event.gateways
            self._not_before, self._waits_since = max(self._not_before, now + _SETTLE), now

    def _fleet_changed(self, event: FleetChanged, now: int) -> list[Instruction]:
        self._meet(event, now)
        return self._rest(now) if self.state is State.WAITING else []

    def _fleet_changed_in_round(self, event: FleetChanged, now: int) -> list[Instruction]:
        self._meet(event, now)
        assert self.round is not None
        gone = {gateway for gateway in self.round.awaited & event.stopped if gateway not in self.round.exchanges}
        self.round.awaited -= gone
        stored = [StoreAwaited(self.round.number, frozenset(self.round.awaited))] if gone else []
        return [*stored, *self._close_if_complete(now)]

    def _certificates_revoked(self, event: CertificatesRevoked, now: int) -> list[Instruction]:
        if self.run.wish is Wish.NOTHING:
            return []
        self.run = replace(self.run, revoked=self.run.revoked + event.count)
        return [StoreRun(), *(self._rest(now) if self.state is State.WAITING else [])]

    def _timer(self, event: TimerFired, now: int) -> list[Instruction]:
        del event
        return self._rest(now) if self.state is State.WAITING else []

    def _timer_in_round(self, event: TimerFired, now: int) -> list[Instruction]:
        del event
        assert self.round is not None
        return self._close(now) if now >= self.round.expires else []

    def _start(self, event: StartRequested, now: int) -> list[Instruction]:
        self.run = Run(wish=Wish.ROUNDS, settings=event.settings, first_round=self.last_round + 1)
        self.made = 0
        self._accuracy = None
        self._failures = 0
        return [StoreRun(), *self._rest(now)]

    def _pause(self, event: PauseRequested, now: int) -> list[Instruction]:
        del event
        self.run = replace(self.run, wish=Wish.PAUSE)
        return [StoreRun(), *self._rest(now)]

    def _pause_later(self, event: PauseRequested, now: int) -> list[Instruction]:
        del event, now
        self.run = replace(self.run, wish=Wish.PAUSE)
        return [StoreRun(), PublishStatus()]

    def _resume(self, event: ResumeRequested, now: int) -> list[Instruction]:
        del event
        self.run = replace(self.run, wish=Wish.ROUNDS, problem="")
        self._failures = 0
        return [StoreRun(), *self._rest(now)]

    def _resume_in_round(self, event: ResumeRequested, now: int) -> list[Instruction]:
        del event, now
        self.run = replace(self.run, wish=Wish.ROUNDS)
        return [StoreRun(), PublishStatus()]

    def _abort_requested(self, event: AbortRequested, now: int) -> list[Instruction]:
        self.run = replace(self.run, wish=Wish.PAUSE)
        return [StoreRun(), *self._abort(event.reason, now)]

    def _opened(self, event: RoundOpened, now: int) -> list[Instruction]:
        del now
        settings = self.run.settings
        self.round = Round(
            number=self.last_round,
            plan=event.plan,
            expires=event.expires,
            minimum=settings.quorum_minimum,
            cohort_cap=settings.cohort_cap,
            awaited=self.fleet.gateways,
            rules=rules_of(settings),
        )
        self.state = State.COLLECTING
        if self.run.problem:
            self.run = replace(self.run, problem="")
            return [StoreRun(), PublishPlan(self.last_round), PublishStatus()]
        return [PublishPlan(self.last_round), PublishStatus()]

    def _open_refused(self, event: OpenRefused, now: int) -> list[Instruction]:
        # Nothing was published under this number.
        self.last_round -= 1
        self._failures += 1
        # What will not pass by itself fails again, however often it is tried: somebody has to look.
        wish = self.run.wish if event.passing else Wish.PAUSE
        self.run = replace(self.run, wish=wish, problem=event.reason)
        return [StoreRun(), *self._rest_later(now)]

    def _proposal(self, event: ProposalVerified, now: int) -> list[Instruction]:
        del now
        assert self.round is not None
        reason = self.round.judge_proposal(event)
        if reason is not None:
            return [Refuse(message=event.message, reason=reason)]
        if self.round.is_repeated(event):
            return [SendCommit(event.message.gateway)]
        members, excluded = self.round.admit(event)
        return [
            StoreCommit(
                message=event.message,
                members=members,
                excluded=excluded,
                declined=event.declined,
                rejected=event.rejected,
            )
        ]

    def _committed(self, event: CommitStored, now: int) -> list[Instruction]:
        assert self.round is not None
        self.round.exchanges[event.gateway].commit = event.commit
        return [SendCommit(event.gateway), *self._close_if_complete(now)]

    def _reveal(self, event: RevealVerified, now: int) -> list[Instruction]:
        assert self.round is not None
        reason = self.round.judge_reveal(event)
        if reason is not None:
            return [Refuse(message=event.message, reason=reason)]
        exchange = self.round.exchanges[event.message.gateway]
        if exchange.reveal is not None:
            return [SendStoredReceipt(event.message.gateway)]
        exchange.reveal = event.message.head
        exchange.contributors = 0 if event.failed is not None else event.count - event.lost
        return [
            StoreReveal(event.message),
            SendStoredReceipt(event.message.gateway),
            *self._close_if_complete(now),
        ]

    def _late(self, event: ProposalVerified | RevealVerified, now: int) -> list[Instruction]:
        del now
        return [Refuse(message=event.message, reason=RejectReason.LATE, detail="no such round is open")]

    def _step_stored(self, event: StepStored, now: int) -> list[Instruction]:
        assert self.round is not None
        number = self.round.number
        self.made += 1
        self._accuracy = event.accuracy
        self._failures = 0
        return [PublishModel(), PublishEnd(number), *self._rest_later(now)]

    def _step_failed(self, event: StepFailed, now: int) -> list[Instruction]:
        # The same sums would fail again, and so might the next: somebody has to look.
        self.run = replace(self.run, wish=Wish.PAUSE, problem=event.reason)
        return [StoreRun(), *self._abort(event.reason, now)]


def rules_of(settings: RoundSettings) -> SiteRules | None:
    """The rules for each site's members that go with the settings of a round."""
    if settings.mode is not Mode.SPLIT:
        return None
    return SiteRules(minimum_cohort=settings.minimum_cohort, minimum_owners=settings.minimum_owners)


def _table() -> dict[tuple[State, type], Edge]:
    s = State
    between = (s.NO_MODEL, s.IDLE, s.WAITING, s.OPENING, s.PAUSED, s.FINISHED)
    resting = tuple(state for state in between if state is not s.OPENING)
    table: dict[tuple[State, type], Edge] = {}
    for state in resting:
        table[state, Started] = Edge("_started", state, s.OPENING) if state is s.WAITING else Edge("_started", state)
        table[state, ModelStored] = Edge("_model_stored", *between)
        waits = (state, s.OPENING) if state is s.WAITING else (state,)
        table[state, FleetChanged] = Edge("_fleet_changed", *waits)
        table[state, CertificatesRevoked] = Edge("_certificates_revoked", *waits)
        table[state, TimerFired] = Edge("_timer", *waits)
        table[state, StartRequested] = Edge("_start", s.NO_MODEL, s.WAITING, s.OPENING)
        table[state, PauseRequested] = Edge("_pause", s.NO_MODEL, s.PAUSED)
        table[state, ResumeRequested] = Edge("_resume", s.NO_MODEL, s.WAITING, s.OPENING, s.FINISHED)
    for state in (s.COLLECTING, s.STEPPING):
        table[state, CertificatesRevoked] = Edge("_certificates_revoked")
    for state in (*resting, s.STEPPING):
        table[state, ProposalVerified] = Edge("_late", state)
        table[state, RevealVerified] = Edge("_late", state)
    ended = (s.IDLE, s.WAITING, s.OPENING, s.PAUSED, s.FINISHED)
    closed = (s.STEPPING, *ended)
    table |= {
        (s.OPENING, RoundOpened): Edge("_opened", s.COLLECTING),
        (s.OPENING, OpenRefused): Edge("_open_refused", s.WAITING, s.PAUSED),
        (s.COLLECTING, Started): Edge("_started", s.COLLECTING, *closed),
        (s.COLLECTING, FleetChanged): Edge("_fleet_changed_in_round", s.COLLECTING, *closed),
        (s.COLLECTING, TimerFired): Edge("_timer_in_round", s.COLLECTING, *closed),
        (s.COLLECTING, PauseRequested): Edge("_pause_later"),
        (s.COLLECTING, ResumeRequested): Edge("_resume_in_round"),
        (s.COLLECTING, AbortRequested): Edge("_abort_requested", s.PAUSED),
        (s.COLLECTING, ProposalVerified): Edge("_proposal"),
        (s.COLLECTING, CommitStored): Edge("_committed", s.COLLECTING, *closed),
        (s.COLLECTING, RevealVerified): Edge("_reveal", s.COLLECTING, *closed),
        (s.STEPPING, FleetChanged): Edge("_fleet_changed"),
        (s.STEPPING, TimerFired): Edge("_timer"),
        (s.STEPPING, PauseRequested): Edge("_pause_later"),
        (s.STEPPING, ResumeRequested): Edge("_resume_in_round"),
        (s.STEPPING, StepStored): Edge("_step_stored", *ended),
        (s.STEPPING, StepFailed): Edge("_step_failed", s.PAUSED),
    }
    return table


CoordinatorMachine.TABLE = _table()
