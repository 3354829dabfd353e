"""A gateway and coordinators that come and go: what one said that the owners list no more is void, on disk too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway import events as ev
from fleetfed.gateway.journal import Journal, forget_rows, lower_rows, round_rows
from fleetfed.gateway.record import Place
from fleetfed.gateway.state import GatewayMachine, GatewayState
from fleetfed.shared.errors import RejectReason

FLEET = SignedFleet()
NOW = FLEET.now
HONEST, THIEF = b"h" * 16, b"t" * 16
FAR = 2**62


def machine(**changes: Any) -> GatewayMachine:
    made = GatewayMachine("north", Place(gateway="g", direct=True), **changes)
    made.handle(ev.ModelServed(version=1, sha256=FLEET.model(1)[0].sha256, sizes=FLEET.sizes), NOW)
    return made


def plan(round: int, signer: bytes = HONEST) -> ev.PlanArrived:
    made, message = FLEET.plan(round)
    return ev.PlanArrived(plan=made, hash=message.head.hash, raw=message.encode(), signer=signer)


def end(round: int, signer: bytes = HONEST) -> ev.RoundEndArrived:
    return ev.RoundEndArrived(round=round, plan=b"p" * 32, raw=f"end {round}".encode(), signer=signer)


def test_rounds_that_a_thief_pushed_up_fall_when_the_key_is_listed_no_more() -> None:
    gateway = machine()
    gateway.handle(plan(4), NOW)
    gateway.handle(end(4), NOW)
    gateway.handle(plan(FAR, THIEF), NOW)
    (refused,) = [each for each in gateway.handle(plan(5), NOW) if isinstance(each, ev.Refused)]
    assert refused.reason is RejectReason.REPLAYED
    out = gateway.handle(ev.CoordinatorsChanged(listed=frozenset({HONEST})), NOW)
    assert ev.LowerRound(round=4, forget=frozenset({THIEF})) in out
    assert ev.PublishPlan(b"") in out, "the thief's plan is cleared below"
    assert gateway.state is GatewayState.IDLE
    gateway.validate()
    gateway.handle(plan(5), NOW)
    assert gateway.state is GatewayState.ROUND
    gateway.validate()


def test_an_end_of_a_round_far_away_falls_too() -> None:
    gateway = machine()
    gateway.handle(plan(4), NOW)
    gateway.handle(end(FAR, THIEF), NOW)
    gateway.handle(ev.CoordinatorsChanged(listed=frozenset({HONEST})), NOW)
    assert gateway.last_round == 4


def test_an_open_round_of_a_coordinator_that_stays_goes_on() -> None:
    gateway = machine()
    gateway.handle(plan(3, THIEF), NOW)
    gateway.handle(plan(4), NOW)
    out = gateway.handle(ev.CoordinatorsChanged(listed=frozenset({HONEST})), NOW)
    assert out == [ev.LowerRound(round=4, forget=frozenset({THIEF}))]
    assert gateway.state is GatewayState.ROUND
    assert gateway.handle(ev.CoordinatorsChanged(listed=frozenset({HONEST})), NOW) == []


def test_a_plan_that_waits_for_its_model_is_dropped_with_its_coordinator() -> None:
    gateway = GatewayMachine("north", Place(gateway="g", direct=True))
    gateway.handle(plan(FAR, THIEF), NOW)
    assert gateway.state is GatewayState.WAITING
    gateway.handle(ev.CoordinatorsChanged(listed=frozenset()), NOW)
    assert (gateway.state, gateway.last_round) == (GatewayState.IDLE, 0)
    gateway.validate()


def test_what_was_counted_before_keys_were_remembered_stays() -> None:
    gateway = machine(last_round=9)
    assert gateway.handle(ev.CoordinatorsChanged(listed=frozenset()), NOW) == []
    assert gateway.last_round == 9


def stored(round: int, fleet: SignedFleet) -> ev.StoreRound:
    _, message = fleet.plan(round)
    return ev.StoreRound(round=round, hash=message.head.hash, raw=message.encode(), sizes=fleet.sizes)


def test_the_journal_forgets_a_coordinator_as_the_machine_does(tmp_path: Path) -> None:
    key = FLEET.coordinator.certificate.key_id
    journal = Journal(tmp_path / "journal.db")
    first = stored(4, FLEET)
    journal.write(round_rows(first))
    journal.write(forget_rows(ev.ForgetRound(round=4, hash=first.hash)))
    assert journal.load().counted == {key: 4}
    # Another key is forgotten: nothing of this one's falls.
    journal.write(lower_rows(ev.LowerRound(round=4, forget=frozenset({THIEF}))))
    loaded = journal.load()
    assert (loaded.last_round, loaded.counted, loaded.previous.hash) == (4, {key: 4}, first.hash)
    far = stored(2**40, FLEET)
    journal.write(round_rows(far))
    journal.write(forget_rows(ev.ForgetRound(round=far.round, hash=far.hash)))
    journal.write(lower_rows(ev.LowerRound(round=0, forget=frozenset({key}))))
    journal.close()
    again = Journal(tmp_path / "journal.db")
    loaded = again.load()
    again.close()
    assert (loaded.last_round, loaded.previous.hash) == (0, None)
    assert max(loaded.counted.values(), default=0) == 0
