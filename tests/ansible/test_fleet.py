"""The whole life of a fleet on four hosts, in the order of this file: each test goes on where the one before ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ansible.bed import DEVICES, GATEWAY, HOSTS, HUB, SECRET, SITE, Bed, Play, why_not

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.xdist_group("ansible"),
]

SERVICES = {
    HUB: ("fleetfed-broker", "fleetfed-enroller", "fleetfed-coordinator"),
    GATEWAY: ("fleetfed-gateway",),
    **dict.fromkeys(DEVICES, ("fleetfed-device",)),
}
PROBE = """
import sys, threading, paho.mqtt.client as mqtt
name, tls = sys.argv[1], "/var/lib/fleetfed-device/identity/tls/"
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
client.tls_set(tls + "ca.pem", tls + "cert.pem", tls + "key.pem")
inside = threading.Event()
client.on_connect = lambda _c, _u, _f, reason, _p: None if reason.is_failure else inside.set()
try:
    client.connect("hub", 8883)
    client.loop_start()
    print("in" if inside.wait(5) else "out")
except OSError as error:
    print("out")
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    reason = why_not()
    if reason:
        pytest.skip(f"{reason}: the roles are not run")
    made = Bed(tmp_path_factory.mktemp("ansible"), "fleetfed-test-ansible")
    try:
        made.up()
        yield made
    finally:
        made.down()


def _good(play: Play) -> Play:
    if play.returncode or any(play.failed.values()):
        pytest.fail(play.output[-6000:])
    return play


def _nothing(play: Play) -> None:
    _good(play)
    if any(play.changed.values()):
        changed = re.findall(r"TASK \[.*\] \*+\n(?:.*\n)*?changed: .*", play.output)
        pytest.fail("\n".join(changed)[-6000:])


def _round(bed: Bed, expected: int, seconds: float = 120) -> dict[str, Any]:
    """Run one round as soon as so many devices are ready; the coordinator's facts about it."""
    end = time.monotonic() + seconds
    while (seen := bed.fleetfed("fleet", "list"))["devices_ready"] != expected:
        assert time.monotonic() < end, seen
        time.sleep(1)
    before: int = bed.fleetfed("round", "status")["round"]
    bed.fleetfed("round", "start", "--rounds", "1", "--set", f"start_when={expected}")
    while not (done := [e for e in bed.fleetfed("round", "status")["history"] if e["round"] > before]):
        assert time.monotonic() < end, bed.fleetfed("round", "status")
        time.sleep(1)
    entry: dict[str, Any] = done[-1]
    assert entry["outcome"] == "committed"
    return entry


def _version(bed: Bed, host: str) -> str:
    """Of the release that the host's last service runs, not of the one that is merely there."""
    pid = bed.shell(host, f"systemctl show -p MainPID --value {SERVICES[host][-1]}")
    return bed.shell(
        host, f"tr '\\0' '\\n' < /proc/{pid}/cmdline | head -n 1 | xargs dirname | xargs dirname | xargs basename"
    )


def _probe(bed: Bed, device: str) -> str:
    return bed.shell(device, f"/opt/fleetfed/current/bin/python - {device}", stdin=PROBE)


# --- From nothing -----------------------------------------------------------------------------------------------------


def test_a_host_that_does_not_suit_is_refused_before_anything_is_done_to_it(bed: Bed) -> None:
    play = bed.play("site", common_minimum_free_mb=10**9)
    assert play.returncode
    assert "MB left on /" in play.output
    for host in HOSTS:
        assert play.changed.get(host, 0) == 0
        assert bed.shell(host, "ls -d /opt/fleetfed /etc/fleetfed 2>/dev/null", check=False) == ""


def test_one_command_provisions_four_bare_hosts(bed: Bed) -> None:
    play = _good(bed.play("site"))
    print(f"four bare hosts provisioned in {play.seconds:.0f} s")
    for host, services in SERVICES.items():
        for service in services:
            assert (
                bed.shell(host, f"systemctl is-active {service}; systemctl is-enabled {service}") == "active\nenabled"
            )


def test_a_round_runs_through_it(bed: Bed) -> None:
    assert _round(bed, 2)["contributors"] == 2


def test_a_second_run_changes_nothing(bed: Bed) -> None:
    _nothing(bed.play("site"))


def test_a_dry_run_goes_through_and_finds_nothing_to_do(bed: Bed) -> None:
    _nothing(bed.play("site", "--check", "--diff"))


def test_units_are_confined_and_run_as_users_of_their_own(bed: Bed) -> None:
    for host, services in SERVICES.items():
        for service in services:
            text = bed.shell(host, f"systemd-analyze security --no-pager {service} | tail -n 1")
            exposure = re.search(r"([0-9.]+) OK", text)
            assert exposure is not None, text
            assert float(exposure[1]) < 1.5
            pid = bed.shell(host, f"systemctl show -p MainPID --value {service}")
            assert bed.shell(host, f"stat -c %u /proc/{pid}") != "0"


