"""Flat, two tiers and three tiers: the same updates make the same model file, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.local_fleet import running

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "devices": 5,
    "trainer": "repeatable",
    "seed": 7,
    "rounds": {"weighting": "examples", "weight_cap": 500, "error_feedback": True},
}


async def final_model(path: Path, **shape: int) -> str:
    async with running(path, **SETTINGS, **shape) as fleet:
        await fleet.begin(ROUNDS)
        fact = await fleet.finished(ROUNDS)
        assert fact["contributors"] == SETTINGS["devices"]
        return await fleet.held_by_all(ROUNDS + 1)


async def test_three_tiers_make_the_same_file_as_the_flat_fleet(tmp_path: Path) -> None:
    flat = await final_model(tmp_path / "flat", gateways=1, tiers=1)
    assert await final_model(tmp_path / "three", gateways=4, tiers=3) == flat


@pytest.mark.slow
async def test_any_tree_makes_the_same_file(tmp_path: Path) -> None:
    """Two tiers are compared with a flat fleet by default too, with masks: `test_split`."""
    flat = await final_model(tmp_path / "flat", gateways=1, tiers=1)
    assert await final_model(tmp_path / "wide", gateways=3, tiers=1) == flat
    assert await final_model(tmp_path / "two", gateways=3, tiers=2) == flat
