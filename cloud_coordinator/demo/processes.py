"""Starts operating-system processes, watches them, stops them; none outlives the program that started it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleetfed.cloud_coordinator.control.errors import CommandFailedError

_TAIL_LINES: Final = 25
_TAIL_BYTES: Final = 8192
_PR_SET_PDEATHSIG: Final = 1
STOP_SECONDS: Final = 10.0

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


class ProcessEndedError(CommandFailedError):
    """A process ended that should not have.

    Attributes:
        name: which one.
        code: its exit status; negative for a signal.
        tail: the end of its log.
    """

    def __init__(self, name: str, code: int, log: Path, tail: str) -> None:
        self.name = name
        self.code = code
        self.log = log
        self.tail = tail
        super().__init__(name, code, log, tail)

    def __str__(self) -> str:
        how = f"exit status {self.code}"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-self.code).name
        return f"{self.name} ended ({how}); the end of {self.log}:\n{self.tail}"


@dataclass(slots=True)
class Running:
    """One process and where its output goes."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    expected: bool = False
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)

    def tail(self) -> str:
        """The end of its log."""
        try:
            data = self.log.read_bytes()[-_TAIL_BYTES:]
        except OSError:
            return "(no log)"
        lines = data.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (the log is empty)"


class Supervisor:
    """Processes of one run. Whoever owns it must call `stop` in the end; `failed` tells when one died.

    Args:
        logs: folder for one log file per process.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, Running] = {}
        self._failed: asyncio.Future[ProcessEndedError] = asyncio.get_running_loop().create_future()

    @property
    def failed(self) -> asyncio.Future[ProcessEndedError]:
        """Done when a process ended that was not told to."""
        return self._failed

    def names(self) -> frozenset[str]:
        """Everybody who was started and not stopped."""
        return frozenset(self._running)

    def pid(self, name: str) -> int:
        """The process id of a started process."""
        return self._running[name].process.pid

    async def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None, pipe: bool = False
    ) -> Running:
        """Start a process; its stderr, and stdout where it is not piped, go to ``NAME.log``.

        Args:
            name: also of its log.
            command: program and arguments.
            environment: added to ours.
            pipe: read stdout here: `wait_line` needs it.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        parent = os.getpid()
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if pipe else log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                # A group of its own: Ctrl-C on the terminal reaches us alone, and we stop the fleet in order.
                process_group=0,
                preexec_fn=lambda: _die_with(parent),
            )
        running = Running(name, process, path)
        self._running[name] = running
        running.watcher = asyncio.create_task(self._watch(running), name=f"watch-{name}")
        return running

    async def wait_line(self, running: Running, start: str, *, timeout: float) -> str:
        """Wait until a piped process prints a line that begins with ``start``; return the line.

        Raises:
            CommandFailedError: it ends first, or says nothing in time.
        """
        stdout = running.process.stdout
        assert stdout is not None
        try:
            async with asyncio.timeout(timeout):
                while raw := await stdout.readline():
                    line = raw.decode(errors="replace").rstrip("\n")
                    if line.startswith(start):
                        return line
                code = await running.process.wait()
        except TimeoutError:
            raise CommandFailedError(
                f"{running.name} is not ready after {timeout:g} s; the end of {running.log}:\n{running.tail()}"
            ) from None
        raise ProcessEndedError(running.name, code, running.log, running.tail())

    async def stop(self, names: Iterable[str] | None = None) -> None:
        """Stop processes cleanly, all at once: SIGTERM, and SIGKILL for whoever does not follow.

        Args:
            names: which; None for all that still run.
        """
        chosen = [self._running[name] for name in (list(self._running) if names is None else names)]
        for each in chosen:
            each.expected = True
            _send(each.process, signal.SIGTERM)
        waits = [asyncio.ensure_future(each.process.wait()) for each in chosen]
        if waits:
            _, late = await asyncio.wait(waits, timeout=STOP_SECONDS)
            if late:
                for each in chosen:
                    _send(each.process, signal.SIGKILL)
                await asyncio.wait(late)
        for each in chosen:
            if each.watcher is not None:
                await each.watcher
            del self._running[each.name]

    async def kill(self, name: str) -> None:
        """Kill one as a crash would; `start` may follow under the same name."""
        running = self._running.pop(name)
        running.expected = True
        _send(running.process, signal.SIGKILL)
        await running.process.wait()

    async def _watch(self, running: Running) -> None:
        code = await running.process.wait()
        if not running.expected and not self._failed.done():
            self._failed.set_result(ProcessEndedError(running.name, code, running.log, running.tail()))


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _die_with(parent: int) -> None:
    """In the child: be killed when the parent is gone, however it went (prctl(2), PR_SET_PDEATHSIG)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may be gone already.
        if os.getppid() != parent:
            os._exit(1)
