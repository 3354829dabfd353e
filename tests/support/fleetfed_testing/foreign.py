"""Programs for another processor: a Debian of `tests/arm/install.sh`, in which the kernel runs them by emulation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fleetfed_testing.local_fleet import LocalFleet

FOLDER = Path(os.environ.get("FLEETFED_ARM", Path(__file__).parents[3] / ".arm"))
_MACHINES = {"arm64": "aarch64", "armhf": "armv7l"}
# Each program has mounts of its own, which go with it. The last one lets it find its files where we have them.
_ENTER = """
root=$1 share=$2; shift 2
mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" &&
mkdir -p "$root$share" && mount --bind "$share" "$root$share" && exec chroot "$root" "$@"
"""
_ROLES = "PYTHONPATH=/opt/fleetfed"
_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


def program(role: str) -> tuple[str, ...]:
    """How ``fleetfed-device`` or ``fleetfed-gateway`` is called in there."""
    return ("python3", "-P", "-m", f"fleetfed.{role}")


class Foreign:
    """One root file system; skips the test where it is missing or cannot be run.

    Args:
        arch: Debian's name of the architecture.
        share: a folder of ours that is in there, too, under the same name.
    """

    def __init__(self, arch: str, share: Path) -> None:
        self._root = FOLDER / arch
        self._share = share
        if not (self._root / "opt" / "fleetfed").exists():
            pytest.skip(f"{self._root} is missing: `make arm`")
        asked = self._done("uname", "-m")
        if asked.returncode:
            pytest.skip(f"programs of {self._root} do not run here: {asked.stderr}")
        assert asked.stdout.strip() == _MACHINES[arch]

    def command(self, *command: str | Path, setting: tuple[str, ...] = ()) -> tuple[str, ...]:
        """What to execute here for a command in there; ``setting`` is of its environment, which is else empty."""
        enter = ("unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self._root), str(self._share))
        return (*enter, "env", "-i", _PATH, "HOME=/root", *setting, *map(str, command))

    def run(self, *command: str | Path, given: str = "") -> str:
        """The output of a command in there."""
        done = self._done(*command, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _done(self, *command: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        entered = self.command(*command, setting=(_ROLES,))
        return subprocess.run(entered, input=given, capture_output=True, text=True, check=False)

    async def start(self, fleet: LocalFleet, name: str) -> None:
        """Start a device or a gateway of a fleet in there."""
        config = fleet.folder.config(name)
        command = self.command(*program(config.stem), "run", "--config", config, setting=(_ROLES, "PYTHONUNBUFFERED=1"))
        await fleet.fleet.supervisor.start(name, command)
