"""Flat, two tiers and three tiers: the same updates make the same model file, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.local_fleet import running

pytestmark = pytest.mark.timeout(240)

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "devices": 6,
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


async def test_the_tree_makes_the_same_file_as_the_flat_fleet(tmp_path: Path) -> None:
    flat = await final_model(tmp_path / "flat", gateways=1, tiers=1)
    wide = await final_model(tmp_path / "wide", gateways=3, tiers=1)
    two = await final_model(tmp_path / "two", gateways=3, tiers=2)
    three = await final_model(tmp_path / "three", gateways=4, tiers=3)
    assert flat == wide == two == three
