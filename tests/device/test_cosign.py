"""Split mode and the privacy ledger in the device's machine, without I/O."""

from __future__ import annotations

from typing import Any

import pytest
from fleetfed_testing.device_driver import CARD, Driver, answer, hash_of, held, kinds, plan, receipt
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device import events as e
from fleetfed.device.events import AnswerKind, Fate
from fleetfed.device.ledger import Account
from fleetfed.device.state import DeviceState, Facts
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.privacy.cost import participation
from fleetfed.shared.trust.policy import PrivacyFloor
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import DeclineReason, Eligibility, Mode, Outcome, RoundEnd
from fleetfed.shared.wire.privacy import Mechanism, Privacy

GATEWAY, HELPER = b"g" * 32, b"h" * 32
SPLIT: dict[str, Any] = {"mode": Mode.SPLIT, "split": Split(seal_key=b"c" * 32)}
OTHER = Digest(b"x" * 32)
BELOW = e.Verdict(reason=RejectReason.BELOW_POLICY, detail="mode plain is not allowed")


def cosign(round_: int = 1, of: bytes | None = None, **changes: Any) -> e.CosignArrived:
    whole = {"round": round_, "plan": hash_of(round_) if of is None else of, "seal_key": GATEWAY, "expires": 90_000}
    return e.CosignArrived(**{**whole, **changes})


def noisy(most: int = 3, apart: int = 1) -> Privacy:
    return Privacy(
        mechanism=Mechanism.CENTRAL,
        clip=10.0,
        noise_multiplier=1.0,
        max_participations=most,
        min_separation=apart,
        epsilon=1.0,
        delta=1e-6,
    )


@pytest.fixture
def ready() -> Driver:
    """Connected, with version 1 on disk."""
    return spent(0)


def spent(participations: int, last_round: int = 0) -> Driver:
    account = Account(participations=participations, rounds={"": last_round} if last_round else {})
    driver = Driver(Facts(models=(held(1),), cards=frozenset({CARD.ref.digest}), floor=1, account=account))
    driver(e.Connected())
    return driver


def refusals(instructions: list[Any]) -> list[RejectReason]:
    return [each.reason for each in instructions if isinstance(each, e.CountRejection)]


# --- The cosignature --------------------------------------------------------------------------------------------------


def test_a_split_plan_waits_for_its_cosignature(ready: Driver) -> None:
    assert ready.plan(**SPLIT) == []
    assert ready.state is DeviceState.WAITING
    assert ready.machine.next_deadline() == 60_000, "it would spin"
    assert kinds(ready(cosign())) == ["Train"]
    (store,) = ready(e.TrainingDone(hash_of(1), e.Verdict(helper_key=HELPER)))
    assert (store.gateway_key, store.helper_key) == (GATEWAY, HELPER)


def test_the_cosignature_may_come_first(ready: Driver) -> None:
    assert ready(cosign()) == []
    assert kinds(ready.plan(**SPLIT)) == ["Train"]


def test_the_cosignature_may_come_while_the_model_does(ready: Driver) -> None:
    ready.plan(version=2, **SPLIT)
    assert ready(cosign()) == []
    assert ready.state is DeviceState.WAITING


def test_a_repeated_cosignature_changes_nothing(ready: Driver) -> None:
    ready.plan(**SPLIT)
    ready(cosign())
    assert ready(cosign()) == []
    ready.train_and_store()
    assert ready(cosign()) == []
    assert ready.state is DeviceState.SENDING


def test_a_plain_plan_needs_none(ready: Driver) -> None:
    assert kinds(ready.plan()) == ["Train"]


def test_without_a_cosignature_the_plan_is_missed(ready: Driver) -> None:
    ready.plan(**SPLIT)
    assert ready(TimerFired(), now=60_000) == [e.RecordRound(1, "missed")]
    assert ready(cosign()) == []


def test_an_expired_cosignature_is_none(ready: Driver) -> None:
    ready(cosign(expires=1999))
    assert ready.plan(**SPLIT) == []
    assert ready.state is DeviceState.WAITING


