"""The owners' commands as people call them: output, exit codes, files, and an offline round trip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleetfed.cloud_coordinator.cli.app import run
from fleetfed.cloud_coordinator.keys.owners import Owners
from fleetfed.shared.trust import files
from fleetfed.shared.wire.messages import Mode


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet") / "keys"
    assert run(["keys", "init", "--fleet", "demo", "--dir", str(directory), "--root-keys", "1/2"]) == 0
    return directory


@pytest.fixture
def keys(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    capsys.readouterr()
    return Path(shutil.copytree(made, tmp_path / "keys"))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def vault(keys: Path) -> Path:
    folder = keys.parent / "vault"
    (keys / "trust" / "offline").rename(folder)
    return folder


def test_init_says_which_keys_to_move_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(capsys, "keys", "init", "--fleet", "demo", "--dir", tmp_path / "keys", "--targets-keys", "3/4")
    assert code == 0
    assert [Path(each).stem for each in answer["offline_keys"]] == [
        *(f"root-{number}" for number in (1, 2, 3)),
        *(f"targets-{number}" for number in (1, 2, 3, 4)),
    ]
    assert Owners(tmp_path / "keys" / "trust").root.signed.roles["targets"].threshold == 3


@pytest.mark.parametrize("threshold", ["3/2", "0/1", "two", "2/", "9/99"])
def test_a_threshold_that_cannot_be_met(tmp_path: Path, threshold: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "init", "--fleet", "demo", "--dir", str(tmp_path / "k"), "--root-keys", threshold]) == 2
    assert "2/3" in capsys.readouterr().err
    assert not (tmp_path / "k").exists()


def test_a_policy_goes_round_over_machines(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away = vault(keys)
    assert run(["keys", "policy", "show", "--dir", str(keys)]) == 0
    file, request = tmp_path / "policy.toml", tmp_path / "next.json"
    file.write_text(capsys.readouterr().out.replace('modes = ["plain", "split"]', 'modes = ["split"]'))
    code, answer = call(capsys, "keys", "policy", "set", file, "--card", "ab" * 32, "--model", "cd" * 32, "--dir", keys)
    assert (code, answer["in_force"], answer["missing"][0]["needs"]) == (0, False, 2)
    assert call(capsys, "keys", "status", "--dir", keys)[0] == 1, "somebody has to sign"
    assert call(capsys, "keys", "sign", "--export", request, "--dir", keys)[0] == 0
    for name in ("targets-1", "targets-2"):
        code, answer = call(capsys, "keys", "sign", "--file", request, "--key", away / f"{name}.key")
        assert code == 0
        assert 'modes = ["split"]' in answer["policy"]
    code, answer = call(capsys, "keys", "sign", "--import", request, "--dir", keys)
    assert (code, answer["in_force"]) == (0, True)
    policy = Owners(keys / "trust").policy
    assert (policy.version, policy.modes, policy.cards) == (2, (Mode.SPLIT,), (b"\xab" * 32,))
    assert policy.models == (b"\xcd" * 32,)
    # Whoever is enrolled from now on begins with it.
    bundle = (keys / "identities" / "operator" / "trust" / "bundle.bin").read_bytes()
    assert files.render_policy(policy).encode() in bundle
    assert call(capsys, "keys", "status", "--dir", keys)[0] == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("minimum_cohort = 0\n", "minimum_cohort"),
        ("minimum_cohorts = 2\n", "did you mean"),
        ('cards = ["xyz"]\n', "cards"),
        ("models = 3\n", "--model"),
        ("= 3", "policy.toml"),
    ],
)
def test_a_policy_that_nobody_could_mean(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    code, answer = call(capsys, "keys", "policy", "set", file, "--dir", keys)
    assert (code, answer["error"]) == (2, "config")
    assert told in answer["detail"]


def test_the_policy_in_force_is_not_signed_again(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["keys", "policy", "show", "--dir", str(keys)])
    file = tmp_path / "policy.toml"
    file.write_text(capsys.readouterr().out)
    assert "already" in call(capsys, "keys", "policy", "set", file, "--dir", keys)[1]["detail"]


def test_renewing_and_rotating_make_roots_that_say_so(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "keys", "renew", "targets", "--days", 10, "--dir", keys)[1]["in_force"]
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    assert (code, answer["soon"]) == (1, True), "ten days are soon"
    assert call(capsys, "keys", "renew", "targets", "--dir", keys)[1]["in_force"]
    assert call(capsys, "keys", "renew", "root", "--dir", keys)[1]["in_force"]
    code, answer = call(capsys, "keys", "rotate", "root", "--replace", "root-2", "--dir", keys)
    assert answer["new_keys"].endswith("root-2.3.key")
    code, answer = call(capsys, "keys", "rotate", "timestamp", "--dir", keys)
    assert answer["in_force"]
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    (root,) = [row for row in answer["roles"] if row["role"] == "root"]
    assert (code, root["version"], root["keys"]) == (0, 4, ["root-1", "root-2.3"])
    # The coordinator's folder has the new key beside the old one, until the coordinator has taken the new root.
    trust = keys / "identities" / "coordinator" / "trust"
    assert sorted(path.name for path in trust.glob("*.key")) == ["snapshot.key", "timestamp.4.key", "timestamp.key"]


def test_brokers_lists_that_end_soon_are_told_until_they_are_written_again(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "keys", "crl", "--days", 20, "--dir", keys)[0] == 0
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    told = {row["role"]: row["warning"] for row in answer["roles"] if row["warning"]}
    assert (code, answer["soon"]) == (1, True)
    assert told == dict.fromkeys(("crl-site", "crl-cloud"), "fleetfed keys crl, then bring it to the brokers")
    assert call(capsys, "keys", "crl", "--dir", keys)[0] == 0
    assert call(capsys, "keys", "status", "--dir", keys)[0] == 0


@pytest.mark.parametrize("content", [None, b"", b"-----END X509 CRL-----"])
def test_a_brokers_list_that_cannot_be_read_is_named(
    keys: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = keys / "tls" / "crl-site.pem"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    assert code == 3
    assert "crl-site.pem" in answer["detail"]
    assert "fleetfed keys crl" in answer["detail"]


def test_what_cannot_be_replaced_is_named(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(capsys, "keys", "rotate", "targets", "--replace", "nobody", "--dir", keys)
    assert code == 2
    assert "targets-1" in answer["detail"]
    assert run(["keys", "sign", "--discard", "--export", "x", "--dir", str(keys)]) == 2
    assert run(["keys", "sign", "--export", str(keys / "x"), "--dir", str(keys)]) == 2
    assert "nothing waits" in capsys.readouterr().err


def test_what_waits_can_be_thrown_away(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault(keys)
    call(capsys, "keys", "renew", "targets", "--dir", keys)
    assert call(capsys, "keys", "sign", "--discard", "--dir", keys)[0] == 0
    assert call(capsys, "keys", "status", "--dir", keys)[0] == 0


def test_a_second_coordinator_waits_for_the_owners(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away = vault(keys)
    code, answer = call(capsys, "keys", "issue", "c-2", "--role", "coordinator", "--dir", keys)
    assert (code, answer["missing"][0]["role"]) == (0, "targets")
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    assert code == 1
    code, answer = call(
        capsys, "keys", "sign", "--key", away / "targets-1.key", "--key", away / "targets-3.key", "--dir", keys
    )
    assert answer["in_force"]
    code, answer = call(capsys, "keys", "status", "--dir", keys)
    listed = [row["keys"] for row in answer["roles"] if row["role"] == "coordinator"]
    assert (code, listed) == (0, [["coordinator"], ["c-2"]])


def test_the_table_shows_every_role(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "status", "--dir", str(keys)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("root-1, root-2", "1 of 2", "targets-3", "2 of 3", "coordinator", "move each"))


def test_a_bundle_can_be_carried_as_a_file(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "keys", "publish", "--file", tmp_path / "bundle.bin", "--dir", keys)[0] == 0
    assert (tmp_path / "bundle.bin").read_bytes() == Owners(keys / "trust").bundle()
    code, answer = call(capsys, "keys", "publish", "--dir", keys)
    assert (code, answer["error"]) == (2, "config")
