"""What the kernel says of this process, under the names that every Prometheus client uses. Linux; elsewhere less."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from fleetfed.shared.monitoring.samples import Samples

_PROC: Final = Path("/proc")
_AFTER_NAME: Final = 3
"""Number in proc(5) of the first field behind the program's name."""


def process(samples: Samples) -> None:
    """Add CPU time, memory, start and open files; what cannot be read is left out. Reads files."""
    samples.set("process_max_fds", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    with suppress(OSError, ValueError, IndexError):
        # The name may hold spaces and brackets; its end is the last closing one.
        fields = (_PROC / "self" / "stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        user, system, start, virtual, pages = (int(fields[number - _AFTER_NAME]) for number in (14, 15, 22, 23, 24))
        samples.set("process_cpu_seconds_total", (user + system) / ticks)
        samples.set("process_virtual_memory_bytes", virtual)
        samples.set("process_resident_memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
        samples.set("process_start_time_seconds", _boot_time() + start / ticks)
    with suppress(OSError):
        # Less the one that lists them.
        samples.set("process_open_fds", len(os.listdir(_PROC / "self" / "fd")) - 1)


@cache
def _boot_time() -> float:
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    raise ValueError("no btime")
