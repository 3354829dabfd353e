"""Fixtures for all tests: certificates and real brokers."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Tests are imported by path, so what they share needs a place on the path: a folder that holds nothing else.
sys.path.insert(0, str(Path(__file__).parent / "support"))

# The brokers to test against instead of those that are installed (`brokers/install.sh`), Mosquitto among them.
if "FLEETFED_BROKERS" in os.environ:
    unpacked = Path(os.environ["FLEETFED_BROKERS"]).resolve()
    os.environ |= {"FLEETFED_BROKERS": str(unpacked), "PATH": f"{unpacked}/usr/sbin:{os.environ.get('PATH', '')}"}

from fleetfed_testing.fixtures import (
    any_broker,
    any_plain_broker,
    embedded_broker,
    fleet_pki,
    mosquitto_broker,
    mqtt_versions_forgotten,
    start_any_broker,
)

__all__ = [
    "any_broker",
    "any_plain_broker",
    "embedded_broker",
    "fleet_pki",
    "mosquitto_broker",
    "mqtt_versions_forgotten",
    "start_any_broker",
]

# Before anything loads numpy: workers and the programs they start share the cores, so pools of threads only get in
# each other's way.
for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# The programs that tests start: each may keep what it compiled for the next, a quarter of the time that starting takes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Everything that tests write is made durable many thousand times over, which a memory file system does at no cost.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 << 30:
    os.environ.setdefault("TMPDIR", str(MEMORY))
    tempfile.tempdir = None

# The same examples in every run, and no verdict on how fast a shared machine was just now.
settings.register_profile("fleetfed", derandomize=True, deadline=None)
settings.load_profile("fleetfed")

_DEAR = (
    "integration/",
    "simulation/",
    "cloud_coordinator/test_crash.py",
    "cloud_coordinator/demo/",
    "device/test_crashes.py",
)
"""What takes most of the time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the tests, begin with the dear ones: one at the end would keep the others waiting."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(_DEAR))
