"""Trust metadata in a fleet of processes: a new policy reaches every tier while it runs, and outlives a kill -9."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
from fleetfed_testing.local_fleet import LocalFleet, running
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator.control.errors import RefusedError
from fleetfed.cloud_coordinator.keys.owners import Owners
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire.messages import Command, Mode


async def publish(fleet: LocalFleet, policy: Policy) -> None:
    """What the owners do, with all keys at hand."""
    owners = Owners(fleet.folder.keys / "trust")
    owners.stage_targets(now=unix_ms(), policy=policy)
    assert owners.sign() == []
    await fleet.ask(Command.KEYS_PUBLISH, bundle=owners.bundle())


async def under(fleet: LocalFleet, version: int, names: Iterable[str]) -> None:
    """Wait until members say that a policy is in force."""
    async with asyncio.timeout(PATIENCE):
        for name in names:
            while fleet.folder.status(name).get("trust", {}).get("policy") != version:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_policy_reaches_every_tier_and_outlives_whoever_is_killed(tmp_path: Path) -> None:
    async with running(tmp_path, devices=2, gateways=1, tiers=2) as fleet:
        gateways = [gateway.id for gateway in fleet.tree.gateways]
        await fleet.begin()
        assert (await fleet.finished())["outcome"] == "committed"
        await under(fleet, 1, (*gateways, *fleet.devices))

        await publish(fleet, Policy(minimum_lane_bits=8))
        await under(fleet, 2, fleet.devices)
        for name in (*gateways, fleet.devices[0], "coordinator"):
            await fleet.kill(name)
        for name in (*gateways, fleet.devices[0], "coordinator"):
            await fleet.start_again(name)
        await fleet.begin()
        assert (await fleet.finished(2))["contributors"] == 2
        await under(fleet, 2, (*gateways, *fleet.devices))

        # A policy that the coordinator's settings do not keep: it says so itself, and nobody is asked for an update.
        await publish(fleet, Policy(modes=(Mode.SPLIT,)))
        await under(fleet, 3, fleet.devices)
        with pytest.raises(RefusedError, match="policy"):
            await fleet.begin()
