"""docker-compose.yml as a reader runs it: a cloud, two sites whose brokers are bridged to it, and six devices.

The tests run in their order on one fleet. Times are the containers' own, so waiting is for what they do.
"""

from __future__ import annotations

import time
from functools import partial

import pytest
from fleetfed_testing.composed import DEVICES, Composed, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

NORTH = tuple(name for name in DEVICES if name.startswith("north"))
OUTAGE = 60.0
UP_SECONDS = 60.0
"""From `up`, with images built, to the first finished round."""
NOTICED = 30.0
"""Seconds until the coordinator must know that a site is away: the bridge's keep-alive is 10 s, noticed after 15."""


def member(device: str) -> str:
    """The id of the device in a container."""
    site, _, number = device.split("-")
    return f"d-{site}-{number}"


def test_the_first_round_is_over_a_minute_after_up(composed: Composed) -> None:
    composed.until("a first version", lambda: "version 2 of" in composed.log("coordinator"), UP_SECONDS)
    taken = time.monotonic() - composed.began
    print(f"first finished round {taken:.1f} s after `up`")
    assert taken <= UP_SECONDS


def test_everybody_takes_part(composed: Composed) -> None:
    composed.until("all devices in a round", lambda: any(r["contributors"] == 6 for r in composed.round()["history"]))


@pytest.mark.parametrize("service", ["coordinator", "north-gateway", "north-broker", "north-device-1"])
def test_no_container_has_more_than_it_needs(composed: Composed, service: str) -> None:
    form = "{{.HostConfig.ReadonlyRootfs}} {{.Config.User}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}"
    read_only, user, *rest = run("docker", "inspect", "--format", form, composed.container(service)).split()
    assert read_only == "true"
    assert user not in {"", "0", "0:0", "root"}
    assert rest == ["[ALL]", "[no-new-privileges:true]"]
    refused = composed.inside(service, "sh", "-c", "echo x > /etc/fleetfed/x", check=False)
    assert "Read-only file system" in refused
    variables = composed.inside(service, "sh", "-c", "cat /proc/1/environ").lower()
    assert not any(word in variables for word in ("password", "secret", "key="))


def test_the_device_has_nothing_of_the_operators(composed: Composed) -> None:
    names = composed.inside(
        "north-device-1", "sh", "-c", "ls /opt/fleetfed/lib/python3*/site-packages/fleetfed"
    ).split()
    assert sorted(name for name in names if not name.startswith("_")) == ["device", "shared"]
    assert composed.inside("north-device-1", "sh", "-c", "ls /opt/fleetfed/bin/fleetfed*").split() == [
        "/opt/fleetfed/bin/fleetfed-device"
    ]
    modules = "cryptography", "sqlalchemy", "click", "pip"
    code = f"import importlib.util as u; print([m for m in {modules!r} if u.find_spec(m)])"
    assert composed.inside("north-device-1", "/opt/fleetfed/bin/python3", "-c", code).strip() == "[]"


def test_a_gateway_reaches_its_own_broker_and_no_other(composed: Composed) -> None:
    probe = "import socket, sys; socket.create_connection((sys.argv[1], 8883), 3)"
    assert composed.inside("north-gateway", "python3", "-c", probe, "broker") == ""
    for other in ("cloud-broker", "south-broker"):
        assert "Name or service not known" in composed.inside(
            "north-gateway", "python3", "-c", probe, other, check=False
        ) or "Temporary failure" in composed.inside("north-gateway", "python3", "-c", probe, other, check=False)


def test_setting_up_again_changes_no_identity(composed: Composed) -> None:
    sums = "find /etc/fleetfed/identity -type f ! -name sequence ! -name crl.pem -exec sha256sum {} + | sort"
    before = composed.inside("north-gateway", "sh", "-c", sums)
    composed.compose("up", "--no-build", "--no-deps", "keys")
    assert "15 identities were there, 0 are new" in composed.log("keys")
    assert composed.inside("north-gateway", "sh", "-c", sums) == before


