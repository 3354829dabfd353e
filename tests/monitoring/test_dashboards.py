"""The dashboards are what is built, ask for series that exist, and show data of a demo to a real Prometheus."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from fleetfed_testing.prometheus import Prometheus, needs_prometheus
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from fleetfed.shared.monitoring.catalog import SERIES

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "deploy/monitoring/dashboards"
NAMES: Final = ("executive", "oncall", "debug")
_VARIABLES: Final = {"$window": "1m", "$site": ".*"}
_ROUNDS: Final = 60


def _builder() -> Any:
    spec = importlib.util.spec_from_file_location("build_dashboards", ROOT / "deploy/monitoring/build_dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())  # type: ignore[no-any-return]


def queries(name: str) -> Iterator[tuple[str, str]]:
    """Panel and query, with the variables filled in."""
    for panel in load(name)["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in _VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_the_builder_writes(name: str) -> None:
    assert load(name) == _builder().build(name)


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_own_schema_knows_everything_in_a_dashboard(name: str) -> None:
    """What Grafana does not know it passes over without a word: an option that is misspelt would just do nothing."""
    plugins.register_default_plugins()
    dashboard = load(name)
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert list(_lost(dashboard, read)) == []


def _lost(ours: Any, read: Any, place: str = "") -> Iterator[str]:
    """Whatever of ours has not come back as it is; that Grafana adds its defaults is no loss."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for key, value in ours.items():
            yield from _lost(value, read.get(key), f"{place}.{key}")
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for index, (value, other) in enumerate(zip(ours, read, strict=True)):
            yield from _lost(value, other, f"{place}[{index}]")
    elif ours != read:
        yield f"{place}: {ours!r} is read as {read!r}"


@pytest.mark.parametrize("name", NAMES)
def test_the_panels_of_a_dashboard_have_each_their_place(name: str) -> None:
    dashboard = load(name)
    assert dashboard["uid"] == f"fleetfed-{name}"
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)


@pytest.mark.parametrize("name", NAMES)
def test_every_query_asks_for_series_that_a_role_shows(name: str) -> None:
    for title, query in queries(name):
        assert "$" not in query, title
        used = set(re.findall(r"\b(?:fleetfed|process)_[a-z_]+\b", query))
        assert used, title
        assert used <= SERIES, (title, used - SERIES)


def test_grafana_finds_them() -> None:
    folder = ROOT / "deploy/monitoring/provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards/fleetfed.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/fleetfed"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["isDefault"]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("scraped")
    demo = folder / "demo"
    with (folder / "demo.log").open("wb") as log:
        fleet = subprocess.Popen(
            [
                *(sys.executable, "-m", "fleetfed.cloud_coordinator", "demo", "--metrics", "--keep"),
                *("--devices", "6", "--gateways", "2", "--rounds", str(_ROUNDS), "--privacy", "helper"),
                *("--dir", str(demo)),
            ],
            stdout=log,
            stderr=log,
        )
        prometheus = Prometheus(folder, demo / "prometheus.json")
        try:
            deadline = time.monotonic() + 180
            while not (demo / "report.json").exists():
                assert fleet.poll() is None, (folder / "demo.log").read_text()
                assert time.monotonic() < deadline, (folder / "demo.log").read_text()
                time.sleep(0.5)
            yield prometheus
        finally:
            for process in (fleet, prometheus.process):
                process.send_signal(signal.SIGINT)
            for process in (fleet, prometheus.process):
                process.wait(30)


@pytest.mark.slow
@needs_prometheus
@pytest.mark.parametrize("name", NAMES)
def test_every_panel_shows_data_of_a_demo(scraped: Prometheus, name: str) -> None:
    # Devices tell once a minute at most.
    deadline = time.monotonic() + 120
    missing = list(queries(name))
    while missing and time.monotonic() < deadline:
        missing = [(title, query) for title, query in missing if not scraped.shows(query)]
        if missing:
            time.sleep(1)
    assert not missing


@pytest.mark.slow
@needs_prometheus
def test_a_demo_is_healthy_to_its_alerts(scraped: Prometheus) -> None:
    assert all(target["health"] == "up" for target in scraped.ask("targets")["activeTargets"])
    assert not scraped.alerts()
    rules = scraped.rules()
    assert rules
    assert all(rule["health"] == "ok" for rule in rules), [rule.get("lastError") for rule in rules]
