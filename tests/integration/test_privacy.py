"""Private rounds of real processes: devices, gateways and coordinator each add what the plan says they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.local_fleet import running

pytest.importorskip("dp_accounting")

DEVICES, Z = 6, 40.0


@pytest.mark.parametrize(
    ("mechanism", "variance"),
    # In units of one mechanism's whole noise: two leaf gateways and the coordinator; six shares where three would do.
    [
        pytest.param({"mechanism": "split_central", "sums": 2}, 3.0, marks=pytest.mark.slow),
        pytest.param({"mechanism": "skellam", "honest": 3}, 2.0, marks=pytest.mark.slow),
    ],
    ids=["split_central", "skellam"],
)
async def test_a_masked_fleet_makes_versions_with_everybodys_noise(
    tmp_path: Path, mechanism: dict[str, Any], variance: float
) -> None:
    privacy = {"noise_multiplier": Z, "participations": 2, "clip": 1.0, "epsilon": 8.0, **mechanism}
    rounds = {"mode": "split", "minimum_cohort": 3, "cohort_cap": 20, "quorum_minimum": DEVICES, "privacy": privacy}
    async with running(tmp_path, devices=DEVICES, gateways=2, rounds=rounds) as fleet:
        await fleet.begin(2)
        fact = await fleet.finished(2)
        assert fact["outcome"] == "committed"
        assert fact["contributors"] == DEVICES
        assert 0 < fact["epsilon"] < 8.0
        assert "training_loss" not in fact
        steps = np.diff(np.stack([await fleet.weights(number) for number in (0, 3)]), axis=0)
        # Two rounds, 65 weights: deviation of a mean's coordinate, within the chance of so few.
        expected = Z * np.sqrt(2 * variance) / DEVICES
        assert expected / 1.5 < steps.std() < expected * 1.5
        # Every device has spent what it may: a third round finds nobody.
        await fleet.begin(1, deadline=3.0, expires=6.0)
        over = await fleet.finished(3)
        assert over["outcome"] == "aborted"
        assert over["declined"] == {"privacy_budget": DEVICES}
