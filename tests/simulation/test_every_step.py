"""One round, and one death at every step of it: of every gateway, the coordinator and the helper, each before and after
a write.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.simulation.ops import (
    GATEWAYS,
    After,
    CrashCoordinator,
    CrashGateway,
    CrashHelper,
    Deliver,
    DeliverAll,
    Op,
    StartRound,
    all_train,
)
from tests.simulation.setting import BUCKETS, HELPED, PLAIN, SPLIT, Setting
from tests.simulation.world import world

STEPS = {PLAIN: 170, SPLIT: 180, BUCKETS: 190, HELPED: 200}
"""Messages, writes and other work from the end of training to the end of the round, at most; fewer where the dice have
it."""

pytestmark = pytest.mark.timeout(900)


def deaths(setting: Setting, stride: int, offset: int = 0) -> Iterator[tuple[Op, ...]]:
    """Operations with one death, ``stride`` deaths apart."""
    trained = (StartRound(), DeliverAll(), *all_train(setting))
    who: list[Op] = [CrashGateway(number + 1, after) for number in range(GATEWAYS) for after in After]
    who += [CrashCoordinator(after) for after in After]
    who += [CrashHelper(after) for after in After if setting.helper]
    every = itertools.product(range(STEPS[setting]), who)
    for step, death in itertools.islice(every, offset, None, stride):
        yield (*trained, Deliver(step, seed=step % 5), death, DeliverAll(seed=step))


def check(setting: Setting, operations: tuple[Op, ...]) -> None:
    with world(setting) as made:
        made.run(operations)
        made.finish()
        assert {number: total.count for number, total in made.sums.items()} == {1: setting.size}, operations


@pytest.mark.parametrize("setting", STEPS, ids=["plain", "split", "buckets", "helped"])
def test_the_round_has_no_more_steps(setting: Setting) -> None:
    with world(setting) as made:
        made.run([StartRound(), DeliverAll(), *all_train(setting), Deliver(STEPS[setting])])
        assert made.sums


# Primes, so that a stride meets every member and both kinds of death.
@pytest.mark.parametrize(
    ("setting", "stride"),
    [(PLAIN, 151), (SPLIT, 293), (BUCKETS, 389), (HELPED, 389)],
    ids=["plain", "split", "buckets", "helped"],
)
def test_death_at_some_steps(setting: Setting, stride: int) -> None:
    for operations in deaths(setting, stride):
        check(setting, operations)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("setting", STEPS, ids=["plain", "split", "buckets", "helped"])
def test_death_at_every_step(setting: Setting) -> None:
    for operations in deaths(setting, 1 if setting is PLAIN else 3):
        check(setting, operations)
