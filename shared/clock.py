"""The only place that reads the wall clock."""

from __future__ import annotations

import time


def unix_ms() -> int:
    """Now, in unix milliseconds."""
    return time.time_ns() // 1_000_000
