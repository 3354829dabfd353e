"""Rounds of masked updates, typed by hand: every kind of fault by itself, and the rules that only these rounds have."""

from __future__ import annotations

import pytest

from tests.simulation.checks import secrets_on_disk
from tests.simulation.ops import (
    AbortRound,
    AdvanceTime,
    After,
    BrokerCrash,
    CrashCoordinator,
    CrashDevice,
    CrashGateway,
    CrashHelper,
    Deliver,
    DeliverAll,
    DeviceTrains,
    DropConnection,
    Duplicate,
    Op,
    PartitionSite,
    ReplayOld,
    Restart,
    RevokeDevice,
    SleepDevice,
    StartRound,
    all_train,
)
from tests.simulation.setting import BUCKETS, HELPED, SPLIT, Setting
from tests.simulation.world import world

pytestmark = pytest.mark.timeout(900)
_MORE = pytest.mark.slow
_ALL = pytest.mark.parametrize("setting", [SPLIT, BUCKETS, HELPED], ids=["split", "buckets", "helped"])


def play(setting: Setting, *operations: Op) -> dict[int, int]:
    """Run operations, heal, check; returns the contributors of every round that was committed."""
    with world(setting) as made:
        made.run(operations)
        made.finish()
        return {number: total.count for number, total in made.sums.items()}


def trained(setting: Setting) -> tuple[Op, ...]:
    """A round whose updates are ready to leave."""
    return StartRound(), DeliverAll(), *all_train(setting)


@_ALL
def test_an_undisturbed_round_has_everybody_once_and_leaves_no_key(setting: Setting) -> None:
    with world(setting) as made:
        made.run([*trained(setting), Deliver(20)])
        # The last check of every run finds what it looks for, as long as it is there.
        assert {path.split("/")[0] for path in secrets_on_disk(made)} == {"c-main", "g-1", "g-2", "g-3"}
        made.finish()
        assert {number: total.count for number, total in made.sums.items()} == {1: setting.size}


@_ALL
def test_everything_comes_twice_and_the_past_again(setting: Setting) -> None:
    twice = [Duplicate(f"g-{gateway}", which) for gateway in (1, 2, 3) for which in range(20)]
    past = [ReplayOld(which) for which in range(0, 400, 9)]
    steps = (*trained(setting), DeliverAll(), *twice, DeliverAll(), *past, DeliverAll())
    assert play(setting, *steps) == {1: setting.size}


def test_a_site_below_the_minimum_is_in_no_sum() -> None:
    steps = (StartRound(), DeliverAll(), SleepDevice(3), *all_train(SPLIT), DeliverAll(), AdvanceTime(61_000))
    assert play(SPLIT, *steps, DeliverAll()) == {1: 5}


def test_a_site_of_three_goes_on_without_one() -> None:
    steps = (StartRound(), DeliverAll(), SleepDevice(4), *all_train(SPLIT), DeliverAll(), AdvanceTime(61_000))
    assert play(SPLIT, *steps, DeliverAll()) == {1: 6}


def test_no_sum_where_every_site_is_below_the_minimum() -> None:
    alone = [SleepDevice(number) for number in (1, 3, 4, 5)]
    with world(SPLIT) as made:
        made.run([StartRound(), DeliverAll(), *alone, *all_train(SPLIT), DeliverAll(), AdvanceTime(121_000)])
        made.run([DeliverAll()])
        assert not made.sums
        assert not any(message.topic.endswith("/reveal") for _, message in made.ledger.history)
        made.finish()


def test_a_device_revoked_after_its_update_is_left_out_with_its_site() -> None:
    steps = (StartRound(), DeliverAll(), DeviceTrains(6), DeliverAll(), RevokeDevice(6), DeliverAll())
    assert play(SPLIT, *steps, *all_train(SPLIT), DeliverAll()) == {1: 5}


def test_an_aborted_round_leaves_no_key() -> None:
    assert play(SPLIT, *trained(SPLIT), Deliver(25), AbortRound(), DeliverAll()) == {}


def test_a_site_that_is_cut_off_beyond_the_end_leaves_no_key() -> None:
    steps = (StartRound(), DeliverAll(), PartitionSite(1), *all_train(SPLIT), DeliverAll(), AdvanceTime(121_000))
    assert play(SPLIT, *steps, DeliverAll()) == {1: 3}


@pytest.mark.parametrize("lose", [pytest.param(False, marks=_MORE), True])
@pytest.mark.parametrize("broker", [0, 1])
def test_a_broker_dies(broker: int, lose: bool) -> None:
    assert play(HELPED, *trained(HELPED), Deliver(30), BrokerCrash(broker, lose)) == {1: 7}


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_device_dies_with_its_update(step: int) -> None:
    crash = CrashDevice(1, step=step, lossy=True)
    assert play(SPLIT, StartRound(), DeliverAll(), crash, *all_train(SPLIT), Deliver(4), Restart("d-1")) == {1: 7}


@pytest.mark.parametrize("after", After)
@pytest.mark.parametrize("progress", [pytest.param(50, marks=_MORE), 60, 70, pytest.param(80, marks=_MORE)])
def test_the_helper_dies(progress: int, after: After) -> None:
    steps = (*trained(HELPED), Deliver(progress, seed=progress), CrashHelper(after), DeliverAll(), Restart("h-main"))
    assert play(HELPED, *steps) == {1: 7}


def test_the_helper_is_away_for_a_while() -> None:
    steps = (*trained(HELPED), CrashHelper(), DeliverAll(), AdvanceTime(30_000), DeliverAll(), Restart("h-main"))
    assert play(HELPED, *steps, DropConnection("h-main"), DeliverAll()) == {1: 7}


def test_without_its_helper_a_round_has_no_sum() -> None:
    with world(HELPED) as made:
        made.run([*trained(HELPED), CrashHelper(), DeliverAll(), AdvanceTime(121_000), DeliverAll()])
        assert not made.sums
        made.finish()


def test_everybody_dies_at_once() -> None:
    crashes = (CrashCoordinator(), CrashGateway(1), CrashGateway(2), CrashGateway(3), CrashHelper())
    wake = [Restart(name) for name in ("g-2", "g-1", "g-3", "h-main", "c-main")]
    for progress in (30, 60):
        steps = (*trained(HELPED), Deliver(progress, seed=progress), *crashes, *wake)
        assert play(HELPED, *steps) == {1: 7}
