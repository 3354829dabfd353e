"""The fleet of docker-compose.yml, for tests that need a container engine."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
CONTAINERS = ROOT / "tests" / "containers"
PROJECT = "fleetfed-test"
DEVICES = tuple(f"{site}-device-{number}" for site in ("north", "south") for number in (1, 2, 3))
NORTH = DEVICES[:3]


def run(*command: str, check: bool = True, timeout: float = 120, environment: dict[str, str] | None = None) -> str:
    """A command's output; both streams if it may fail, and a failure that may not be shows them."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} exits {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + ("" if check else done.stderr)


@functools.cache
def compose_command() -> tuple[str, ...]:
    """Compose v2, a plugin of docker, or else v1, a program of its own; empty if there is neither."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else ()


def no_engine() -> str:
    """Why containers cannot be run here; empty if they can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if not compose_command():
        return "neither Compose v2 nor docker-compose is installed"
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "the container engine does not answer"
    return "" if done.returncode == 0 else "no container engine is running"


class Composed:
    """Six devices at two sites, and their cloud; what is done to them and what they say of it."""

    def __init__(self) -> None:
        self.began = 0.0
        self._ids: dict[str, str] = {}

    def compose(self, *arguments: str, timeout: float = 300) -> str:
        files = ("-f", "docker-compose.yml", "-f", str(CONTAINERS / "override.yml"))
        settings = {"BASE_IMAGE": "fleetfed-test/base", "PROMETHEUS_PORT": "19090"}
        return run(
            *compose_command(),
            "-p",
            PROJECT,
            *files,
            "--profile",
            "demo",
            *arguments,
            timeout=timeout,
            environment=settings,
        )

    def container(self, service: str) -> str:
        if service not in self._ids:
            labels = f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}"
            (self._ids[service],) = run("docker", "ps", "-aq", "--filter", labels[0], "--filter", labels[1]).split()
        return self._ids[service]

    def inside(self, service: str, *command: str, check: bool = True) -> str:
        return run("docker", "exec", self.container(service), *command, check=check)

    def inspect(self, service: str) -> dict[str, Any]:
        (answer,) = json.loads(run("docker", "inspect", self.container(service)))
        return dict(answer)

    def operator(self, *command: str) -> Any:
        """The answer to ``fleetfed …`` of the operator."""
        return json.loads(self.inside("operator", "fleetfed", *command, "--json"))

    def round(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.operator("round", "status")
        return answer

    def history(self, number: int) -> dict[str, Any] | None:
        """What became of a round; None until it is over."""
        return next((dict(row) for row in self.round()["history"] if row["round"] == number), None)

    def device(self, name: str) -> dict[str, Any]:
        command = ("fleetfed-device", "status", "--config", "/etc/fleetfed/device.toml", "--json")
        answer: dict[str, Any] = json.loads(self.inside(name, *command))
        return answer

    def accepted(self, name: str) -> set[int]:
        """Rounds for which a device holds a receipt of acceptance."""
        return {row["round"] for row in self.device(name)["rounds"] if row["outcome"] == "accepted"}

    def counted(self) -> dict[str, int]:
        """How often each device's update is part of a version, as the coordinator's database has it."""
        query = "select id, contributions from devices"
        rows = self.inside("postgres", "psql", "-U", "fleetfed", "-d", "fleetfed", "-AtF", " ", "-c", query)
        return {name: int(count) for name, count in (line.split() for line in rows.splitlines())}

    def newest(self) -> str:
        """SHA-256 of the newest version, as the coordinator has it."""
        return str(self.operator("model", "show")["sha256"])

    def held(self, name: str) -> str:
        """SHA-256 of the file on a device's disk that it calls its current version."""
        path = f"/var/lib/fleetfed/models/{self.device(name)['model_sha256']}.tflite"
        return self.inside(name, "sha256sum", path, check=False).split()[0]

    def pause(self) -> None:
        """Let the open round end, and no further one begin."""
        self.operator("round", "pause")
        self.until("no open round", lambda: self.round()["state"] == "paused", 180)

    def open_round(self) -> int:
        """Open a round with no device of the north awake, after a pause; return its number when the site has it."""
        number = int(self.round()["round"]) + 1
        run("docker", "pause", *map(self.container, NORTH))
        self.operator("round", "resume")
        self.until("the plan at the site", lambda: f"round {number} opens" in self.log("north-gateway"))
        return number

    def wake(self, *names: str) -> None:
        run("docker", "unpause", *map(self.container, names))

    def health(self, service: str) -> str:
        return str(self.inspect(service)["State"].get("Health", {}).get("Status", "none"))

    def services(self) -> list[str]:
        """Those that have a container."""
        form = '{{.Label "com.docker.compose.service"}}'
        label = f"label=com.docker.compose.project={PROJECT}"
        return sorted(run("docker", "ps", "-a", "--filter", label, "--format", form).split())

    def awaited(self) -> dict[int, set[str]]:
        """The sites that each round waited for from its beginning."""
        found = re.findall(r"round (\d+): opened, waiting for (.*)", self.log("coordinator"))
        return {int(number): {gateway.removeprefix("g-") for gateway in names.split(", ")} for number, names in found}

    def cut(self, site: str) -> None:
        """Take a site's uplink away: packets are lost, nothing is closed."""
        run("docker", "network", "disconnect", f"{PROJECT}_{site}-uplink", self.container(f"{site}-broker"))

    def mend(self, site: str) -> None:
        run("docker", "network", "connect", f"{PROJECT}_{site}-uplink", self.container(f"{site}-broker"))

    def kill(self, service: str) -> None:
        """Kill a container's processes without a word, and start it again."""
        run("docker", "kill", "--signal", "KILL", self.container(service))
        run("docker", "start", self.container(service))

    def log(self, service: str) -> str:
        return run("docker", "logs", self.container(service), check=False)

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 60.0) -> float:
        """Wait for what other processes do; return the seconds that it took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                logs = "\n".join(f"--- {each}\n{self.log(each)[-2000:]}" for each in ("coordinator", "north-gateway"))
                pytest.fail(f"{what}: not within {seconds:.0f} s\n{logs}")
            time.sleep(0.2)
        return time.monotonic() - began
