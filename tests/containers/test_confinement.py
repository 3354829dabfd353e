"""What the containers of docker-compose.yml may do, see and reach."""

from __future__ import annotations

import base64
import json

import pytest
from fleetfed_testing.composed import DEVICES, Composed, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

ROLES = ("coordinator", "operator", "cloud-broker", "north-broker", "north-gateway", "south-gateway", *DEVICES)


@pytest.mark.parametrize("service", ROLES)
def test_no_container_has_more_than_it_needs(composed: Composed, service: str) -> None:
    container = composed.inspect(service)
    host = container["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert container["Config"]["User"] not in {"", "0", "0:0", "root"}
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    # Refused as not permitted where the kernel says so before it looks at the file system.
    assert (
        composed.inside(service, "sh", "-c", "echo x > /usr/x || echo x > /opt/x", check=False).count("cannot create")
        == 2
    )
    status = composed.inside(service, "cat", "/proc/1/status")
    rights = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(rights["CapEff"], 16) == 0
    assert int(rights["CapBnd"], 16) == 0
    assert rights["NoNewPrivs"].strip() == "1"


@pytest.mark.parametrize("service", [name for name in ROLES if name != "operator"])
def test_settings_and_identity_cannot_be_written(composed: Composed, service: str) -> None:
    assert "cannot create" in composed.inside(service, "sh", "-c", "echo x > /etc/fleetfed/x", check=False)


def test_no_secret_is_in_an_environment_a_command_or_an_image(composed: Composed) -> None:
    secrets = {composed.inside("postgres", "cat", "/etc/fleetfed/password").strip()}
    for service in ("coordinator", "operator", "north-gateway", "north-broker", "north-device-1"):
        secrets |= forms_of_keys(composed, service)
    assert len(secrets) > 10
    for service in composed.services():
        told = json.dumps(composed.inspect(service))
        assert not any(secret in told for secret in secrets), service
        for variable in composed.inspect(service)["Config"]["Env"]:
            name, _, value = variable.partition("=")
            # A path to a secret is no secret.
            assert value.startswith("/") or not any(
                word in name.lower() for word in ("password", "secret", "key", "token")
            )
    for role in ("broker", "gateway", "device", "coordinator"):
        told = run("docker", "history", "--no-trunc", f"fleetfed/{role}:0.1.0")
        assert not any(secret in told for secret in secrets), role
        paths = run(
            "docker",
            "run",
            "--rm",
            "--network",
            "none",
            "--entrypoint",
            "find",
            f"fleetfed/{role}:0.1.0",
            "/etc/fleetfed",
            "/var/lib/fleetfed",
            "-mindepth",
            "1",
        )
        assert paths == "", role


def forms_of_keys(composed: Composed, service: str) -> set[str]:
    """Each key that a container has, as text would show it: a line of its PEM file, or its bytes in hex and base64."""
    found = set()
    paths = composed.inside(service, "find", "/etc/fleetfed", "-name", "*key*", "-type", "f").split()
    assert paths
    for path in paths:
        encoded = composed.inside(service, "base64", "-w0", path)
        data = base64.b64decode(encoded)
        if data.startswith(b"-----BEGIN"):
            found |= {line for line in data.decode().splitlines() if not line.startswith("-----")}
        else:
            found |= {encoded, base64.urlsafe_b64encode(data).decode(), data.hex()}
    return found


def test_a_secret_is_mounted_in_its_owners_container_alone(composed: Composed) -> None:
    users: dict[str, list[str]] = {}
    for service in composed.services():
        for mount in composed.inspect(service)["Mounts"]:
            if mount["Type"] == "volume" and not mount["Name"].endswith("-state"):
                users.setdefault(mount["Name"], []).append(service)
                assert not mount["RW"] or service in {"keys", "operator", "postgres", "prometheus"}, (service, mount)
    assert all(len([each for each in services if each != "keys"]) <= 1 for services in users.values()), users
    modes = composed.inside(
        "north-gateway", "sh", "-c", "find /etc/fleetfed/identity -type f -printf '%m\\n' | sort -u"
    )
    assert modes.split() == ["600"]


def test_the_device_has_nothing_of_the_operators(composed: Composed) -> None:
    names = composed.inside(
        "north-device-1", "sh", "-c", "ls /opt/fleetfed/lib/python3*/site-packages/fleetfed"
    ).split()
    assert sorted(name for name in names if not name.startswith("_")) == ["device", "shared"]
    commands = composed.inside("north-device-1", "sh", "-c", "ls /opt/fleetfed/bin/fleetfed*").split()
    assert commands == ["/opt/fleetfed/bin/fleetfed-device"]
    modules = "cryptography", "sqlalchemy", "click", "pip"
    code = f"import importlib.util as u; print([m for m in {modules!r} if u.find_spec(m)])"
    assert composed.inside("north-device-1", "/opt/fleetfed/bin/python3", "-c", code).strip() == "[]"


def test_a_gateway_reaches_its_own_broker_and_no_other(composed: Composed) -> None:
    addresses = [
        network["IPAddress"]
        for service in ("cloud-broker", "south-broker", "postgres")
        for network in composed.inspect(service)["NetworkSettings"]["Networks"].values()
    ]
    assert len(addresses) >= 6
    assert reaches(composed, "broker", 8883)
    for other in ("cloud-broker", "south-broker", "postgres", *addresses):
        assert not reaches(composed, other, 8883)
        assert not reaches(composed, other, 5432)


def reaches(composed: Composed, host: str, port: int) -> bool:
    """Whether the northern gateway's container can connect to an address."""
    code = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)
except OSError as error:
    print("no:", error)
else:
    print("yes")
"""
    answer = composed.inside("north-gateway", "python3", "-c", code, host, str(port))
    assert answer.startswith(("yes", "no:"))
    return answer.startswith("yes")
