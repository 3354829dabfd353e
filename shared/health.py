"""Whether a program is well, judged by the status file that it writes; for containers, systemd and people.

A program that runs writes its file every `EVERY` seconds from its event loop, so that an old file means that the loop
hangs or that nothing runs. ``obstacle`` in it says why the program cannot work although it runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from fleetfed.shared.errors import ConfigError, StorageError

EVERY: Final = 20.0
"""Seconds between two writings where nothing happens."""
OLD: Final = 60.0
"""Seconds after which nobody is believed to be alive."""


def ailment(status: Mapping[str, Any], *, now: int, old: float = OLD) -> str:
    """One line that says what is wrong; empty when all is well.

    Args:
        status: as read from the file.
        now: unix milliseconds.
        old: seconds.
    """
    updated, obstacle = status.get("updated"), status.get("obstacle", "")
    if not isinstance(updated, int):
        return "the status file does not say when it was written; it is of an older program"
    age = (now - updated) / 1000
    # A clock that was put back makes no program ill.
    if age > old:
        return f"the status is {age:.0f} s old, more than {old:.0f} s: the program does not run, or hangs"
    return str(obstacle)


def read(path: Path, *, written: str, damaged: type[ConfigError | StorageError] = ConfigError) -> dict[str, Any]:
    """Read a status file.

    Args:
        path: of it.
        written: when the program writes it, for people who look too early.
        damaged: what to raise where it is not a status.

    Raises:
        ConfigError: there is none yet; or ``damaged``.
    """
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it is written {written}") from error
    except ValueError as error:
        raise damaged(f"{path}: {error}") from error
    if not isinstance(table, dict):
        raise damaged(f"{path}: not a status")
    return table


def report(read: Callable[[], Mapping[str, Any]], *, now: int, old: float = OLD) -> int:
    """Say in one line what is wrong, for ``status --healthy``; returns the exit code, 0 for a program that is well.

    Args:
        read: reads the status file.
        now: unix milliseconds.
        old: seconds.
    """
    try:
        found = ailment(read(), now=now, old=old)
    except (ConfigError, StorageError) as error:
        found = str(error)
    if found:
        print(f"not healthy: {found}")
    return 1 if found else 0
