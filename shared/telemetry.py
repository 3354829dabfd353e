"""What a program tells of itself: one log line per event, counters whose labels are bounded, its memory."""

from __future__ import annotations

import logging
import resource
import sys
import threading
from pathlib import Path
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error")
_OTHER: Final = "other"


def configure_logging(role: str, level: str = "info") -> None:
    """Log to stderr as ``time level role logger: message``; for programs, once, at their start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {role} %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class Counters:
    """Counts by label; safe from any thread. Labels beyond the bound are counted together as ``other``.

    >>> counters = Counters(bound=2)
    >>> for label in ("late", "late", "revoked", "expired"):
    ...     counters.add(label)
    >>> counters.snapshot()
    {'late': 2, 'other': 1, 'revoked': 1}
    """

    def __init__(self, *, bound: int = 64) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, label: str, count: int = 1) -> None:
        """Count ``label``."""
        with self._lock:
            if label not in self._counts and len(self._counts) >= self._bound:
                label = _OTHER
            self._counts[label] = self._counts.get(label, 0) + count

    def snapshot(self) -> dict[str, int]:
        """The counts so far, by label in order."""
        with self._lock:
            return dict(sorted(self._counts.items()))


def peak_mb() -> float:
    """Most memory that this program ever held resident, in MB (10**6 bytes).

    Not ``ru_maxrss``: that one begins with the size of the process that started us.
    """
    try:
        with Path("/proc/self/status").open() as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
