from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.lone_gateway import Authority, manifest_of, plan_for, write_settings

from fleetfed.cloud_coordinator import zoo
from fleetfed.device import cli, config
from fleetfed.device.config import StopAs
from fleetfed.device.store import Store
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Manifest

FORBIDDEN = (
    "tensorflow",
    "keras",
    "sqlalchemy",
    "click",
    "rich",
    "cryptography",
    "aiomqtt",
    "asyncio",
    "fleetfed.cloud_coordinator",
    "fleetfed.gateway",
    "fleetfed.broker",
)
"""What no device needs."""
NOT_IN_PLAIN_ROUNDS = (
    "difflib",
    "email",
    "http",
    "tuf",
    "securesystemslib",
    "fleetfed.device.check",
    "fleetfed.device.enroll",
    "fleetfed.device.csr",
    "fleetfed.shared.privacy",
    "fleetfed.shared.secure",
    "fleetfed.shared.wire.enrolment",
)
"""What a device does not need for plain rounds, with an identity that was issued to it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A device that is set up, without TLS."""
    broker = ConnectionConfig(host="127.0.0.1", port=1, client_id="d-1", tls=None)
    write_settings(tmp_path, Authority().member(Role.DEVICE, "d-1"), broker, '[data]\npath = "data.npz"')
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", x=rng.random((50, 8, 8, 1), dtype=np.float32), y=rng.integers(0, 10, 50))
    return tmp_path


def install_model(folder: Path) -> tuple[Manifest, ModelCard]:
    import hashlib

    model = zoo.load("digits", seed=1)
    store = Store(folder / "state")
    manifest, blobs = manifest_of(model.data, model.card, version=3, sha256=hashlib.sha256(model.data).digest())
    for blob in blobs:
        for index in range(len(blob.ref.parts) // 16):
            store.store_chunk(blob.ref, index * blob.ref.chunk, blob.chunk(index))
    store.install_card(manifest.card)
    store.install_full((), manifest)
    store.close()
    return manifest, model.card


def run(*arguments: Any) -> int:
    return cli.main([str(each) for each in arguments])


@pytest.fixture(autouse=True)
def path_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_check_before_the_first_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--config", folder / "device.toml") == 0
    said = capsys.readouterr().out
    assert "d-1 of site north, fleet demo" in said
    assert "40 training and 10 holdout examples of shape (8, 8, 1)" in said
    assert "none yet" in said


def test_check_trains_one_step_and_says_what_it_would_send(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_model(folder)
    assert run("check", "--config", folder / "device.toml") == 0
    said = capsys.readouterr().out
    assert "digits version 3" in said
    assert "1 step on 16 examples" in said
    assert "at 4 bits (24360 as float32), weight 40" in said
    assert "masked     12" in said
    assert "privacy    no round with differential privacy yet" in said
    store = Store(folder / "state")
    assert store.facts().answer is None
    store.close()


def test_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "--config", folder / "device.toml") == 2
    assert "has the device run?" in capsys.readouterr().err
    status = {
        "id": "d-1",
        "software": "x 1",
        "pid": 7,
        "state": "idle",
        "model_version": 3,
        "model_sha256": "ab" * 32,
        "wire": {"sent": 1, "received": 2},
        "rss_mb_max": 60.5,
        "rejected": {"late": 2},
        "rounds": [
            {
                "round": 4,
                "train_started": 1000,
                "train_ended": 2500,
                "update_bytes": 99,
                "steps": 5,
                "loss": 0.5,
                "outcome": "accepted",
            },
            {
                "round": 5,
                "train_started": 0,
                "train_ended": 0,
                "update_bytes": 0,
                "steps": 0,
                "loss": 0.0,
                "outcome": "declined:policy",
                "detail": "below_policy: mode plain is not allowed",
            },
        ],
        "privacy": {"participations": 3, "most": 50, "left": 47, "last_round": 4},
    }
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "status.json").write_text(json.dumps(status))
    assert run("status", "--config", folder / "device.toml") == 0
    said = capsys.readouterr().out
    assert "round 4     accepted, 5 steps in 1.5 s, loss 0.5000, 99 bytes" in said
    assert "late 2" in said
    assert "privacy    3 of 50 participations, 47 left; the last in round 4" in said
    assert "declined:policy" in said
    assert "below_policy: mode plain is not allowed" in said
    assert run("status", "--config", folder / "device.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == status
    (folder / "state" / "status.json").write_text("{")
    assert run("status", "--config", folder / "device.toml") == 3


def _edit(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _append(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "device.toml"
        path.write_text(path.read_text() + text)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "device.toml").unlink(), "No such file"),
        (_append("keepalive = 0\n"), "broker.keepalive: 0 is not between 1 and 300"),
        (_append("keepalife = 9\n"), "did you mean 'keepalive'?"),
        (_append('[run]\nstop_as = "gone"\n'), "run.stop_as: 'gone' is none of: sleeping, disconnected"),
        (lambda folder: (folder / "identity" / "certificate.bin").write_bytes(b"x"), "bad_certificate"),
        (lambda folder: (folder / "identity" / "signing.key").unlink(), "fleetfed keys issue"),
        (lambda folder: (folder / "identity" / "signing.key").chmod(0o644), "chmod 600"),
        (lambda folder: (folder / "data.npz").unlink(), "data.npz: No such file"),
        (_edit("data.npz", "text"), "not a readable .npz"),
    ],
)
def test_settings_that_are_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], says: str
) -> None:
    change(folder)
    assert run("check", "--config", folder / "device.toml") == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_an_identity_of_another_role_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Authority().member(Role.GATEWAY, "g-1").save(folder / "identity")
    assert run("run", "--config", folder / "device.toml") == 2
    assert "this program needs device" in capsys.readouterr().err