def test_a_cosignature_that_expires_while_the_device_trains_seals_nothing(ready: Driver) -> None:
    ready(cosign(expires=3000))
    ready.plan(**SPLIT)
    ready.now = 3001
    assert ready(e.TrainingDone(hash_of(1))) == [e.CancelTraining(), e.RecordRound(1, "missed")]


@pytest.mark.parametrize("first", ["plan", "cosignature"])
def test_a_cosignature_of_another_plan_of_the_round_is_a_conflict(ready: Driver, first: str) -> None:
    if first == "plan":
        ready.plan(**SPLIT)
        out = ready(cosign(of=OTHER))
    else:
        ready(cosign(of=OTHER))
        out = ready.plan(**SPLIT)
    assert refusals(out) == [RejectReason.CONFLICT]
    assert out[-1] == e.RecordRound(1, "conflict")
    assert ready.state is DeviceState.IDLE
    assert refusals(ready(cosign())) == [RejectReason.CONFLICT], "its first word for another plan is not taken back"
    assert ready.state is DeviceState.IDLE


@pytest.mark.parametrize("changes", [{"of": OTHER}, {"seal_key": b"k" * 32}])
def test_a_second_cosignature_stops_the_training(ready: Driver, changes: dict[str, Any]) -> None:
    ready(cosign())
    ready.plan(**SPLIT)
    out = ready(cosign(**changes))
    assert kinds(out) == ["CountRejection", "CancelTraining", "RecordRound"]
    assert ready(e.TrainingDone(hash_of(1))) == []


def test_two_cosignatures_before_the_plan_spoil_the_round(ready: Driver) -> None:
    ready(cosign())
    assert refusals(ready(cosign(of=OTHER))) == [RejectReason.CONFLICT]
    assert refusals(ready.plan(**SPLIT)) == [RejectReason.CONFLICT]
    assert ready.state is DeviceState.IDLE


def test_an_update_is_not_sent_again_once_the_gateway_cosigned_another_plan(ready: Driver) -> None:
    ready(cosign())
    ready.plan(**SPLIT)
    ready.train_and_store()
    count, settle, abandon, record = ready(cosign(of=OTHER))
    assert count.reason is RejectReason.CONFLICT
    assert settle.answer.fate is Fate.UNANSWERED
    assert isinstance(abandon, e.AbandonSending)
    assert record == e.RecordRound(1, "unanswered")
    assert e.SendAnswer(answer()) not in ready(e.Disconnected(), e.Connected())


def test_the_conflict_is_seen_after_a_restart() -> None:
    driver = Driver(Facts(models=(held(1),), floor=1, answer=answer()))
    driver(e.Connected())
    assert driver(cosign()) == []
    assert driver.state is DeviceState.SENDING
    assert refusals(driver(cosign(of=OTHER))) == [RejectReason.CONFLICT]
    assert driver.state is DeviceState.IDLE


def test_an_answer_that_is_being_stored_when_the_conflict_shows_is_not_sent(ready: Driver) -> None:
    ready(cosign())
    ready.plan(**SPLIT)
    ready(e.TrainingDone(hash_of(1)))
    ready(cosign(of=OTHER))
    out = ready(e.AnswerStored(answer()))
    assert "SendAnswer" not in kinds(out)
    assert ready.state is DeviceState.IDLE


def test_a_cosignature_of_the_plan_for_another_round(ready: Driver) -> None:
    ready.plan(**SPLIT)
    assert refusals(ready(cosign(2, of=hash_of(1)))) == [RejectReason.WRONG_ROUND]
    assert ready.state is DeviceState.WAITING


def test_cosignatures_of_rounds_that_are_gone_are_nothing(ready: Driver) -> None:
    ready.plan(5, **SPLIT)
    assert ready(cosign(4, of=OTHER)) == []
    ready(e.RoundEnded(RoundEnd(round=5, plan=hash_of(5), outcome=Outcome.ABORTED)))
    assert ready(cosign(5, of=OTHER)) == []


