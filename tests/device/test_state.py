"""The device's machine, without I/O; its invariants are checked after every event."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fleetfed_testing.device_driver import (
    CARD,
    Driver,
    answer,
    hash_of,
    held,
    kinds,
    manifest,
    patch,
    plan,
    receipt,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device import events as e
from fleetfed.device.events import AnswerKind, Fate
from fleetfed.device.state import FIRST_RESEND, LONGEST_RESEND, SLOW_CLOCK, DeviceMachine, DeviceState, Facts
from fleetfed.shared.errors import IllegalTransitionError, RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import (
    DeclineReason,
    Eligibility,
    Outcome,
    RoundEnd,
)

# --- A round ----------------------------------------------------------------------------------------------------------


def test_a_round_from_plan_to_receipt(ready: Driver) -> None:
    """
    1. The plan comes and its model is here: train.
    2. Training is done: sign and store.
    3. It is durable: send.
    4. The receipt: settle, and be free.
    """
    assert ready.plan() == [e.Train(plan(), hash_of(1), held(1))]
    assert ready(e.TrainingDone(hash_of(1))) == [e.StoreUpdate(plan(), hash_of(1))]
    assert ready(e.AnswerStored(answer())) == [e.SendAnswer(answer())]
    assert ready.state is DeviceState.SENDING
    settled = dataclasses.replace(answer(), fate=Fate.ACCEPTED)
    assert ready(receipt()) == [e.SettleAnswer(settled), e.RecordRound(1, "accepted")]
    assert ready.state is DeviceState.IDLE


def test_a_plan_is_answered_once(ready: Driver) -> None:
    ready.plan()
    assert ready.plan() == []
    ready.train_and_store()
    assert ready.plan() == []
    ready(receipt())
    assert ready.plan() == []
    assert ready(e.TrainingDone(hash_of(1))) == []


def test_a_plan_is_answered_once_over_restarts() -> None:
    for fate in Fate:
        driver = Driver(Facts(models=(held(1),), floor=1, answer=answer(fate=fate)))
        driver(e.Connected())
        assert driver.plan() == []
        assert driver.state is (DeviceState.SENDING if fate is Fate.PENDING else DeviceState.IDLE)


def test_another_plan_of_an_answered_round_is_a_conflict(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    (refusal,) = ready(e.PlanArrived(plan(nonce=b"n" * 16), Digest(b"x" * 32)))
    assert refusal.reason is RejectReason.CONFLICT
    (refusal,) = ready(e.PlanArrived(plan(round_=0 + 1, nonce=b"m" * 16), Digest(b"y" * 32)))
    assert refusal.reason is RejectReason.CONFLICT


def test_an_older_plan_is_refused(ready: Driver) -> None:
    ready.plan(5)
    (refusal,) = ready.plan(4)
    assert refusal.reason is RejectReason.WRONG_ROUND
    assert ready.state is DeviceState.TRAINING


def test_not_selected_does_nothing(ready: Driver) -> None:
    assert ready.plan(eligibility=Eligibility(fraction=0.0)) == []
    assert ready.state is DeviceState.IDLE


def test_labels_that_do_not_fit_are_declined(ready: Driver) -> None:
    wants = {"eligibility": Eligibility(labels={"region": "north"})}
    (store,) = ready.plan(**wants)
    assert isinstance(store, e.StoreDecline)
    assert store.reason is DeclineReason.LABELS
    declined = answer(kind=AnswerKind.DECLINE)
    assert ready(e.AnswerStored(declined)) == [
        e.RecordRound(1, "declined:labels", "not {'region': 'north'}"),
        e.SendAnswer(declined),
    ]
    assert ready.state is DeviceState.IDLE
    assert e.SendAnswer(declined) in ready(e.Disconnected(), e.Connected())


def test_labels_that_fit_train() -> None:
    driver = Driver(Facts(models=(held(1),), floor=1), labels={"region": "north", "more": "x"})
    assert kinds(driver.plan(eligibility=Eligibility(labels={"region": "north"}))) == ["Train"]


def test_training_that_fails_is_declined(ready: Driver) -> None:
    ready.plan()
    (store,) = ready(e.TrainingDeclined(hash_of(1), DeclineReason.DIVERGED, "NaN"))
    assert store.reason is DeclineReason.DIVERGED
    ready(e.AnswerStored(answer(kind=AnswerKind.DECLINE)))
    assert ready.state is DeviceState.IDLE


def test_a_plan_that_has_not_begun_waits(ready: Driver) -> None:
    assert ready.plan(opened=SLOW_CLOCK + 5000, deadline=SLOW_CLOCK + 9000, expires=SLOW_CLOCK + 9999) == []
    assert ready.state is DeviceState.WAITING
    assert ready.machine.next_deadline() == 5000
    assert kinds(ready(TimerFired(), now=5000)) == ["Train"]


def test_a_device_whose_clock_is_slow_does_not_hold_up_the_round(ready: Driver) -> None:
    assert kinds(ready.plan(opened=ready.now + 120_000, deadline=ready.now + 180_000)) == ["Train"]


def test_the_deadline_stops_training(ready: Driver) -> None:
    ready.plan()
    assert ready.machine.next_deadline() == 60_000
    assert ready(TimerFired(), now=60_000) == [e.CancelTraining(), e.RecordRound(1, "cancelled")]
    assert ready(e.TrainingDone(hash_of(1))) == []


def test_a_plan_after_its_deadline_is_missed(ready: Driver) -> None:
    ready.now = 60_000
    assert ready.plan() == [e.RecordRound(1, "missed")]


def test_a_later_plan_stops_training(ready: Driver) -> None:
    ready.plan(1)
    out = ready.plan(2)
    assert out == [e.CancelTraining(), e.RecordRound(1, "cancelled"), e.Train(plan(2), hash_of(2), held(1))]
    assert ready(e.TrainingDone(hash_of(1))) == []


def test_the_end_of_the_round_stops_training(ready: Driver) -> None:
    ready.plan(3)
    assert ready(e.RoundEnded(RoundEnd(round=2, plan=hash_of(2), outcome=Outcome.COMMITTED))) == []
    out = ready(e.RoundEnded(RoundEnd(round=3, plan=hash_of(3), outcome=Outcome.ABORTED)))
    assert out == [e.CancelTraining(), e.RecordRound(3, "cancelled")]
    assert ready.plan(3) == []


# --- Sending ----------------------------------------------------------------------------------------------------------


def test_the_same_answer_is_sent_with_back_off_and_after_every_connect(ready: Driver) -> None:
    ready.plan(expires=10_000_000, deadline=10_000_000)
    ready(e.TrainingDone(hash_of(1)))
    kept = answer(expires=10_000_000)
    assert ready(e.AnswerStored(kept)) == [e.SendAnswer(kept)]
    waits = []
    for _ in range(9):
        deadline = ready.machine.next_deadline()
        assert deadline is not None
        waits.append(deadline - ready.now)
        assert ready(TimerFired(), now=deadline) == [e.SendAnswer(kept)]
    assert waits[0] == FIRST_RESEND
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_RESEND
    ready(e.Disconnected())
    assert ready.machine.next_deadline() == 10_000_000
    assert ready(e.Connected()) == [e.Announce(), e.SendAnswer(kept)]


def test_a_gateway_that_announces_itself_gets_it_again(ready: Driver) -> None:
    assert ready(e.NodeBorn(False)) == [e.Announce()]
    ready.plan()
    ready.train_and_store()
    assert ready(e.NodeBorn(False)) == [e.Announce(), e.SendAnswer(answer())]


def test_the_birth_that_follows_a_connect_sends_nothing_twice(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    assert e.SendAnswer(answer()) in ready(e.Disconnected(), e.Connected())
    assert ready(e.NodeBorn(True)) == []


def test_a_refusal_is_settled_with_its_reason(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    settle, abandon, record = ready(receipt(reason=RejectReason.LATE))
    assert settle.answer.fate is Fate.REFUSED
    assert settle.answer.reason == "late"
    assert isinstance(abandon, e.AbandonSending)
    assert record == e.RecordRound(1, "refused:late")


def test_not_now_is_tried_again(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    assert ready(receipt(reason=RejectReason.OVERLOADED)) == []
    deadline = ready.machine.next_deadline()
    assert ready.state is DeviceState.SENDING
    assert ready(TimerFired(), now=deadline) == [e.SendAnswer(answer())]


def test_receipts_that_are_not_ours_change_nothing(ready: Driver) -> None:
    ready.plan()
    assert ready(receipt()) == []
    ready.train_and_store()
    assert ready(receipt(2)) == []
    (refusal,) = ready(receipt(head=b"z" * 32))
    assert refusal.reason is RejectReason.CONFLICT
    assert ready.state is DeviceState.SENDING


def test_a_round_that_ends_without_a_receipt(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    settle, _, record = ready(e.RoundEnded(RoundEnd(round=1, plan=hash_of(1), outcome=Outcome.COMMITTED)))
    assert settle.answer.fate is Fate.UNANSWERED
    assert record == e.RecordRound(1, "unanswered")
    assert ready(receipt()) == []


def test_an_aborted_round_voids_an_accepted_update(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    ready(receipt())
    settle = ready(e.RoundEnded(RoundEnd(round=1, plan=hash_of(1), outcome=Outcome.ABORTED, reason="operator")))[0]
    assert settle.answer.fate is Fate.VOID


def test_an_answer_expires(ready: Driver) -> None:
    ready.plan()
    ready.train_and_store()
    ready(e.Disconnected())
    settle = ready(TimerFired(), now=90_000)[0]
    assert settle.answer.fate is Fate.UNANSWERED
    assert ready.state is DeviceState.IDLE


def test_a_restart_sends_what_was_stored() -> None:
    driver = Driver(Facts(models=(held(1),), floor=1, answer=answer()))
    assert driver.state is DeviceState.SENDING
    assert driver(e.Connected()) == [e.Announce(), e.SendAnswer(answer())]


def test_a_later_plan_ends_an_answer_without_a_receipt(ready: Driver) -> None:
    ready.plan(1)
    ready.train_and_store(1)
    out = ready.plan(2)
    assert out[0].answer.fate is Fate.UNANSWERED
    assert kinds(out) == ["SettleAnswer", "AbandonSending", "RecordRound", "Train"]


def test_an_answer_stored_for_a_plan_that_was_left_is_not_sent(ready: Driver) -> None:
    ready.plan(1)
    ready(e.TrainingDone(hash_of(1)))
    ready.plan(2)
    out = ready(e.AnswerStored(answer(1)))
    assert kinds(out) == ["SettleAnswer"]
    assert ready.state is DeviceState.TRAINING


# --- Any order --------------------------------------------------------------------------------------------------------


def test_nothing_is_handled_after_a_stop(ready: Driver) -> None:
    ready.plan()
    assert ready(e.StopRequested()) == [e.CancelTraining(), e.Stop()]
    with pytest.raises(IllegalTransitionError):
        ready(e.Connected())


def test_the_diagram_comes_from_the_table() -> None:
    diagram = DeviceMachine.diagram()
    assert "training --> sending: AnswerStored" in diagram
    assert "stopped -->" not in diagram


_STEPS = st.one_of(
    st.sampled_from([e.Connected(), e.Disconnected(), TimerFired(), e.NodeBorn(False), e.NodeBorn(True)]),
    st.builds(lambda r, v: ("plan", r, v), st.integers(1, 4), st.integers(1, 3)),
    st.builds(lambda v: e.ManifestArrived(manifest(v, patch(v - 1, v))), st.integers(1, 4)),
    st.builds(
        lambda r, o: e.RoundEnded(RoundEnd(round=r, plan=hash_of(r), outcome=o)),
        st.integers(1, 4),
        st.sampled_from(list(Outcome)),
    ),
    st.builds(receipt, st.integers(1, 4), st.sampled_from([None, RejectReason.LATE, RejectReason.OVERLOADED])),
    st.builds(lambda r: e.TrainingDone(hash_of(r)), st.integers(1, 4)),
    st.builds(lambda r: e.TrainingDeclined(hash_of(r), DeclineReason.DIVERGED, ""), st.integers(1, 4)),
    st.builds(lambda r: e.InstallFailed(r, ""), st.sampled_from([RejectReason.BODY_MISMATCH, RejectReason.LARGE_STEP])),
    st.integers(1, 40_000),
)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(_STEPS, max_size=40))
def test_whatever_comes_in_whatever_order(steps: list[Any]) -> None:
    """No illegal transition, no broken invariant, never two answers to one plan, nothing sent that is not durable."""
    driver = Driver(Facts(models=(held(1),), cards=frozenset({CARD.ref.digest}), floor=1))
    made: list[bytes] = []
    for step in steps:
        if isinstance(step, int):
            driver.now += step
            continue
        if isinstance(step, tuple):
            pending = [e.PlanArrived(plan(step[1], step[2]), hash_of(step[1]))]
        else:
            pending = [step]
        while pending:
            for instruction in driver(pending.pop(0)):
                match instruction:
                    case e.StoreUpdate(each, plan_hash):
                        made.append(plan_hash)
                        pending.append(e.AnswerStored(answer(each.round)))
                    case e.StoreDecline(each, plan_hash):
                        made.append(plan_hash)
                        pending.append(e.AnswerStored(answer(each.round, AnswerKind.DECLINE)))
                    case e.SendAnswer(each):
                        assert each.plan in made
                    case e.FindParts(ref):
                        pending.append(e.PartsFound(ref.digest, tuple(range(len(ref.parts) // 16))))
                    case e.InstallPatches(manifest=wanted) | e.InstallFull(manifest=wanted):
                        pending.append(e.ModelInstalled(held(wanted.version)))
    assert len(made) == len(set(made))
