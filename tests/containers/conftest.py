"""One fleet in containers for all tests here: built once, brought up once, and removed at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fleetfed_testing.composed import CONTAINERS, Composed, no_engine, run


@pytest.fixture(scope="session")
def composed() -> Iterator[Composed]:
    reason = no_engine()
    if reason:
        pytest.skip(f"{reason}: containers are not tested")
    fleet = Composed()
    run("sh", str(CONTAINERS / "standins" / "build.sh"), timeout=1800)
    # One service per image: docker-compose 1.29 would go through all of them.
    fleet.compose("build", "cloud-broker", "north-gateway", "north-device-1", "coordinator", timeout=3600)
    fleet.compose("down", "--volumes", "--remove-orphans")
    try:
        fleet.began = time.monotonic()
        fleet.compose("up", "--detach", "--no-build")
        yield fleet
    finally:
        fleet.compose("down", "--volumes", "--remove-orphans")