def test_the_edge_goes_on_without_the_cloud_and_nothing_is_lost_or_counted_twice(composed: Composed) -> None:
    """1. a round is open, its plan is at the site; 2. the uplink is cut; 3. the site's devices train and hold receipts;
    4. the gateway is killed and started again; 5. after a minute the uplink is back; 6. the round has all six.
    """
    composed.operator("round", "pause")
    composed.until("no open round", lambda: composed.round()["state"] == "paused")
    number = composed.round()["round"] + 1
    containers = [composed.container(name) for name in NORTH]
    run("docker", "pause", *containers)
    try:
        composed.operator("round", "resume")
        composed.until("the plan at the site", lambda: f"round {number} opens" in composed.log("north-gateway"))
        composed.cut("north")
        cut_at = time.monotonic()
    finally:
        run("docker", "unpause", *containers)

    composed.until("receipts from the edge", lambda: all(number in composed.accepted(name) for name in NORTH))
    print(f"receipts at the cut site after {time.monotonic() - cut_at:.1f} s")
    assert composed.round()["round"] == number
    assert not any(row["round"] == number for row in composed.round()["history"]), "the cloud cannot have closed it"

    noticed = composed.until("the coordinator to know", lambda: composed.round()["gateways_ready"] == 1, NOTICED)
    print(f"away {noticed:.1f} s after the receipts, {time.monotonic() - cut_at:.1f} s after the cut")
    run("docker", "kill", "--signal", "KILL", composed.container("north-gateway"))
    run("docker", "start", composed.container("north-gateway"))
    composed.until("the round again", lambda: f"round {number} goes on" in composed.log("north-gateway"))
    time.sleep(max(0.0, OUTAGE - (time.monotonic() - cut_at)))
    composed.mend("north")
    taken = composed.until(
        "the round's end", lambda: any(r["round"] == number for r in composed.round()["history"]), 90
    )
    print(f"round {number} closed {taken:.1f} s after the uplink was back")
    (row,) = (row for row in composed.round()["history"] if row["round"] == number)
    assert (row["outcome"], row["contributors"]) == ("committed", 6)
    composed.until("both sites", lambda: composed.round()["gateways_ready"] == 2)
    check_the_books(composed)


def test_no_round_waits_for_a_site_that_is_away(composed: Composed) -> None:
    composed.operator("round", "pause")
    composed.until("no open round", lambda: composed.round()["state"] == "paused")
    composed.cut("south")
    noticed = composed.until("the coordinator to know", lambda: composed.round()["gateways_ready"] == 1, NOTICED)
    print(f"noticed {noticed:.1f} s after the cut")
    number = composed.round()["round"]
    composed.operator("round", "resume")
    # A round's deadline is 120 s.
    taken = composed.until("rounds of the other site", lambda: composed.round()["round"] >= number + 3, 40)
    print(f"three rounds of one site in {taken:.1f} s")
    assert {row["contributors"] for row in composed.round()["history"] if row["round"] in (number + 1, number + 2)} == {
        3
    }
    composed.mend("south")
    composed.until("both sites", lambda: composed.round()["gateways_ready"] == 2, NOTICED)
    composed.until("a round of both", lambda: composed.round()["history"][-1]["contributors"] == 6)
    check_the_books(composed)


def test_a_broker_that_is_killed_brings_everything_back(composed: Composed) -> None:
    for service in ("north-broker", "cloud-broker"):
        before = composed.round()["round"]
        run("docker", "kill", "--signal", "KILL", composed.container(service))
        run("docker", "start", composed.container(service))
        composed.until(f"rounds after {service}", partial(finished_after, composed, before + 1), 120)
    check_the_books(composed)


def finished_after(composed: Composed, number: int) -> bool:
    return any(row["round"] > number and row["contributors"] == 6 for row in composed.round()["history"])


def check_the_books(composed: Composed) -> None:
    """Every device's receipts are as many as the coordinator counted of it."""
    composed.operator("round", "pause")
    composed.until("no open round", lambda: composed.round()["state"] == "paused", 180)
    history = {row["round"]: row["contributors"] for row in composed.round()["history"]}
    accepted = {name: composed.accepted(name) for name in DEVICES}
    assert {member(name): len(rounds) for name, rounds in accepted.items()} == composed.counted()
    for number, contributors in history.items():
        assert sum(number in rounds for rounds in accepted.values()) == contributors, number
    print(f"{len(history)} rounds, {sum(map(len, accepted.values()))} receipts, all counted once")
    composed.operator("round", "resume")
