"""Fixtures of the gateway's tests: a fleet that signs for real, and a gateway without brokers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.signed_fleet import SignedFleet


@pytest.fixture
def fleet() -> SignedFleet:
    return SignedFleet()


@pytest.fixture
async def bench(fleet: SignedFleet, tmp_path: Path) -> AsyncIterator[Bench]:
    """A gateway at the site ``north`` below the coordinator, which has a model and nothing else."""
    made = Bench(fleet, tmp_path / "state")
    await made.start()
    yield made
    made.machine.validate()
    await made.close()
