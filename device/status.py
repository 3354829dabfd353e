"""``status.json``: what people and programs may know of a device; rewritten as a whole, relied upon by nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from fleetfed.device.events import HeldModel
from fleetfed.device.ledger import Account
from fleetfed.device.worker import Summary
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.telemetry import Counters, peak_mb

EVERY: Final = 60.0
"""Seconds after which the file is at least touched, so that whoever reads it sees that the device lives."""
OLD: Final = 3 * EVERY
"""Seconds after which a device that has not touched it is not believed to live."""
_MOST_ROUNDS: Final = 1000
_MOST_BYTES: Final = 4 << 20


def privacy(account: Account) -> dict[str, int]:
    """What the ledger says, for the status."""
    return {
        "participations": account.participations,
        "most": account.most,
        "left": max(account.most - account.participations, 0),
        "last_round": account.last_round,
    }


def privacy_line(told: dict[str, int]) -> str:
    """The same for people."""
    if not told.get("most"):
        return "no round with differential privacy yet"
    last = f"; the last in round {told['last_round']}" if told["participations"] else ""
    return f"{told['participations']} of {told['most']} participations, {told['left']} left{last}"


class StatusFile:
    """Collects and writes the status.

    Args:
        path: of the file; the rounds and counts that it holds from an earlier run are kept.
        device: the device's id.
        software: name and version.
    """

    def __init__(self, path: Path, *, device: str, software: str) -> None:
        self._path = path
        self._device = device
        self._software = software
        self._rounds: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._rejected = Counters()
        self._before = ByteCount()
        self._touched = 0
        self.dirty = True
        self._resume()

    def training(self, round_: int, now: int) -> None:
        """Training began."""
        self._row(round_).update(train_started=now, train_ended=0, outcome="training")

    def trained(self, round_: int, now: int, summary: Summary, *, update_bytes: int) -> None:
        """An update was made."""
        self._row(round_).update(
            train_ended=now,
            update_bytes=update_bytes,
            steps=summary.steps,
            loss=round(summary.loss, 6),
            weight=summary.weight,
            clipped=round(summary.clipped, 6),
            holdout_examples=summary.holdout_examples,
            holdout_correct=summary.holdout_correct,
            before_correct=summary.before_correct,
            outcome="sent",
        )

    def outcome(self, round_: int, outcome: str, detail: str = "") -> None:
        """What became of the round; ``detail`` says why, where there is more to say."""
        row = self._row(round_)
        row["outcome"] = outcome
        if detail:
            row["detail"] = detail

    def reject(self, reason: str) -> None:
        """Something was refused."""
        self._rejected.add(reason)
        self.dirty = True

    def touch(self) -> None:
        """Something else changed."""
        self.dirty = True

    def total(self, wire: ByteCount) -> ByteCount:
        """Bytes on the connections of this run and of those before it."""
        return self._before + wire

    def alive(self, now: int) -> int:
        """Touch the file where that is due; returns when it is due again."""
        if not 0 <= now - self._touched < EVERY * 1000:
            self._touched = now
            with contextlib.suppress(OSError):
                os.utime(self._path)
        return self._touched + round(EVERY * 1000)

    def write(
        self,
        now: int,
        *,
        state: str,
        obstacle: str,
        model: HeldModel | None,
        wire: ByteCount,
        refused_by_broker: int,
        account: Account,
        trust: dict[str, Any] | None = None,
    ) -> None:
        """Replace the file; ``obstacle`` says why the device cannot take part now."""
        total = self.total(wire)
        status = {
            "id": self._device,
            "role": "device",
            "pid": os.getpid(),
            "software": self._software,
            "updated": now,
            "state": state,
            "obstacle": obstacle,
            "model_version": model.version if model else 0,
            "model_sha256": model.sha256.hex() if model else "",
            "wire": {"sent": total.sent, "received": total.received},
            "rss_mb_max": round(peak_mb(), 1),
            "rejected": self._rejected.snapshot(),
            "refused_by_broker": refused_by_broker,
            "privacy": privacy(account),
            "trust": trust or {},
            "rounds": list(self._rounds.values()),
        }
        temporary = self._path.with_name(".status.json")
        temporary.write_text(json.dumps(status, separators=(",", ":")) + "\n")
        temporary.replace(self._path)
        self._touched = now
        self.dirty = False

    def _row(self, round_: int) -> dict[str, Any]:
        self.dirty = True
        row = self._rounds.get(round_)
        if row is None:
            row = self._rounds[round_] = {
                "round": round_,
                "train_started": 0,
                "train_ended": 0,
                "update_bytes": 0,
                "steps": 0,
                "loss": 0.0,
                "outcome": "",
            }
            if len(self._rounds) > _MOST_ROUNDS:
                self._rounds.popitem(last=False)
        return row

    def _resume(self) -> None:
        """Go on from what an earlier run wrote; a file that is missing or damaged begins anew."""
        try:
            if self._path.stat().st_size > _MOST_BYTES:
                return
            status = json.loads(self._path.read_text())
            self._rounds.update((int(row["round"]), dict(row)) for row in status["rounds"][-_MOST_ROUNDS:])
            for reason, count in status["rejected"].items():
                self._rejected.add(str(reason), int(count))
            self._before = ByteCount(int(status["wire"]["sent"]), int(status["wire"]["received"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
