"""The same fleet on RabbitMQ's MQTT plugin: MQTT 3.1.1, nothing retained on wildcards, rights by regular expression."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleetfed_testing.engines import RabbitMq
from fleetfed_testing.local_fleet import running

pytestmark = pytest.mark.slow


async def test_x(tmp_path: Path) -> None:
    async with running(tmp_path, devices=3, engine=RabbitMq()) as fleet:
        await fleet.begin()
        fact = await fleet.finished()
        assert (fact["outcome"], fact["contributors"]) == ("committed", 3)
        await fleet.held_by_all(2)
