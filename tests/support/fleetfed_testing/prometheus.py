"""A real Prometheus (Debian package `prometheus`) that scrapes a fleet every second and judges it by our rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from fleetfed_testing.brokers import free_port
from fleetfed_testing.waiting import PATIENCE

ALERTS: Final = Path(__file__).resolve().parents[3] / "deploy/monitoring/alerts.yml"
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0, "y": 31_536_000.0}
_DURATION: Final = re.compile(r"(?:\d+(?:ms|[smhdwy]))+")
_RANGE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\[([^\]]*)\]')
"""A range, or a string, in which brackets mean something else."""

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package `prometheus`)"
)


def seconds(duration: str) -> float:
    """A duration as Prometheus writes it, such as ``1h30m``.

    Raises:
        ValueError: it is none.
    """
    if _DURATION.fullmatch(duration) is None:
        raise ValueError(f"{duration!r} is no duration")
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdwy])", duration))


def hurried(rules: str, *, factor: float, least: float) -> str:
    """The same rules with every ``for`` and every range divided by ``factor``; thresholds stay as they are.

    Args:
        rules: a rule file.
        factor: how much faster time is to pass.
        least: seconds that remain at least; a range needs some scrapes to see a change at all.

    Raises:
        ValueError: there is a duration of a kind that this does not change, such as a subquery or an offset.
    """

    def shorter(duration: str) -> str:
        return f"{round(1000 * max(seconds(duration) / factor, least))}ms"

    table = yaml.safe_load(rules)
    for group in table["groups"]:
        for rule in group["rules"]:
            if re.search(r"\boffset\b|@", rule["expr"]) or "keep_firing_for" in rule:
                raise ValueError(f"{rule['alert']} has a duration that is not understood")
            rule["expr"] = _RANGE.sub(
                lambda found: found[0] if found[1] is None else f"[{shorter(found[1])}]", rule["expr"]
            )
            if "for" in rule:
                rule["for"] = shorter(rule["for"])
    return yaml.safe_dump(table, sort_keys=False, width=1000)


class Prometheus:
    """One process; `ask` it while it runs.

    Args:
        folder: for its files.
        targets: a file as ``file_sd_configs`` reads it.
        rules: a rule file.
    """

    def __init__(self, folder: Path, targets: Path, rules: Path = ALERTS) -> None:
        self._port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {"job_name": "fleetfed", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.began = time.time()
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def ask(self, path: str, **arguments: str) -> Any:
        """What its API says."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def shows(self, query: str) -> bool:
        """Whether there was any value of it, since the start."""
        found = self.ask("query_range", query=query, start=f"{self.began:.0f}", end=f"{time.time():.0f}", step="1s")
        return any(not math.isnan(float(value)) for series in found["result"] for _, value in series["values"])

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and when it was evaluated."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def alerts(self, state: str = "firing") -> dict[str, list[dict[str, str]]]:
        """The labels of the alerts that are in a state now, by the alert's name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in self.ask("alerts")["alerts"]:
            if alert["state"] == state:
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    def ever(self) -> dict[str, set[str]]:
        """Every alert that was in a state other than inactive at any time, pending ones too, with these states."""
        found = self.ask("series", **{"match[]": "ALERTS", "start": f"{self.began:.0f}", "end": f"{time.time():.0f}"})
        states: dict[str, set[str]] = {}
        for series in found:
            states.setdefault(series["alertname"], set()).add(series["alertstate"])
        return states

    async def ready(self) -> None:
        """Wait until all targets are up."""
        down = ["no target"]
        try:
            async with asyncio.timeout(PATIENCE):
                while down:
                    await asyncio.sleep(0.1)
                    down = await asyncio.to_thread(self._down)
        except TimeoutError:
            raise AssertionError(f"not up: {down}") from None

    def _down(self) -> list[str]:
        try:
            targets = self.ask("targets")["activeTargets"]
        except OSError as error:
            return [str(error)]
        if not targets:
            return ["no target"]
        return [f"{each['scrapeUrl']}: {each['lastError']}" for each in targets if each["health"] != "up"]

    async def holds(self, query: str) -> None:
        """Wait until a query has a result."""
        async with asyncio.timeout(PATIENCE):
            while not (await asyncio.to_thread(self.ask, "query", query=query))["result"]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def until(
        self, *, firing: dict[str, list[dict[str, str]]] | None = None, quiet: tuple[str, ...] = ()
    ) -> None:
        """Wait until alerts fire with just these labels, as far as they are given, and others do not fire.

        Args:
            firing: per alert, one set of labels for each that is to fire, and no further one.
            quiet: alerts of which none is to fire.
        """
        wanted = firing or {}
        found: dict[str, list[dict[str, str]]] = {}
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    found = await asyncio.to_thread(self.alerts)
                    missing = [name for name, labels in wanted.items() if not _same(found.get(name, []), labels)]
                    if not missing and not found.keys() & set(quiet):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"wanted {wanted}, none of {quiet}; firing are {found}") from None


def _same(found: list[dict[str, str]], wanted: list[dict[str, str]]) -> bool:
    return len(found) == len(wanted) and all(any(want.items() <= each.items() for each in found) for want in wanted)


def _start(folder: Path, targets: Path, rules: str) -> Prometheus:
    folder.mkdir()
    path = folder / "rules.yml"
    path.write_text(rules)
    return Prometheus(folder, targets, path)


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: Path, rules: str) -> AsyncIterator[Prometheus]:
    """A Prometheus with these rules that sees all of its targets."""
    running = await asyncio.to_thread(_start, folder, targets, rules)
    try:
        await running.ready()
        yield running
    finally:
        await asyncio.to_thread(running.stop)
