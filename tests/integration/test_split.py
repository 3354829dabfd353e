"""Masked rounds of whole fleets: the same model as plain ones, bit for bit, and nothing is lost by who is killed.

Every role is a process of its own, over TLS and the embedded broker.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.local_fleet import LocalFleet, running

from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.masking import HYBRID

DEVICES = 4
LEARNING: dict[str, Any] = {"weighting": "examples", "weight_cap": 500, "error_feedback": True}
SPLIT: dict[str, Any] = {**LEARNING, "mode": "split", "minimum_cohort": 2, "minimum_owners": 1}


def fleet_of(path: Path, rounds: dict[str, Any] = SPLIT, **shape: int) -> Any:
    """A fleet whose every run is the same: seeds, and a trainer that follows them."""
    return running(path, devices=DEVICES, trainer="repeatable", seed=7, rounds=rounds, **shape)


async def models(path: Path, rounds: dict[str, Any] = SPLIT, **shape: int) -> list[str]:
    """SHA-256 of the model after each of two rounds."""
    digests = []
    async with fleet_of(path, rounds, **shape) as fleet:
        for number in (1, 2):
            await fleet.begin()
            fact = await fleet.finished(number)
            assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES)
            digests.append(await fleet.held_by_all(number + 1))
        sizes = {row["update_bytes"] for name in fleet.devices for row in fleet.folder.status(name)["rounds"]}
        assert (len(sizes) == 1) is (rounds is not LEARNING), "masked updates, and only they, have one length"
    return digests


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The models that plain rounds make."""
    return asyncio.run(models(tmp_path_factory.mktemp("plain"), LEARNING))


async def test_masked_rounds_make_the_same_files_as_plain_ones(tmp_path: Path, plain: list[str]) -> None:
    assert await models(tmp_path / "flat") == plain
    assert await models(tmp_path / "two", gateways=2, tiers=2) == plain


@pytest.mark.slow
async def test_updates_within_a_budget_make_one_file_whatever_the_tree(tmp_path: Path) -> None:
    small = {**SPLIT, "error_feedback": False, "update_bytes": 6000}
    made = await models(tmp_path / "two", small, gateways=2, tiers=2)
    assert await models(tmp_path / "flat", small) == made
    for status in (tmp_path / "flat").rglob("status.json"):
        for row in json.loads(status.read_text()).get("rounds", []):
            assert row.get("update_bytes", 0) < 6000 + limits.MAX_HEAD


@pytest.mark.slow
async def test_seals_of_suite_3_make_the_same_files(tmp_path: Path, plain: list[str]) -> None:
    """Every party makes, stores and opens keys of ML-KEM-768 and X25519; nothing else of the round changes."""
    assert await models(tmp_path, {**SPLIT, "suite": HYBRID}, gateways=2, tiers=2) == plain


@pytest.mark.slow
async def test_buckets_make_the_same_files_as_one_sum(tmp_path: Path, plain: list[str]) -> None:
    assert await models(tmp_path, {**SPLIT, "bucket": 2}) == plain


async def assert_as_if_nothing_happened(fleet: LocalFleet, plain: list[str]) -> None:
    """The round had everybody in it, once: its model is that of a plain round in which nobody was killed."""
    fact = await fleet.finished()
    assert (fact["outcome"], fact["contributors"]) == ("committed", DEVICES), fact
    assert await fleet.held_by_all(2) == plain[0]


async def test_a_gateway_killed_with_what_it_took_and_a_device_killed_twice(tmp_path: Path, plain: list[str]) -> None:
    async with fleet_of(tmp_path) as fleet:
        fleet.hold("d-04")
        await fleet.begin()
        await fleet.answered(3)
        await fleet.training("d-04")
        await fleet.kill("d-04")
        await fleet.kill("g-north")
        fleet.release("d-04")
        await fleet.start_again("d-04")
        # The cosignature is at the broker: the device seals without its gateway.
        await fleet.has_update_in_outbox("d-04")
        await fleet.kill("d-04")
        await fleet.start_again("d-04")
        await fleet.start_again("g-north")
        await assert_as_if_nothing_happened(fleet, plain)


@pytest.mark.slow
async def test_a_gateway_killed_after_it_gave_receipts(tmp_path: Path, plain: list[str]) -> None:
    """Its key of the round and what it took are on its disk."""
    async with fleet_of(tmp_path) as fleet:
        fleet.hold("d-03", "d-04")
        await fleet.begin()
        await fleet.answered(2)
        await fleet.kill("g-north")
        fleet.release("d-03")
        await fleet.has_update_in_outbox("d-03")
        await fleet.start_again("g-north")
        fleet.release("d-04")
        await assert_as_if_nothing_happened(fleet, plain)


@pytest.mark.slow
async def test_everybody_killed_at_once(tmp_path: Path, plain: list[str]) -> None:
    async with fleet_of(tmp_path) as fleet:
        fleet.hold("d-04")
        await fleet.begin()
        await fleet.answered(3)
        everybody = [BROKER, COORDINATOR, "g-north", *fleet.devices]
        for name in everybody:
            await fleet.kill(name)
        fleet.release("d-04")
        for name in everybody:
            await fleet.start_again(name)
        await assert_as_if_nothing_happened(fleet, plain)
