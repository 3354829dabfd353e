"""The brokers that a fleet can grow into, as parameters."""

from __future__ import annotations

import pytest
from fleetfed_testing.engines import Nats, RabbitMq

ENGINES = {"rabbitmq": RabbitMq, "nats": Nats}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RabbitMq | Nats:
    """One that is not started yet; skips where its program is missing."""
    return ENGINES[request.param]()
