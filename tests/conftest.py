"""Fixtures for all tests: certificates and real brokers."""

import sys
from pathlib import Path

from hypothesis import settings

# Tests are imported by path, so what they share needs a place on the path: a folder that holds nothing else.
sys.path.insert(0, str(Path(__file__).parent / "support"))

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

# The same examples in every run, and no verdict on how fast a shared machine was just now.
settings.register_profile("fleetfed", derandomize=True, deadline=None)
settings.load_profile("fleetfed")
