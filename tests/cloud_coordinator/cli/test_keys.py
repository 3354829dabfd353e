"""`fleetfed keys` and `broker render` as a person calls them: output, exit codes, files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from fleetfed.broker.config import load_config
from fleetfed.cloud_coordinator.cli.app import run
from fleetfed.cloud_coordinator.control import delivery
from fleetfed.cloud_coordinator.control.client import ControlClient
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    directory = tmp_path / "keys"
    assert run(["keys", "init", "--fleet", "demo", "--dir", str(directory)]) == 0
    capsys.readouterr()
    return directory


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_init_makes_a_coordinator_and_an_operator(keys: Path) -> None:
    for name, role in (("coordinator", Role.COORDINATOR), ("operator", Role.OPERATOR)):
        assert Identity.load(keys / "identities" / name, role=role).certificate.fleet == "demo"


def test_init_twice_is_a_mistake_with_its_own_exit_code(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(capsys, "keys", "init", "--fleet", "demo", "--dir", keys)
    assert (code, answer["error"]) == (2, "config")
    assert "never overwritten" in answer["detail"]


def test_many_are_issued_at_once(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(
        capsys, "keys", "issue", "d", "--role", "device", "--site", "north", "--count", 12, "--dir", keys
    )
    assert code == 0
    assert [member["id"] for member in answer["members"]] == [f"d-{n:02d}" for n in range(1, 13)]
    assert all(Identity.load(Path(member["folder"]), role=Role.DEVICE) for member in answer["members"])


def test_a_csv_names_them_with_the_options_as_defaults(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text("id,role,site,owner,days\ng-north,gateway,north,,\nd-1,,north,ward-3,30\nd-2,,north,,\n")
    code, answer = call(capsys, "keys", "issue", "--csv", table, "--role", "device", "--dir", keys)
    assert code == 0
    rows = {row["id"]: row for row in answer["members"]}
    assert (rows["g-north"]["role"], rows["d-1"]["role"], rows["d-1"]["owner"]) == ("gateway", "device", "ward-3")
    assert rows["d-1"]["not_after"] - rows["d-1"]["not_before"] == 30 * 86_400_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,color\nd-1,red\n", "must name columns"),
        ("id,role\nd-1\n", "not as many values"),
        ("id,role\nd-1,robot\n", "none of"),
        ("id,role,days\nd-1,device,soon\n", "no number"),
        ("id,role\n", "no members"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text(text)
    code, answer = call(capsys, "keys", "issue", "--csv", table, "--site", "north", "--dir", keys)
    assert code == 2
    assert words in answer["detail"]
    assert str(table) in answer["detail"]


def test_revoking_without_a_coordinator_says_how_the_list_is_delivered(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["keys", "issue", "d-1", "--role", "device", "--site", "north", "--dir", str(keys)])
    capsys.readouterr()
    code, answer = call(capsys, "keys", "revoke", "d-1", "--dir", keys)
    assert (code, answer["delivered"]) == (0, False)
    assert "keys revoke --config" in answer["detail"]
    assert Path(answer["list"]).exists()
    assert Path(answer["crl"]).exists()
    code, answer = call(capsys, "keys", "list", "--role", "device", "--dir", keys)
    assert answer["members"][0]["revoked"] > 0


def test_revoking_keeps_the_list_when_nobody_listens(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "ControlClient", functools.partial(ControlClient, timeout=0.1))
    run(["keys", "issue", "d-1", "--role", "device", "--site", "north", "--dir", str(keys)])
    config = tmp_path / "operator.toml"
    config.write_text(f'identity = "{keys}/identities/operator"\n[broker]\nhost = "127.0.0.1"\nport = 1\ntls = true\n')
    capsys.readouterr()
    code, answer = call(capsys, "keys", "revoke", "nobody", "--dir", keys, "--config", config)
    assert (code, answer["error"]) == (2, "config")
    assert not (keys / "revocations.bin").exists()
    code, answer = call(capsys, "keys", "revoke", "d-1", "--dir", keys, "--config", config)
    assert (code, answer["delivered"]) == (0, False)
    assert "fleetfed keys revoke --config operator.toml" in answer["detail"]
    assert [row["id"] for row in answer["revoked"]] == ["d-1"]
    assert (keys / "revocations.bin").read_bytes() == Keyring.load(keys).revocations()


def test_people_get_tables(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "list", "--dir", str(keys)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("coordinator" in line and "_" in line for line in lines)


def test_usage_errors_have_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "issue"]) == 2
    assert "give either an ID or --csv" in capsys.readouterr().err
    code, answer = call(capsys, "keys", "issue")
    assert (code, answer["error"]) == (2, "usage")


def test_render_writes_what_a_broker_reads(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["keys", "issue", "broker", "--role", "broker", "--host", "localhost", "--dir", str(keys)])
    run(["keys", "issue", "g-north", "--role", "gateway", "--site", "north", "--dir", str(keys)])
    capsys.readouterr()
    out = tmp_path / "out"
    identity = keys / "identities" / "broker"
    code, answer = call(capsys, "broker", "render", "--keys", keys, "--identity", identity, "--out", out)
    assert code == 0
    assert {Path(path).name for path in answer["files"]} == {"acl", "mosquitto.conf"}
    assert "user g-north" in (out / "acl").read_text()
    assert str(identity / "tls" / "crl.pem") in (out / "mosquitto.conf").read_text()
    code, answer = call(
        capsys, "broker", "render", "--keys", keys, "--identity", keys / "identities" / "operator", "--out", out
    )
    assert (code, answer["error"]) == (2, "config")
    rabbitmq = ["definitions/1-topics.json", "definitions/2-access.json"]
    for engine, files in (("rabbitmq", rabbitmq), ("nats", ["users.conf"])):
        code, answer = call(capsys, "broker", "render", "--for", engine, "--keys", keys, "--out", out)
        assert (code, answer["files"]) == (0, [str(out / file) for file in files])
        assert all("g-north" in (out / file).read_text() for file in files)
    code, answer = call(capsys, "broker", "render", "--for", "nats", "--keys", keys, "--identity", keys, "--out", out)
    assert (code, answer["error"]) == (2, "usage")


def test_a_fresh_coordinator_file_is_valid(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = keys.parent / "coordinator.toml"
    code, answer = call(capsys, "coordinator", "init", "--config", config)
    assert code == 0
    assert {Path(path).name for path in answer["files"]} == {"coordinator.toml", "operator.toml"}
    code, answer = call(capsys, "coordinator", "init", "--config", config)
    assert (code, answer["error"]) == (1, "failed")


def test_a_wrong_broker_file_is_a_configuration_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "broker.toml"
    config.write_text('prot = 1\nhost = "127.0.0.1"\n')
    assert run(["broker", "run", "--config", str(config)]) == 2
    assert "prot" in capsys.readouterr().err
    config.write_text('host = "127.0.0.1"\n')
    assert load_config(config).host == "127.0.0.1"
