"""Processes are watched, stopped, and never outlive whoever started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator.control.errors import CommandFailedError
from fleetfed.cloud_coordinator.demo import processes
from fleetfed.cloud_coordinator.demo.processes import ProcessEndedError, Supervisor


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


WAITS = "import time; print('ready', flush=True); time.sleep(60)"


async def test_a_line_on_stdout_says_when_it_is_ready(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    running = await supervisor.start("one", python("print('warming up'); print('ready on 4711'); input()"), pipe=True)
    with pytest.raises(ProcessEndedError):
        # It ends because there is no terminal to read from.
        await supervisor.wait_line(running, "never", timeout=PATIENCE)
    running = await supervisor.start("two", python(WAITS), pipe=True)
    assert await supervisor.wait_line(running, "ready", timeout=PATIENCE) == "ready"
    with pytest.raises(CommandFailedError, match="not ready after"):
        await supervisor.wait_line(running, "more", timeout=0.05)
    await supervisor.stop(["two"])


async def test_whoever_dies_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    await supervisor.start("fine", python(WAITS))
    await supervisor.start("ill", python("import sys; print('last words', file=sys.stderr); sys.exit(7)"))
    ended = await asyncio.wait_for(supervisor.failed, PATIENCE)
    assert (ended.name, ended.code) == ("ill", 7)
    assert "last words" in str(ended)
    assert "exit status 7" in str(ended)
    assert str(tmp_path / "ill.log") in str(ended)
    await supervisor.stop()


async def test_a_signal_is_named(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    await supervisor.start("victim", python(WAITS))
    os.kill(supervisor.pid("victim"), signal.SIGKILL)
    assert "SIGKILL" in str(await asyncio.wait_for(supervisor.failed, PATIENCE))
    await supervisor.stop()


async def test_stopping_is_no_failure_and_is_thorough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    stubborn = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print('ready', flush=True)
        time.sleep(60)
    """
    supervisor = Supervisor(tmp_path)
    running = await supervisor.start("stubborn", python(stubborn), pipe=True)
    await supervisor.wait_line(running, "ready", timeout=PATIENCE)
    await supervisor.start("polite", python(WAITS))
    await supervisor.stop()
    assert not supervisor.names()
    assert not supervisor.failed.done()
    assert running.process.returncode == -signal.SIGKILL


async def test_a_killed_one_may_be_started_again(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    await supervisor.start("one", python(WAITS))
    first = supervisor.pid("one")
    await supervisor.kill("one")
    await supervisor.start("one", python(WAITS))
    assert supervisor.pid("one") != first
    assert not supervisor.failed.done()
    await supervisor.stop()


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    parent = """
        import asyncio, sys
        from pathlib import Path
        from fleetfed.cloud_coordinator.demo.processes import Supervisor

        async def main():
            supervisor = Supervisor(Path(sys.argv[1]))
            await supervisor.start("child", (sys.executable, "-c", "import time; time.sleep(60)"))
            print(supervisor.pid("child"), flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    with subprocess.Popen(
        (*python(parent), str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        watched = os.pidfd_open(child)
        process.kill()
        process.wait()
    # A pidfd becomes readable when its process has ended.
    import select

    assert select.select([watched], [], [], 10)[0], "the child outlived its parent"
    os.close(watched)
