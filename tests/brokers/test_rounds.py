"""The same fleet on RabbitMQ and on a cluster of NATS servers: the same files, whatever dies in the middle of a round.

Every role is a process of its own, over TLS with client certificates. The model takes ten chunks and an update two,
so that what a broker does with large payloads shows, too. RabbitMQ speaks MQTT 5 since 3.13, NATS 3.1.1 alone.
"""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.engines import Nats, RabbitMq
from fleetfed_testing.local_fleet import Engine, LocalFleet, running

from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR
from fleetfed.shared.wire import limits

pytestmark = pytest.mark.slow

DEVICES = 4
WIDTH = 60_000
LEARNING: dict[str, Any] = {"weighting": "examples", "weight_cap": 500, "error_feedback": True}
SPLIT: dict[str, Any] = {**LEARNING, "mode": "split", "minimum_cohort": 2, "minimum_owners": 1}


async def models(path: Path, rounds: dict[str, Any], engine: Engine | None, **shape: Any) -> list[str]:
    """SHA-256 of the model after each of two rounds."""
    digests = []
    settings = {"devices": DEVICES, "trainer": "repeatable", "seed": 7, "rounds": rounds, "width": WIDTH}
    async with running(path, **settings, engine=engine, **shape) as fleet:
        assert fleet.model.stat().st_size > 9 * limits.CHUNK_DATA
        for number in (1, 2):
            await fleet.begin()
            fact = await fleet.finished(number)
            assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES)
            digests.append(await fleet.held_by_all(number + 1))
        sizes = {row["update_bytes"] for name in fleet.devices for row in fleet.folder.status(name)["rounds"]}
        assert max(sizes) > limits.CHUNK_DATA
    return digests


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The models that plain rounds make on the embedded broker."""
    return asyncio.run(models(tmp_path_factory.mktemp("plain"), LEARNING, None))


async def test_plain_rounds_make_the_same_files(tmp_path: Path, engine: Engine, plain: list[str]) -> None:
    assert await models(tmp_path, LEARNING, engine) == plain


async def test_masked_rounds_of_two_tiers_make_the_same_files(tmp_path: Path, engine: Engine, plain: list[str]) -> None:
    assert await models(tmp_path, SPLIT, engine, gateways=2, tiers=2) == plain


async def assert_counted_once(fleet: LocalFleet, devices: int) -> None:
    """All devices were in the round, each exactly once: each moved a coordinate of its own, further than the clip."""
    fact = await fleet.finished()
    assert (fact["outcome"], fact["contributors"]) == ("committed", devices), fact
    moved = await fleet.weights(2) - await fleet.weights()
    own, others = moved[:devices], moved[devices:]
    assert own[0] > 0
    np.testing.assert_allclose(own[own.size // 2], own, rtol=0.05)
    assert np.abs(others).max() < own[0] / 100


@pytest.mark.parametrize("how", ["stopped", "killed", "wiped"])
async def test_a_broker_that_ends_in_mid_round_loses_nothing_that_was_accepted(tmp_path: Path, how: str) -> None:
    """RabbitMQ, restarted in good order, cut off, and cut off with an empty disk afterwards."""
    async with running(tmp_path, devices=4, gateways=2, engine=RabbitMq()) as fleet:
        fleet.hold("d-03", "d-04")
        await fleet.begin()
        await fleet.answered(2)
        if how == "stopped":
            await fleet.fleet.supervisor.stop([BROKER])
        else:
            await fleet.kill(BROKER)
        if how == "wiped":
            fleet.forget_broker_state()
        fleet.release("d-03")
        await fleet.start_again(BROKER)
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)


def node_of(nats: Nats, member: str) -> str:
    """The node that a member connects to first."""
    return nats.names[zlib.crc32(member.encode()) % len(nats.names)]


@pytest.mark.parametrize("whose", ["g-north", COORDINATOR])
async def test_a_node_of_a_cluster_killed_in_mid_round_is_not_missed(tmp_path: Path, whose: str) -> None:
    """NATS: a round goes on with two nodes of three, and so does the next; then the third comes back."""
    nats = Nats()
    async with running(tmp_path, devices=4, gateways=2, engine=nats) as fleet:
        fleet.hold("d-03", "d-04")
        await fleet.begin()
        await fleet.answered(2)
        victim = node_of(nats, whose)
        await fleet.kill(victim)
        fleet.release("d-03")
        await fleet.has_a_receipt("d-03")
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)
        await fleet.begin()
        assert (await fleet.finished(2))["contributors"] == 4
        await nats.start(fleet, victim)
        await fleet.begin()
        assert (await fleet.finished(3))["contributors"] == 4
        await fleet.held_by_all(4)


async def test_a_coordinator_and_gateways_that_start_anew_find_each_other(tmp_path: Path, engine: Engine) -> None:
    """RabbitMQ hands out nothing that it keeps to who listens with a wildcard: everybody says it again."""
    async with running(tmp_path, devices=4, gateways=2, engine=engine) as fleet:
        fleet.hold("d-04")
        await fleet.begin()
        await fleet.answered(3)
        for name in (COORDINATOR, "g-north"):
            await fleet.kill(name)
            await fleet.start_again(name)
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)
        await fleet.begin()
        assert (await fleet.finished(2))["contributors"] == 4


async def test_a_helper_that_was_there_first_is_found(tmp_path: Path, engine: Engine) -> None:
    rounds = {**SPLIT, "seed_holders": 2}
    async with running(
        tmp_path, devices=DEVICES, helper=True, rounds=rounds, engine=engine, without=[COORDINATOR]
    ) as fleet:
        await fleet.start_again(COORDINATOR)
        await fleet.begin()
        assert (await fleet.finished())["outcome"] == "committed"