def test_keys_of_a_device_are_on_it_alone_and_its_token_is_gone(bed: Bed) -> None:
    for device in DEVICES:
        home = "/var/lib/fleetfed-device"
        assert bed.shell(device, f"test -e {home}/token && echo there", check=False) == ""
        assert bed.shell(device, f"find {home} -name '*key*' -perm /077") == ""
        key = bed.shell(device, f"sha256sum < {home}/identity/signing.key")
        copies = bed.shell(HUB, "find / -xdev -size 32c -type f -exec sha256sum {} + 2>/dev/null", check=False)
        assert key.split()[0] not in copies
        assert not list(bed.authority.rglob(f"{device}*"))


def test_a_device_that_no_play_reaches_enrols_with_a_token_once(bed: Bed) -> None:
    file = bed.folder / "tokens.txt"
    asked = {"enrol_tokens": 2, "enrol_owner": "ward-3", "enrol_site": SITE, "enrol_lifetime": "1h"}
    play = _good(bed.play("enrol", enrol_file=str(file), **asked))
    assert file.stat().st_mode & 0o777 == 0o600
    first, second = file.read_text().split()
    assert first not in play.output
    assert second not in play.output

    def enroll(folder: str, token: str) -> str:
        """As whoever holds the device would; its new name, or nothing."""
        program, ca = "/opt/fleetfed/current/bin/fleetfed-device", "/var/lib/fleetfed-device/ca.pem"
        # A hardware name of its own: one host stands for many, and a second identity for the same one is refused.
        service = f"--url https://{HUB}:8443 --ca {ca} --hardware {folder}"
        command = f"{program} enroll {service} --token - --identity {folder} >/dev/null"
        return bed.shell(DEVICES[0], f"{command} && grep '^id' {folder}/fleet.toml", stdin=token, check=False)

    names = enroll("/tmp/one", first), enroll("/tmp/two", second)
    assert all(re.fullmatch(r'id = "[a-z0-9_-]+"', name) for name in names), names
    assert names[0] != names[1]
    assert enroll("/tmp/thief", first) == ""
    bed.shell(DEVICES[0], "rm -r /tmp/one /tmp/two /tmp/thief")


def test_the_enrolment_services_word_is_published_by_a_timer_and_a_failure_is_seen(bed: Bed) -> None:
    unit = "fleetfed-enroller-publish"
    assert bed.shell(HUB, f"systemctl is-active {unit}.timer; systemctl is-enabled {unit}.timer") == "active\nenabled"
    assert bed.shell(HUB, f"systemctl show -p NextElapseUSecRealtime --value {unit}.timer") != ""
    assert "devices" not in bed.fleetfed("round", "status")["trust"]["expiries"]
    bed.shell(HUB, f"systemctl start {unit}")
    assert "devices" in bed.fleetfed("round", "status")["trust"]["expiries"]
    text = bed.shell(HUB, f"systemd-analyze security --no-pager {unit} | tail -n 1")
    exposure = re.search(r"([0-9.]+) OK", text)
    assert exposure is not None, text
    assert float(exposure[1]) < 1.5
    try:
        bed.shell(HUB, "systemctl stop fleetfed-coordinator")
        bed.shell(HUB, f"systemctl start {unit}", check=False)
        assert bed.shell(HUB, f"systemctl is-failed {unit}") == "failed"
        assert "start it with" in bed.shell(HUB, f"journalctl -u {unit} --no-pager -o cat")
    finally:
        bed.shell(HUB, "systemctl start fleetfed-coordinator")
    bed.shell(HUB, f"systemctl start {unit}")
    assert bed.shell(HUB, f"systemctl is-failed {unit}", check=False) == "inactive"


def test_what_the_vault_holds_is_in_one_file_and_in_no_output(bed: Bed) -> None:
    assert bed.shell(HUB, "stat -c '%U %a' /etc/fleetfed/pgpass") == "fleetfed-coordinator 600"
    # The format of that file escapes colons.
    assert bed.shell(HUB, "cat /etc/fleetfed/pgpass") == "*:*:*:*:" + SECRET.replace(":", "\\:")
    for log in bed.folder.glob("*.log"):
        assert SECRET not in log.read_text()
    assert SECRET not in (bed.folder / "inventory" / "group_vars" / "all" / "vault.yml").read_text()


