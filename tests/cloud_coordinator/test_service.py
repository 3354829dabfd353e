"""Whole rounds of a coordinator without a broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleetfed_testing.cloud import ScriptedGateway, World

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.state import State


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    world.coordinator.machine.validate()
    await world.close()


async def test_a_round_makes_a_version(world: World) -> None:
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    assert world.coordinator.machine.state is State.WAITING
    await world.join(north)
    assert world.plan()[0].round == 1
    await world.run_round(north)
    assert world.manifest().version == 2
    assert world.end().version == 2
    assert world.plan()[0].round == 2
    assert world.plan()[0].model_sha256 == world.manifest().sha256


async def test_the_next_round_comes_after_its_interval_although_the_clock_is_put_back(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=RoundSettings(weight_cap=50, interval=60.0))
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(north)
    await world.run_round(north)
    assert world.coordinator.machine.state is State.WAITING
    await world.pass_time(1_000)
    world.clock.now -= 3_600_000
    world.coordinator.timer()
    await world.pass_time(61_000)
    assert world.plan()[0].round == 2
    await world.close()
