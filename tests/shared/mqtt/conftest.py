"""Peers of the session's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fleetfed_testing.mqtt_peer import MakePeer, Peer
from fleetfed_testing.waiting import PATIENCE

from fleetfed.shared.mqtt.config import ConnectionConfig


@pytest.fixture
async def peer() -> AsyncIterator[MakePeer]:
    """Starts peers and, at the end, stops them and looks for what they left behind."""
    peers: list[Peer] = []

    async def start(config: ConnectionConfig, *subscriptions: str, connected: bool = True, **options: Any) -> Peer:
        made = Peer(config, *subscriptions, **options)
        peers.append(made)
        if connected:
            await asyncio.wait_for(made.session.wait_connected(), PATIENCE)
        return made

    yield start
    for each in peers:
        await each.stop()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task.get_name() for task in left if "mqtt" in task.get_name() or "misc" in repr(task.get_coro())]
