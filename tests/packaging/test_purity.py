"""The house: who may import whom. Read from the sources, so that nothing has to be imported to be judged."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROLES = ("broker", "device", "gateway", "cloud_coordinator")
ALLOWED = {
    "shared": {"shared"},
    "broker": {"shared", "broker"},
    "device": {"shared", "device"},
    "gateway": {"shared", "gateway"},
    "cloud_coordinator": {"shared", "broker", "cloud_coordinator"},
}
IO = {"asyncio", "socket", "time", "random", "os", "pathlib", "threading", "subprocess", "sqlite3", "aiomqtt", "paho"}
ONLY_IN = {
    "paho": {"device/link.py", "shared/mqtt"},
    "aiomqtt": {"shared/mqtt"},
    "sqlalchemy": {"cloud_coordinator"},
    "click": {"cloud_coordinator"},
    "rich": {"cloud_coordinator"},
    "cryptography": {"cloud_coordinator", "shared/secure"},
    "tuf": {"shared/trust", "cloud_coordinator/keys"},
    "securesystemslib": {"shared/trust"},
    "dp_accounting": {"cloud_coordinator/privacy"},
    "tensorflow": {"cloud_coordinator/builder", "cloud_coordinator/zoo"},
    "sklearn": {"cloud_coordinator/demo"},
    "matplotlib": {"cloud_coordinator/demo"},
}


def sources() -> list[Path]:
    return sorted(path for role in (*ROLES, "shared") for path in (ROOT / role).rglob("*.py"))


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return tuple(found)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_role_imports_only_what_it_may(path: Path) -> None:
    role = name(path).split("/")[0]
    for module in imports(path):
        if module.startswith("fleetfed."):
            assert module.split(".")[1] in ALLOWED[role], module
        for library, places in ONLY_IN.items():
            if module.split(".")[0] == library:
                assert any(name(path).startswith(place) for place in places), module


@pytest.mark.parametrize("path", sorted((ROOT / "cloud_coordinator" / "helper").rglob("*.py")), ids=name)
def test_the_helper_shares_no_code_with_whom_it_checks(path: Path) -> None:
    for module in imports(path):
        if module.startswith("fleetfed."):
            assert module.startswith(("fleetfed.shared", "fleetfed.cloud_coordinator.helper")), module


ENROLLER_MAY = ("enroll", "keys", "cli", "control.delivery")
"""Of the coordinator's rooms: X.509, the look of command lines, and the operator's way to hand in a revocation list."""


@pytest.mark.parametrize("path", [path for path in sources() if name(path).startswith("cloud_coordinator/")], ids=name)
def test_enrolment_and_the_coordinator_know_nothing_of_each_other(path: Path) -> None:
    own = name(path).startswith("cloud_coordinator/enroll/")
    for module in imports(path):
        if module.startswith("fleetfed.cloud_coordinator."):
            room = module.removeprefix("fleetfed.cloud_coordinator.")
            if own:
                assert any(room == each or room.startswith(f"{each}.") for each in ENROLLER_MAY), module
            else:
                assert not room.startswith("enroll"), module


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sources()
        if name(path).startswith(("shared/wire", "shared/aggregate", "shared/secure"))
        or (path.parent.name != "cli" and path.name in ("state.py", "events.py", "machine.py", "round.py"))
    ],
    ids=name,
)
def test_what_decides_does_no_io(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & IO


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 550  # "about 500"


def test_the_generated_parts_of_the_documentation_are_fresh() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
