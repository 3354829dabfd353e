"""Log lines for programs."""

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fleetfed.shared.telemetry import LogFormat, configure_logging, name_logs


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

        def flush(self) -> None:
            pass

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", Stream())
    configure_logging("gateway", log_format=LogFormat.JSON)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


def read(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in "".join(lines).splitlines()]


def test_a_line_says_who_when_and_which_round(lines: list[str]) -> None:
    log = logging.getLogger("fleetfed.gateway.runtime")
    log.info("starting")
    name_logs("g-north", "north")
    log.info("round %d is over", 7)
    log.warning("refused: %s", "late", extra={"device": "d-0001", "reason": "late", "round": 7})
    first, second, third = read(lines)
    assert first.keys() == {"ts", "level", "role", "logger", "message"}
    assert second | {"ts": ""} == {
        "ts": "",
        "level": "info",
        "role": "gateway",
        "id": "g-north",
        "site": "north",
        "logger": "fleetfed.gateway.runtime",
        "message": "round 7 is over",
        "round": 7,
    }
    assert second["ts"].endswith("Z")
    assert (third["device"], third["reason"], third["round"], third["level"]) == ("d-0001", "late", 7, "warning")


def test_what_a_peer_sends_cannot_make_a_line_of_its_own(lines: list[str]) -> None:
    logging.getLogger("fleetfed").warning("topic %s", 'x\n{"level": "error"}\r\x1b[31m')
    (line,) = read(lines)
    assert line["message"] == 'topic x\n{"level": "error"}\r\x1b[31m'


def test_a_failure_has_its_traceback_in_its_line(lines: list[str]) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("fleetfed").exception("failed")
    (line,) = read(lines)
    assert "ValueError: no" in line["exception"]
    assert line["level"] == "error"
