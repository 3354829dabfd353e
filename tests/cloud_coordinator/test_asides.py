"""Outliers that gateways report set devices aside; an operator lifts it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import ScriptedGateway, World

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.quarantine import QuarantineConfig
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.defence import Defence
from fleetfed.shared.wire.messages import Command, Mode
from fleetfed.shared.wire.topics import Verb

SETTINGS = RoundSettings(
    weight_cap=50, start_when=3, defence=Defence(outlier_score=6.0), quarantine=QuarantineConfig(strikes=2, window=5)
)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path, autostart=False, rounds=SETTINGS)
    yield world
    world.coordinator.machine.validate()
    await world.close()


@pytest.fixture
async def north(world: World) -> ScriptedGateway:
    gateway = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(gateway)
    return gateway


async def one_round(world: World, gateway: ScriptedGateway, outliers: dict[str, float]) -> None:
    """A round in which the gateway left out some of its devices; it may name others as well."""
    plan, plan_hash, ring = world.plan()
    updates = gateway.train(plan, plan_hash, ring, seed=plan.round)
    heads = [
        update.message.head.encode()
        for name, update in zip(gateway.devices, updates, strict=True)
        if name not in outliers and name not in plan.eligibility.quarantined
    ]
    await world.deliver(gateway.name, Verb.PROPOSE, gateway.propose(plan, plan_hash, heads, outliers=outliers))
    commit, commit_hash, _ = world.commits(gateway.name)[-1]
    await world.deliver(gateway.name, Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
    await world.settle()


def aside(world: World) -> list[dict[str, Any]]:
    return world.coordinator.book.asides.load().rows()


async def test_an_outlier_again_and_again_is_left_out_of_plans(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.ROUND_START, rounds=4)
    await one_round(world, north, {"b": 9.0})
    assert world.plan()[0].eligibility.quarantined == ()
    assert world.plan()[0].defence == SETTINGS.defence
    await one_round(world, north, {"b": 7.5})
    assert [row["device"] for row in aside(world)] == ["b"]
    assert "scores 9.0, 7.5" in aside(world)[0]["reason"]
    assert world.plan()[0].eligibility.quarantined == ("b",)
    await world.restart()
    assert [row["device"] for row in aside(world)] == ["b"]
    answer = await world.ask(Command.FLEET_LIST)
    assert [row["device"] for row in answer.result["quarantined"]] == ["b"]


async def test_an_update_of_a_quarantined_device_is_not_committed(world: World, north: ScriptedGateway) -> None:
    await world.ask(Command.FLEET_ASIDE, id="b", reason="smoke")
    await world.ask(Command.ROUND_START, rounds=1)
    await world.run_round(north)
    commit = world.commits(north.name)[-1][0]
    assert len(commit.members) == 2 * 16
    assert list(commit.excluded.values()) == ["quarantined"]


async def test_who_is_committed_elsewhere_is_no_outlier_whatever_a_gateway_says(
    world: World, north: ScriptedGateway
) -> None:
    south = ScriptedGateway(world.fleet, "south", ["x", "y"])
    await world.join(south)
    await world.ask(Command.ROUND_START, rounds=4, quarantine={"strikes": 1})
    plan, plan_hash, ring = world.plan()
    for gateway, outliers in ((north, {"x": 99.0}), (south, {})):
        heads = [update.message.head.encode() for update in gateway.train(plan, plan_hash, ring)]
        await world.deliver(gateway.name, Verb.PROPOSE, gateway.propose(plan, plan_hash, heads, outliers=outliers))
    for gateway in (north, south):
        commit, commit_hash, _ = world.commits(gateway.name)[-1]
        await world.deliver(gateway.name, Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
    await world.settle()
    assert world.plan()[0].round == 2
    assert aside(world) == []


async def test_an_operator_sets_aside_and_lets_back_in(world: World, north: ScriptedGateway) -> None:
    assert (await world.ask(Command.FLEET_ASIDE, id="c")).result["quarantined"]
    assert aside(world)[0]["by"] == "op"
    assert (await world.ask(Command.FLEET_ASIDE, id="c")).error == "already_quarantined"
    assert (await world.ask(Command.FLEET_ASIDE, id="No Such Id")).error == "invalid"
    assert not (await world.ask(Command.FLEET_RELEASE, id="c")).result["quarantined"]
    assert (await world.ask(Command.FLEET_RELEASE, id="c")).error == "not_quarantined"
    await world.ask(Command.ROUND_START, rounds=1)
    assert world.plan()[0].eligibility.quarantined == ()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="bucket and robust"):
        RoundSettings(mode=Mode.SPLIT, defence=Defence())
