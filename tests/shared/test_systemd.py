"""What systemd hears, on a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetfed.shared.systemd import Notifier, beat


class Manager:
    """systemd's end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@pytest.fixture
def environ(tmp_path: Path, manager: Manager) -> dict[str, str]:
    return {
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
    }


def test_ready_is_said_once_and_its_text_each_time(manager: Manager, environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready("connected to b:8883")
    notifier.ready("connected\nREADY=1 again")
    notifier.ready()
    assert manager.heard() == ["READY=1\nSTATUS=connected to b:8883", "STATUS=connected READY=1 again"]


def test_before_it_is_ready_a_program_asks_for_time_and_then_says_that_it_lives(
    manager: Manager, environ: dict[str, str]
) -> None:
    notifier = Notifier(environ)
    assert notifier.interval == pytest.approx(10)
    notifier.alive()
    notifier.ready()
    notifier.alive()
    assert manager.heard() == ["EXTEND_TIMEOUT_USEC=30000000", "READY=1", "WATCHDOG=1"]


def test_a_stop_is_announced(manager: Manager, environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.status("round 3 goes on")
    notifier.stopping()
    assert manager.heard() == ["STATUS=round 3 goes on", "STOPPING=1"]


def test_an_abstract_socket_is_reached(environ: dict[str, str]) -> None:
    name = f"fleetfed-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    Notifier(environ | {"NOTIFY_SOCKET": f"@{name}"}).ready()
    assert manager.heard() == ["READY=1"]
    manager.socket.close()


@pytest.mark.parametrize(
    "change",
    [{"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "-5"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_PID": "1"}],
    ids=["none", "nonsense", "off", "of another process"],
)
def test_a_watchdog_that_is_not_ours_is_not_fed(
    manager: Manager, environ: dict[str, str], change: dict[str, str]
) -> None:
    notifier = Notifier(environ | change)
    assert notifier.interval is None
    notifier.ready()
    notifier.alive()
    assert manager.heard() == ["READY=1"]


@pytest.mark.parametrize("address", ["", "nowhere", "tcp:1"])
def test_without_systemd_nothing_is_said(manager: Manager, environ: dict[str, str], address: str) -> None:
    notifier = Notifier(environ | {"NOTIFY_SOCKET": address})
    notifier.ready("x")
    notifier.alive()
    notifier.stopping()
    assert notifier.interval is None
    assert manager.heard() == []


def test_a_manager_that_went_away_stops_nobody(
    tmp_path: Path, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    Notifier(environ | {"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert "systemd does not hear us" in caplog.text


async def test_the_loop_beats_until_it_is_cancelled(manager: Manager, environ: dict[str, str]) -> None:
    notifier = Notifier(environ | {"WATCHDOG_USEC": "3000"})
    task = asyncio.create_task(beat(notifier))
    notifier.ready()
    said: list[str] = []
    while said.count("WATCHDOG=1") < 3:
        await asyncio.sleep(0)
        said += manager.heard()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nobody_beats_for_nobody() -> None:
    await asyncio.wait_for(beat(Notifier({})), 5)
