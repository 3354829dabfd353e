"""When the device tells how it fares, and what: on change, but rarely; at rest, once an hour. Pure.

What it costs: about 300 bytes an hour on a connection that does nothing else.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from fleetfed.device.ledger import Account
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.wire.telemetry import Telemetry

MINUTE: Final = 60_000
HOUR: Final = 3_600_000


class Teller:
    """Decides when to tell, and counts what is told.

    Args:
        started: when the program did, in unix milliseconds.
        enabled: whether to tell at all.
        soonest: milliseconds between two messages, at least.
        latest: milliseconds between two messages, at most.
    """

    def __init__(self, *, started: int, enabled: bool = True, soonest: int = MINUTE, latest: int = HOUR) -> None:
        self._started = started
        self._enabled = enabled
        self._soonest = soonest
        self._latest = latest
        self._last: int | None = None
        self._changed = True
        self._rounds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._training_since: int | None = None
        self._trained = 0

    def outcome(self, outcome: str) -> None:
        """A round ended as ``outcome``, or ``outcome:reason``."""
        label, _, reason = outcome.partition(":")
        self._rounds[label] += 1
        if reason:
            self._reasons[reason] += 1
        self._changed = True

    def refused(self, reason: str) -> None:
        """The device refused a message."""
        self._refused[reason] += 1
        self._changed = True

    def changed(self) -> None:
        """Something else is worth telling."""
        self._changed = True

    def again(self) -> None:
        """Whoever is told knows nothing of us: it began anew."""
        self._last = None

    def training(self, now: int) -> None:
        """Training begins."""
        self._training_since = now

    def trained(self, now: int) -> None:
        """Training ended."""
        if self._training_since is not None:
            self._trained += max(0, now - self._training_since)
            self._training_since = None

    def next_deadline(self, now: int) -> int | None:
        """When to tell, in unix milliseconds; None for never."""
        if not self._enabled:
            return None
        # Also where the clock was put back.
        if self._last is None or self._last > now:
            return now
        return self._last + (self._soonest if self._changed else self._latest)

    def tell(
        self, now: int, *, wire: ByteCount, model_version: int, account: Account, cpu: int, memory: int, peak: int
    ) -> Telemetry:
        """What is said now.

        Args:
            now: unix milliseconds.
            wire: bytes on the connection since the state folder was made.
            model_version: that is held.
            account: the privacy ledger.
            cpu: milliseconds of CPU time.
            memory, peak: bytes held, and most ever held.
        """
        self._last = now
        self._changed = False
        # How long a device trains, and how much memory it needs for it, grows with its examples.
        silent = bool(account.most)
        return Telemetry(
            started=self._started,
            sent=wire.sent,
            received=wire.received,
            cpu=0 if silent else cpu,
            memory=0 if silent else memory,
            memory_peak=0 if silent else peak,
            trained=0 if silent else self._trained,
            model_version=model_version,
            rounds=dict(self._rounds.most_common(16)),
            reasons=dict(self._reasons.most_common(64)),
            refused=dict(self._refused.most_common(64)),
            participations=account.participations,
            most=account.most,
        )
