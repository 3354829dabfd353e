"""The helper's memory: keys that come and go, and masks that are given once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.helper import events as ev
from fleetfed.cloud_coordinator.helper.events import Claim, Key
from fleetfed.cloud_coordinator.helper.state import SKEW, HelperMachine, HelperState
from fleetfed.shared.errors import IllegalTransitionError, RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import HYBRID

DAY = 86_400_000
T0 = 1_800_000_000_000


def key(number: int, *, issued: int = T0) -> Key:
    return Key(public=bytes([number]) * 32, message=b"key %d" % number, issued=issued, expires=issued + 2 * DAY)


def claim(**changes: Any) -> Claim:
    values: dict[str, Any] = {
        "question": Digest(b"q" * 32),
        "round": 1,
        "plan": Digest(b"p" * 32),
        "gateway": "g-north",
        "key": key(1).public,
        "devices": frozenset({"d-1", "d-2"}),
    }
    return Claim(**{**values, **changes})


@pytest.fixture
def machine() -> Iterator[HelperMachine]:
    found = HelperMachine(period=DAY)
    found.handle(ev.Started(), T0)
    found.handle(ev.KeyStored(key(1)), T0)
    yield found
    found.validate()


def answer(machine: HelperMachine, wanted: Claim) -> None:
    assert machine.handle(ev.Asked(wanted.question), T0) == [ev.Verify(wanted.question)]
    assert machine.handle(ev.Verified(wanted), T0) == [ev.Answer(wanted)]
    assert machine.handle(ev.AnswerStored(wanted), T0) == [ev.Send(wanted.round, wanted.gateway)]


def test_the_first_key_is_made_at_the_start() -> None:
    machine = HelperMachine(period=DAY)
    assert machine.next_deadline() is None
    assert machine.handle(ev.Started(), T0) == [ev.MakeKey(issued=T0, expires=T0 + 2 * DAY)]
    with pytest.raises(IllegalTransitionError):
        machine.handle(ev.Connected(), T0)
    assert machine.handle(ev.KeyStored(key(1)), T0) == [ev.PublishKey(b"key 1")]
    assert machine.state is HelperState.SERVING
    assert machine.handle(ev.Connected(), T0) == [ev.PublishKey(b"key 1")]


def test_a_kept_key_goes_on_after_a_restart() -> None:
    machine = HelperMachine(period=DAY, keys=[key(1)])
    assert machine.handle(ev.Started(), T0 + DAY - 1) == []
    assert machine.state is HelperState.SERVING
    assert machine.next_deadline() == T0 + DAY


def test_keys_rotate_and_secrets_are_destroyed(machine: HelperMachine) -> None:
    assert machine.next_deadline() == T0 + DAY
    now = T0 + DAY
    assert machine.handle(TimerFired(), now) == [ev.MakeKey(issued=now, expires=now + 2 * DAY)]
    # Until it is stored there is nothing to wait for, and no third one is made.
    assert machine.next_deadline() is None
    assert machine.handle(TimerFired(), now) == []
    assert machine.handle(ev.KeyStored(key(2, issued=now)), now) == [ev.PublishKey(b"key 2")]
    assert machine.key(b"key 1") == key(1)
    void = T0 + 2 * DAY + SKEW + 1
    machine.handle(TimerFired(), T0 + 2 * DAY)
    machine.handle(ev.KeyStored(key(3, issued=T0 + 2 * DAY)), T0 + 2 * DAY)
    assert machine.next_deadline() == void
    assert machine.handle(TimerFired(), void - 1) == []
    assert machine.handle(TimerFired(), void) == [ev.DestroyKeys((key(1).public,))]
    assert machine.key(b"key 1") is None


def test_after_a_long_sleep_all_is_made_up_for() -> None:
    machine = HelperMachine(period=DAY, keys=[key(1)], claims=[claim()])
    now = T0 + 10 * DAY
    assert machine.handle(ev.Started(), now) == [
        ev.DestroyKeys((key(1).public,)),
        ev.MakeKey(issued=now, expires=now + 2 * DAY),
    ]
    assert machine.answered(1) == frozenset()


def test_a_key_from_the_future_is_not_kept_until_then() -> None:
    """A clock that was years ahead when it was made."""
    machine = HelperMachine(period=DAY, keys=[key(1, issued=T0 + 1000 * DAY)])
    assert machine.handle(ev.Started(), T0) == [ev.MakeKey(issued=T0, expires=T0 + 2 * DAY)]


def test_the_same_request_gets_the_stored_answer(machine: HelperMachine) -> None:
    answer(machine, claim())
    assert machine.handle(ev.Asked(claim().question), T0) == [ev.Send(1, "g-north")]


def test_it_is_remembered_over_a_restart() -> None:
    machine = HelperMachine(period=DAY, keys=[key(1)], claims=[claim()])
    machine.handle(ev.Started(), T0)
    assert machine.handle(ev.Asked(claim().question), T0) == [ev.Send(1, "g-north")]
    other = claim(question=Digest(b"r" * 32), devices=frozenset({"d-1"}))
    (refusal,) = machine.handle(ev.Verified(other), T0)
    assert refusal.reason is RejectReason.CONFLICT
    machine.validate()


@pytest.mark.parametrize(
    "second",
    [
        {"devices": frozenset({"d-1"})},
        {"devices": frozenset({"d-8", "d-9"})},
        {"gateway": "g-south", "devices": frozenset({"d-2", "d-3"})},
        {"gateway": "g-south", "devices": frozenset({"d-8", "d-9"}), "plan": Digest(b"o" * 32)},
    ],
    ids=["a smaller set", "another set", "a device through another gateway", "a second plan of the round"],
)
def test_a_second_different_request_is_a_conflict(machine: HelperMachine, second: dict[str, Any]) -> None:
    answer(machine, claim())
    other = claim(question=Digest(b"r" * 32), **second)
    assert machine.handle(ev.Asked(other.question), T0) == [ev.Verify(other.question)]
    (refusal,) = machine.handle(ev.Verified(other), T0)
    assert isinstance(refusal, ev.Refuse)
    assert (refusal.question, refusal.reason) == (other.question, RejectReason.CONFLICT)
    assert machine.answered(1) == {"g-north"}


def test_other_devices_of_another_gateway_and_the_next_round(machine: HelperMachine) -> None:
    answer(machine, claim())
    answer(machine, claim(question=Digest(b"r" * 32), gateway="g-south", devices=frozenset({"d-8", "d-9"})))
    answer(machine, claim(question=Digest(b"s" * 32), round=2, plan=Digest(b"o" * 32)))
    assert machine.answered(1) == {"g-north", "g-south"}


def test_a_key_that_was_destroyed_meanwhile(machine: HelperMachine) -> None:
    (refusal,) = machine.handle(ev.Verified(claim(key=b"x" * 32)), T0)
    assert refusal.reason is RejectReason.EXPIRED


claims = st.builds(
    claim,
    question=st.integers(0, 30).map(lambda n: Digest(bytes([n]) * 32)),
    round=st.integers(1, 3),
    plan=st.sampled_from((Digest(b"p" * 32), Digest(b"o" * 32))),
    gateway=st.sampled_from(("g-a", "g-b", "g-c")),
    devices=st.frozensets(st.integers(0, 9).map(lambda n: f"d-{n}"), min_size=1),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(claims, max_size=20))
def test_whatever_is_asked_no_device_is_in_two_sums(wanted: list[Claim]) -> None:
    machine = HelperMachine(period=DAY, keys=[key(1)])
    machine.handle(ev.Started(), T0)
    given_: list[Claim] = []
    for each in wanted:
        (step,) = machine.handle(ev.Asked(each.question), T0)
        if isinstance(step, ev.Send):
            continue
        (step,) = machine.handle(ev.Verified(each), T0)
        if isinstance(step, ev.Answer):
            machine.handle(ev.AnswerStored(each), T0)
            given_.append(each)
        machine.validate()
    for a in given_:
        for b in given_:
            if a is not b and a.round == b.round:
                assert not a.devices & b.devices
                assert a.plan == b.plan


def test_a_new_key_is_made_at_once_when_the_settings_name_another_suite() -> None:
    machine = HelperMachine(period=DAY, suite=HYBRID, keys=[key(1)])
    (make,) = machine.handle(ev.Started(), T0 + 1)
    assert isinstance(make, ev.MakeKey)
    hybrid = Key(public=bytes(1216), message=b"key 2", issued=T0 + 1, expires=T0 + 1 + 2 * DAY)
    machine.handle(ev.KeyStored(hybrid), T0 + 1)
    assert machine.current == hybrid
    assert machine.key(b"key 1") == key(1), "rounds that named it go on"
    assert machine.handle(TimerFired(), T0 + 2) == []
    machine.validate()
