"""Whole fleets of real processes that are killed, cut off and put to sleep in the middle of a round.

Every device moves one coordinate of its own, further than the clip. So the sum holds the limit there for whoever was
counted once, twice that for whoever was counted twice, and nothing for whoever was lost.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fleetfed_testing.local_fleet import LocalFleet, running

from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR
from fleetfed.shared.wire.messages import Command


async def assert_counted_once(fleet: LocalFleet, devices: int, *, version: int = 2) -> None:
    """All devices were in the round, each exactly once."""
    fact = await fleet.finished()
    assert fact["outcome"] == "committed", fact
    assert fact["contributors"] == devices
    moved = await fleet.weights(version) - await fleet.weights()
    own, others = moved[:devices], moved[devices:]
    assert own[0] > 0
    np.testing.assert_allclose(own[own.size // 2], own, rtol=0.05)
    assert np.abs(others).max() < own[0] / 100


async def test_a_device_killed_in_mid_training_contributes_once_after_its_restart(tmp_path: Path) -> None:
    async with running(tmp_path, devices=3) as fleet:
        fleet.hold("d-03")
        await fleet.begin()
        await fleet.training("d-03")
        await fleet.kill("d-03")
        await fleet.answered(2)
        fleet.release("d-03")
        await fleet.start_again("d-03")
        await assert_counted_once(fleet, 3)


async def test_a_gateway_killed_after_it_gave_receipts_still_counts_what_it_accepted(tmp_path: Path) -> None:
    async with running(tmp_path, devices=4) as fleet:
        fleet.hold("d-03", "d-04")
        await fleet.begin()
        await fleet.answered(2)
        await fleet.kill("g-north")
        fleet.release("d-03")
        await fleet.has_update_in_outbox("d-03")
        await fleet.start_again("g-north")
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)


async def test_a_coordinator_killed_in_mid_round_ends_the_same_round(tmp_path: Path) -> None:
    async with running(tmp_path, devices=4, gateways=2) as fleet:
        fleet.hold("d-04")
        await fleet.begin()
        await fleet.answered(3)
        await fleet.kill(COORDINATOR)
        await fleet.start_again(COORDINATOR)
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)


@pytest.mark.parametrize("state", ["kept", "lost"])
async def test_a_broker_killed_in_mid_round_loses_nothing_that_was_accepted(tmp_path: Path, state: str) -> None:
    async with running(tmp_path, devices=4, gateways=2) as fleet:
        fleet.hold("d-03", "d-04")
        await fleet.begin()
        await fleet.answered(2)
        await fleet.kill(BROKER)
        if state == "lost":
            fleet.forget_broker_state()
        fleet.release("d-03")
        await fleet.start_again(BROKER)
        fleet.release("d-04")
        await assert_counted_once(fleet, 4)


async def test_everybody_killed_at_once_ends_the_same_round(tmp_path: Path) -> None:
    async with running(tmp_path, devices=3) as fleet:
        fleet.hold("d-03")
        await fleet.begin()
        await fleet.answered(2)
        everybody = [BROKER, COORDINATOR, "g-north", *fleet.devices]
        for name in everybody:
            await fleet.kill(name)
        fleet.forget_broker_state()
        fleet.release("d-03")
        for name in everybody:
            await fleet.start_again(name)
        await assert_counted_once(fleet, 3)


async def test_a_device_asleep_during_the_announcement_joins_when_it_wakes(tmp_path: Path) -> None:
    async with running(tmp_path, devices=3) as fleet:
        await fleet.until(lambda status: status.expected == 0 and status.state == "idle")
        # A process that is stopped before it has come up says nothing.
        await fleet.held_by_all(1)
        await fleet.fleet.supervisor.stop(["d-02"])  # says that it sleeps
        await fleet.begin()
        await fleet.answered(2)
        assert all(not status.history for status in fleet.statuses), "the round did not wait for the sleeper"
        await fleet.start_again("d-02")
        await assert_counted_once(fleet, 3)


async def test_a_round_without_a_lost_device_ends_at_the_deadline(tmp_path: Path) -> None:
    async with running(tmp_path, devices=3, rounds={"deadline": 4.0, "expires": 8.0}) as fleet:
        fleet.hold("d-03")
        await fleet.begin()
        await fleet.training("d-03")
        await fleet.kill("d-03")
        await assert_counted_once_without(fleet, 2)


async def assert_counted_once_without(fleet: LocalFleet, devices: int) -> None:
    """The round ended with the first ``devices`` only."""
    fact = await fleet.finished()
    assert (fact["outcome"], fact["contributors"]) == ("committed", devices)


async def test_an_aborted_round_changes_nothing_and_the_next_one_counts(tmp_path: Path) -> None:
    async with running(tmp_path, devices=2) as fleet:
        fleet.hold("d-02")
        await fleet.begin()
        await fleet.answered(1)
        await fleet.ask(Command.ROUND_ABORT, reason="a test")
        first = await fleet.finished(1)
        assert (first["outcome"], first["reason"]) == ("aborted", "a test")
        fleet.release("d-02")
        await fleet.begin()
        second = await fleet.finished(2)
        assert (second["outcome"], second["contributors"]) == ("committed", 2)
        moved = await fleet.weights(2) - await fleet.weights()
        np.testing.assert_allclose(moved[0], moved[1], rtol=0.05)
