"""The coordinator's machine, without anything around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator import events as ev
from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.round import Round, SiteRules
from fleetfed.cloud_coordinator.state import CoordinatorMachine, Run, State, Wish
from fleetfed.shared.errors import IllegalTransitionError, RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.messages import Mode

PLAN = Digest(b"p" * 32)


def machine(*, model: bool = True, wish: Wish = Wish.ROUNDS, **settings: Any) -> CoordinatorMachine:
    return CoordinatorMachine(run=Run(wish=wish, settings=RoundSettings(**settings)), has_model=model)


def fleet(
    *gateways: str, devices: int = 10, known: int | None = None, stopped: tuple[str, ...] = ()
) -> ev.FleetChanged:
    known = devices if known is None else known
    return ev.FleetChanged(gateways=frozenset(gateways), stopped=frozenset(stopped), devices=devices, known=known)


def named(gateway: str, number: int = 0) -> ev.Named:
    return ev.Named(
        gateway=gateway,
        message_id=MessageId(number.to_bytes(16, "big")),
        head=Digest(gateway.encode().ljust(31, b"-") + bytes([number])),
    )


def member(device: str) -> ev.Member:
    return ev.Member(
        device=device,
        site="s",
        message_id=MessageId(device.encode().ljust(16)),
        head=Digest(device.encode().ljust(32)),
        size=1,
    )


def proposal(gateway: str, *devices: str, number: int = 0, plan: Digest = PLAN) -> ev.ProposalVerified:
    members = tuple(member(device) for device in devices)
    return ev.ProposalVerified(message=named(gateway, number), plan=plan, members=members)


def commit_hash(gateway: str) -> Digest:
    return Digest(b"commit " + gateway.encode().ljust(25))


def reveal(gateway: str, count: int, *, commit: Digest | None = None, number: int = 100) -> ev.RevealVerified:
    return ev.RevealVerified(
        message=named(gateway, number), plan=PLAN, commit=commit or commit_hash(gateway), count=count
    )


class Driver:
    """Plays the runtime: answers what must be answered at once, and remembers all instructions."""

    def __init__(self, machine: CoordinatorMachine) -> None:
        self.machine = machine
        self.now = 1_000_000
        self.done: list[Any] = []

    def feed(self, *events: object) -> list[Any]:
        begun = len(self.done)
        for event in events:
            self._feed(event)
        return self.done[begun:]

    def _feed(self, event: object) -> None:
        queue = [event]
        while queue:
            for instruction in self.machine.handle(queue.pop(0), self.now):
                self.done.append(instruction)
                match instruction:
                    case ev.OpenRound():
                        queue.append(ev.RoundOpened(plan=PLAN, expires=self.now + 900_000))
                    case ev.StoreCommit(message=message):
                        queue.append(ev.CommitStored(gateway=message.gateway, commit=commit_hash(message.gateway)))
        self.machine.validate()

    def tick(self, milliseconds: int) -> list[Any]:
        self.now += milliseconds
        return self.feed(TimerFired())

    def open(self, *gateways: str) -> None:
        self.feed(fleet(*gateways))
        self.tick(1_000)
        assert self.machine.state is State.COLLECTING


def refusals(instructions: list[Any]) -> list[RejectReason]:
    return [each.reason for each in instructions if isinstance(each, ev.Refuse)]


def test_a_round_waits_for_enough_devices_and_for_gateways_to_gather() -> None:
    driver = Driver(machine(start_when=5))
    driver.feed(fleet("a", devices=4))
    driver.tick(10_000)
    assert driver.machine.state is State.WAITING
    assert driver.machine.next_deadline() is None
    driver.feed(fleet("a", "b", devices=5))
    assert driver.machine.state is State.WAITING
    deadline = driver.machine.next_deadline()
    assert deadline is not None
    driver.tick(deadline - driver.now)
    assert driver.machine.state is State.COLLECTING
    assert driver.machine.round is not None
    assert driver.machine.round.awaited == {"a", "b"}


def waiting_for_ten() -> Driver:
    driver = Driver(machine(start_when=10))
    driver.feed(fleet("a", devices=9, known=10))
    driver.tick(10_000)
    assert driver.machine.state is State.WAITING
    return driver


@pytest.mark.parametrize("first", ["list", "census"])
def test_who_was_revoked_is_no_longer_asked_for(first: str) -> None:
    driver = waiting_for_ten()
    news: list[object] = [ev.CertificatesRevoked(1), fleet("a", devices=9)]
    driver.feed(*(news if first == "list" else reversed(news)))
    assert driver.machine.state is State.COLLECTING


def test_several_certificates_of_one_device_are_one_device() -> None:
    driver = waiting_for_ten()
    driver.feed(ev.CertificatesRevoked(3), fleet("a", devices=8, known=9))
    assert driver.machine.state is State.WAITING
    driver.feed(fleet("a", devices=9))
    assert driver.machine.state is State.COLLECTING


def test_a_number_below_the_fleets_stays_as_it_is_when_others_are_revoked() -> None:
    driver = Driver(machine(start_when=5))
    driver.feed(ev.CertificatesRevoked(4), fleet("a", devices=4, known=96))
    driver.tick(10_000)
    assert driver.machine.state is State.WAITING


def test_a_gateway_that_knows_few_devices_yet_opens_no_round_with_those() -> None:
    driver = waiting_for_ten()
    driver.feed(ev.CertificatesRevoked(1), fleet("a", devices=2))
    assert driver.machine.state is State.WAITING
    assert driver.machine.needed == 9


def test_what_was_revoked_before_the_rounds_were_asked_for_lowers_nothing() -> None:
    driver = waiting_for_ten()
    driver.feed(ev.CertificatesRevoked(1))
    driver.feed(ev.StartRequested(RoundSettings(start_when=10)), fleet("a", devices=9))
    assert driver.machine.state is State.WAITING
    assert driver.machine.needed == 10


def test_a_round_closes_when_every_awaited_gateway_has_revealed() -> None:
    driver = Driver(machine())
    driver.open("a", "b")
    driver.feed(proposal("a", "x", "y"), proposal("b", "z"), reveal("a", 2))
    assert driver.machine.state is State.COLLECTING
    assert ev.StartStep(1) in driver.feed(reveal("b", 1))
    assert driver.machine.state is State.STEPPING


def test_an_empty_proposal_needs_no_reveal() -> None:
    driver = Driver(machine())
    driver.open("a", "b")
    driver.feed(proposal("a"), proposal("b", "z"))
    assert ev.StartStep(1) in driver.feed(reveal("b", 1))


def test_a_gateway_that_was_not_awaited_is_waited_for_once_it_has_a_commit() -> None:
    driver = Driver(machine())
    driver.open("a")
    driver.feed(proposal("late", "w"), proposal("a", "x"), reveal("a", 1))
    assert driver.machine.state is State.COLLECTING
    assert ev.StartStep(1) in driver.feed(reveal("late", 1))


def test_a_gateway_that_comes_back_in_mid_round_is_waited_for_while_it_is_there() -> None:
    driver = Driver(machine())
    driver.open("a")
    driver.feed(fleet("a", "back"), proposal("a", "x"), reveal("a", 1))
    assert driver.machine.state is State.COLLECTING
    driver.feed(proposal("back", "w"))
    assert ev.StartStep(1) in driver.feed(reveal("back", 1))


def test_a_gateway_that_came_back_and_went_again_holds_nobody_up() -> None:
    driver = Driver(machine())
    driver.open("a")
    driver.feed(fleet("a", "back"), proposal("a", "x"), reveal("a", 1))
    assert ev.StartStep(1) in driver.feed(fleet("a"))


def test_a_gateway_that_stops_for_good_is_not_waited_for() -> None:
    driver = Driver(machine())
    driver.open("a", "b")
    driver.feed(proposal("a", "x"), reveal("a", 1))
    done = driver.feed(fleet("a", stopped=("b",)))
    assert done[0] == ev.StoreAwaited(1, frozenset({"a"}))
    assert driver.machine.state is State.STEPPING


def test_a_gateway_that_is_lost_is_waited_for_until_the_round_expires() -> None:
    driver = Driver(machine())
    driver.open("a", "b")
    driver.feed(proposal("a", "x"), reveal("a", 1), fleet("a"))
    driver.tick(800_000)
    assert driver.machine.state is State.COLLECTING
    driver.tick(200_000)
    assert driver.machine.state is State.STEPPING


def test_too_few_contributors_abort_the_round_and_the_next_waits_longer_each_time() -> None:
    driver = Driver(machine(quorum_minimum=2))
    driver.open("a")
    waits = []
    for number in range(1, 5):
        done = driver.feed(proposal("a", "x"), reveal("a", 1))
        (abort,) = [each for each in done if isinstance(each, ev.StoreAbort)]
        assert abort == ev.StoreAbort(number, "below_minimum: 1 of at least 2 contributors")
        deadline = driver.machine.next_deadline()
        assert deadline is not None
        waits.append(deadline - driver.now)
        driver.tick(waits[-1])
        assert driver.machine.last_round == number + 1
    assert waits == [1_000, 2_000, 4_000, 8_000]


def test_rounds_follow_each_other_after_the_interval() -> None:
    driver = Driver(machine(interval=5.0))
    driver.open("a")
    driver.feed(proposal("a", "x"), reveal("a", 1), ev.StepStored(version=2, accuracy=None))
    assert driver.machine.state is State.WAITING
    driver.tick(4_999)
    assert driver.machine.state is State.WAITING
    driver.tick(1)
    assert driver.machine.state is State.COLLECTING


@pytest.mark.parametrize(
    ("settings", "accuracies", "state"),
    [
        ({"rounds": 2}, [None, None], State.FINISHED),
        ({"rounds": 3}, [None, None], State.COLLECTING),
        ({"target_accuracy": 0.9}, [0.5, 0.9], State.FINISHED),
        ({"target_accuracy": 0.9}, [0.5, 0.89], State.COLLECTING),
        ({"target_accuracy": 0.9}, [0.5, None], State.COLLECTING),
    ],
)
def test_training_is_finished_when_a_goal_is_reached(
    settings: dict[str, Any], accuracies: list[float | None], state: State
) -> None:
    driver = Driver(machine(**settings))
    driver.open("a")
    for number, accuracy in enumerate(accuracies):
        driver.feed(proposal("a", "x"), reveal("a", 1), ev.StepStored(version=number + 2, accuracy=accuracy))
    assert driver.machine.state is state
    if state is State.FINISHED:
        driver.feed(ev.StartRequested(RoundSettings()))
        assert driver.machine.state is State.COLLECTING


@pytest.mark.parametrize("newcomer", [False, True])
def test_a_clock_that_is_put_back_does_not_put_off_the_next_round(newcomer: bool) -> None:
    waiting = machine(interval=60.0)
    waiting.handle(fleet("g1"), 1_000_000_000)
    waiting.handle(TimerFired(), 1_000_000_250)
    waiting.handle(ev.RoundOpened(plan=PLAN, expires=1_000_900_000), 1_000_000_250)
    waiting.handle(ev.AbortRequested("test"), 1_000_001_000)
    waiting.handle(ev.ResumeRequested(), 1_000_001_000)
    assert waiting.next_deadline() == 1_000_061_000
    waiting.handle(fleet("g1", "g2") if newcomer else TimerFired(), 5_000)
    assert waiting.next_deadline() == 65_000


def test_a_step_that_fails_pauses() -> None:
    driver = Driver(machine())
    driver.open("a")
    done = driver.feed(proposal("a", "x"), reveal("a", 1), ev.StepFailed("NaN"))
    assert ev.StoreAbort(1, "NaN") in done
    assert driver.machine.state is State.PAUSED


def test_what_is_late_is_refused_and_changes_nothing() -> None:
    driver = Driver(machine())
    assert refusals(driver.feed(proposal("a", "x"), reveal("a", 1))) == [RejectReason.LATE] * 2
    driver.open("a")
    driver.feed(proposal("a", "x"), reveal("a", 1))
    assert refusals(driver.feed(proposal("b", "y"))) == [RejectReason.LATE]
    assert driver.machine.round is not None
    assert driver.machine.round.committed == 1


def test_without_a_model_nothing_runs() -> None:
    driver = Driver(machine(model=False))
    driver.feed(ev.Started(), fleet("a"))
    driver.tick(10_000)
    assert driver.machine.state is State.NO_MODEL
    done = driver.feed(ev.ModelStored(1))
    assert done[0] == ev.PublishModel()
    assert driver.machine.state is State.COLLECTING


def test_an_event_out_of_place_tells_its_story() -> None:
    with pytest.raises(IllegalTransitionError, match="StepStored is not allowed in state waiting"):
        machine().handle(ev.StepStored(version=2, accuracy=None), 0)


def test_the_diagram_names_every_state() -> None:
    diagram = CoordinatorMachine.diagram()
    assert all(state.value in diagram for state in State)


_GATEWAYS = ("a", "b", "c")
_DEVICES = ("u", "v", "w", "x", "y", "z")
_acts: dict[str, Callable[[Any, Driver], object]] = {
    "proposal": lambda draw, _: proposal(
        draw(st.sampled_from(_GATEWAYS)),
        *draw(st.lists(st.sampled_from(_DEVICES), max_size=3)),
        number=draw(st.integers(0, 2)),
    ),
    "reveal": lambda draw, _: reveal(
        draw(st.sampled_from(_GATEWAYS)), draw(st.integers(0, 3)), number=draw(st.integers(100, 101))
    ),
    "fleet": lambda draw, _: fleet(*draw(st.sets(st.sampled_from(_GATEWAYS)))),
    "stopped": lambda draw, _: fleet(stopped=tuple(draw(st.sets(st.sampled_from(_GATEWAYS))))),
    "pause": lambda _, __: ev.PauseRequested(),
    "resume": lambda _, __: ev.ResumeRequested(),
    "abort": lambda _, __: ev.AbortRequested("test"),
    "start": lambda _, __: ev.StartRequested(RoundSettings(rounds=2)),
    "stored": lambda _, __: ev.StepStored(version=2, accuracy=0.5),
    "failed": lambda _, __: ev.StepFailed("test"),
}


@given(st.data())
def test_any_story_keeps_the_invariants_and_counts_nobody_twice(data: st.DataObject) -> None:
    driver = Driver(machine(quorum_minimum=2, cohort_cap=4))
    driver.feed(ev.Started(), fleet("a", "b"))
    for _ in range(data.draw(st.integers(0, 25))):
        name = data.draw(st.sampled_from([*_acts, "time"]))
        if name == "time":
            driver.tick(data.draw(st.sampled_from([1, 500, 10_000, 1_000_000])))
            continue
        event = _acts[name](data.draw, driver)
        if (driver.machine.state, type(event)) in CoordinatorMachine.TABLE:
            driver.feed(event)
    committed: dict[str, str] = {}
    rounds: set[int] = set()
    for instruction in driver.done:
        match instruction:
            case ev.OpenRound(number=number):
                assert number not in rounds
                rounds.add(number)
                committed = {}
            case ev.StoreCommit(message=message, members=members):
                for each in members:
                    assert committed.setdefault(each.device, message.gateway) == message.gateway
                assert len(committed) <= 4


def test_a_round_that_cannot_be_opened_is_tried_again_if_that_may_pass() -> None:
    driver = Driver(machine())
    state_machine = driver.machine
    state_machine.handle(fleet("a"), driver.now)
    (opening,) = state_machine.handle(TimerFired(), driver.now + 1_000)
    assert isinstance(opening, ev.OpenRound)
    driver.now += 1_000
    driver.feed(ev.OpenRefused(reason="no helper", passing=True))
    assert (state_machine.state, state_machine.last_round) == (State.WAITING, 0)
    assert state_machine.run.problem == "no helper"
    deadline = state_machine.next_deadline()
    assert deadline is not None
    driver.tick(deadline - driver.now)
    assert state_machine.state is State.COLLECTING
    assert state_machine.round is not None
    assert state_machine.round.number == 1
    assert state_machine.run.problem == ""


def test_a_round_that_nobody_would_obey_pauses_the_rounds() -> None:
    driver = Driver(machine())
    driver.machine.handle(fleet("a"), driver.now)
    driver.machine.handle(TimerFired(), driver.now + 1_000)
    driver.feed(ev.OpenRefused(reason="below policy"))
    assert (driver.machine.state, driver.machine.run.problem) == (State.PAUSED, "below policy")
    assert driver.machine.next_deadline() is None
    driver.feed(ev.ResumeRequested())
    assert driver.machine.run.problem == ""


def test_without_a_helper_no_round_with_two_seed_holders_opens() -> None:
    driver = Driver(machine(mode=Mode.SPLIT, seed_holders=2))
    driver.feed(fleet("a"))
    driver.tick(10_000)
    assert (driver.machine.state, driver.machine.next_deadline()) == (State.WAITING, None)
    driver.feed(replace(fleet("a"), helper=True))
    assert driver.machine.state is State.COLLECTING


def test_a_failed_reveal_ends_its_gateways_part_and_counts_nothing() -> None:
    driver = Driver(machine(quorum_minimum=2))
    driver.open("a", "b")
    driver.feed(proposal("a", "d1", "d2", "d3"), proposal("b", "d4", "d5"))
    done = driver.feed(replace(reveal("a", 3), failed=RejectReason.OUT_OF_RANGE))
    assert [type(each) for each in done] == [ev.StoreReveal, ev.SendStoredReceipt]
    done = driver.feed(replace(reveal("b", 2), lost=1))
    assert any(isinstance(each, ev.StoreAbort) for each in done)


members = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["n", "s"]), st.sampled_from(["", "x", "y"]), st.integers(0, 25)),
    max_size=30,
)


@given(st.lists(members, max_size=3), st.integers(2, 6), st.integers(1, 3))
def test_whatever_is_committed_keeps_the_rules_of_split_mode(
    proposals: list[list[tuple[int, str, str, int]]], minimum: int, owners: int
) -> None:
    rules = SiteRules(minimum_cohort=minimum, minimum_owners=owners)
    round_ = Round(number=1, plan=PLAN, expires=1, minimum=1, cohort_cap=40, awaited=(), rules=rules)
    seeds: list[bytes] = []
    devices: list[str] = []
    for number, drawn in enumerate(proposals):
        proposed = tuple(
            ev.Member(
                device=f"d{device}",
                site=site,
                owner=owner,
                message_id=MessageId(bytes([number, place]) * 8),
                head=Digest(bytes([number, place]) * 16),
                size=1,
                seed=bytes([seed]),
            )
            for place, (device, site, owner, seed) in enumerate(drawn)
        )
        event = ev.ProposalVerified(message=named(f"g{number}"), plan=PLAN, members=proposed)
        committed, excluded = round_.admit(event)
        assert {member.head.hex() for member in committed}.isdisjoint(excluded)
        assert len(committed) + len(excluded) == len(proposed)
        for site in {member.site for member in committed}:
            own = [member for member in committed if member.site == site]
            left_out = sum(member.site == site for member in proposed) - len(own)
            assert len(own) >= minimum
            assert len({member.owner for member in own}) >= owners
            assert left_out <= max(2, 0.05 * (len(own) + left_out))
        seeds += [member.seed for member in committed]
        devices += [member.device for member in committed]
        round_.validate()
    assert len(set(seeds)) == len(seeds)
    assert len(set(devices)) == len(devices)
