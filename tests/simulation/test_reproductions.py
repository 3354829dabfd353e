"""Scenarios typed by hand: every kind of fault by itself, and all that random runs ever found."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.gateway.perform import Performer
from tests.simulation.ops import (
    AbortRound,
    AdvanceTime,
    After,
    BrokerCrash,
    Corrupt,
    CrashCoordinator,
    CrashDevice,
    CrashGateway,
    Deliver,
    DeliverAll,
    DeviceTrains,
    DropConnection,
    Duplicate,
    Heal,
    Op,
    PartitionSite,
    ReplayOld,
    Restart,
    RevokeDevice,
    SleepDevice,
    StartRound,
    WakeDevice,
    all_train,
)
from tests.simulation.setting import PLAIN, Setting
from tests.simulation.world import World, simulate, world

ALL_TRAIN = all_train()

pytestmark = pytest.mark.timeout(900)
_MORE = pytest.mark.slow
"""`test_every_step` has what is between."""


def play(*operations: Op, setting: Setting = PLAIN) -> dict[int, int]:
    """Run operations, heal, check; returns the contributors of every round that was committed."""
    with world(setting) as made:
        made.run(operations)
        made.finish()
        return {number: total.count for number, total in made.sums.items()}


def test_an_undisturbed_round_has_everybody_once() -> None:
    assert play(StartRound(2), DeliverAll()) == {1: 5, 2: 5}


@pytest.mark.parametrize("step", [0, 1, 3, 8])
def test_a_device_dies_with_its_update(step: int) -> None:
    crash = CrashDevice(1, step=step, lossy=True)
    assert play(StartRound(), DeliverAll(), crash, *ALL_TRAIN, Deliver(4), Restart("d-1")) == {1: 5}


@pytest.mark.parametrize("after", After)
@pytest.mark.parametrize("gateway", [1, 2, 3])
@pytest.mark.parametrize("progress", [25, *(pytest.param(step, marks=_MORE) for step in (2, 9, 45))])
def test_a_gateway_dies(gateway: int, after: After, progress: int) -> None:
    steps = (StartRound(), DeliverAll(), *ALL_TRAIN, Deliver(progress, seed=progress))
    assert play(*steps, CrashGateway(gateway, after), DeliverAll(), Restart(f"g-{gateway}")) == {1: 5}


@pytest.mark.parametrize("after", After)
@pytest.mark.parametrize("progress", [40, 70, *(pytest.param(step, marks=_MORE) for step in (2, 20, 55))])
def test_the_coordinator_dies(after: After, progress: int) -> None:
    steps = (StartRound(), DeliverAll(), *ALL_TRAIN, Deliver(progress, seed=progress))
    assert play(*steps, CrashCoordinator(after), DeliverAll(), Restart("c-main")) == {1: 5}


@pytest.mark.parametrize("lose", [False, True])
@pytest.mark.parametrize("broker", [0, 1])
def test_a_broker_dies(broker: int, lose: bool) -> None:
    assert play(StartRound(), DeliverAll(), *ALL_TRAIN, Deliver(10), BrokerCrash(broker, lose)) == {1: 5}


@pytest.mark.parametrize("member", ["c-main", "g-1", "g-2", "g-3", "d-1", "d-4"])
def test_a_connection_breaks(member: str) -> None:
    assert play(StartRound(), DeliverAll(), *ALL_TRAIN, Deliver(12), DropConnection(member)) == {1: 5}


def test_everything_comes_twice() -> None:
    twice = [Duplicate(f"g-{gateway}", which) for gateway in (1, 2, 3) for which in range(20)]
    assert play(StartRound(), DeliverAll(), *ALL_TRAIN, DeliverAll(), *twice, DeliverAll()) == {1: 5}


def test_the_past_comes_again() -> None:
    past = [ReplayOld(which) for which in range(0, 400, 3)]
    assert play(StartRound(2), DeliverAll(), *ALL_TRAIN, DeliverAll(), *past, DeliverAll()) == {1: 5, 2: 5}


def test_damaged_messages_are_not_believed() -> None:
    damaged = [Corrupt(which, byte=37 * which, flip=1 + which % 255) for which in range(0, 300, 7)]
    assert set(play(StartRound(), DeliverAll(), *ALL_TRAIN, DeliverAll(), *damaged)) == {1}


def test_a_device_sleeps_and_wakes_before_the_deadline() -> None:
    assert play(StartRound(), DeliverAll(), SleepDevice(2), *ALL_TRAIN, DeliverAll(), WakeDevice(2)) == {1: 5}


def test_who_sleeps_past_the_deadline_is_left_out() -> None:
    steps = (StartRound(), DeliverAll(), SleepDevice(2), *ALL_TRAIN, DeliverAll(), AdvanceTime(61_000), DeliverAll())
    assert play(*steps) == {1: 4}


def test_a_site_cut_off_beyond_the_end_aborts_nothing_for_the_others() -> None:
    steps = (StartRound(), DeliverAll(), PartitionSite(1), *ALL_TRAIN, DeliverAll(), AdvanceTime(121_000), DeliverAll())
    assert play(*steps, Heal()) == {1: 2}


def test_a_site_cut_off_for_a_while_is_in_the_sum() -> None:
    steps = (StartRound(), DeliverAll(), PartitionSite(1), *ALL_TRAIN, DeliverAll(), AdvanceTime(30_000), Heal())
    assert play(*steps, DeliverAll()) == {1: 5}


def test_a_revoked_device_is_left_out() -> None:
    steps = (StartRound(), DeliverAll(), RevokeDevice(5), DeliverAll(), *ALL_TRAIN, DeliverAll())
    assert play(*steps) == {1: 4}


def test_a_device_revoked_after_its_update_is_left_out() -> None:
    steps = (StartRound(), DeliverAll(), DeviceTrains(5), DeliverAll(), RevokeDevice(5), DeliverAll(), *ALL_TRAIN)
    assert play(*steps, DeliverAll()) == {1: 4}


def test_an_aborted_round_makes_no_version() -> None:
    assert play(StartRound(), DeliverAll(), AbortRound(), *ALL_TRAIN, DeliverAll()) == {}


# --- Found by random runs --------------------------------------------------------------------------------------------


def test_a_gateway_without_the_cloud_does_not_spin() -> None:
    """A census that fell due without a connection stayed due: the gateway's timer fired for ever, at full speed."""
    with world() as made:
        made.run([StartRound(), DeliverAll(), PartitionSite(1), DeliverAll(), DeviceTrains(1), DeliverAll()])
        before = made.loop.turns
        made.pass_time(30_000)
        assert made.loop.turns - before < 500
        made.finish()


