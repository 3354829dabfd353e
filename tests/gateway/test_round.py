"""A round's machine without I/O: when it closes, what is answered how, and what no order of events can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fleetfed_testing.round_events import (
    FLEET,
    HASH,
    MADE,
    MASKED,
    PLAN,
    child,
    child_reveal,
    commit,
    kinds,
    name_of,
    revealed,
    update,
)
from fleetfed_testing.signed_fleet import T0
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.gateway import events as ev
from fleetfed.gateway.record import NEVER, Accepted, Child, Place, RoundRecord, RoundState, Sent, close_time
from fleetfed.gateway.round import KEPT, LONELY, RETRY, RETRY_CAP, RoundMachine
from fleetfed.gateway.state import CENSUS_SOON, GatewayMachine
from fleetfed.shared.errors import IllegalTransitionError, RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.envelope import Digest, MessageId, digest
from fleetfed.shared.wire.messages import Life, Plan, Presence
from fleetfed.shared.wire.topics import Kind

Make = Callable[..., RoundMachine]


@pytest.fixture
def make() -> Any:
    """Makes machines, and checks every invariant of each when the test is over."""
    made: list[RoundMachine] = []

    def build(*devices: str, gateways: tuple[str, ...] = (), plan: Plan = PLAN, **place: Any) -> RoundMachine:
        machine = RoundMachine(
            RoundRecord(plan=plan, hash=HASH),
            FLEET.ring,
            Place(**{"gateway": "g", "direct": True, "settled": 0, **place}),
            devices=devices,
            gateways=gateways,
            now=T0,
        )
        machine.handle(ev.UpstreamConnected(), T0)
        made.append(machine)
        return machine

    yield build
    for machine in made:
        machine.validate()


def proposed(machine: RoundMachine, *devices: str, now: int = T0) -> RoundMachine:
    for device in devices:
        machine.handle(update(device), now)
    assert machine.state is RoundState.PROPOSED
    machine.handle(MADE, now)
    return machine


# --- Closing ---------------------------------------------------------------------------------------------------------


def test_without_the_tier_above_no_census_is_due() -> None:
    machine = GatewayMachine("north", Place(gateway="g-north", direct=True))
    machine.handle(ev.UpstreamConnected(), T0)
    machine.handle(ev.UpstreamLost(), T0 + 1)
    ready = ev.PresenceArrived(kind=Kind.DEVICE, member="d-1", presence=Presence(life=Life.READY, session=1))
    machine.handle(ready, T0 + 2)
    assert machine.next_deadline() is None, "its timer would fire for ever"
    machine.handle(ev.UpstreamConnected(), T0 + 3)
    assert machine.next_deadline() == T0 + 3 + CENSUS_SOON


def test_it_closes_when_all_expected_have_answered(make: Make) -> None:
    machine = make("a", "b")
    assert kinds(machine.handle(update("a"), T0)) == ["StoreUpdate", "SendStoredReceipt"]
    instructions = machine.handle(update("b"), T0)
    assert kinds(instructions) == ["StoreUpdate", "SendStoredReceipt", "MakeProposal"]
    assert kinds(machine.handle(MADE, T0)) == ["StoreProposal", "SendProposal"]


def test_a_decline_is_an_answer_and_is_told_upwards(make: Make) -> None:
    machine = make("a", "b")
    machine.handle(update("a"), T0)
    decline = ev.DeclineArrived(device="b", plan=HASH, message_id=name_of("x"), head=digest(b"x"), reason="labels")
    instructions = machine.handle(decline, T0)
    assert kinds(instructions) == ["StoreDecline", "SendReceipt", "MakeProposal"]
    assert instructions[-1].declined == {"labels": 1}


def test_a_device_that_declined_may_still_send_an_update(make: Make) -> None:
    machine = make("a", "b")
    decline = ev.DeclineArrived(device="a", plan=HASH, message_id=name_of("x"), head=digest(b"x"), reason="busy")
    machine.handle(decline, T0)
    machine.handle(update("a"), T0)
    assert machine.answered == 1
    assert machine.handle(update("b"), T0)[-1].declined == {}


@pytest.mark.parametrize(("fraction", "devices", "needed"), [(0.7, 10, 7), (0.5, 3, 2), (0.01, 5, 1), (1.0, 4, 4)])
def test_the_quorums_fraction_is_enough(make: Make, fraction: float, devices: int, needed: int) -> None:
    plan, _ = FLEET.plan(1, quorum=fraction)
    machine = make(*map(str, range(devices)), plan=plan)
    for number in range(needed):
        assert machine.state is RoundState.OPEN
        machine.handle(update(str(number)), T0)
    assert machine.state is RoundState.PROPOSED


def test_a_lost_device_stays_expected_and_a_disconnected_one_does_not(make: Make) -> None:
    machine = make("a", "b", "c")
    machine.handle(update("a"), T0)
    machine.handle(ev.MemberChanged(kind=Kind.DEVICE, member="b", life=Life.LOST), T0)
    machine.handle(ev.MemberChanged(kind=Kind.DEVICE, member="c", life=Life.DISCONNECTED), T0)
    assert machine.state is RoundState.OPEN
    instructions = machine.handle(ev.MemberChanged(kind=Kind.DEVICE, member="b", life=Life.DISCONNECTED), T0)
    assert kinds(instructions) == ["MakeProposal"]


def test_a_device_that_wakes_is_waited_for(make: Make) -> None:
    machine = make("a")
    machine.handle(ev.MemberChanged(kind=Kind.DEVICE, member="b", life=Life.READY), T0)
    machine.handle(update("a"), T0)
    assert machine.state is RoundState.OPEN
    machine.handle(update("b"), T0)
    assert machine.state is RoundState.PROPOSED


def test_a_gateway_below_that_comes_back_is_waited_for(make: Make) -> None:
    machine = make("a")
    machine.handle(ev.MemberChanged(kind=Kind.GATEWAY, member="g-1", life=Life.READY), T0)
    machine.handle(update("a"), T0)
    assert machine.state is RoundState.OPEN
    machine.handle(child("g-1", "b"), T0)
    assert machine.state is RoundState.PROPOSED


def test_it_waits_for_gateways_below_as_well(make: Make) -> None:
    machine = make("a", gateways=("g-1", "g-2"))
    machine.handle(update("a"), T0)
    machine.handle(child("g-1", "x", "y"), T0)
    assert machine.state is RoundState.OPEN
    assert kinds(machine.handle(child("g-2"), T0)) == ["StoreChildProposal", "SendStoredReceipt", "MakeProposal"]


def test_the_deadline_ends_the_waiting(make: Make) -> None:
    machine = make("a", "b")
    machine.handle(update("a"), T0)
    assert machine.next_deadline() == PLAN.deadline
    assert machine.handle(TimerFired(), PLAN.deadline - 1) == []
    assert kinds(machine.handle(TimerFired(), PLAN.deadline)) == ["MakeProposal"]


def test_gateways_close_later_the_higher_they_stand() -> None:
    times = [close_time(PLAN, level) for level in range(PLAN.tiers)]
    assert times == [T0 + 60_000, T0 + 80_000]
    assert close_time(PLAN, 7) == PLAN.expires


def test_where_nobody_is_expected_it_waits_a_moment(make: Make) -> None:
    machine = make()
    assert machine.next_deadline() == T0 + LONELY
    assert kinds(machine.handle(TimerFired(), T0 + LONELY)) == ["MakeProposal"]


def test_where_the_plan_selects_none_of_those_present_it_waits_for_nobody(make: Make) -> None:
    nobody = replace(PLAN, eligibility=replace(PLAN.eligibility, fraction=0.0))
    machine = make("a", "b", plan=nobody, settled=T0 - 1)
    assert machine.next_deadline() == T0 - 1
    assert kinds(machine.handle(TimerFired(), T0)) == ["MakeProposal"]


def test_after_a_start_it_does_not_trust_presence_at_once(make: Make) -> None:
    machine = make("a", settled=T0 + 500)
    machine.handle(update("a"), T0)
    assert machine.next_deadline() == T0 + 500
    machine.handle(ev.MemberChanged(kind=Kind.DEVICE, member="b", life=Life.READY), T0 + 100)
    assert machine.next_deadline() == PLAN.deadline


def test_before_the_site_is_reached_it_waits_for_the_deadline(make: Make) -> None:
    machine = make("a", settled=NEVER)
    machine.handle(update("a"), T0)
    assert machine.next_deadline() == PLAN.deadline
    assert kinds(machine.handle(ev.SiteConnected(T0), T0)) == ["MakeProposal"]


def test_updates_of_devices_revoked_meanwhile_are_not_proposed(make: Make) -> None:
    machine = make("a", "b", "c")
    machine.handle(update("a"), T0)
    machine.handle(update("b"), T0)
    machine.handle(ev.Revoked(serials=frozenset({update("a").serial})), T0)
    instructions = machine.handle(update("c"), T0)
    assert kinds(instructions) == ["StoreUpdate", "SendStoredReceipt", "DropUpdates", "MakeProposal"]
    assert instructions[2] == ev.DropUpdates(message_ids=(name_of("a/0"),), forget=True)
    assert instructions[3].rejected == {"revoked": 1}
    assert machine.record.own_part() == tuple(sorted([name_of("b/0"), name_of("c/0")]))


# --- Repetitions -----------------------------------------------------------------------------------------------------


def test_the_same_update_again_gets_the_same_receipt_in_every_state(make: Make) -> None:
    machine = make("a")
    answer = [ev.SendStoredReceipt(kind=Kind.DEVICE, member="a", message_id=name_of("a/0"))]
    proposed(machine, "a")
    for step in (None, commit("a"), revealed(commit("a")), receipt("reveal")):
        if step is not None:
            machine.handle(step, T0)
        assert machine.handle(update("a"), T0)[1:] == answer


def receipt(of: str, reason: RejectReason | None = None) -> ev.ReceiptArrived:
    return ev.ReceiptArrived(message_id=name_of(of), reason=reason)


def test_a_childs_proposal_again_gets_the_commit_once_there_is_one(make: Make) -> None:
    machine = make(gateways=("g-1",))
    machine.handle(child("g-1", "x"), T0)
    machine.handle(MADE, T0)
    assert kinds(machine.handle(child("g-1", "x"), T0)) == ["SendStoredReceipt"]
    machine.handle(commit("x"), T0)
    assert machine.handle(child("g-1", "x"), T0) == [ev.SendCommit("g-1")]


def test_another_proposal_of_the_same_child_is_a_conflict(make: Make) -> None:
    machine = make("a", gateways=("g-1",))
    machine.handle(child("g-1", "x"), T0)
    assert machine.handle(child("g-1", "y", version=1), T0)[-1].reason is RejectReason.CONFLICT


def test_a_childs_proposal_after_the_close_is_late(make: Make) -> None:
    machine = proposed(make("a"), "a")
    assert machine.handle(child("g-1", "x"), T0)[-1].reason is RejectReason.LATE


def test_children_cannot_exceed_the_cohort(make: Make) -> None:
    plan, _ = FLEET.plan(1, cohort=2)
    machine = make("a", gateways=("g-1",), plan=plan)
    machine.handle(update("a"), T0)
    assert machine.handle(child("g-1", "x", "y"), T0)[-1].reason is RejectReason.COHORT_FULL


# --- Commit and reveal -----------------------------------------------------------------------------------------------


def test_what_the_commit_leaves_out_leaves_the_sum(make: Make) -> None:
    machine = proposed(make("a", "b"), "a", "b")
    instructions = machine.handle(commit("b"), T0)
    assert kinds(instructions) == ["StoreCommit", "DropUpdates", "MakeReveal"]
    assert instructions[1].message_ids == (name_of("a/0"),)
    assert instructions[2].count == 1


def test_the_reveal_waits_for_the_children_that_are_in(make: Make) -> None:
    machine = make("a", gateways=("g-1", "g-2"))
    machine.handle(child("g-1", "x", "y"), T0)
    machine.handle(child("g-2", "z"), T0)
    proposed(machine, "a")
    final = commit("a", "x")
    assert kinds(machine.handle(final, T0)) == ["StoreCommit", "SendCommit", "SendCommit"]
    wrong = machine.handle(child_reveal("g-1", 2, commit=final.head), T0)
    assert wrong[-1].reason is RejectReason.OUT_OF_RANGE
    stranger = machine.handle(child_reveal("g-2", 1, commit=final.head), T0)
    assert stranger[-1].reason is RejectReason.OUT_OF_RANGE
    instructions = machine.handle(child_reveal("g-1", 1, commit=final.head), T0)
    assert kinds(instructions) == ["StoreChildReveal", "SendStoredReceipt", "MakeReveal"]
    assert instructions[2].count == 2
    assert kinds(machine.handle(child_reveal("g-1", 1, commit=final.head), T0)) == ["SendStoredReceipt"]
    other = machine.handle(child_reveal("g-1", 1, commit=final.head, version=1), T0)
    assert other[-1].reason is RejectReason.CONFLICT


def test_a_second_commit_is_a_conflict_and_the_first_counts(make: Make) -> None:
    machine = proposed(make("a", "b"), "a", "b")
    machine.handle(commit("a"), T0)
    assert machine.handle(commit("b", version=1), T0)[0].reason is RejectReason.CONFLICT
    assert machine.record.own_part() == (name_of("a/0"),)


def test_a_commit_of_what_was_never_proposed_changes_nothing(make: Make) -> None:
    machine = proposed(make("a"), "a")
    for bad in (commit("a", "x"), commit("a", gateway="other"), commit("a", proposal=bytes(32))):
        assert machine.handle(bad, T0)[0].reason is RejectReason.NOT_PROPOSED
    assert machine.state is RoundState.PROPOSED


def test_below_another_gateway_a_commit_names_members_of_others(make: Make) -> None:
    machine = proposed(make("a", direct=False), "a")
    assert kinds(machine.handle(commit("a", "x", gateway="above"), T0)) == ["StoreCommit", "MakeReveal"]


def test_an_empty_commit_needs_no_reveal(make: Make) -> None:
    machine = proposed(make("a"), "a")
    assert kinds(machine.handle(commit(), T0)) == ["StoreCommit", "DropUpdates", "StoreAnswered"]
    assert machine.state is RoundState.CLOSED


def test_proposal_and_reveal_are_sent_again_with_growing_pauses(make: Make) -> None:
    machine = proposed(make("a"), "a")
    now, pauses = T0, []
    for _ in range(6):
        due = machine.next_deadline()
        assert due is not None
        pauses.append(due - now)
        now = due
        assert machine.handle(TimerFired(), now) == [ev.SendProposal()]
    assert pauses == [RETRY, 2 * RETRY, 4 * RETRY, 8 * RETRY, RETRY_CAP, RETRY_CAP]
    machine.handle(commit("a"), now)
    assert kinds(machine.handle(revealed(commit("a")), now)) == ["StoreReveal", "SendReveal"]
    assert machine.next_deadline() == now + RETRY


def test_while_the_cloud_is_away_nothing_is_sent_and_then_everything_is(make: Make) -> None:
    machine = make("a")
    machine.handle(ev.UpstreamLost(), T0)
    machine.handle(update("a"), T0)
    assert kinds(machine.handle(MADE, T0)) == ["StoreProposal"]
    assert machine.next_deadline() == PLAN.expires + KEPT, "there is nobody to send it to"
    assert machine.handle(ev.UpstreamConnected(), T0) == [ev.SendProposal()]


def test_a_receipt_ends_the_reveal_and_a_refusal_ends_the_round_here(make: Make) -> None:
    machine = proposed(make("a"), "a")
    assert machine.handle(receipt("proposal", RejectReason.OVERLOADED), T0) == []
    assert machine.handle(receipt("proposal"), T0) == []
    assert machine.next_deadline() == T0 + RETRY_CAP
    machine.handle(commit("a"), T0)
    machine.handle(revealed(commit("a")), T0)
    assert machine.handle(receipt("unknown"), T0) == []
    assert kinds(machine.handle(receipt("reveal"), T0)) == ["StoreAnswered"]
    refused = proposed(make("a"), "a")
    assert kinds(refused.handle(receipt("proposal", RejectReason.LATE), T0)) == ["Refused", "StoreAnswered"]


def test_what_waits_for_a_cloud_that_never_comes_back_is_given_up(make: Make) -> None:
    proposal = proposed(make("a"), "a")
    waits = make("a", gateways=("g-1",))
    waits.handle(child("g-1", "x"), T0)
    proposed(waits, "a")
    waits.handle(commit("a", "x"), T0)
    assert waits.state is RoundState.COMMITTED
    for machine in (proposal, waits):
        machine.handle(ev.UpstreamLost(), T0)
        void = machine.next_deadline()
        assert void == PLAN.expires + KEPT
        assert machine.handle(TimerFired(), void - 1) == []
        assert kinds(machine.handle(TimerFired(), void)) == ["StoreAnswered"]
        assert machine.next_deadline() is None
        assert kinds(machine.handle(commit("a", version=1), void)) == ["Refused"]


def test_an_event_that_cannot_happen_names_its_story(make: Make) -> None:
    with pytest.raises(IllegalTransitionError, match="ProposalMade is not allowed in state open"):
        make("a").handle(MADE, T0)


# --- Any order, any repetition, any crash ----------------------------------------------------------------------------


@dataclass
class Disk:
    """What an ideal journal holds, and the sum, which is lost in a crash and built again."""

    record: RoundRecord = field(default_factory=lambda: RoundRecord(plan=PLAN, hash=HASH))
    total: list[str] = field(default_factory=list)
    receipts: list[tuple[str, MessageId]] = field(default_factory=list)
    proposals: list[frozenset[MessageId]] = field(default_factory=list)
    reveals: list[tuple[str, ...]] = field(default_factory=list)

    def perform(self, machine: RoundMachine, instructions: list[Any]) -> None:
        stored = self.record
        for step in instructions:
            match step:
                case ev.StoreUpdate(update=taken):
                    accepted = Accepted(taken.message_id, taken.head, taken.serial, taken.size)
                    assert taken.device not in stored.accepted
                    stored.accepted[taken.device] = accepted
                    self.total.append(taken.message_id.hex())
                case ev.StoreChildProposal(proposal=said):
                    stored.children[said.gateway] = Child(said.message_id, frozenset(said.members))
                case ev.MakeProposal():
                    ids = {each.message_id for each in stored.accepted.values()}
                    self.proposals.append(frozenset(ids.union(*(c.members for c in stored.children.values()))))
                    self.perform(machine, machine.handle(MADE, T0))
                case ev.StoreProposal():
                    stored.proposal = Sent(MADE.message_id, MADE.head)
                case ev.StoreCommit():
                    stored.commit = machine.record.commit
                case ev.DropUpdates(message_ids=ids):
                    for message_id in ids:
                        self.total.remove(message_id.hex())
                case ev.StoreChildReveal(reveal=said):
                    old = stored.children[said.gateway]
                    stored.children[said.gateway] = Child(
                        old.proposal, old.members, {}, {}, said.message_id, said.count
                    )
                    self.total.append(said.gateway)
                case ev.MakeReveal(commit=head):
                    self.reveals.append(tuple(sorted(self.total)))
                    made = ev.RevealMade(plan=HASH, commit=head, message_id=name_of("reveal"), raw=b"")
                    self.perform(machine, machine.handle(made, T0))
                case ev.StoreReveal():
                    assert stored.commit is not None
                    stored.reveal = Sent(name_of("reveal"), stored.commit.head)
                case ev.StoreAnswered():
                    stored.answered = True
                case ev.StoreAborted(reason=reason):
                    stored.commit, stored.aborted = machine.record.commit, str(reason)
                    assert stored.commit is not None
                    stored.reveal = Sent(name_of("refusal"), stored.commit.head)
                    made = ev.RefusalMade(plan=HASH, message_id=name_of("refusal"))
                    self.perform(machine, machine.handle(made, T0))
                case ev.SendStoredReceipt(member=member, message_id=message_id):
                    self.receipts.append((member, message_id))
                    if member.startswith("d"):
                        assert stored.accepted[member].message_id == message_id

    def restart(self) -> RoundMachine:
        """A machine made of what is durable, and the sum of what it says belongs in it."""
        record = RoundRecord(
            plan=self.record.plan,
            hash=HASH,
            accepted=dict(self.record.accepted),
            children=dict(self.record.children),
            proposal=self.record.proposal,
            commit=self.record.commit,
            reveal=self.record.reveal,
            aborted=self.record.aborted,
            answered=self.record.answered,
        )
        place = Place(gateway="g", direct=True, settled=0)
        machine = RoundMachine(record, FLEET.ring, place, devices=DEVICES, gateways=("g-1",), now=T0)
        self.total = [message_id.hex() for message_id in machine.record.own_part()]
        self.total += [name for name, said in record.children.items() if said.reveal is not None]
        self.perform(machine, machine.resume(T0))
        self.perform(machine, machine.handle(ev.UpstreamConnected(), T0))
        return machine


DEVICES = tuple(f"d{number}" for number in range(4))
FINAL = commit("d0", "d1", "d3", "x", "y")
CRASH = "crash"

EVENTS: list[Any] = [
    *(update(device) for device in DEVICES),
    *(update(device, version=1) for device in DEVICES[:2]),
    child("g-1", "x", "y", "z"),
    child("g-1", "x", version=1),
    FINAL,
    commit("d0", version=1),
    child_reveal("g-1", 2, commit=FINAL.head),
    child_reveal("g-1", 3, commit=FINAL.head, version=1),
    receipt("proposal"),
    ev.UpstreamConnected(),
    ev.UpstreamLost(),
    TimerFired(),
    CRASH,
]
STRAIGHT: list[Any] = [
    *(update(device) for device in DEVICES),
    child("g-1", "x", "y", "z"),
    FINAL,
    child_reveal("g-1", 2, commit=FINAL.head),
]


def sensible(events: list[Any]) -> list[Any]:
    """Without second, different messages whose first did not come before them: those would rightly count."""
    seen: set[MessageId] = set()
    kept = []
    for event in events:
        if isinstance(event, ev.UpdateArrived | ev.ChildProposed):
            sender = event.device if isinstance(event, ev.UpdateArrived) else event.gateway
            seen.add(event.message_id)
            if name_of(f"{sender}/0") not in seen:
                continue
        kept.append(event)
    return kept


@settings(max_examples=400)
@given(
    st.sampled_from([PLAN, MASKED]), st.lists(st.sampled_from(EVENTS), max_size=40), st.randoms(use_true_random=False)
)
def test_no_order_repetition_or_crash_changes_the_set_or_the_sum(plan: Plan, events: list[Any], random: Any) -> None:
    """Whatever comes first, once everything has arrived the first update of each device counts exactly once."""
    disk = Disk(RoundRecord(plan=plan, hash=HASH))
    machine = disk.restart()

    def step(event: Any) -> None:
        nonlocal machine
        if event == CRASH:
            machine = disk.restart()
        else:
            disk.perform(machine, machine.handle(event, T0))
        machine.validate()

    for event in sensible(events):
        step(event)
    for event in STRAIGHT:
        for again in [event] * random.randint(1, 2):
            step(again)
        if random.random() < 0.5:
            step(CRASH)
    everybody = frozenset(name_of(f"{name}/0") for name in (*DEVICES, "x", "y", "z"))
    expected = tuple(sorted([*(name_of(f"{name}/0").hex() for name in ("d0", "d1", "d3")), "g-1"]))
    assert set(disk.proposals) == {everybody}
    assert len(set(disk.reveals)) <= 1, "one sum, ever"
    # A crash between the making and the storing of a reveal makes it again, of the same sum.
    if disk.record.commit is not None and disk.record.commit.head == FINAL.head:
        assert set(disk.reveals) == {expected}
        assert machine.state is RoundState.REVEALED
    elif plan is MASKED:
        assert machine.record.aborted == RejectReason.BELOW_MINIMUM, "the other commit is of one device"
        assert machine.state is RoundState.REVEALED, "and the tier above is told so"
        assert disk.reveals == []


def test_facts_amount_to_states() -> None:
    record = RoundRecord(plan=PLAN, hash=HASH)
    assert record.state() is RoundState.OPEN
    record.proposal = Sent(name_of("proposal"), Digest(b""))
    assert record.state() is RoundState.PROPOSED
    record.commit = FINAL
    assert record.state() is RoundState.COMMITTED
    record.reveal = Sent(name_of("reveal"), Digest(b""))
    assert record.state() is RoundState.REVEALED
    record.answered = True
    assert record.state() is RoundState.CLOSED
