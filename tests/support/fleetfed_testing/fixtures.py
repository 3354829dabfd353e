"""Pytest fixtures around `fleetfed_testing.brokers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleetfed.shared.mqtt import versions
from fleetfed_testing.brokers import MOSQUITTO, Embedded, FleetPki, Mosquitto, RunningBroker

StartBroker = Callable[..., Any]

_KINDS = [pytest.param("mosquitto", marks=pytest.mark.mosquitto), "embedded"]


@pytest.fixture(scope="session")
def fleet_pki(tmp_path_factory: pytest.TempPathFactory) -> FleetPki:
    """One fleet's certificates for the whole run."""
    return FleetPki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def mosquitto_broker(tmp_path: Path, fleet_pki: FleetPki) -> Iterator[Callable[..., Mosquitto]]:
    """Starts Mosquitto: ``mosquitto_broker(tls=True, acl=None, extra="")``; as often as called."""
    if MOSQUITTO is None:
        pytest.skip("the mosquitto binary is not installed")
    with ExitStack() as stack:

        def start(**settings: Any) -> Mosquitto:
            directory = tmp_path / f"mosquitto-{len(list(tmp_path.glob('mosquitto-*')))}"
            broker = Mosquitto(directory, fleet_pki, **settings)
            stack.callback(broker.stop)
            return broker

        yield start


@pytest.fixture
def embedded_broker(tmp_path: Path, fleet_pki: FleetPki) -> Iterator[Callable[..., Embedded]]:
    """Starts the embedded broker: ``embedded_broker(tls=True, acl=None, limits=...)``; as often as called."""
    if importlib.util.find_spec("fleetfed.broker.embedded") is None:
        pytest.skip("there is no embedded broker")
    with ExitStack() as stack:

        def start(**settings: Any) -> Embedded:
            directory = tmp_path / f"embedded-{len(list(tmp_path.glob('embedded-*')))}"
            broker = Embedded(directory, fleet_pki, **settings)
            stack.callback(broker.stop)
            return broker

        yield start


@pytest.fixture(params=_KINDS)
def start_any_broker(request: pytest.FixtureRequest) -> StartBroker:
    """`mosquitto_broker`, then `embedded_broker`; ``tls`` and ``acl`` work for both."""
    start: StartBroker = request.getfixturevalue(f"{request.param}_broker")
    return start


@pytest.fixture
def any_broker(start_any_broker: StartBroker) -> RunningBroker:
    """A broker with mutual TLS that allows everything, once as Mosquitto and once as the embedded one."""
    broker: RunningBroker = start_any_broker()
    return broker


@pytest.fixture
def any_plain_broker(start_any_broker: StartBroker) -> RunningBroker:
    """The same without TLS."""
    broker: RunningBroker = start_any_broker(tls=False)
    return broker


@pytest.fixture(autouse=True)
def mqtt_versions_forgotten() -> Iterator[None]:
    """What one test learned about the broker on a port must not reach the next test."""
    versions.forget()
    yield
    versions.forget()
