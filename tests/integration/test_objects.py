"""A coordinator with a bucket behind its folder of objects goes on where the folder is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fleetfed_testing.local_fleet import prepared

from fleetfed.cloud_coordinator.demo.layout import COORDINATOR


@pytest.mark.slow
async def test_a_coordinator_that_lost_its_objects_ends_the_round_and_makes_the_next(tmp_path: Path) -> None:
    async with prepared(tmp_path / "fleet", devices=3) as fleet:
        fleet.settings.tables["storage"] = {"blobs": f"file://{tmp_path}/bucket"}
        await fleet.start()
        await fleet.begin()
        assert (await fleet.finished())["outcome"] == "committed"
        fleet.hold("d-03")
        await fleet.begin()
        await fleet.answered(2)
        await fleet.kill(COORDINATOR)
        shutil.rmtree(fleet.folder.role(COORDINATOR) / "state" / "blobs")
        fleet.release("d-03")
        await fleet.start_again(COORDINATOR)
        assert (await fleet.finished(2))["contributors"] == 3
        await fleet.held_by_all(3)
