"""The gateway's machine without I/O: which plan opens a round, and who is waited for in it."""

from __future__ import annotations

from typing import Any

from fleetfed_testing.round_events import (
    FLEET,
    kinds,
    name_of,
    update,
)
from fleetfed_testing.signed_fleet import T0

from fleetfed.gateway import events as ev
from fleetfed.gateway.record import Place, RoundState
from fleetfed.gateway.round import RoundMachine
from fleetfed.gateway.state import CENSUS_EVERY, CENSUS_SOON, GatewayMachine, GatewayState
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Life, Presence
from fleetfed.shared.wire.topics import Kind


def gateway() -> GatewayMachine:
    return GatewayMachine("north", Place(gateway="g", direct=True))


def plan_event(round: int, **changes: Any) -> ev.PlanArrived:
    plan, message = FLEET.plan(round, **changes)
    return ev.PlanArrived(plan=plan, hash=message.head.hash, raw=message.encode())


def served(version: int = 1) -> ev.ModelServed:
    return ev.ModelServed(version=version, sha256=FLEET.model(version)[0].sha256, sizes=FLEET.sizes)


def test_a_plan_waits_for_its_model() -> None:
    machine = gateway()
    event = plan_event(1)
    assert machine.handle(event, T0) == []
    assert machine.state is GatewayState.WAITING
    instructions = machine.handle(served(), T0)
    assert instructions == [
        ev.StoreRound(round=1, hash=event.hash, raw=event.raw, sizes=FLEET.sizes),
        ev.PublishPlan(event.raw),
    ]
    machine.validate()


def test_a_later_plan_ends_the_round() -> None:
    machine = gateway()
    machine.handle(served(), T0)
    first = plan_event(1)
    machine.handle(first, T0)
    instructions = machine.handle(plan_event(2), T0)
    assert kinds(instructions) == ["ForgetRound", "RoundOver", "StoreRound", "PublishPlan"]
    assert machine.previous.hash == first.hash
    machine.validate()


def test_the_same_plan_again_is_ignored_and_so_is_its_end() -> None:
    machine = gateway()
    machine.handle(served(), T0)
    event = plan_event(1)
    machine.handle(event, T0)
    assert machine.handle(event, T0) == []
    end = ev.RoundEndArrived(round=1, plan=event.hash, raw=b"end")
    assert kinds(machine.handle(end, T0)) == ["ForgetRound", "RoundOver", "PublishPlan"]
    assert machine.handle(end, T0) == []
    assert machine.handle(event, T0) == []
    assert machine.state is GatewayState.IDLE


def test_an_expired_plan_is_not_opened() -> None:
    machine = gateway()
    machine.handle(served(), T0)
    event = plan_event(1)
    assert machine.handle(event, event.plan.expires)[0].reason is RejectReason.EXPIRED
    assert machine.state is GatewayState.IDLE


def test_a_plan_whose_model_comes_after_its_expiry_is_not_opened() -> None:
    machine = gateway()
    event = plan_event(1)
    machine.handle(event, T0)
    assert [each.reason for each in machine.handle(served(), event.plan.expires)] == [RejectReason.EXPIRED]
    assert machine.state is GatewayState.IDLE


def test_a_plan_for_another_file_of_the_version_is_refused() -> None:
    machine = gateway()
    machine.handle(served(), T0)
    assert machine.handle(plan_event(1, model_sha256=bytes(32)), T0)[0].reason is RejectReason.WRONG_MODEL


def test_an_update_decoded_after_its_round_ended_is_late_even_if_another_is_open() -> None:
    machine = gateway()
    machine.handle(served(), T0)
    first = plan_event(1)
    machine.handle(first, T0)
    machine.handle(plan_event(2), T0)
    assert machine.handle(update("a", plan=first.hash), T0)[-1].reason is RejectReason.LATE