def test_tls_is_off_only_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('identity = "i"\nstate = "s"\n[broker]\nhost = "broker.example.org"\ntls = false\n')
    with pytest.raises(ConfigError, match="only for a broker on this machine"):
        config.load(path)


def test_settings_have_documented_defaults(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('identity = "i"\nstate = "s"\n[broker]\nhost = "broker.example.org"\n')
    settings = config.load(path)
    connection = settings.broker.connection(client_id="d-1", identity=settings.identity)
    assert connection.keepalive == 60
    assert connection.port == 8883
    assert connection.tls is not None
    assert connection.tls.cert == tmp_path / "i" / "tls" / "cert.pem"
    assert settings.run.stop_as is StopAs.SLEEPING
    assert settings.data.holdout == 0.2


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["status"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*command, "--help")
    assert caught.value.code == 0
    assert "example:" in capsys.readouterr().out


WHOLE_RUN = """
import sys, threading
from fleetfed.device import cli
assert not any(name == "numpy" for name in sys.modules), "numpy before the allocator was set up"
from fleetfed.device import memory
memory.settle_in()  # as `run` does before it imports the rest
from fleetfed.device.runtime import DeviceRuntime
stop = DeviceRuntime.run
def run(self):
    threading.Timer(0.2, self.request_stop).start()
    stop(self)
DeviceRuntime.run = run
for command in {commands!r}:
    assert cli.main([command, "--config", {settings!r}]) == 0
{work}
bad = [name for name in sys.modules if any(name == f or name.startswith(f + ".") for f in {forbidden!r})]
assert not bad, bad
"""


def whole_run(folder: Path, *commands: str, forbidden: tuple[str, ...], work: str) -> None:
    settings = str(folder / "device.toml")
    script = WHOLE_RUN.format(commands=commands, settings=settings, forbidden=forbidden, work=work)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr


def test_a_device_imports_nothing_that_only_others_need(folder: Path) -> None:
    """A whole run: start, train on a model that is there, stop; then look at what was imported."""
    install_model(folder)
    runtime = "assert 'ai_edge_litert' in sys.modules or 'tflite_runtime' in sys.modules"
    whole_run(folder, "check", "run", forbidden=FORBIDDEN, work=runtime)


def test_a_device_in_plain_rounds_carries_nothing_of_the_others(folder: Path) -> None:
    """Start with a model, find no broker, stop; make what a plain round asks for."""
    manifest, card = install_model(folder)
    work = f"""
import numpy as np
from fleetfed.device import update
from fleetfed.device.trainer import Trained
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Plan
plan = codec.decode(Plan, {codec.encode(plan_for(card, manifest))!r}, limit=1 << 20)
card = ModelCard.decode({card.encode()!r})
delta = np.full(card.parameters, 0.01, dtype=np.float32)
trained = Trained(delta=delta, examples=10, seen=10, steps=1, training_loss=0.5)
update.check_plan(plan, card)
prepared = update.prepare(trained, plan, card, rng=np.random.default_rng(1), residual=None)
assert prepared.body
"""
    whole_run(folder, "run", forbidden=NOT_IN_PLAIN_ROUNDS, work=work)


def test_a_module_that_was_put_off_comes_when_it_is_used() -> None:
    script = """
import sys
from fleetfed.device import memory
memory.settle_in()
import urllib.request
from paho.mqtt import client
assert "http.client" not in sys.modules
assert isinstance(client.urllib.request.getproxies(), dict)
assert "http.client" in sys.modules
assert sys.modules["urllib.request"] is urllib.request
assert urllib.request.__file__
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_settings_say_the_defaults(tmp_path: Path) -> None:
    """As they stand, and with every commented default switched on, they mean the same."""
    text = (Path(__file__).parents[2] / "examples" / "device.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("# function")]
    verbose = [
        line[2:] if line.startswith("# ") and " = " in line and not line.startswith("# Every") else line
        for line in lines
    ]
    (tmp_path / "plain.toml").write_text(text)
    (tmp_path / "verbose.toml").write_text("\n".join(verbose))
    plain, full = config.load(tmp_path / "plain.toml"), config.load(tmp_path / "verbose.toml")
    identity = plain.identity
    assert (plain.data, plain.run, plain.labels) == (full.data, full.run, full.labels)
    assert plain.broker.connection(client_id="d", identity=identity) == full.broker.connection(
        client_id="d", identity=identity
    )
    assert len(verbose) - sum(line.startswith("#") for line in verbose) > 30