def test_a_device_that_died_while_it_fetched_ends_its_old_subscriptions() -> None:
    """The broker kept the subscription to a chunk, and nobody ended it after the restart."""
    made: World
    with world() as made:
        made.run([StartRound(2), CrashDevice(2, step=32)])
        made.finish(549)
        for session in made.network.broker(2).sessions.values():
            assert not any("/blob/" in each for each in session.filters)


def test_random_run_1() -> None:
    simulate([StartRound(2), CrashDevice(1, step=24, lossy=True), SleepDevice(5), AdvanceTime(1_000)], seed=250)


# --- The simulation itself -------------------------------------------------------------------------------------------


def test_two_runs_of_the_same_operations_are_the_same() -> None:
    """Else a failure could not be repeated: keys, hashes and the order of what waits are the same, byte for byte."""
    operations = [StartRound(2), DeliverAll(1), CrashGateway(1), DeviceTrains(1), Deliver(9), CrashDevice(4, step=3)]

    def history() -> list[object]:
        with world() as made:
            made.run(operations)
            made.finish(3)
            return [*made.ledger.history]

    assert history() == history()


class _AlarmError(BaseException):
    """As the tests' time limit raises it: in the middle of whatever runs."""


@pytest.mark.parametrize(
    ("role", "method"), [(Coordinator, "_compute_and_store"), (Performer, "feed"), (DeviceRuntime, "_receive")]
)
def test_a_time_limit_is_not_blamed_on_the_program_that_it_hits(role: Any, method: str) -> None:
    """On a busy machine the tests' limit struck inside of a program, whose odd end was then reported as the failure."""
    with mock.patch.object(role, method, side_effect=_AlarmError), pytest.raises(_AlarmError):
        play(StartRound())
