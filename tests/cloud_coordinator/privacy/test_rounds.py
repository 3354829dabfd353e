"""Private rounds at the coordinator, over crashes: one noise per round, one account, one promise."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, World, small_model
from fleetfed_testing.private_cloud import SIZES, PrivateGateway

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.privacy import accounting
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings, norm_of
from fleetfed.cloud_coordinator.storage.store import NOISE
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.messages import Command, Mode, Weighting
from fleetfed.shared.wire.privacy import Mechanism

pytest.importorskip("dp_accounting")


def settings(privacy: PrivacySettings, **given: Any) -> RoundSettings:
    return RoundSettings(weighting=Weighting.UNIFORM, cohort_cap=20, privacy=privacy, **given)


async def world_of(
    directory: Path, privacy: PrivacySettings, devices: int = 8, **given: Any
) -> tuple[World, PrivateGateway]:
    fleet = Fleet()
    world = World(directory, fleet=fleet, rounds=settings(privacy, **given))
    gateway = PrivateGateway(fleet, "north", [f"d{i}" for i in range(devices)])
    await world.join(gateway)
    return world, gateway


def moved(world: World, version: int) -> np.ndarray:  # type: ignore[type-arg]
    """The step from the version before."""
    table, weights = small_model()[1].table, []
    for number in (version - 1, version):
        record = world.store.version(number)
        assert record is not None
        assert record.file is not None
        weights.append(read_weights(world.coordinator.blobs.get(record.file), table))
    step: np.ndarray = weights[1] - weights[0]  # type: ignore[type-arg]
    return step


async def test_a_version_holds_the_noise_and_says_what_it_promises(tmp_path: Path) -> None:
    privacy = PrivacySettings(noise_multiplier=20.0, participations=10, clip=1.0, epsilon=8.0)
    world, gateway = await world_of(tmp_path, privacy)
    await world.run_round(gateway)
    step = moved(world, 2)
    # A clip of 1 over 8 devices that agree: a mean of length 1; noise of length 20 / 8 * sqrt(65).
    assert 10 < np.linalg.norm(step) < 40
    manifest = world.manifest()
    assert manifest.metrics["epsilon"] == pytest.approx(0.18, abs=0.03)
    assert manifest.metrics["delta"] == 1e-6
    assert "training_loss" not in manifest.metrics
    shown = (await world.ask(Command.MODEL_SHOW)).result
    assert shown["privacy"]["unit"] == "one device"
    assert shown["privacy"]["max_participations"] == 10
    assert "coordinator" in shown["privacy"]["honest"]
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert status["privacy"]["noise_multiplier"] == 20.0
    assert status["history"][-1]["epsilon"] == pytest.approx(manifest.metrics["epsilon"])
    # How well an update compresses depends on it.
    assert status["history"][-1]["update_bytes_total"] == 0
    assert not {"examples", "clipped", "training_loss"} & set(status["history"][-1])
    await world.close()


async def test_a_step_that_is_repeated_adds_the_same_noise_and_no_two_rounds_do(tmp_path: Path) -> None:
    world, gateway = await world_of(tmp_path, PrivacySettings(noise_multiplier=20.0))
    keys = []
    for _ in range(2):
        noise = world.coordinator.book.noise()
        assert noise is not None
        assert noise.key.hex() not in repr(noise)
        keys.append(noise.key)
        await world.restart()
        await world.join(gateway)
        again = world.coordinator.book.noise()
        assert again is not None
        assert again.key == noise.key
        number = world.coordinator.machine.last_round
        assert world.store.seal(number) is not None
        await world.run_round(gateway)
        # The round is over: nobody can draw its noise again.
        assert world.store.seal(number) is None
    assert len(set(keys)) == 2
    await world.close()


async def test_a_round_beyond_the_budget_is_refused_and_said_to_be(tmp_path: Path) -> None:
    privacy = PrivacySettings(noise_multiplier=5.0, epsilon=1.3, participations=100)
    world, gateway = await world_of(tmp_path, privacy)
    for _ in range(2):
        await world.run_round(gateway)
    assert world.coordinator.machine.state.value == "paused"
    assert world.coordinator.machine.last_round == 2
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert "privacy budget is spent" in status["waiting_for"]
    assert "1.3" in status["waiting_for"]
    assert status["privacy"]["epsilon"] <= 1.3
    for command in (Command.ROUND_START, Command.ROUND_RESUME):
        refused = await world.ask(command)
        assert refused.error == "privacy_budget"
    # Who raises the budget answers for it; what was spent stays spent.
    await world.restart()
    await world.join(gateway)
    answer = await world.ask(Command.ROUND_START, privacy={"epsilon": 5.0})
    assert not answer.error
    await world.pass_time(2_000)
    plan = world.plan()[0]
    assert plan.round == 3
    account = world.coordinator.book.privacy.account()
    assert [each.rounds for each in account.segments] == [3]
    await world.close()


async def test_rounds_without_privacy_are_counted_beside_what_is_promised(tmp_path: Path) -> None:
    """What they showed of a device is covered by no epsilon, so it must not look as if it were."""
    world, gateway = await world_of(tmp_path, PrivacySettings(participations=10))
    assert (await world.ask(Command.ROUND_STATUS)).result["privacy"]["rounds_without_privacy"] == 0
    await world.close()
    world = World(tmp_path / "mixed", fleet=world.fleet, rounds=RoundSettings(weighting=Weighting.UNIFORM, rounds=2))
    plain = ScriptedGateway(world.fleet, "north", gateway.devices)
    await world.join(plain)
    for _ in range(2):
        await world.run_round(plain)
    assert (await world.ask(Command.ROUND_START, privacy={"participations": 10})).error == ""
    assert (await world.ask(Command.ROUND_STATUS)).result["privacy"]["rounds_without_privacy"] == 2
    await world.close()


async def test_an_aborted_round_stays_in_the_account(tmp_path: Path) -> None:
    world, gateway = await world_of(tmp_path, PrivacySettings(participations=10))
    await world.ask(Command.ROUND_ABORT)
    await world.ask(Command.ROUND_RESUME)
    await world.pass_time(10_000)
    await world.run_round(gateway)
    assert world.coordinator.book.privacy.account().segments[0].rounds >= 2
    assert world.manifest().metrics["epsilon"] > accounting.epsilon(
        (world.coordinator.book.privacy.account().segments[0].over(1),), 1e-6
    )
    await world.close()


async def test_correlated_noise_goes_on_over_a_restart_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    privacy = PrivacySettings(mechanism=Mechanism.MATRIX, band=3, separation=3, participations=4, noise_multiplier=9.0)
    world, gateway = await world_of(tmp_path, privacy)
    lengths, names = [], []
    for number in range(1, 5):
        await world.run_round(gateway, seed=number)
        name = world.store.document(NOISE)
        assert name is not None
        names.append(name)
        state = MatrixState.decode(world.coordinator.blobs.get(name))
        assert state.round == number
        lengths.append(len(state.history))
        assert stat.S_IMODE(world.coordinator.blobs.path(name).stat().st_mode) == 0o600
        await world.restart()
        await world.join(gateway)
    assert lengths == [1, 2, 2, 2]
    # The next round knows the last; older states are gone.
    assert len(set(names)) == 4
    assert [world.coordinator.blobs.has(name) for name in names] == [False, False, False, True]
    noise = world.coordinator.book.noise()
    assert noise is not None
    assert noise.state is not None
    assert noise.state.mechanism == noise.mechanism
    await world.close()


async def test_under_another_key_correlated_noise_begins_anew(tmp_path: Path) -> None:
    """Devices that believe the old key no more may be in two rounds nearer than the band, which costs more than two."""
    privacy = PrivacySettings(mechanism=Mechanism.MATRIX, band=3, separation=3, participations=4, noise_multiplier=9.0)
    world, gateway = await world_of(tmp_path, privacy)
    await world.run_round(gateway)
    await world.close()
    world.fleet.member(Role.COORDINATOR, "coordinator-2", "_")
    world._signer = world.fleet.signer(Role.COORDINATOR, "coordinator-2", "_")
    world.open()
    await world.join(gateway)
    await world.ask(Command.ROUND_RESUME)
    await world.pass_time(10_000)
    await world.run_round(gateway, seed=2)
    name = world.store.document(NOISE)
    assert name is not None
    state = MatrixState.decode(world.coordinator.blobs.get(name))
    assert (state.round, len(state.history)) == (world.end().round, 1)
    account = world.coordinator.book.privacy.account()
    assert [(each.rounds >= 2, each.participations) for each in account.segments] == [(True, 2)]
    await world.close()


async def test_the_clip_adapts_to_the_noised_count(tmp_path: Path) -> None:
    privacy = PrivacySettings(
        noise_multiplier=5.0, quantile=0.5, flag_noise=2.0, clip=1.0, clip_rate=1.0, participations=5, epsilon=100.0
    )
    world, gateway = await world_of(tmp_path, privacy, devices=20)
    norms = []
    for seed in range(3):
        norms.append(norm_of(world.plan()[0]))
        await world.run_round(gateway, seed=seed)
    # All deltas are five long: every device is beyond a clip of one.
    assert norms[0] == pytest.approx(1.0, rel=1e-6)
    assert norms[0] < norms[1] < norms[2] < np.exp(1.0) * 1.001
    assert world.plan()[0].privacy == world.coordinator.book.privacy.privacy_of(privacy, sum(SIZES))
    await world.close()


async def test_the_library_is_imported_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, in which nobody would be answered."""
    threads: list[int] = []
    real = accounting.load
    monkeypatch.setattr(accounting, "load", lambda: (threads.append(threading.get_ident()), real())[1])
    world, _ = await world_of(tmp_path, PrivacySettings(participations=10))
    await world.coordinator.book.privacy.prepare(None, PrivacySettings())
    await world.coordinator.book.privacy.prepare(None)
    await world.ask(Command.ROUND_PAUSE)
    await world.ask(Command.ROUND_ABORT)
    assert (await world.ask(Command.ROUND_RESUME)).error == ""
    await world.ask(Command.ROUND_PAUSE)
    await world.ask(Command.ROUND_ABORT)
    assert (await world.ask(Command.ROUND_START)).error == ""
    assert len(threads) == 3
    assert threading.get_ident() not in threads
    await world.close()


