"""Real fleets of real processes: small ones by default, one of the size that the README shows when asked for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator.control.client import OperatorConfig
from fleetfed.cloud_coordinator.control.model_client import fetch_model

pytest.importorskip("ai_edge_litert", reason="devices train in LiteRT")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def demo(directory: Path, *arguments: str) -> tuple[str, ...]:
    return (
        sys.executable,
        "-P",
        "-m",
        "fleetfed.cloud_coordinator",
        "demo",
        "--dir",
        str(directory),
        *arguments,
    )


def run(directory: Path, *arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        demo(directory, "--json", *arguments), capture_output=True, text=True, timeout=4 * PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def survivors(directory: Path) -> list[str]:
    """Command lines of processes that still use the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in command and int(path.parent.name) != os.getpid():
            found.append(command)
    return found


def test_a_small_fleet_learns_and_ends_on_one_file(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    report = run(directory, "--devices", "3", "--gateways", "1", "--rounds", "2")
    assert report["rounds"] == 2
    assert report["final_accuracy"] > 0.5
    assert set(report["device_model_sha256"].values()) == {report["model_sha256"]}
    # Masked words do not compress: two bytes for each parameter, less once four bits are enough.
    assert 0 < report["update_bytes_mean"] < 4 * report["parameters"] / 2
    assert report["privacy"] == "split"
    assert "sums of 3 devices" in report["who_learned_what"]
    assert 0 < report["wire_bytes_up"] < report["wire_bytes_down"]
    assert 0 < report["overhead_seconds_per_round_median"] < report["seconds_per_round_median"]
    assert report["tls"]
    assert json.loads((directory / "report.json").read_text()) == report
    assert (directory / "accuracy.png").stat().st_size > 1000
    assert not survivors(directory)
    # The hash is that of the file itself, not only what the device says.
    for name in report["device_model_sha256"]:
        files = [path for path in (directory / name / "state").rglob("*") if path.is_file()]
        assert report["model_sha256"] in {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_taller_tree_over_mosquitto(tmp_path: Path) -> None:
    from fleetfed.broker.mosquitto import find_mosquitto

    if find_mosquitto() is None:
        pytest.skip("the mosquitto binary is not installed")
    report = run(
        tmp_path / "run",
        *("--devices", "4", "--gateways", "2", "--tiers", "2", "--rounds", "3", "--broker", "mosquitto"),
    )
    assert (report["gateways"], report["tiers"], report["rounds"]) == (3, 2, 3)


@pytest.mark.slow
def test_the_default_demo_reaches_its_figures(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    assert max(report["accuracy_by_round"]) >= 0.93
    assert report["rounds"] <= 20
    assert report["seconds"] <= 90
    assert set(report["device_model_sha256"].values()) == {report["model_sha256"]}


class Kept:
    """A demo that goes on running."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            demo(directory, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return
        assert self.process.stderr is not None
        pytest.fail(f"{words!r} never came: {self.process.stderr.read()}")

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@pytest.mark.slow
def test_an_interrupt_stops_everything(tmp_path: Path) -> None:
    fleet = Kept(tmp_path / "run", "--devices", "2", "--gateways", "1", "--rounds", "1000")
    fleet.wait_for("accuracy")
    fleet.process.send_signal(signal.SIGINT)
    code, errors = fleet.end()
    assert code == 130
    assert "interrupted" in errors
    assert not survivors(fleet.directory)


@pytest.mark.slow
def test_a_dead_process_is_named(tmp_path: Path) -> None:
    fleet = Kept(tmp_path / "run", "--devices", "2", "--gateways", "1", "--rounds", "1000")
    fleet.wait_for("accuracy")
    status = json.loads((fleet.directory / "d-02" / "state" / "status.json").read_text())
    os.kill(status["pid"], signal.SIGKILL)
    code, errors = fleet.end()
    assert code == 1
    assert "d-02 ended (SIGKILL)" in errors
    assert "the end of" in errors
    assert not survivors(fleet.directory)


@pytest.mark.slow
def test_a_kept_fleet_answers_the_command_line(tmp_path: Path) -> None:
    fleet = Kept(tmp_path / "run", "--devices", "2", "--gateways", "1", "--rounds", "2", "--keep")
    fleet.wait_for("goes on running")
    config = fleet.directory / "operator.toml"

    def call(*arguments: str, as_json: bool = True) -> tuple[int, Any]:
        options = ("-c", str(config), "--json") if as_json else ("-c", str(config))
        result = subprocess.run(
            (sys.executable, "-P", "-m", "fleetfed.cloud_coordinator", *arguments, *options),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return result.returncode, json.loads(result.stdout) if as_json else result.stdout

    code, status = call("round", "status")
    assert (code, status["state"], status["made"]) == (0, "finished", 2)
    code, watched = call("round", "watch", "--until-idle", as_json=False)
    assert (code, watched.split(":")[0]) == (0, "finished")
    code, versions = call("model", "list")
    assert [row["version"] for row in versions["versions"]] == [3, 2, 1]
    code, listed = call("fleet", "list")
    assert [(row["id"], row["ready"]) for row in listed["gateways"]] == [("g-north", 2)]
    code, shown = call("fleet", "show", "d-01")
    assert (code, shown["contributions"]) == (0, 2)
    fetched = asyncio.run(fetch_model(OperatorConfig.load(config), timeout=30))
    assert hashlib.sha256(fetched.data).hexdigest() == versions["versions"][0]["sha256"]
    out = tmp_path / "out.tflite"
    assert call("model", "export", "--out", str(out))[0] == 0
    assert out.read_bytes() == fetched.data
    assert call("model", "rollback", "2")[1]["version"] == 4
    code, refused = call("model", "show", "99")
    assert (code, refused["error"]) == (5, "no_such_version")
    example = Path(__file__).parents[3] / "examples" / "control.py"
    port = str(OperatorConfig.load(config).broker.port)
    identity = fleet.directory / "keys" / "identities" / "operator"
    asked = subprocess.run(
        (sys.executable, str(example), str(identity), "127.0.0.1", port),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert json.loads(asked.stdout)["version"] == 4
    revoke = ("keys", "revoke", "d-01", "--dir", str(fleet.directory / "keys"))
    assert call(*revoke)[1]["delivered"]
    # It stays connected, counts no more for `start_when` and is not waited for; of one device there is no masked sum.
    alone = ("--mode", "plain", "--set", "start_when=1")
    assert call("round", "start", "--rounds", "1", "--deadline", "60", *alone)[0] == 0
    deadline = time.monotonic() + PATIENCE
    while (status := call("round", "status")[1])["made"] < 1 or status["state"] != "finished":
        assert time.monotonic() < deadline, status
    last = status["history"][-1]
    assert (last["outcome"], last["contributors"]) == ("committed", 1)
    assert last["seconds"] < 60
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.end()[0] == 0
    assert not survivors(fleet.directory)
