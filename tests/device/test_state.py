"""The device's machine, without I/O; its invariants are checked after every event."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from fleetfed_testing.device_driver import CARD, LARGEST, Driver, answer, hash_of, held, kinds, plan, receipt, sha
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device import events as e
from fleetfed.device.events import AnswerKind, Fate
from fleetfed.device.state import FIRST_RESEND, LONGEST_RESEND, SLOW_CLOCK, DeviceMachine, DeviceState, Facts
from fleetfed.shared.errors import IllegalTransitionError, RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import (
    DeclineReason,
    Eligibility,
    Manifest,
    Outcome,
    PatchRef,
    RoundEnd,
)

FILE = publishable(b"".join(i.to_bytes(2, "big") for i in range(500)), chunk=200)


def patch_blob(target: int) -> Publishable:
    return publishable(f"patch to {target}".encode())


def patch(base: int, target: int) -> PatchRef:
    return PatchRef(
        base_version=base,
        base_sha256=sha(base),
        target_version=target,
        target_sha256=sha(target),
        blob=patch_blob(target).ref,
    )


def manifest(version: int, *patches: PatchRef, full_version: int | None = None, **changes: Any) -> Manifest:
    full = version if full_version is None else full_version
    whole = {
        "version": version,
        "parent": version - 1,
        "name": "m",
        "sha256": sha(version),
        "size": FILE.ref.raw_size,
        "card": CARD.ref,
        "full": FILE.ref,
        "full_version": full,
        "full_sha256": sha(full),
        "patches": patches,
    }
    return Manifest(**{**whole, **changes})


@pytest.fixture
def new() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.machine.validate()


@pytest.fixture
def ready() -> Iterator[Driver]:
    """Connected, with version 1 on disk."""
    driver = Driver(Facts(models=(held(1),), cards=frozenset({CARD.ref.digest}), floor=1))
    driver(e.Connected())
    yield driver
    driver.machine.validate()


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


# --- Models -----------------------------------------------------------------------------------------------------------


def fetch(driver: Driver, blob: Publishable, found: e.FindParts, *, have: tuple[int, ...] = ()) -> list[Any]:
    """Answer a `FindParts` and deliver every chunk that is subscribed to; what comes after the last one."""
    assert found == e.FindParts(blob.ref)
    out = driver(e.PartsFound(blob.ref.digest, have))
    rest: list[Any] = []
    while out:
        each = out.pop(0)
        match each:
            case e.SubscribeChunk(digest, index):
                out += driver(e.ChunkArrived(digest[:16], index, blob.chunk(index)))
            case e.StoreChunk() | e.UnsubscribeChunk():
                pass
            case _:
                rest.append(each)
    return rest


def test_the_first_model_is_the_card_and_the_full_file(new: Driver) -> None:
    new(e.Connected())
    wanted = manifest(1)
    floor, drop, find = new(e.ManifestArrived(wanted))
    assert floor == e.RaiseFloor(1)
    assert drop == e.DropParts((CARD.ref.digest, FILE.ref.digest))
    assert fetch(new, CARD, find) == [e.InstallCard(CARD.ref)]
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    assert fetch(new, FILE, find) == [e.InstallFull((), wanted)]
    assert new(e.ModelInstalled(held(1))) == [e.DropParts()]
    assert new(e.ManifestArrived(wanted)) == []


def test_a_plan_waits_for_its_model(new: Driver) -> None:
    new(e.Connected())
    assert new.plan() == []
    assert new.state is DeviceState.WAITING
    find = new(e.ManifestArrived(manifest(1)))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    fetch(new, FILE, find)
    assert kinds(new(e.ModelInstalled(held(1)))) == ["DropParts", "Train"]


def test_a_device_behind_takes_the_chain_of_patches(ready: Driver) -> None:
    wanted = manifest(3, patch(0, 1), patch(1, 2), patch(2, 3))
    find = ready(e.ManifestArrived(wanted))[-1]
    (find,) = fetch(ready, patch_blob(2), find)
    assert fetch(ready, patch_blob(3), find) == [e.InstallPatches(held(1), (patch(1, 2), patch(2, 3)), wanted)]
    ready(e.ModelInstalled(held(3)))
    assert ready.machine.sync.models == (held(3), held(1))


def test_a_chain_larger_than_the_file_is_not_taken(ready: Driver) -> None:
    big = dataclasses.replace(patch(1, 2), blob=dataclasses.replace(FILE.ref, digest=b"b" * 32))
    find = ready(e.ManifestArrived(manifest(2, big)))[-1]
    assert find.ref == FILE.ref


def test_a_full_file_of_an_earlier_version_is_patched(new: Driver) -> None:
    new(e.Connected())
    wanted = manifest(3, patch(1, 2), patch(2, 3), full_version=2)
    find = new(e.ManifestArrived(wanted))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    (find,) = fetch(new, FILE, find)
    assert fetch(new, patch_blob(3), find) == [e.InstallFull((patch(2, 3),), wanted)]


def test_a_rollback_to_the_file_before_needs_no_download(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(2, patch(1, 2))))
    ready(e.ModelInstalled(held(2)))
    wanted = manifest(3, sha256=sha(1), full_sha256=sha(1))
    assert ready(e.ManifestArrived(wanted))[-1] == e.InstallPatches(held(1), (), wanted)


def test_training_may_need_the_version_before(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(2, patch(1, 2))), e.ModelInstalled(held(2)))
    assert ready.plan(version=1) == [e.Train(plan(), hash_of(1), held(1))]


def test_a_manifest_that_goes_back_is_refused(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(5)))
    for version in (1, 4):
        (refusal,) = ready(e.ManifestArrived(manifest(version)))
        assert refusal.reason is RejectReason.REPLAYED
    assert ready.machine.sync.floor == 5


def test_the_floor_holds_over_a_restart() -> None:
    driver = Driver(Facts(models=(held(1),), floor=7))
    (refusal,) = driver(e.ManifestArrived(manifest(6)))
    assert refusal.reason is RejectReason.REPLAYED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 1, "sha256": b"x" * 32, "full_sha256": b"x" * 32}, RejectReason.CONFLICT),
        ({"size": LARGEST + 1, "full": dataclasses.replace(FILE.ref, raw_size=LARGEST + 1)}, RejectReason.TOO_LARGE),
        ({"size": 5}, RejectReason.MALFORMED),
        ({"full_sha256": b"x" * 32}, RejectReason.MALFORMED),
        ({"full": dataclasses.replace(FILE.ref, parts=bytes(16))}, RejectReason.MALFORMED),
        ({"card": dataclasses.replace(CARD.ref, raw_size=LARGEST + 1)}, RejectReason.TOO_LARGE),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    ready: Driver, changes: dict[str, Any], reason: RejectReason
) -> None:
    (refusal,) = ready(e.ManifestArrived(manifest(**{"version": 2, **changes})))
    assert refusal.reason is reason
    assert ready.machine.sync.floor == 1
    assert kinds(ready.plan()) == ["Train"]


def test_a_step_that_the_policy_forbids_is_tried_again_with_what_is_on_disk(ready: Driver) -> None:
    wanted = manifest(2, patch(1, 2))
    find = ready(e.ManifestArrived(wanted))[-1]
    install = fetch(ready, patch_blob(2), find)
    assert install == [e.InstallPatches(held(1), (patch(1, 2),), wanted)]
    (refusal,) = ready(e.InstallFailed(RejectReason.LARGE_STEP, "too far"))
    assert refusal == e.CountRejection(RejectReason.LARGE_STEP, "too far")
    assert ready.machine.sync.models == (held(1),)
    # It says so to whoever asks it to train that version, and trains the one that it has.
    (decline,) = ready.plan(version=2)
    assert (decline.reason, decline.detail) == (DeclineReason.NO_MODEL, "large_step: too far")
    ready(e.AnswerStored(answer(kind=AnswerKind.DECLINE, reason="no_model")))
    assert kinds(ready.plan(2, version=1, deadline=90_000)) == ["Train"]
    # The owners changed the policy meanwhile: nothing is fetched again.
    pause = ready.machine.next_deadline()
    assert pause is not None
    ready.now = pause
    assert ready(TimerFired()) == install
    ready(e.ModelInstalled(held(2)))
    assert ready.machine.sync.models == (held(2), held(1))


def test_a_bad_patch_is_followed_by_the_full_file(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2, patch(1, 2))))[-1]
    fetch(ready, patch_blob(2), find)
    refusal, _, find = ready(e.InstallFailed(RejectReason.BODY_MISMATCH, "hash"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert fetch(ready, FILE, find) == [e.InstallFull((), manifest(2, patch(1, 2)))]


def test_a_bad_full_file_is_tried_again_later_and_declined_meanwhile(new: Driver) -> None:
    new(e.Connected())
    new.plan()
    find = new(e.ManifestArrived(manifest(1)))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    fetch(new, FILE, find)
    refusal, _drop, decline = new(e.InstallFailed(RejectReason.BODY_MISMATCH, "hash"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert decline.reason is DeclineReason.NO_MODEL
    new(e.AnswerStored(answer(kind=AnswerKind.DECLINE)))
    deadline = new.machine.next_deadline()
    assert deadline is not None
    assert kinds(new(TimerFired(), now=deadline)) == ["FindParts"]


def test_a_corrupt_chunk_is_counted_and_stays_wanted(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    (refusal,) = ready(e.ChunkArrived(find.ref.digest[:16], 0, b"wrong"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert e.StoreChunk(find.ref, 0, FILE.chunk(0)) in ready(e.ChunkArrived(find.ref.digest[:16], 0, FILE.chunk(0)))


def test_a_download_goes_on_where_it_was(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    out = ready(e.PartsFound(find.ref.digest, (0, 1)))
    assert [each.index for each in out] == list(range(2, len(FILE.ref.parts) // 16))


@pytest.mark.parametrize("data", [b"chunk", b""])
def test_a_subscription_of_a_process_before_us_is_ended(ready: Driver, data: bytes) -> None:
    assert ready(e.ChunkArrived(b"\x77" * 16, 3, data)) == [e.UnsubscribeChunk(b"\x77" * 16, 3)]


def test_chunks_are_subscribed_once_after_a_reconnect(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    first = ready(e.PartsFound(find.ref.digest, ()))
    gone = ready(e.Disconnected())
    assert [each.index for each in gone] == [each.index for each in first]
    assert kinds(gone) == ["UnsubscribeChunk"] * len(first)
    assert ready(e.Connected())[1:] == first


def test_a_silent_broker_is_asked_again_then_the_gateway(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    assert "SubscribeChunk" in kinds(ready(TimerFired(), now=ready.machine.next_deadline()))
    assert "AskChunks" in kinds(ready(TimerFired(), now=ready.machine.next_deadline()))


def test_a_newer_manifest_takes_over(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    out = ready(e.ManifestArrived(manifest(3, patch(1, 2), patch(2, 3))))
    assert "UnsubscribeChunk" in kinds(out)
    assert out[-1] == e.FindParts(patch_blob(2).ref)


def test_an_installation_that_a_newer_manifest_overtook(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2, patch(1, 2))))[-1]
    fetch(ready, patch_blob(2), find)
    assert ready(e.ManifestArrived(manifest(3, patch(1, 2), patch(2, 3))))[-1] == e.DropParts(
        (patch_blob(2).ref.digest, patch_blob(3).ref.digest)
    )
    assert ready(e.ModelInstalled(held(2))) == [e.FindParts(patch_blob(3).ref)]


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
