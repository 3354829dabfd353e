"""Settings and the command line."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway import cli
from fleetfed.gateway.config import load
from fleetfed.gateway.runtime import Gateway
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import locked
from fleetfed.shared.trust.certificates import Role

SHORT = 'identity = "identity"\nstate = "state"\n[broker]\nhost = "127.0.0.1"\nport = 1\ntls = false\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "gateway.toml"
    path.write_text(text)
    return path


def test_the_shortest_file_shares_one_connection(tmp_path: Path) -> None:
    config = load(write(tmp_path, SHORT))
    assert config.shared
    assert config.upstream.site == "_"
    assert config.state == tmp_path / "state"


@pytest.mark.parametrize(("port", "shared"), [(1, True), (2, False)])
def test_the_same_host_and_port_is_one_connection(tmp_path: Path, port: int, shared: bool) -> None:
    text = SHORT + f'[upstream.broker]\nhost = "127.0.0.1"\nport = {port}\ntls = false\n'
    assert load(write(tmp_path, text)).shared is shared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT + "[limits]\nsetle = 1\n", "did you mean 'settle'"),
        (SHORT.replace("127.0.0.1", "example.org"), "tls = false is allowed only"),
        (SHORT.replace('state = "state"\n', ""), "state: is missing"),
        ('log_level = "loud"\n' + SHORT, "log_level 'loud' is none of"),
    ],
)
def test_a_wrong_file_says_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_a_configuration_error_is_exit_code_2_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--config", str(tmp_path / "missing.toml")]) == cli.BAD_CONFIG
    assert "missing.toml" in capsys.readouterr().err


def test_a_devices_identity_cannot_run_a_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SignedFleet().identity("d-1", Role.DEVICE, "north").save(tmp_path / "identity")
    assert cli.main(["run", "--config", str(write(tmp_path, SHORT))]) == cli.BAD_CONFIG
    assert "needs gateway" in capsys.readouterr().err


def test_a_gateway_cannot_be_a_member_of_its_own_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SignedFleet().identity("g-1", Role.GATEWAY, "north").save(tmp_path / "identity")
    text = SHORT + '[upstream]\nsite = "north"\n'
    assert cli.main(["run", "--config", str(write(tmp_path, text))]) == cli.BAD_CONFIG
    assert "the site that this gateway serves itself" in capsys.readouterr().err


def test_a_damaged_journal_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SignedFleet().identity("g-1", Role.GATEWAY, "north").save(tmp_path / "identity")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/journal.db").write_bytes(b"nothing that SQLite knows" * 50)
    assert cli.main(["run", "--config", str(write(tmp_path, SHORT))]) == cli.BAD_STORAGE
    assert "journal.db" in capsys.readouterr().err


def test_status_before_the_first_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SHORT)
    assert cli.main(["status", "--config", str(path)]) == cli.BAD_CONFIG
    assert "when the gateway starts" in capsys.readouterr().err


def test_status_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SHORT)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/status.json").write_text('{"id": "g-1", "rejected": {"late": 2}}')
    assert cli.main(["status", "--config", str(path)]) == cli.OK
    assert "late 2" in capsys.readouterr().out
    assert cli.main(["status", "--config", str(path), "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["id"] == "g-1"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert "fleetfed-gateway run --config gateway.toml" in capsys.readouterr().out


FORBIDDEN = (
    "click", "rich", "sqlalchemy", "cryptography", "tensorflow", "ai_edge_litert",
    "fleetfed.cloud_coordinator", "fleetfed.device", "fleetfed.broker",
)  # fmt: skip


def test_a_gateway_imports_nothing_of_other_roles() -> None:
    """In a process of its own: this one has imported everything already."""
    code = (
        "import sys, fleetfed.gateway.cli, fleetfed.gateway.runtime\n"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_processes_cannot_use_one_state_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, SHORT)
    with locked(tmp_path / "state"):
        assert cli.main(["run", "--config", str(config)]) == cli.BAD_CONFIG
    assert "in use by another process" in capsys.readouterr().err


def test_a_full_disk_is_named_wherever_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SignedFleet().identity("g-north", Role.GATEWAY, "north").save(tmp_path / "identity")

    async def full(_self: Gateway) -> None:
        raise ExceptionGroup("gateway", [OSError(errno.ENOSPC, "No space left on device")])

    monkeypatch.setattr(Gateway, "run", full)
    assert cli.main(["run", "--config", str(write(tmp_path, SHORT))]) == cli.BAD_STORAGE
    assert "No space left on device" in capsys.readouterr().err
