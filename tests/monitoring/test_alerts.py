"""Each alert fires on what it is for and not in a healthy fleet, by Prometheus's own rule tester."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from fleetfed_testing.prometheus import ALERTS, hurried, seconds
from fleetfed_testing.provocations import HEALTHY, HOUR, PROVOKED, REPLAYED_ONLY

from fleetfed.shared.monitoring.catalog import SERIES
from fleetfed.shared.monitoring.failures import MODES

ROOT: Final = Path(__file__).resolve().parents[2]
REAL: Final = ROOT / "tests/monitoring/test_real_alerts.py"
RUNBOOKS: Final = ROOT / "docs/runbooks"
_PROMETHEUS: Final = {"up"}
_NAME: Final = re.compile(r"\b(?:fleetfed|process)_[a-z_]+\b")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian package `prometheus`)"
)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _kebab(alert: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", alert.removeprefix("Fleetfed")).lower()


def _replay(tmp_path: Path, cases: list[tuple[str, dict[str, str], int]]) -> subprocess.CompletedProcess[str]:
    """Run promtool; a case is an alert (or empty for any), the series, and how many are to fire after three hours."""
    tests = [
        {
            "interval": "1m",
            "name": alert or "healthy",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{{_which(alert)}alertstate="firing"}}) or vector(0)',
                    "eval_time": f"{3 * HOUR}m",
                    "exp_samples": [{"labels": "{}", "value": count}],
                }
            ],
        }
        for alert, series, count in cases
    ]
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)


def _which(alert: str) -> str:
    return f'alertname="{alert}",' if alert else ""


@needs_promtool
def test_every_alert_fires_on_what_it_is_for_and_a_healthy_fleet_is_quiet(tmp_path: Path) -> None:
    cases = [(alert, series, 1) for alert, series in PROVOKED.items()]
    done = _replay(tmp_path, [*cases, ("", HEALTHY, 0)])
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_what_the_enrolment_service_published_expires_sooner_than_the_rest(tmp_path: Path) -> None:
    """It is good for a week and published anew each day, so a warning of two weeks would never end."""
    series = 'fleetfed_trust_expiry_timestamp_seconds{metadata="devices"}'
    cases = [("FleetfedTrustExpires", {series: f"{days * 86400}x200"}, fires) for days, fires in ((7, 0), (2, 1))]
    done = _replay(tmp_path, cases)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_a_test_of_an_alert_can_fail(tmp_path: Path) -> None:
    assert _replay(tmp_path, [("FleetfedRoundsWait", HEALTHY, 1)]).returncode != 0


def test_every_alert_is_provoked() -> None:
    assert {rule["alert"] for rule in rules()} == PROVOKED.keys()


def test_every_alert_is_set_off_by_real_processes_or_it_says_why_not() -> None:
    # Those that it waits for; a name may stand among the quiet ones too.
    real = set(re.findall(r'"(Fleetfed\w+)": ', REAL.read_text()))
    assert not real & REPLAYED_ONLY.keys()
    assert real | REPLAYED_ONLY.keys() == PROVOKED.keys()


@pytest.mark.parametrize(
    ("duration", "expected"), [("5m", 300), ("1h30m", 5400), ("90s", 90), ("500ms", 0.5), ("1d", 86_400)]
)
def test_durations_as_prometheus_writes_them(duration: str, expected: float) -> None:
    assert seconds(duration) == expected


@pytest.mark.parametrize("duration", ["", "5", "m", "5 m", "1h-", "1x"])
def test_what_is_no_duration(duration: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds(duration)


RULE: Final = {"alert": "A", "expr": 'rate(a{b="c[1h]"}[1h]) > 300 and max_over_time(b[10m]) > 5', "for": "15m"}


def test_time_is_made_shorter_and_nothing_else() -> None:
    (group,) = yaml.safe_load(hurried(ALERTS.read_text(), factor=1.0, least=0.0))["groups"][:1]
    assert group["name"] == "fleetfed-rounds"
    text = yaml.safe_dump({"groups": [{"name": "g", "rules": [RULE, {"alert": "B", "expr": "b > 3600"}]}]})
    first, second = yaml.safe_load(hurried(text, factor=120.0, least=6.0))["groups"][0]["rules"]
    assert first["expr"] == 'rate(a{b="c[1h]"}[30000ms]) > 300 and max_over_time(b[6000ms]) > 5'
    assert first["for"] == "7500ms"
    assert second == {"alert": "B", "expr": "b > 3600"}


@needs_promtool
def test_rules_are_valid_before_and_after(tmp_path: Path) -> None:
    faster = tmp_path / "faster.yml"
    faster.write_text(hurried(ALERTS.read_text(), factor=120.0, least=3.0))
    subprocess.run(["promtool", "check", "rules", str(ALERTS), str(faster)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "change", [{"expr": "a offset 1h > 1"}, {"expr": "max_over_time(a[1h:5m]) > 1"}, {"keep_firing_for": "5m"}]
)
def test_a_duration_of_another_kind_is_not_passed_over(change: dict[str, str]) -> None:
    text = yaml.safe_dump({"groups": [{"name": "g", "rules": [RULE | change]}]})
    with pytest.raises(ValueError):
        hurried(text, factor=2.0, least=1.0)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_has_a_runbook_a_mode_and_known_series(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket", "info")
    assert rule["labels"]["failure"] in MODES
    used = set(_NAME.findall(rule["expr"]))
    assert used <= SERIES | _PROMETHEUS, used - SERIES
    runbook = rule["annotations"]["runbook_url"]
    assert runbook == f"docs/runbooks/{_kebab(rule['alert'])}.md"
    assert (ROOT / runbook).is_file()


def test_the_list_of_runbooks_has_every_alert_with_its_severity() -> None:
    text = (RUNBOOKS / "README.md").read_text()
    for rule in rules():
        assert f"[{rule['alert']}]({_kebab(rule['alert'])}.md) | {rule['labels']['severity']} |" in text


def test_no_runbook_is_left_over() -> None:
    wanted = {f"{_kebab(rule['alert'])}.md" for rule in rules()} | {"README.md"}
    assert {path.name for path in RUNBOOKS.iterdir()} == wanted