async def test_without_the_library_rounds_pause_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(accounting.importlib, "import_module", missing)
    world, _ = await world_of(tmp_path, PrivacySettings())
    status = (await world.ask(Command.ROUND_STATUS)).result
    assert status["state"] == "paused"
    assert "fleetfed[privacy]" in status["waiting_for"]
    assert (await world.ask(Command.ROUND_START)).error == "invalid"
    await world.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weighting": Weighting.EXAMPLES}, "uniform"),
        ({"error_feedback": True}, "error_feedback"),
        ({"privacy": PrivacySettings(mechanism=Mechanism.SKELLAM, honest=4)}, "split"),
        ({"privacy": PrivacySettings(mechanism=Mechanism.SPLIT_CENTRAL)}, "split"),
        (
            {
                "privacy": PrivacySettings(mechanism=Mechanism.SKELLAM, honest=9),
                "mode": Mode.SPLIT,
                "minimum_cohort": 5,
            },
            "minimum_cohort",
        ),
        ({"mode": Mode.SPLIT, "bucket": 5, "robust": "trimmed_mean"}, "robust"),
    ],
)
def test_settings_that_would_break_the_promise_are_refused(given: dict[str, Any], says: str) -> None:
    defaults: dict[str, Any] = {"weighting": Weighting.UNIFORM, "privacy": PrivacySettings()}
    with pytest.raises(ConfigError, match=says):
        RoundSettings(**(defaults | given))
