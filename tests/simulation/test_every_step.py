"""One round, and one death at every step of it: of each gateway and of the coordinator, before and after a write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.simulation.ops import (
    DEVICES,
    GATEWAYS,
    After,
    CrashCoordinator,
    CrashGateway,
    Deliver,
    DeliverAll,
    DeviceTrains,
    Op,
    StartRound,
)
from tests.simulation.world import world

TRAINED = (StartRound(), DeliverAll(), *(DeviceTrains(number + 1) for number in range(DEVICES)))
"""All updates are ready to leave."""
STEPS = 170
"""Messages, writes and other work from there to the end, at most; fewer where the dice have it."""


def deaths(stride: int, offset: int = 0) -> Iterator[tuple[Op, ...]]:
    """Operations with one death, ``stride`` deaths apart."""
    who: list[Op] = [CrashGateway(number + 1, after) for number in range(GATEWAYS) for after in After]
    who += [CrashCoordinator(after) for after in After]
    every = itertools.product(range(STEPS), who)
    for step, death in itertools.islice(every, offset, None, stride):
        yield (*TRAINED, Deliver(step, seed=step % 5), death, DeliverAll(seed=step))


def check(operations: tuple[Op, ...]) -> None:
    with world() as made:
        made.run(operations)
        made.finish()
        assert {number: total.count for number, total in made.sums.items()} == {1: DEVICES}, operations


def test_the_round_has_no_more_steps() -> None:
    with world() as made:
        made.run([*TRAINED, Deliver(STEPS)])
        assert made.sums


def test_death_at_some_steps() -> None:
    for operations in deaths(29):
        check(operations)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_death_at_every_step() -> None:
    for operations in deaths(1):
        check(operations)
