"""docker-compose.yml as a reader runs it: a cloud, two sites whose brokers are bridged to it, and six devices.

All tests of this folder run in their order on one fleet. Times are the containers' own, so waiting is for what they do.
"""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from fleetfed_testing.composed import DEVICES, Composed, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

UP_SECONDS = 180.0
"""From `up`, with images built, to the first finished round: about 30 on two free cores, far more on crowded ones."""
WATCHED = ("cloud-broker", "coordinator", "north-broker", "north-gateway", "postgres", "south-broker", "south-gateway")


def test_the_first_round_is_over_soon_after_up(composed: Composed) -> None:
    composed.until("a first version", lambda: "version 2 of" in composed.log("coordinator"), UP_SECONDS)
    print(f"first finished round {time.monotonic() - composed.began:.1f} s after `up`")


def test_everybody_takes_part(composed: Composed) -> None:
    composed.until("all devices in a round", lambda: any(r["contributors"] == 6 for r in composed.round()["history"]))


@pytest.mark.parametrize("service", [*WATCHED, *DEVICES])
def test_every_container_is_healthy(composed: Composed, service: str) -> None:
    taken = composed.until(f"{service} to be healthy", lambda: composed.health(service) == "healthy", 240)
    print(f"{service} healthy, waited {taken:.0f} s")


def test_a_gateway_without_its_broker_is_not_healthy(composed: Composed) -> None:
    command = ("fleetfed-gateway", "status", "--config", "/etc/fleetfed/gateway.toml", "--healthy")
    composed.inside("south-gateway", *command)
    broker = composed.container("south-broker")
    run("docker", "stop", broker)
    try:
        composed.until(
            "it to say so", lambda: "not healthy:" in composed.inside("south-gateway", *command, check=False)
        )
    finally:
        run("docker", "start", broker)
    composed.until("it to be well", lambda: composed.inside("south-gateway", *command, check=False) == "")


def test_prometheus_sees_coordinator_and_gateways(composed: Composed) -> None:
    up = {"coordinator:9464", "north-gateway:9465", "south-gateway:9465"}
    composed.until("three targets", lambda: answered(composed, 'up{job="fleetfed"} == 1') == up)
    composed.until("samples", lambda: answered(composed, 'fleetfed_rounds_total{job="fleetfed"} > 0'))
    groups = asked(composed, "rules")["groups"]
    assert groups
    assert all(rule["health"] in {"ok", "unknown"} for group in groups for rule in group["rules"])


def answered(composed: Composed, query: str) -> set[str]:
    """Which instances a query finds."""
    return {row["metric"]["instance"] for row in asked(composed, f"query?query={quote(query)}")["result"]}


def asked(composed: Composed, path: str) -> Any:
    """What Prometheus answers at the port that is published."""
    port = composed.inspect("prometheus")["NetworkSettings"]["Ports"]["9090/tcp"][0]["HostPort"]
    with urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def test_setting_up_again_changes_no_identity(composed: Composed) -> None:
    sums = "find /etc/fleetfed/identity -type f ! -name sequence ! -name crl.pem -exec sha256sum {} + | sort"
    before = composed.inside("north-gateway", "sh", "-c", sums)
    composed.compose("up", "--no-build", "--no-deps", "keys")
    assert "15 identities were there, 0 are new" in composed.log("keys")
    assert composed.inside("north-gateway", "sh", "-c", sums) == before


def test_grafanas_password_is_where_the_documentation_says(composed: Composed) -> None:
    path = "/fleet/grafana/password"
    password = composed.compose("run", "--rm", "--no-deps", "--entrypoint", "cat", "keys", path).strip()
    assert len(password) > 40