def test_many_changes_share_one_census() -> None:
    machine = gateway()
    machine.handle(ev.UpstreamConnected(), T0)
    for number in range(5):
        event = ev.PresenceArrived(kind=Kind.DEVICE, member=f"d{number}", presence=Presence(life=Life.READY, session=1))
        machine.handle(event, T0)
    assert machine.next_deadline() == T0 + CENSUS_SOON
    (sent,) = machine.handle(TimerFired(), T0 + CENSUS_SOON)
    assert (sent.census.devices, sent.census.ready) == (5, 5)
    machine.handle(ev.PresenceArrived(kind=Kind.DEVICE, member="d0", presence=None), T0 + 200)
    assert machine.next_deadline() == T0 + CENSUS_SOON + CENSUS_EVERY


def there(member: str, *, kind: Kind = Kind.DEVICE) -> ev.PresenceArrived:
    """A member is ready and names the certificate that its updates have."""
    presence = Presence(life=Life.READY, session=1, serial=update(member).serial)
    return ev.PresenceArrived(kind=kind, member=member, presence=presence)


def revoke(*members: str) -> ev.Revoked:
    return ev.Revoked(serials=frozenset(update(member).serial for member in members))


def with_round(*devices: str, gateways: tuple[str, ...] = ()) -> tuple[GatewayMachine, RoundMachine, Digest]:
    """A machine that knows these members, and the round that it has opened for them."""
    machine, event = gateway(), plan_event(1)
    machine.handle(ev.UpstreamConnected(), T0)
    machine.handle(ev.SiteConnected(T0), T0)
    machine.handle(served(), T0)
    for kind, names in ((Kind.DEVICE, devices), (Kind.GATEWAY, gateways)):
        for name in names:
            machine.handle(there(name, kind=kind), T0)
    machine.handle(event, T0)
    assert machine.round is not None
    return machine, machine.round, event.hash


def test_a_round_closes_with_the_list_that_revokes_all_who_are_still_awaited() -> None:
    machine, rnd, plan = with_round("a", "b", "c", gateways=("g-1",))
    machine.handle(update("a", plan=plan), T0)
    assert machine.handle(revoke("b"), T0) == []
    assert rnd.expected == {"a", "c"}
    instructions = machine.handle(revoke("b", "c", "g-1"), T0)
    assert kinds(instructions) == ["MakeProposal"]
    assert (rnd.expected, rnd.expected_gateways) == ({"a"}, set())
    machine.validate()
    (sent,) = machine.handle(TimerFired(), T0 + CENSUS_SOON)
    assert (sent.census.devices, sent.census.ready, sent.census.answered, sent.census.expected) == (1, 1, 1, 1)


def test_a_revoked_device_that_has_answered_stays_expected_and_its_update_is_not_proposed() -> None:
    machine, rnd, plan = with_round("a", "b")
    machine.handle(update("a", plan=plan), T0)
    assert machine.handle(revoke("a"), T0) == [], "the other is still awaited"
    assert rnd.expected == {"a", "b"}
    assert kinds(machine.handle(update("b", plan=plan), T0))[-2:] == ["DropUpdates", "MakeProposal"]
    assert rnd.record.own_part() == (name_of("b/0"),)
    machine.validate()


def test_a_presence_that_names_a_certificate_revoked_before_is_not_awaited() -> None:
    machine, rnd, plan = with_round("a")
    machine.handle(revoke("b", "c"), T0)
    machine.handle(there("b"), T0)
    machine.handle(there("c", kind=Kind.GATEWAY), T0)
    assert (rnd.expected, rnd.expected_gateways) == ({"a"}, set())
    assert kinds(machine.handle(update("a", plan=plan), T0))[-1] == "MakeProposal"
    # Nor in the next round.
    machine.handle(there("b"), T0)
    machine.handle(plan_event(2), T0)
    assert machine.round is not None
    assert (machine.round.expected, machine.round.expected_gateways) == ({"a"}, set())
    machine.validate()


def test_a_site_of_revoked_devices_alone_proposes_nothing_at_once() -> None:
    machine, rnd, _ = with_round("a", "b")
    assert kinds(machine.handle(revoke("a", "b"), T0)) == ["MakeProposal"]
    assert (rnd.contributors, rnd.expected) == (0, set())


def test_the_diagrams_show_every_state() -> None:
    assert all(f" {state} -->" in RoundMachine.diagram() for state in RoundState)
    assert all(f" {state} -->" in GatewayMachine.diagram() for state in GatewayState)
