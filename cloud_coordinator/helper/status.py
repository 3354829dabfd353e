"""``status.json``: what a running helper says about itself, for ``fleetfed-helper status`` and for monitoring."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetfed.shared import health
from fleetfed.shared.files import write_atomic
from fleetfed.shared.telemetry import peak_mb

FILE: Final = "status.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One look at the helper.

    Attributes:
        id, software: who it is.
        updated: unix milliseconds.
        connected: whether it reaches the broker.
        obstacle: why it cannot serve now; empty when it can.
        keys: whose secrets it holds.
        key_expires: until when rounds may last that name the newest key; unix milliseconds.
        answered: sets of masks given with these keys.
        round: the last round among them; 0 for none.
        rejected: refusals by reason since the start.
        trust: versions and expiries of the trust metadata, and warnings; empty for a fleet without.
    """

    id: str
    software: str
    updated: int
    connected: bool
    obstacle: str
    keys: int
    key_expires: int
    answered: int
    round: int
    rejected: dict[str, int]
    trust: dict[str, Any]


def write_status(directory: Path, status: Status) -> None:
    """Replace the file."""
    table = {**dataclasses.asdict(status), "role": "helper", "pid": os.getpid(), "rss_mb_max": round(peak_mb(), 1)}
    write_atomic(directory / FILE, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())


def read_status(directory: Path) -> dict[str, Any]:
    """Read the file of a helper that runs or ran.

    Raises:
        ConfigError: there is none yet, or it is damaged.
    """
    return health.read(directory / FILE, written="once the helper runs")
