"""Alerts as an operator gets them: a real Prometheus scrapes a fleet of real processes, and something breaks.

The shipped rules with their thresholds; only the time that they wait or look back is shorter (`watched_fleet.FACTOR`).
What cannot be done to real processes in a few minutes is replayed alone (`provocations.REPLAYED_ONLY`, with why).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from fleetfed_testing.brokers import free_port
from fleetfed_testing.impostor import commit_to_one, impostor
from fleetfed_testing.local_fleet import prepared, running
from fleetfed_testing.prometheus import ALERTS, needs_prometheus
from fleetfed_testing.proxies import Proxy
from fleetfed_testing.watched_fleet import (
    FACTOR,
    LEAST,
    cut,
    digits,
    flood,
    instance,
    publish,
    reissue,
    silence,
    small_disk,
    through,
    watched,
    wayward,
)

from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR, HELPER, HOST, toml
from fleetfed.cloud_coordinator.keys.keyring import DEFAULT_DAYS, Keyring, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.owners import TARGETS_DAYS
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.wire.messages import Command
from fleetfed.shared.wire.topics import Verb

pytestmark = [pytest.mark.slow, needs_prometheus]

LONGEST: Final = 1800.0
"""Seconds: the longest ``for`` that a rule has."""
_SELECTOR: Final = re.compile(r"\b(?:(?:fleetfed|process)_\w+|up)\b(?:\{[^}]*\})?")
_NOT_IN_THIS_FLEET: Final = {
    # There is no enrolment service, and no run has a target.
    "fleetfed_revocations_expiry_timestamp_seconds",
    "fleetfed_rounds_to_target",
    'fleetfed_trust_expiry_timestamp_seconds{metadata="devices"}',
}

_ROUNDS: Final[dict[str, Any]] = {"deadline": 5.0, "expires": 8.0, "start_when": 2}


async def test_a_healthy_fleet_is_quiet(tmp_path: Path) -> None:
    rounds = {"mode": "split", "minimum_cohort": 2, "seed_holders": 2, "start_when": 4, "interval": 0.5}
    shape: dict[str, Any] = {"devices": 4, "gateways": 2, "trainer": "wayward", "rounds": rounds, "helper": True}
    async with prepared(tmp_path / "fleet", metrics=True, **shape) as fleet:
        digits(fleet)
        await fleet.start()
        async with watched(fleet) as prometheus:
            # Else the first round waits for the helper's key, and says so.
            await prometheus.holds("fleetfed_helper_available == 1")
            await fleet.begin(0)
            # Longer than any rule waits.
            await prometheus.holds(f"min(count_over_time(up[10m])) > {2 * LEAST + LONGEST / FACTOR}")
            await fleet.finished(5)
            assert not [alert for alert, states in prometheus.ever().items() if "firing" in states]
            assert prometheus.ask("alerts")["alerts"] == []
            shipped = yaml.safe_load(ALERTS.read_text())["groups"]
            found = prometheus.rules()
            assert {rule["name"] for rule in found} == {rule["alert"] for group in shipped for rule in group["rules"]}
            assert [rule for rule in found if rule["health"] != "ok" or rule.get("lastError")] == []
            selectors = {selector for rule in found for selector in _SELECTOR.findall(rule["query"])}
            assert {each for each in selectors if not prometheus.shows(each)} == _NOT_IN_THIS_FLEET


async def test_processes_that_are_gone(tmp_path: Path) -> None:
    fleet_shape: dict[str, Any] = {"devices": 4, "gateways": 2, "trainer": "wayward", "rounds": _ROUNDS}
    async with running(tmp_path / "fleet", metrics=True, **fleet_shape) as fleet, watched(fleet) as prometheus:
        await fleet.kill("g-south")
        await prometheus.until(
            firing={"FleetfedTargetDown": [instance(fleet, "g-south")], "FleetfedSiteDown": [{"site": "south"}]}
        )
        await fleet.begin(5)
        await prometheus.until(firing={"FleetfedStale": [{"site": "south"}]})
        await fleet.start_again("g-south")
        await prometheus.until(quiet=("FleetfedTargetDown", "FleetfedSiteDown", "FleetfedStale"))

        await fleet.kill(BROKER)
        others = [instance(fleet, name) for name in (COORDINATOR, "g-north", "g-south")]
        await prometheus.until(firing={"FleetfedNotReady": others, "FleetfedTargetDown": [instance(fleet, BROKER)]})
        await fleet.start_again(BROKER)
        await prometheus.until(quiet=("FleetfedNotReady", "FleetfedTargetDown"))

        await fleet.kill(COORDINATOR)
        await prometheus.until(firing={"FleetfedTargetDown": [instance(fleet, COORDINATOR)]})
        await fleet.start_again(COORDINATOR)
        await prometheus.until(quiet=("FleetfedTargetDown",))

        # Rounds go on without whoever is gone already: these two go in the middle of one.
        fleet.hold("d-01", "d-03")
        await fleet.begin(1)
        await fleet.answered(2)
        for name in ("d-01", "d-03"):
            await fleet.kill(name)
        cloud = instance(fleet, COORDINATOR)
        await prometheus.until(
            firing={
                "FleetfedDevicesLost": [{"site": "north"}],
                "FleetfedDropouts": [{}],
                "FleetfedParticipationLow": [cloud],
            }
        )
        fleet.release("d-01", "d-03")
        for name in ("d-01", "d-03"):
            await fleet.start_again(name)
        await prometheus.until(quiet=("FleetfedDevicesLost",))
        await fleet.begin(1)
        await prometheus.until(quiet=("FleetfedParticipationLow",))


async def test_messages_that_do_not_belong(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"devices": 4, "gateways": 2, "trainer": "wayward", "rounds": _ROUNDS}
    with contextlib.ExitStack() as stack:
        async with prepared(tmp_path / "fleet", metrics=True, **shape) as fleet:
            line = stack.enter_context(Proxy(fleet.port))
            fleet.lay_out()
            through(fleet, "g-north", line.port)
            await fleet.start_broker()
            for name in (COORDINATOR, "g-north", "g-south", "d-01"):
                await fleet.start_again(name)
            async with watched(fleet) as prometheus:
                south = instance(fleet, "g-south")
                identity = fleet.folder.keys / "identities" / "d-02"
                async with impostor(identity, fleet.port) as thief:
                    await thief.say(Verb.DECLINE, b"garbage" * 40, times=8)
                    await thief.say(Verb.DECLINE, thief.forged(), times=8)
                    await thief.say(Verb.DECLINE, thief.too_large(), times=15)
                    await thief.say(Verb.DECLINE, thief.too_new(), times=30)
                    await prometheus.until(
                        firing={
                            "FleetfedCorruption": [{}],
                            "FleetfedPoisoning": [{}],
                            "FleetfedOverload": [south],
                            "FleetfedVersionSkew": [south],
                        }
                    )
                    silence(fleet, "g-south")
                    await fleet.kill(BROKER)
                    await fleet.start_again(BROKER)
                    await thief.session.wait_connected()
                    for _ in range(30):
                        await thief.say(Verb.DECLINE, thief.message())
                    await prometheus.until(firing={"FleetfedMessagesLost": [{"cause": "refused", **south}]})
                await cut(fleet, "g-north", line, times=8)
                await prometheus.until(firing={"FleetfedReconnects": [{"side": "site", **instance(fleet, "g-north")}]})


async def test_rounds_and_models_that_go_wrong(tmp_path: Path) -> None:
    rounds = {**_ROUNDS, "start_when": 4, "defence": {"outlier_score": 50.0, "minimum": 3}}
    async with prepared(tmp_path / "fleet", metrics=True, devices=4, trainer="wayward", rounds={**rounds}) as fleet:
        digits(fleet)
        await fleet.start()
        async with watched(fleet) as prometheus:
            await fleet.begin(1, target_accuracy=0.999)
            await prometheus.until(firing={"FleetfedTargetMissed": [{}]})

            wayward(fleet, "stands out", "d-04")
            await fleet.begin(3)
            await prometheus.until(firing={"FleetfedQuarantine": [{}], "FleetfedFailedUpdates": [{}]})
            wayward(fleet, "", "d-04")
            await fleet.ask(Command.FLEET_RELEASE, id="d-04")
            await prometheus.until(quiet=("FleetfedQuarantine", "FleetfedTargetMissed"))

            wayward(fleet, "runs away")
            await fleet.begin(3)
            await prometheus.until(firing={"FleetfedDivergence": [{}], "FleetfedClipping": [{}]})
            await fleet.ask(Command.MODEL_ROLLBACK, version=5)
            wayward(fleet, "explodes")
            await fleet.begin(3)
            await prometheus.until(
                firing={"FleetfedRoundsAbort": [{}], "FleetfedUpdatesDiverge": [{}]}, quiet=("FleetfedDivergence",)
            )
            wayward(fleet, "")
            await prometheus.until(quiet=("FleetfedRoundsAbort", "FleetfedClipping"))


async def test_papers_that_end_and_a_helper_that_is_gone(tmp_path: Path) -> None:
    rounds = {**_ROUNDS, "mode": "split", "minimum_cohort": 2, "seed_holders": 2, "deadline": 20.0, "expires": 30.0}
    shape: dict[str, Any] = {"devices": 2, "trainer": "repeatable", "rounds": rounds, "helper": True}
    async with running(tmp_path / "fleet", metrics=True, **shape) as fleet, watched(fleet) as prometheus:
        everybody = [instance(fleet, name) for name in (COORDINATOR, "g-north", HELPER)]
        keyring = Keyring.load(fleet.folder.keys)
        await reissue(fleet, keyring, "g-north", days=3)
        await publish(fleet, days=10)
        north = instance(fleet, "g-north")
        await prometheus.until(
            firing={
                "FleetfedTrustExpires": [{"metadata": "targets", **each} for each in everybody],
                "FleetfedCertificateExpires": [{"certificate": kind, **north} for kind in ("identity", "tls")],
            }
        )
        await reissue(fleet, keyring, "g-north", days=DEFAULT_DAYS)
        await publish(fleet, days=TARGETS_DAYS)
        await prometheus.until(quiet=("FleetfedTrustExpires", "FleetfedCertificateExpires"))

        # The plan names a key whose secret is lost: nobody can take its masks off any more.
        fleet.hold("d-02")
        await fleet.begin()
        await fleet.answered(1)
        await fleet.kill(HELPER)
        await prometheus.until(firing={"FleetfedHelperMissing": [{}]})
        shutil.rmtree(fleet.folder.role(HELPER) / "state")
        slow = fleet.folder.config(HELPER)
        slow.write_text("rotate_hours = 0.4\n" + slow.read_text())
        fleet.release("d-02")
        await fleet.start_again(HELPER)
        await prometheus.until(
            firing={"FleetfedMaskedSumsFail": [{}], "FleetfedHelperKeyExpires": [instance(fleet, HELPER)]},
            quiet=("FleetfedHelperMissing",),
        )
        await fleet.kill(HELPER)
        await fleet.begin()
        await prometheus.until(firing={"FleetfedRoundsWait": [instance(fleet, COORDINATOR)]})

        await publish(fleet, days=0, seconds=5)
        await prometheus.until(firing={"FleetfedTrustStale": everybody[:2]})
        await publish(fleet, days=TARGETS_DAYS)
        await prometheus.until(quiet=("FleetfedTrustStale",))


async def test_room_that_runs_out(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"devices": 4, "gateways": 2, "trainer": "repeatable", "width": 560_000}
    with contextlib.ExitStack() as stack:
        async with prepared(tmp_path / "fleet", metrics=True, rounds={"start_when": 1}, **shape) as fleet:
            fleet.settings = dataclasses.replace(fleet.settings, gateway={"limits": {"journal_mib": 1}})
            await fleet.start(without=("d-01", "d-02", "d-03"))
            async with watched(fleet) as prometheus:
                await fleet.begin()
                await fleet.finished()
                broker = instance(fleet, BROKER)
                pid = fleet.fleet.supervisor.pid(BROKER)
                used = len(os.listdir(f"/proc/{pid}/fd"))
                before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (4 * used, before[1]))
                idle = [stack.enter_context(socket.create_connection((HOST, fleet.port))) for _ in range(3 * used - 8)]
                await prometheus.until(firing={"FleetfedDescriptors": [broker]})
                for each in idle:
                    each.close()
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
                await prometheus.until(
                    firing={"FleetfedJournalFull": [instance(fleet, "g-south")]}, quiet=("FleetfedDescriptors",)
                )

                gateways = ("g-north", "g-south")
                for name in gateways:
                    await fleet.kill(name)
                await asyncio.gather(*(flood(fleet, name) for name in ("d-01", "d-02")))
                await prometheus.until(firing={"FleetfedBrokerQueues": [{"session": "offline", **broker}]})
                for name in gateways:
                    await fleet.start_again(name)
                await prometheus.until(quiet=("FleetfedBrokerQueues",))


async def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    async with prepared(tmp_path / "fleet", metrics=True, devices=1) as fleet:
        fleet.lay_out()
        with small_disk(fleet.folder.role("g-north") / "state") as state:
            usage = shutil.disk_usage(state)
            (state / "ballast").write_bytes(bytes(usage.free - usage.total // 20))
            await fleet.start_broker()
            await fleet.start_again("g-north")
            async with watched(fleet, "g-north", BROKER) as prometheus:
                await prometheus.until(firing={"FleetfedDiskFull": [instance(fleet, "g-north")]})
            await fleet.kill("g-north")


async def test_privacy_that_is_spent(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra `privacy`")
    rounds = {**_ROUNDS, "start_when": 4, "privacy": {"epsilon": 8.0, "delta": 1e-5, "participations": 1}}
    shape: dict[str, Any] = {"devices": 4, "trainer": "wayward", "rounds": rounds}
    async with running(tmp_path / "fleet", metrics=True, **shape) as fleet, watched(fleet) as prometheus:
        await fleet.begin(1)
        await prometheus.until(firing={"FleetfedPrivacyBudget": [instance(fleet, COORDINATOR)]})
        # Their own ledgers say that it is enough.
        await fleet.begin(1)
        await prometheus.until(firing={"FleetfedPrivacyRefusals": [instance(fleet, COORDINATOR)]})


async def test_a_coordinator_that_asks_for_a_single_update(tmp_path: Path) -> None:
    rounds = {"mode": "split", "minimum_cohort": 2, "deadline": 10.0, "expires": 15.0, "start_when": 2}
    shape: dict[str, Any] = {"devices": 2, "trainer": "wayward", "rounds": rounds}
    async with running(tmp_path / "fleet", metrics=True, **shape) as fleet, watched(fleet) as prometheus:
        fleet.hold()
        await fleet.begin()
        for name in fleet.devices:
            await fleet.training(name)
        await fleet.kill(COORDINATOR)
        fleet.release()
        await commit_to_one(fleet.folder.keys / "identities" / COORDINATOR, fleet.port)
        # The round ends as any other, and with it what is counted.
        await fleet.start_again(COORDINATOR)
        await prometheus.until(firing={"FleetfedCommitsRefused": [instance(fleet, "g-north")]})


async def test_a_revocation_list_that_ends(tmp_path: Path) -> None:
    async with prepared(tmp_path / "fleet", metrics=True, devices=1) as fleet:
        keyring = fleet.lay_out()
        keyring.issue([NewMember(id="enroller", role=MemberRole.ENROLLER, hosts=(HOST,))], now=unix_ms())
        folder = fleet.folder.path / "enroll"
        enroll = (sys.executable, "-P", "-m", "fleetfed.cloud_coordinator.enroll")

        def ask(*arguments: str) -> None:
            subprocess.run([*enroll, *arguments, "--dir", str(folder)], check=True, capture_output=True)

        keyring.write_crl(now=unix_ms(), days=10)
        ask("init", "--identity", str(keyring.identity_folder("enroller")), "--keys", str(keyring.directory))
        listen = f"{HOST}:{free_port()}"
        settings = (folder / "enroll.toml").read_text().replace("port = 8443", "port = 0")
        tables = {"monitoring": {"listen": listen}, "broker": {"out": "broker"}}
        (folder / "enroll.toml").write_text(settings + toml(tables))
        ask("files")
        await fleet.fleet.supervisor.start("enroller", (*enroll, "run", "--dir", str(folder)))
        fleet.fleet.listens = {"enroller": listen}
        async with watched(fleet) as prometheus:
            await prometheus.until(firing={"FleetfedRevocationsExpire": [{"instance": listen}]})
            keyring.write_crl(now=unix_ms())
            ask("import", "--keys", str(keyring.directory))
            ask("files")
            await prometheus.until(quiet=("FleetfedRevocationsExpire",))
