"""Fixtures of the device's tests: its machine without I/O, and a device as a whole at a site of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleetfed_testing.brokers import RunningBroker
from fleetfed_testing.device_driver import CARD, Driver, held
from fleetfed_testing.device_site import Site

from fleetfed.device import events as e
from fleetfed.device.state import Facts


@pytest.fixture
def new() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.machine.validate()


@pytest.fixture
def ready() -> Iterator[Driver]:
    """Connected, with version 1 on disk."""
    driver = Driver(Facts(models=(held(1),), cards=frozenset({CARD.ref.digest}), floor=1))
    driver(e.Connected())
    yield driver
    driver.machine.validate()


@pytest.fixture
def site(tmp_path: Path, embedded_broker: Callable[..., RunningBroker]) -> Iterator[Site]:
    site = Site(tmp_path, embedded_broker())
    yield site
    site.close()


@pytest.fixture
def mosquitto_site(tmp_path: Path, mosquitto_broker: Callable[..., RunningBroker]) -> Iterator[Site]:
    site = Site(tmp_path, mosquitto_broker())
    yield site
    site.close()
