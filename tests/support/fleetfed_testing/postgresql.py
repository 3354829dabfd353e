"""A PostgreSQL server of the tests' own: a new cluster in a folder that is removed at the end, on a socket there."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fleetfed_testing.waiting import PATIENCE

USER = "postgres"
"""Whom the server runs as where the tests run as root, which it refuses to."""


def programs() -> Path | None:
    """The folder of PostgreSQL's programs; Debian has them off the path."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max((each.parent for each in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)


class PostgreSQL:
    """See the module. Skips the test where PostgreSQL is not installed."""

    def __init__(self) -> None:
        folder = programs()
        if folder is None:
            pytest.skip("PostgreSQL is not installed (Debian package `postgresql`)")
        self._programs = folder
        self._user = USER if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="fleetfed-pg-"))
        self._numbers = itertools.count(1)
        if self._user is not None:
            shutil.chown(self._folder, self._user, self._user)
        data = str(self._folder / "data")
        self._run("initdb", "--pgdata", data, "--username", USER, "--auth", "trust", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        log = self._folder / "log"
        done = subprocess.run(
            command, user=self._user, group=self._user, cwd=self._folder, capture_output=True, timeout=PATIENCE
        )
        if done.returncode:
            pytest.fail(f"{program}: {done.stderr.decode()}{log.read_text() if log.exists() else ''}")

    def start(self) -> None:
        settings = f"-k {self._folder} -c listen_addresses='' -c max_connections=30"
        place = ("--pgdata", str(self._folder / "data"), "--log", str(self._folder / "log"))
        self._run("pg_ctl", "start", "--wait", *place, "--options", settings)

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "--wait", "--mode", mode, "--pgdata", str(self._folder / "data"))

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"fleet{next(self._numbers)}"
        self._run("createdb", "--host", str(self._folder), "--username", USER, name)
        return f"postgresql+psycopg://{USER}@/{name}?host={self._folder}"
