"""Rounds with two seed holders through real processes: nobody but all three together could read an update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.local_fleet import running

from fleetfed.cloud_coordinator.demo.layout import HELPER

DEVICES = 4
LEARNING: dict[str, Any] = {"weighting": "examples", "weight_cap": 500, "error_feedback": True}
SPLIT: dict[str, Any] = {**LEARNING, "mode": "split", "minimum_cohort": 2, "minimum_owners": 1, "seed_holders": 2}


def fleet_of(path: Path, rounds: dict[str, Any] = SPLIT, **shape: Any) -> Any:
    """A fleet whose every run is the same: seeds, and a trainer that follows them."""
    return running(path, devices=DEVICES, trainer="repeatable", seed=7, rounds=rounds, **shape)


async def plain(path: Path) -> str:
    """The model that a plain round makes."""
    async with fleet_of(path, LEARNING) as fleet:
        await fleet.begin()
        await fleet.finished()
        return str(await fleet.held_by_all(2))


async def test_a_helper_that_is_killed_before_it_is_asked_and_after_it_answered(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, helper=True) as fleet:
        fleet.hold("d-04")
        await fleet.begin()
        await fleet.answered(3)
        # The plan names its key; what it answers later, it answers from the disk.
        await fleet.kill(HELPER)
        fleet.release("d-04")
        await fleet.until(lambda status: status.accepted == DEVICES)
        await fleet.start_again(HELPER)
        fact = await fleet.finished()
        assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES), fact
        await fleet.kill(HELPER)
        await fleet.start_again(HELPER)
        await fleet.begin()
        fact = await fleet.finished(2)
        assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES), fact


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [0, 2])
async def test_a_tree_with_a_helper_makes_the_file_of_a_plain_round(tmp_path: Path, bucket: int) -> None:
    expected = await plain(tmp_path / "plain")
    async with fleet_of(tmp_path / "split", {**SPLIT, "bucket": bucket}, helper=True, gateways=2, tiers=2) as fleet:
        await fleet.begin()
        fact = await fleet.finished()
        assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES), fact
        assert await fleet.held_by_all(2) == expected
