"""The coordinator as Prometheus, systemd and containers see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fleetfed_testing.brokers import Embedded
from fleetfed_testing.cloud import START, Fleet, ScriptedGateway, World, write_model
from fleetfed_testing.masked_cloud import MaskedGateway
from fleetfed_testing.private_cloud import PrivateGateway
from fleetfed_testing.scraping import get, scrape
from fleetfed_testing.waiting import eventually

from fleetfed.cloud_coordinator.cli import app
from fleetfed.cloud_coordinator.config import CoordinatorConfig, RoundSettings
from fleetfed.cloud_coordinator.monitoring import CoordinatorView
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings
from fleetfed.cloud_coordinator.runtime import Runtime
from fleetfed.cloud_coordinator.state import State
from fleetfed.cloud_coordinator.storage.records import RevealResult
from fleetfed.shared.errors import ConfigError, RejectReason
from fleetfed.shared.monitoring import catalog
from fleetfed.shared.monitoring.catalog import of_role
from fleetfed.shared.monitoring.config import CoordinatorMonitoringConfig
from fleetfed.shared.monitoring.failures import MODES
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.mqtt.session import SessionStatistics
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.messages import Life, Mode, Weighting
from fleetfed.shared.wire.topics import Verb

CONNECTED = SessionStatistics(
    **{**dict.fromkeys(SessionStatistics.__dataclass_fields__, 0), "connected": True, "version5": True, "connects": 1}
)


def look(world: World, *, sites: int = 10) -> Samples:
    runtime = SimpleNamespace(
        config=CoordinatorConfig(
            identity=world.config.identity,
            state=world.config.state,
            broker=world.config.broker,
            monitoring=CoordinatorMonitoringConfig(sites=sites),
        ),
        identity=world.identity,
        coordinator=world.coordinator,
        obstacle=lambda: "",
        connection=lambda: (CONNECTED, ByteCount(1000, 2000)),
    )
    view = CoordinatorView(cast("Runtime", runtime))
    samples = view.look()
    view.look_slowly(samples)
    return samples


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Callable[..., World]]:
    made: list[World] = []

    def make(**settings: Any) -> World:
        made.append(World(tmp_path / str(len(made)), fleet=Fleet(), **settings))
        return made[-1]

    yield make
    for world in made:
        await world.close()


async def told(world: World, gateway: ScriptedGateway, **census: Any) -> None:
    await world.hear(gateway.name, Verb.CENSUS, gateway.census(now=world.clock.now, **census))


async def test_a_round_that_made_a_version(worlds: Callable[..., World]) -> None:
    world = worlds(rounds=RoundSettings(rounds=2, weight_cap=50, target_accuracy=0.01, interval=5.0))
    north = ScriptedGateway(world.fleet, "north", ["d0", "d1", "d2"])
    south = ScriptedGateway(world.fleet, "south", ["d3", "d4"])
    await world.join(north, south)
    opened = look(world)
    assert opened.value("fleetfed_round_open") == 1
    assert opened.value("fleetfed_coordinator_state", State.COLLECTING) == 1
    assert opened.value("fleetfed_round_deadline_timestamp_seconds") == pytest.approx(world.clock.now / 1000 + 900, 1)
    assert opened.value("fleetfed_participation_ratio") is None
    assert opened.value("fleetfed_rounds_to_target") is None
    await told(world, north, round=1, expected=4, answered=3, ready=3, devices=5, lost=1, model_version=1)
    await told(world, south, round=1, expected=4, answered=3, model_version=1)
    await world.run_round(north, south)

    seen = look(world)
    assert seen.value("fleetfed_rounds_total", "committed") == 1
    assert seen.value("fleetfed_rounds_total", "aborted") == 0
    assert seen.value("fleetfed_round_expected_devices") == 8
    assert seen.value("fleetfed_round_answered_devices") == 6
    assert seen.value("fleetfed_dropouts_total") == 2
    assert seen.value("fleetfed_participation_ratio") == 5 / 8
    assert seen.value("fleetfed_contributions_total") == 5
    assert seen.value("fleetfed_round_participants") == 5
    assert (seen.value("fleetfed_update_bytes_total") or 0) > 5 * 100
    # Prometheus sees no increase from nothing to one.
    assert seen.value("fleetfed_updates_rejected_total", "outlier", "poisoning") == 0
    assert seen.value("fleetfed_model_version") == 2
    assert (seen.value("fleetfed_model_patch_bytes") or 0) > 0
    assert seen.value("fleetfed_model_loss", "holdout") == pytest.approx(0.5, abs=0.01)
    assert 0 < (seen.value("fleetfed_model_loss", "training") or 0) < 2
    assert seen.value("fleetfed_rounds_to_target") == 1
    assert seen.value("fleetfed_coordinator_state", State.FINISHED) == 1
    assert seen.value("fleetfed_fleet_devices", "north", Life.READY) == 3
    assert seen.value("fleetfed_fleet_devices", "north", Life.LOST) == 1
    assert seen.value("fleetfed_fleet_devices", "north", Life.DISCONNECTED) == 1
    assert seen.value("fleetfed_site_connected", "south") == 1
    assert seen.value("fleetfed_site_model_lag_versions", "south") == 1
    assert seen.value("fleetfed_failures_total", "dropout") == 2
    assert world.coordinator.tally.rounds.snapshot()[0][-1][1] == 1
    assert world.coordinator.tally.steps.snapshot()[0][-1][1] == 1


async def test_sites_beyond_the_bound_are_one(worlds: Callable[..., World]) -> None:
    world = worlds()
    gateways = [ScriptedGateway(world.fleet, f"g{number}", [f"d{number}"]) for number in range(3)]
    await world.join(*gateways)
    seen = look(world, sites=1)
    assert seen.value("fleetfed_fleet_devices", "g0", Life.READY) == 1
    assert seen.value("fleetfed_fleet_devices", "other", Life.READY) == 2
    assert seen.value("fleetfed_site_connected", "g1") is None


async def test_rounds_that_came_to_nothing(worlds: Callable[..., World]) -> None:
    world = worlds(rounds=RoundSettings(quorum_minimum=3, weight_cap=50))
    gateway = ScriptedGateway(world.fleet, "north", ["d0"])
    await world.join(gateway)
    plan, plan_hash, ring = world.plan()
    updates = gateway.train(plan, plan_hash, ring)
    proposal = gateway.propose(
        plan,
        plan_hash,
        [update.message.head.encode() for update in updates],
        declined={"diverged": 2, "labels": 5, "made_up": 1},
        rejected={"outlier": 3, "late": 1},
    )
    await world.deliver("north", Verb.PROPOSE, proposal)
    commit, commit_hash, _ = world.commits("north")[-1]
    await world.deliver("north", Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
    seen = look(world)
    assert seen.value("fleetfed_rounds_total", "aborted") == 1
    assert seen.value("fleetfed_round_aborts_total", "below_minimum", "dropout") == 1
    assert seen.value("fleetfed_consecutive_aborts") == 1
    assert seen.value("fleetfed_declined_total", "diverged", "divergence") == 2
    assert seen.value("fleetfed_declined_total", "other", "none") == 1
    assert seen.value("fleetfed_updates_rejected_total", "outlier", "poisoning") == 3
    assert seen.value("fleetfed_outliers_total") == 3
    assert seen.value("fleetfed_failures_total", "divergence") == 2
    assert seen.value("fleetfed_failures_total", "dropout") == 1
    # Gateways count what they refuse.
    assert seen.value("fleetfed_failures_total", "poisoning") == 0
    assert seen.value("fleetfed_participation_ratio") == 0
    assert {str(mode) for mode in MODES} == {labels[0] for labels in seen._values["fleetfed_failures_total"]}
    await world.restart()
    # What is in the database outlives the process.
    assert look(world).value("fleetfed_consecutive_aborts") == 1
    assert (look(world).value("fleetfed_round_closed_timestamp_seconds") or 0) >= START / 1000


async def test_masked_sums_that_were_revealed_and_that_failed(worlds: Callable[..., World]) -> None:
    rounds = RoundSettings(mode=Mode.SPLIT, minimum_cohort=3, cohort_cap=20, weight_cap=50, interval=5.0)
    world = worlds(rounds=rounds)
    gateways = [MaskedGateway(world.fleet, name, [f"{name}{i}" for i in range(4)]) for name in ("a", "b")]
    await world.join(*gateways)
    plan, plan_hash, ring = world.plan()
    for gateway in gateways:
        updates = gateway.train(plan, plan_hash, ring)
        proposal = gateway.propose(plan, plan_hash, [update.message.head.encode() for update in updates])
        await world.deliver(gateway.name, Verb.PROPOSE, proposal)
    commit, commit_hash, _ = world.commits("a")[-1]
    await world.deliver("a", Verb.REVEAL, gateways[0].reveal(plan, ring, commit, commit_hash))
    commit, commit_hash, _ = world.commits("b")[-1]
    refusal = gateways[1].reveal(
        plan, ring, commit, commit_hash, reason=RejectReason.BELOW_OWNERS, count=0, words=b"", buckets=()
    )
    await world.deliver("b", Verb.REVEAL, refusal)
    seen = look(world)
    assert seen.value("fleetfed_masked_sums_total", "revealed") == 1
    assert seen.value("fleetfed_masked_sums_total", "failed") == 1
    assert seen.value("fleetfed_masked_sum_failures_total", "below_owners", "privacy") == 1
    assert seen.value("fleetfed_failures_total", "privacy") == 1


async def test_what_privacy_has_cost(worlds: Callable[..., World]) -> None:
    pytest.importorskip("dp_accounting")
    privacy = PrivacySettings(noise_multiplier=20.0, participations=10, clip=1.0, epsilon=8.0)
    world = worlds(rounds=RoundSettings(weighting=Weighting.UNIFORM, cohort_cap=20, privacy=privacy, interval=5.0))
    assert look(world).value("fleetfed_privacy_epsilon") == 0
    assert look(world).value("fleetfed_privacy_epsilon_limit") == 8.0
    gateway = PrivateGateway(world.fleet, "north", [f"d{number}" for number in range(8)])
    await world.join(gateway)
    # From when the round opens: devices debit it too.
    assert look(world).value("fleetfed_privacy_epsilon") == pytest.approx(0.18, abs=0.03)
    await world.run_round(gateway)
    seen = look(world)
    assert seen.value("fleetfed_privacy_epsilon") == pytest.approx(0.18, abs=0.03)
    assert seen.value("fleetfed_privacy_delta") == 1e-6
    assert seen.value("fleetfed_update_bytes_total") == 0


async def test_everything_in_the_catalog_is_shown(worlds: Callable[..., World]) -> None:
    world = worlds(rounds=RoundSettings(rounds=1, weight_cap=50, target_accuracy=0.01))
    gateway = ScriptedGateway(world.fleet, "north", ["d0", "d1"])
    await world.join(gateway)
    await told(world, gateway, round=1, expected=2, answered=2)
    plan, plan_hash, ring = world.plan()
    update = gateway.train(plan, plan_hash, ring)[0]
    head = update.message.head.encode()
    proposal = gateway.propose(plan, plan_hash, [head, b"no head"], declined={"busy": 1}, rejected={"late": 1})
    await world.deliver("north", Verb.PROPOSE, proposal)
    commit, commit_hash, _ = world.commits("north")[-1]
    await world.deliver("north", Verb.REVEAL, gateway.reveal(plan, ring, commit, commit_hash))
    world.coordinator.tally.revealed(RevealResult(failed="bad_box"))
    world.coordinator.tally.aborts["late", MODES[0]] += 1
    world.coordinator.rejected.add("late")
    seen = {metric.name for metric, _ in look(world).metrics()}
    of_process = {name for name in of_role(catalog.Role.COORDINATOR) if name.startswith("process_")}
    of_trust = {name for name in of_role(catalog.Role.COORDINATOR) if name.startswith("fleetfed_trust_")}
    assert set(of_role(catalog.Role.COORDINATOR)) - seen == of_process | of_trust


async def test_over_a_broker(
    embedded_broker: Callable[..., Embedded],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broker = embedded_broker(tls=False)
    Fleet().member(Role.COORDINATOR, "coordinator", "_").save(tmp_path / "identity")
    write_model(tmp_path / "model")
    path = tmp_path / "coordinator.toml"
    path.write_text(
        'identity = "identity"\nstate = "state"\n[broker]\nhost = "127.0.0.1"\ntls = false\nreconnect_cap = 0.1\n'
        f'port = {broker.port}\n[model]\nfile = "model/small.tflite"\n[monitoring]\nlisten = "127.0.0.1:0"\n'
    )
    ports: list[int] = []

    class Noted(MonitoringServer):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            ports.append(self.port)

    monkeypatch.setattr("fleetfed.cloud_coordinator.runtime.MonitoringServer", Noted)

    async def healthy() -> tuple[int, str]:
        arguments = ["coordinator", "status", "--config", str(path), "--healthy"]
        return await asyncio.to_thread(app.run, arguments), capsys.readouterr().out

    def obstacle() -> str:
        return str(json.loads((tmp_path / "state" / "status.json").read_text())["obstacle"])

    taken = path.read_text().replace("127.0.0.1:0", f"127.0.0.1:{broker.port}")
    other = tmp_path / "taken.toml"
    other.write_text(taken.replace('"state"', '"elsewhere"'))
    with pytest.raises(ConfigError, match="cannot listen on"):
        await Runtime(CoordinatorConfig.load(other)).run(asyncio.Event())
    code, why = await healthy()
    assert code == 1
    assert "written when the coordinator starts" in why
    stop = asyncio.Event()
    runtime = Runtime(CoordinatorConfig.load(path))
    running = asyncio.create_task(runtime.run(stop))
    await eventually(lambda: ports and not runtime.obstacle() and not obstacle())
    assert await healthy() == (0, "")
    seen = await asyncio.to_thread(scrape, ports[0])
    assert seen.value("fleetfed_ready") == 1
    assert seen.value("fleetfed_model_version") == 1
    assert (seen.value("fleetfed_storage_bytes", store="blobs") or 0) > 0
    assert (seen.value("process_resident_memory_bytes") or 0) > 1e7
    await asyncio.to_thread(broker.stop)
    await eventually(obstacle)
    assert await healthy() == (1, "not healthy: not connected to the broker\n")
    assert await asyncio.to_thread(get, ports[0], "/readyz") == (503, "not connected to the broker\n")
    stop.set()
    await running
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(get, ports[0])