def test_a_flood_of_rounds_to_come_does_not_push_out_the_open_one(ready: Driver) -> None:
    ready.plan(**SPLIT, version=2)
    ready(cosign())
    for round_ in range(2, 60):
        ready(cosign(round_))
    assert ready.machine._cosigned(ready.now)
    assert len(ready.machine._cosigns._rounds) == 2


# --- Policy -----------------------------------------------------------------------------------------------------------


def test_a_refused_plan_is_counted_and_declined(ready: Driver) -> None:
    count, decline = ready.plan(verdict=BELOW)
    assert count == e.CountRejection(RejectReason.BELOW_POLICY, "plan of round 1: mode plain is not allowed")
    assert decline.reason is DeclineReason.POLICY
    assert decline.detail == "below_policy: mode plain is not allowed"
    out = ready(e.AnswerStored(answer(kind=AnswerKind.DECLINE, reason="policy")))
    assert out[0] == e.RecordRound(1, "declined:policy", decline.detail)
    assert ready.plan(verdict=BELOW) == []


def test_a_refused_plan_that_does_not_select_us_is_counted_only(ready: Driver) -> None:
    out = ready.plan(verdict=BELOW, eligibility=Eligibility(fraction=0.0))
    assert refusals(out) == [RejectReason.BELOW_POLICY]
    assert len(out) == 1


def test_a_policy_that_came_while_the_device_trained_counts(ready: Driver) -> None:
    ready.plan()
    count, decline = ready(e.TrainingDone(hash_of(1), BELOW))
    assert count.reason is RejectReason.BELOW_POLICY
    assert decline.reason is DeclineReason.POLICY
    ready(e.AnswerStored(answer(kind=AnswerKind.DECLINE)))
    assert ready.state is DeviceState.IDLE


def test_policy_comes_before_labels_and_labels_before_the_ledger() -> None:
    driver = spent(3)
    wants = {"eligibility": Eligibility(labels={"a": "b"}), "privacy": noisy(3)}
    reasons = [driver.plan(1, verdict=BELOW, **wants)[-1].reason, driver.plan(2, **wants)[-1].reason]
    assert reasons == [DeclineReason.POLICY, DeclineReason.LABELS]
    assert driver.plan(3, privacy=noisy(3), **SPLIT)[-1].reason is DeclineReason.PRIVACY_BUDGET


# --- Ledger -----------------------------------------------------------------------------------------------------------


def test_a_noisy_round_is_debited_before_its_update_is_made(ready: Driver) -> None:
    ready.plan(privacy=noisy())
    debit, store = ready(e.TrainingDone(hash_of(1)))
    cost = participation(noisy(), plan(1).dimension)
    assert debit == e.Debit(Account(participations=1, rounds={"": 1}, last_plan=hash_of(1), most=3, cost=cost))
    assert isinstance(store, e.StoreUpdate)


def test_other_rounds_are_not_debited(ready: Driver) -> None:
    ready.plan()
    assert kinds(ready(e.TrainingDone(hash_of(1)))) == ["StoreUpdate"]


def test_the_budget_is_spent_once() -> None:
    driver = spent(3, 4)
    (decline,) = driver.plan(5, privacy=noisy(3))
    assert decline.reason is DeclineReason.PRIVACY_BUDGET
    assert decline.detail == "took part 3 times of 3"
    assert kinds(driver.plan(6, privacy=noisy(4))) == ["Train"]


def test_the_policys_cap_counts_where_it_is_lower() -> None:
    driver = spent(3, 4)
    verdict = e.Verdict(floor=PrivacyFloor(max_participations=3))
    assert driver.plan(5, privacy=noisy(1000), verdict=verdict)[0].reason is DeclineReason.PRIVACY_BUDGET


