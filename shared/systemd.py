"""Tells systemd how a program does: sd_notify(3) without libsystemd, one datagram per message.

Outside of systemd, or in a unit that is not ``Type=notify``, everything here does nothing.

A unit with ``Type=notify`` and ``WatchdogSec=`` is *activating* until `Notifier.ready`, and killed when
`Notifier.alive` stops. Until it is ready, `alive` asks for more time to start instead: a site whose broker is away for
a day waits for it, and a program that hangs while it starts does not.

::

    notifier = Notifier()
    task = asyncio.create_task(beat(notifier))
    ...
    notifier.ready("connected")      # any thread, as often as it likes
    ...
    notifier.stopping()
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

_log = logging.getLogger(__name__)

_PARTS: Final = 3
"""Signs of life per watchdog interval: one may be late, and one may be lost."""
_MOST_TEXT: Final = 200


class Notifier:
    """Where to say it.

    Args:
        environ: has ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` where systemd started us.

    Attributes:
        interval: seconds between two calls of `alive`; None where nobody waits for them.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._usec = _watchdog(environ) if self._address else 0
        self.interval: float | None = self._usec / _PARTS / 1e6 if self._usec else None
        self._ready = False

    def ready(self, text: str = "") -> None:
        """Say that the program works; from the second time on only the text for ``systemctl status``."""
        self._send(*(() if self._ready else ("READY=1",)), *_status(text))
        self._ready = True

    def status(self, text: str) -> None:
        """Say something for ``systemctl status``, of at most 200 characters in one line."""
        self._send(*_status(text))

    def alive(self) -> None:
        """Say that the loop turns; to be called every `interval`, from the loop itself."""
        if self.interval is not None:
            self._send("WATCHDOG=1" if self._ready else f"EXTEND_TIMEOUT_USEC={self._usec}")

    def stopping(self) -> None:
        """Say that a clean stop has begun."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            # A socket of its own each time: it is rare, and systemd may have been replaced in between.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.setblocking(False)
                channel.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            # A watchdog that misses us acts by itself; we have no better way to complain.
            _log.warning("systemd does not hear us: %s", error)


async def beat(notifier: Notifier) -> None:
    """Call `alive` from the running event loop until cancelled; returns at once where nobody waits for it."""
    # Late: a device, which has no event loop, is not to load one for this.
    import asyncio

    while notifier.interval is not None:
        notifier.alive()
        await asyncio.sleep(notifier.interval)


def _address(text: str) -> str:
    """A path, or a name in the abstract namespace, which is written with ``@``."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""


def _watchdog(environ: Mapping[str, str]) -> int:
    """Microseconds within which systemd wants to hear of us; 0 for never."""
    text, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    # Another process' watchdog is inherited by those that it starts.
    if not text.isdecimal() or (pid and pid != str(os.getpid())):
        return 0
    return int(text)


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())[:_MOST_TEXT]}",) if text else ()
