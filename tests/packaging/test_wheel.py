"""The wheel built from the source distribution holds everything, and nothing under a name of its own."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "cloud_coordinator", "device", "gateway", "shared")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (source,) = (path for path in out.iterdir() if path.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_every_module_and_data_file_is_in_the_wheel_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tracked = run("git", "ls-files", *PACKAGES, cwd=ROOT).split() if (ROOT / ".git").exists() else []
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {f"fleetfed/{name}" for name in tracked} <= held
    assert all(name.split("/")[:2][0] == "fleetfed" and name.split("/")[1] in PACKAGES for name in held), held
    for package in PACKAGES:
        assert f"fleetfed/{package}/py.typed" in held
    assert "fleetfed/cloud_coordinator/zoo/digits.tflite" in held


def test_every_program_starts_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    for module, word in (
        ("fleetfed.device", "fleetfed-device"),
        ("fleetfed.gateway", "fleetfed-gateway"),
        ("fleetfed.cloud_coordinator", "fleetfed"),
        ("fleetfed.cloud_coordinator.helper", "fleetfed-helper"),
        ("fleetfed.broker", "broker"),
    ):
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = [{module!r}, '--help']; "
            f"import runpy, fleetfed.shared.errors as e; assert e.__file__.startswith({str(tmp_path)!r}), e.__file__; "
            f"runpy.run_module({module!r}, run_name='__main__')"
        )
        assert word in run(sys.executable, "-c", code, cwd=tmp_path)


def test_no_role_goes_by_its_bare_name() -> None:
    code = "import fleetfed.cloud_coordinator.cli, fleetfed.device.cli, sys; print([n for n in sys.modules])"
    names = run(sys.executable, "-P", "-c", code, cwd=ROOT)
    assert not {f"'{package}'" for package in PACKAGES} & set(names.strip("[]\n").split(", "))
