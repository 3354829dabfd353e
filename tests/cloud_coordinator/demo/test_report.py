"""The figures of a report, from facts whose answers are known by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.cli.demo import summary
from fleetfed.cloud_coordinator.demo import live, report
from fleetfed.cloud_coordinator.demo.report import RoundFacts

FACTS = {
    "tiers": 1,
    "model": "digits",
    "data": "digits",
    "model_bytes": 5000,
    "broker": "embedded",
    "tls": True,
    "auth": "certificates",
    "seconds": 9.0,
    "setup_seconds": 3.0,
}
REQUIRED = [
    "final_accuracy",
    "accuracy_by_round",
    "rounds",
    "devices",
    "gateways",
    "parameters",
    "model_bytes",
    "update_bytes_mean",
    "patch_bytes_mean",
    "wire_bytes_up",
    "wire_bytes_down",
    "float32_bytes_up",
    "seconds_per_round_median",
    "overhead_seconds_per_round_median",
    "device_rss_mb_max",
    "broker",
    "tls",
    "auth",
    "model_sha256",
    "device_model_sha256",
]


def entry(number: int, *, opened: int, closed: int, accuracy: float, outcome: str = "committed") -> dict[str, Any]:
    made = outcome == "committed"
    return {
        "round": number,
        "outcome": outcome,
        "version": number + 1 if made else 0,
        "accuracy": accuracy if made else None,
        "contributors": 2 if made else 0,
        "update_bytes": 100 if made else 0,
        "update_bytes_total": 200 if made else 0,
        "patch_bytes": 50 if made else 0,
        "opened": opened,
        "closed": closed,
    }


def device(digest: str, intervals: list[tuple[int, int]], *, sent: int, received: int) -> dict[str, Any]:
    return {
        "model_sha256": digest,
        "wire": {"sent": sent, "received": received},
        "rss_mb_max": 40.5,
        "rejected": {"late": 1},
        "rounds": [{"train_started": start, "train_ended": end} for start, end in intervals],
    }


@pytest.fixture
def made() -> report.Report:
    history = [
        entry(1, opened=1000, closed=2000, accuracy=0.5),
        entry(2, opened=2000, closed=2300, accuracy=0, outcome="aborted"),
        entry(3, opened=3000, closed=3400, accuracy=0.9),
    ]
    rounds = [report.facts(row, wire_up=100 * n, wire_down=300 * n) for n, row in enumerate(history, start=1)]
    return report.build(
        rounds=rounds,
        devices={
            "d-1": device("aa", [(1100, 1500), (3100, 3200)], sent=1000, received=4000),
            "d-2": device("aa", [(1400, 1700), (3300, 3500)], sent=500, received=4000),
        },
        gateways={"g-1": {"wire": {"sent": 70, "received": 80}}},
        coordinator={"model_sha256": "aa"},
        facts=FACTS,
        parameters=1000,
    )


def test_every_promised_key_is_there(made: report.Report) -> None:
    table = json.loads(json.dumps(made.to_json()))
    assert set(REQUIRED) <= set(table)


def test_the_figures(made: report.Report) -> None:
    assert made.accuracy_by_round == [0.5, 0.9]
    assert (made.rounds, made.final_accuracy) == (2, 0.9)
    assert (made.update_bytes_mean, made.patch_bytes_mean) == (100, 50)
    assert (made.wire_bytes_up, made.wire_bytes_down) == (1500, 8000)
    assert (made.gateway_bytes_up, made.gateway_bytes_down) == (70, 80)
    assert made.float32_bytes_up == 4 * 1000 * 2 * 2
    assert made.float32_bytes_down == 4 * 1000 * 2 * 2
    assert made.seconds_per_round_median == pytest.approx(0.7)
    # Round 1: 1000 ms less 1100..1700; round 3: 400 ms less 3100..3200 and 3300..3400.
    assert made.overhead_seconds_per_round_median == pytest.approx((0.4 + 0.2) / 2)
    assert made.rejected == {"late": 2}
    assert made.identical


def test_one_device_on_another_file_is_seen(made: report.Report) -> None:
    made.device_model_sha256["d-2"] = "bb"
    assert not made.identical


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8))
def test_the_union_is_what_counting_moments_says(intervals: list[tuple[int, int]]) -> None:
    moments = sum(any(start <= t < end for start, end in intervals) for t in range(5, 30))
    assert report.union(intervals, within=(5, 30)) == moments


def test_the_summary_compares_with_float32(made: report.Report) -> None:
    text = "\n".join(summary(made, Path("runs/demo")))
    assert "0.9000" in text
    assert "40.0x" in text
    assert "late 2" in text


def test_the_plot_is_a_picture(made: report.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(made, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def facts(number: int, accuracy: float | None = 0.5) -> RoundFacts:
    return report.facts(
        entry(number, opened=0, closed=1500, accuracy=accuracy or 0.0), wire_up=1000 * number, wire_down=2000 * number
    )


def test_without_a_terminal_there_is_a_line_per_round() -> None:
    file = io.StringIO()
    screen = live.screen(file)
    screen.say("hello")
    for number in (1, 2):
        screen.progress("never seen")
        screen.round(facts(number))
    screen.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1].split() == list(live.COLUMNS)
    assert lines[2].split() == ["1", "0.5000", "2", "1.0", "kB", "2.0", "kB", "1.50"]
    assert len(lines) == 4


def test_on_a_terminal_there_is_a_table() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    screen = live.screen(file)
    assert isinstance(screen, live.Table)
    for number in range(1, 60):
        screen.round(facts(number))
    screen.progress("round 60: 1 of 2 devices")
    screen.close()
    text = file.getvalue()
    assert "participants" in text
    last = text.rindex("accuracy")
    assert "\n" in text[last:]
    assert " 59 " in text[last:]
    assert " 1 " in text[last:], "the whole table stays on the screen"
