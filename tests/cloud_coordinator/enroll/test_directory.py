"""The service's word in the trust metadata: members who trust the owners learn of the log and of revocations by it."""

from __future__ import annotations

import json

import pytest
from fleetfed_testing.enrolment import NOW, Bench

from fleetfed.cloud_coordinator.enroll.brokerfiles import OWNERS
from fleetfed.cloud_coordinator.enroll.cli import run_command
from fleetfed.cloud_coordinator.enroll.directory import sign_directory
from fleetfed.cloud_coordinator.keys.equip import make_trust
from fleetfed.cloud_coordinator.keys.online import OnlineTrust
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity


def imported(bench: Bench) -> None:
    assert run_command(["import", "--keys", str(bench.keyring.directory), "--dir", str(bench.folder)]) == 0


def test_the_coordinator_signs_it_as_current_and_devices_count(bench: Bench) -> None:
    make_trust(bench.keyring, now=NOW)
    imported(bench)
    device = bench.enrol("d1")
    folder = bench.keyring.identity_folder("coordinator")
    identity = Identity.load(folder, role=Role.COORDINATOR)
    verifier = identity.verifier()
    online = OnlineTrust(bench.path / "state", identity, folder, verifier)
    assert online.start(now=NOW)
    verifier.certificate(device.encoded_certificate, now=NOW)

    bench.enroller.revoke([device.certificate.id], now=NOW)
    owners = bench.settings.authority / OWNERS
    assert online.offer(sign_directory(bench.enroller, owners, now=NOW), now=NOW)
    trust = online.keeper.trust
    assert trust is not None
    assert trust.directory == bench.enroller.directory()
    assert trust.directory.size == 2
    assert trust.directory.revocations == 1
    before = trust.versions["devices"]
    assert online.offer(sign_directory(bench.enroller, owners, now=NOW), now=NOW)
    after = online.keeper.trust
    assert after is not None
    assert after.versions["devices"] == before + 1


def test_a_service_that_the_owners_do_not_list_says_nothing(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="no trust metadata"):
        sign_directory(bench.enroller, bench.settings.authority / OWNERS, now=NOW)
    bench.keyring.revoke(["enroller"], now=NOW)
    make_trust(bench.keyring, now=NOW)
    imported(bench)
    with pytest.raises(ConfigError, match="do not list"):
        sign_directory(bench.enroller, bench.settings.authority / OWNERS, now=NOW)


def test_it_is_written_to_a_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    make_trust(bench.keyring, now=NOW)
    imported(bench)
    bench.enrol("d1")
    capsys.readouterr()
    out = bench.path / "bundle.bin"
    assert run_command(["publish", "--file", str(out), "--dir", str(bench.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 1
    assert out.stat().st_size > 1000
    assert run_command(["publish", "--dir", str(bench.folder)]) == 2
