"""Fixtures of the coordinator's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import Fleet, World
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper
from fleetfed_testing.open_round import NORTH, SOUTH, Open

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.shared.wire.messages import Mode


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    made: list[World] = []

    async def make(owners: dict[str, str] | None = None, **changes: Any) -> Open:
        settings: dict[str, Any] = {"mode": Mode.SPLIT, "minimum_cohort": 3, "weight_cap": 50, "start_when": 14}
        fleet = Fleet()
        fleet.owners |= owners or {}
        world = World(tmp_path / str(len(made)), fleet=fleet, rounds=RoundSettings(**{**settings, **changes}))
        made.append(world)
        north, south = MaskedGateway(fleet, "north", NORTH), MaskedGateway(fleet, "south", SOUTH)
        helper = ScriptedHelper(fleet)
        if changes.get("seed_holders") == 2:
            await helper.join(world)
        await world.join(north, south)
        return Open(world, north, south, helper, *world.plan())

    yield make
    for world in made:
        world.coordinator.machine.validate()
        await world.close()
