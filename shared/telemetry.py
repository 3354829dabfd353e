"""What a program tells of itself: one log line per event, counters whose labels are bounded, its memory.

A log line is text, or a JSON object for programs::

    {"ts": "2026-01-31T12:00:00.123Z", "level": "info", "role": "gateway", "id": "g-north", "site": "north",
     "logger": "fleetfed.gateway.runtime", "message": "round 7 is over", "round": 7}

``round`` is the number in a message that begins with ``round %d``, or, as ``device`` and ``gateway``, what the call
gives as ``extra``. A failure has its traceback as ``exception``. No line has a key, a token or a datum: whoever logs
does not log them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

LEVELS: Final = ("debug", "info", "warning", "error")
_OTHER: Final = "other"


class LogFormat(StrEnum):
    """What a log line is."""

    TEXT = "text"
    JSON = "json"


FORMATS: Final = tuple(str(each) for each in LogFormat)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, see the module.

    Args:
        role: of the program.

    Attributes:
        id, site: of the member, once it is known.
    """

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role
        self.id = ""
        self.site = ""

    def format(self, record: logging.LogRecord) -> str:
        """The line; control characters of a message cannot break it."""
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        line: dict[str, Any] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "id": self.id,
            "site": self.site,
            "logger": record.name,
            "message": record.getMessage(),
        }
        args = record.args
        if str(record.msg).startswith("round %d") and isinstance(args, tuple) and args and isinstance(args[0], int):
            line["round"] = args[0]
        line |= {name: record.__dict__[name] for name in _EXTRAS if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""}, default=str)


_EXTRAS: Final = ("round", "device", "gateway", "reason")


def configure_logging(role: str, level: str = "info", *, log_format: str = LogFormat.TEXT) -> None:
    """Log to stderr as ``time level role logger: message``, or as JSON; for programs, once, at their start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(role)
        if log_format == LogFormat.JSON
        else logging.Formatter(f"%(asctime)s %(levelname)s {role} %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def name_logs(id: str, site: str) -> None:
    """Say in every later JSON line who it is of."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonFormatter):
            handler.formatter.id, handler.formatter.site = id, site


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
    found = _of_status("VmHWM:")
    if found is not None:
        return found / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def resident_bytes() -> int:
    """Memory that this program holds resident now; 0 where the kernel does not say."""
    return _of_status("VmRSS:") or 0


def _of_status(field: str) -> int | None:
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None
