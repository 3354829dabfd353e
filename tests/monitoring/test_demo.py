"""A whole fleet of real processes, scraped: what is in the catalog is on somebody's page."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fleetfed_testing.scraping import Scrape, get, scrape
from fleetfed_testing.waiting import PATIENCE, wait_until

from fleetfed.shared.monitoring.catalog import Role, of_role

pytest.importorskip("ai_edge_litert", reason="devices train in LiteRT")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

_ONLY_WHEN_IT_HAPPENS = {
    "fleetfed_rejected_total",
    "fleetfed_round_aborts_total",
    "fleetfed_declined_total",
    "fleetfed_updates_excluded_total",
    "fleetfed_masked_sum_failures_total",
    "fleetfed_device_reasons_total",
    "fleetfed_device_participations_left",
    # Devices tell of their rounds a minute after the first word.
    "fleetfed_device_rounds_total",
}


def assert_no_secrets(folder: Path) -> None:
    """No key is in a log, in any form that a program would write it."""
    logs = b"".join(path.read_bytes() for path in (folder / "logs").iterdir())
    keys = [path.read_bytes().strip() for path in (folder / "keys").rglob("*key*") if path.is_file()]
    assert len(keys) > 8
    for key in keys:
        # Of a PEM file, its body's first line.
        text = key.splitlines()[1] if key.startswith(b"-----") else key
        for form in (text, base64.b64encode(key), key.hex().encode(), repr(key)[2:-1].encode()):
            assert len(form) >= 16
            assert form not in logs


@pytest.mark.slow
def test_a_demo_with_metrics(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    options = ["--devices", "4", "--gateways", "2", "--rounds", "2", "--privacy", "helper", "--metrics", "--keep"]
    command = [sys.executable, "-P", "-m", "fleetfed.cloud_coordinator", "demo", "--dir", str(folder), *options]
    demo = subprocess.Popen([*command, "--target", "0.05", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: (folder / "report.json").exists() or demo.poll() is not None, seconds=2 * PATIENCE)
        pages: dict[Role, Scrape] = {}
        for each in json.loads((folder / "prometheus.json").read_text()):
            port = int(each["targets"][0].rpartition(":")[2])
            assert get(port, "/readyz") == (200, "ok\n")
            pages[Role(each["labels"]["role"])] = scrape(port)
    finally:
        demo.send_signal(signal.SIGINT)
        _, log = demo.communicate(timeout=PATIENCE)
    assert_no_secrets(folder)
    assert set(pages) == {Role.COORDINATOR, Role.GATEWAY, Role.HELPER, Role.BROKER}, log.decode()
    for role, page in pages.items():
        assert set(of_role(role)) - set(page.kinds) <= _ONLY_WHEN_IT_HAPPENS, role
        assert page.value("fleetfed_ready") == 1
    coordinator = pages[Role.COORDINATOR]
    assert coordinator.value("fleetfed_participation_ratio") == 1
    assert coordinator.value("fleetfed_dropouts_total") == 0
    assert coordinator.value("fleetfed_rounds_to_target") == 1
    assert coordinator.value("fleetfed_masked_sums_total", result="revealed") == 2
    assert coordinator.value("fleetfed_helper_available") == 1
    assert pages[Role.HELPER].value("fleetfed_helper_answers") == 2
    assert pages[Role.GATEWAY].value("fleetfed_devices_telling") == 2
