"""``status.json``: what a running gateway says about itself, for ``fleetfed-gateway status`` and for monitoring."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetfed.shared import health
from fleetfed.shared.files import write_atomic
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.telemetry import peak_mb

FILE: Final = "status.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One look at the gateway.

    Attributes:
        id, site, software: who it is.
        updated: unix milliseconds.
        model_version, model_sha256: what it serves; 0 and empty for nothing.
        shared_connection: whether one MQTT session serves both sites; then the two counts are one.
        wire_site, wire_upstream: bytes on the connections so far.
        rejected: refusals by reason since the start.
        accepted: updates accepted since the start.
        round, round_state: the open round, or the last one and ``idle`` or ``waiting``.
        mode: of that round, ``plain`` or ``split``; empty where the gateway has not seen it.
        aborted: why this gateway refused the coordinator's commit of that round and revealed nothing; else empty.
        answered, expected: devices in the open round.
        level: 0 with devices alone below it.
        journal_commits: transactions since the start; less than the messages stored, because they share them.
        trust: versions and expiries of the trust metadata, and warnings; empty for a fleet without.
        obstacle: why the gateway cannot serve now; empty when it can.
    """

    id: str
    site: str
    software: str
    updated: int
    model_version: int
    model_sha256: str
    shared_connection: bool
    wire_site: ByteCount
    wire_upstream: ByteCount
    rejected: dict[str, int]
    accepted: int
    round: int
    round_state: str
    mode: str
    aborted: str
    answered: int
    expected: int
    level: int
    journal_commits: int
    trust: dict[str, Any]
    obstacle: str

    def table(self) -> dict[str, Any]:
        """As JSON has it."""
        table = dataclasses.asdict(self)
        site, upstream = _bytes(self.wire_site), _bytes(self.wire_upstream)
        total = self.wire_site if self.shared_connection else self.wire_site + self.wire_upstream
        return {
            **table,
            "role": "gateway",
            "pid": os.getpid(),
            "wire_site": site,
            "wire_upstream": upstream,
            "wire": _bytes(total),
            "rss_mb_max": round(peak_mb(), 1),
        }


def write_status(directory: Path, status: Status) -> None:
    """Replace the file."""
    content = json.dumps(status.table(), indent=2, sort_keys=True) + "\n"
    write_atomic(directory / FILE, content.encode())


def read_status(directory: Path) -> dict[str, Any]:
    """Read the file of a gateway that runs or ran.

    Raises:
        ConfigError: there is none yet, or it is damaged.
    """
    return health.read(directory / FILE, written="when the gateway starts")


def _bytes(count: ByteCount) -> dict[str, int]:
    return {"sent": count.sent, "received": count.received}