def test_prometheus_sees_every_host_and_knows_the_alerts(bed: Bed) -> None:
    ask = "python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())' "
    end = time.monotonic() + 60
    while True:
        found = json.loads(bed.shell(HUB, ask + "http://127.0.0.1:9090/api/v1/targets"))["data"]["activeTargets"]
        up = {(each["labels"]["job"], each["labels"].get("role", "")) for each in found if each["health"] == "up"}
        if up == {("node", ""), ("fleetfed", "coordinator"), ("fleetfed", "enroller"), ("fleetfed", "gateway")}:
            break
        assert time.monotonic() < end, found
        time.sleep(1)
    rules = json.loads(bed.shell(HUB, ask + "http://127.0.0.1:9090/api/v1/rules"))["data"]["groups"]
    assert any(rule["name"].startswith("Fleetfed") for group in rules for rule in group["rules"])


# --- Upgrades ---------------------------------------------------------------------------------------------------------


def test_an_upgrade_leaves_a_fleet_that_works(bed: Bed) -> None:
    bed.source("0.2.0")
    play = _good(bed.play("upgrade", common_source=str(bed.folder / "source" / "0.2.0")))
    print(f"four hosts upgraded in {play.seconds:.0f} s")
    assert {_version(bed, host) for host in HOSTS} == {"0.2.0"}
    assert _round(bed, 2)["contributors"] == 2
    _nothing(bed.play("upgrade", common_source=str(bed.folder / "source" / "0.2.0")))


def test_a_release_that_fails_stops_at_the_first_device_which_goes_back(bed: Bed) -> None:
    bed.source("0.3.0", broken="raise SystemExit('broken on purpose')")
    play = bed.play(
        "upgrade", "--limit", ":".join(("localhost", *DEVICES)), common_source=str(bed.folder / "source" / "0.3.0")
    )
    assert play.returncode
    first, second = DEVICES
    assert f"{first} is back on 0.2.0" in play.output
    assert play.failed[first] == 1
    assert bed.shell(second, "ls -d /opt/fleetfed/0.3.0", check=False) == ""
    assert {_version(bed, device) for device in DEVICES} == {"0.2.0"}
    assert _round(bed, 2)["contributors"] == 2


def test_an_upgrade_is_taken_back_without_fetching_anything(bed: Bed) -> None:
    _good(bed.play("upgrade", "--limit", ":".join(("localhost", GATEWAY)), common_release="0.1.0"))
    assert _version(bed, GATEWAY) == "0.1.0"
    assert _round(bed, 2)["contributors"] == 2


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_rotation_gives_a_gateway_new_keys(bed: Bed) -> None:
    read = "sha256sum < /var/lib/fleetfed-gateway/identity/signing.key"
    before = bed.shell(GATEWAY, read)
    lists = bed.shell(HUB, "sha256sum < /var/lib/fleetfed-broker-files/current/crl.pem")
    _good(bed.play("rotate", rotate=GATEWAY))
    assert bed.shell(GATEWAY, read) != before
    assert bed.shell(HUB, "sha256sum < /var/lib/fleetfed-broker-files/current/crl.pem") != lists
    assert _round(bed, 2)["contributors"] == 2
    assert [gateway["id"] for gateway in bed.fleetfed("fleet", "list")["gateways"] if gateway["life"] == "ready"] == [
        f"{GATEWAY}-r1"
    ]


def test_a_revoked_device_is_shut_out_of_broker_and_round(bed: Bed) -> None:
    out = DEVICES[1]
    assert _probe(bed, out) == "in"
    _good(bed.play("revoke", revoke=out))
    # New connections are refused, whatever the device makes of it.
    assert _probe(bed, out) == "out"
    bed.shell(out, "systemctl restart --no-block fleetfed-device")
    # The broker keeps its last word, that it is ready; its gateway knows better.
    entry = _round(bed, 1)
    assert entry["contributors"] == 1
    assert entry["seconds"] < 60, "the deadline: the gateway waited"
    assert _probe(bed, DEVICES[0]) == "in"
    _nothing(bed.play("revoke", revoke=out))


def test_of_a_decommissioned_host_nothing_is_left(bed: Bed) -> None:
    gone = DEVICES[1]
    _good(bed.play("decommission", decommission=gone))
    left = "ls -d /opt/fleetfed* /etc/fleetfed /var/lib/fleetfed* /etc/systemd/system/*fleetfed* 2>/dev/null"
    assert bed.shell(gone, left, check=False) == ""
    assert bed.shell(gone, "getent passwd fleetfed-device", check=False) == ""
    assert bed.shell(gone, "systemctl list-units --all --plain --no-legend 'fleetfed*'") == ""
    _nothing(bed.play("decommission", decommission=gone))


# --- Style ------------------------------------------------------------------------------------------------------------


def test_the_collection_passes_ansible_lint_for_production(bed: Bed) -> None:
    done = bed.lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Profile 'production' was required, and it passed" in done.stdout + done.stderr
