"""Waiting for what other threads and processes do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Final

PATIENCE: Final = float(os.environ.get("FLEETFED_PATIENCE", "120"))
"""Seconds that anything may take on a machine that does a lot else: a ceiling, which no test that passes comes near.

More where programs are emulated.
"""


async def eventually(condition: Callable[[], object], *, seconds: float = PATIENCE) -> None:
    """Return as soon as ``condition()`` holds; nothing tells us when, so ask often."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object], *, seconds: float = PATIENCE) -> None:
    """The same for tests without an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.005)