@pytest.mark.parametrize("from_policy", [False, True])
def test_rounds_that_are_too_near_are_declined(from_policy: bool) -> None:
    driver = spent(1, 4)
    floor = PrivacyFloor(min_separation=3 if from_policy else 1)
    wants = {"privacy": noisy(9, 1 if from_policy else 3), "verdict": e.Verdict(floor=floor)}
    (decline,) = driver.plan(6, **wants)
    assert decline.reason is DeclineReason.TOO_SOON
    assert decline.detail == "2 rounds after round 4, 3 are due"
    assert kinds(driver.plan(7, **wants)) == ["Train"]


def test_a_floor_that_came_while_the_device_trained_counts() -> None:
    driver = spent(3, 4)
    driver.plan(5, privacy=noisy(10))
    (decline,) = driver(e.TrainingDone(hash_of(5), e.Verdict(floor=PrivacyFloor(max_participations=3))))
    assert decline.reason is DeclineReason.PRIVACY_BUDGET


def test_the_same_plan_is_debited_once() -> None:
    """As after a crash between the debit and the answer."""
    driver = spent(2, 4)
    driver.plan(5, privacy=noisy(3))
    account = driver(e.TrainingDone(hash_of(5)))[0].account
    again = Driver(Facts(models=(held(1),), floor=1, account=account))
    assert kinds(again.plan(5, privacy=noisy(3))) == ["Train"]
    assert again(e.TrainingDone(hash_of(5)))[0] == e.Debit(account)
    assert account.participations == 3


_STEPS = st.one_of(
    st.builds(
        lambda r, m, a, s: ("plan", r, m, a, s), st.integers(1, 12), st.integers(0, 3), st.integers(1, 3), st.booleans()
    ),
    st.builds(lambda r, o: cosign(r, of=OTHER if o else None), st.integers(1, 12), st.booleans()),
    st.builds(lambda r: e.TrainingDone(hash_of(r)), st.integers(1, 12)),
    st.builds(receipt, st.integers(1, 12), st.sampled_from([None, RejectReason.LATE])),
    st.sampled_from([e.Connected(), e.Disconnected(), TimerFired(), "crash", "crash before the answer"]),
)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(_STEPS, max_size=60))
def test_no_order_of_events_and_crashes_exceeds_the_ledger(steps: list[Any]) -> None:
    """What left is within every plan's cap and separation; split updates have the one cosignature of their round."""
    facts = Facts(models=(held(1),), cards=frozenset({CARD.ref.digest}), floor=1)
    driver = Driver(facts)
    plans: dict[int, Any] = {}
    left: list[int] = []
    stored: dict[int, Any] = {}
    account, crash = Account(), False

    def restart() -> Driver:
        newest = max(stored.values(), key=lambda each: each.round, default=None)
        return Driver(Facts(models=(held(1),), floor=1, account=account, answer=newest))

    for step in steps:
        if isinstance(step, str):
            crash = step != "crash"
            driver = driver if crash else restart()
            continue
        if isinstance(step, tuple):
            _, round_, most, apart, masked = step
            privacy = noisy(most, apart) if most else None
            made = plans.setdefault(round_, plan(round_, privacy=privacy, **(SPLIT if masked else {})))
            pending: list[Any] = [e.PlanArrived(made, hash_of(round_))]
        else:
            pending = [step]
        while pending:
            for instruction in driver(pending.pop(0)):
                match instruction:
                    case e.Debit(now):
                        account = now
                        if crash:
                            crash, pending, driver = False, [], restart()
                            break
                    case e.StoreUpdate(each, plan_hash, key):
                        assert (each.split is None) == (key == b"")
                        if each.privacy is not None:
                            assert account.last_plan == plan_hash, "an update that was not debited"
                            assert account.participations <= each.privacy.max_participations
                            assert all(each.round - r >= each.privacy.min_separation for r in left)
                            left.append(each.round)
                        stored[each.round] = answer(each.round)
                        pending.append(e.AnswerStored(answer(each.round)))
                    case e.StoreDecline(each):
                        stored[each.round] = answer(each.round, AnswerKind.DECLINE)
                        pending.append(e.AnswerStored(stored[each.round]))
    assert len(left) == len(set(left)) <= account.participations
