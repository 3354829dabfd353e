"""What is rendered is what Prometheus reads."""

import math
import os
import shutil
import subprocess
import time

import pytest
from fleetfed_testing.scraping import parsed

from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import CATALOG, Kind, Role, of_role
from fleetfed.shared.monitoring.exporter import render
from fleetfed.shared.monitoring.process import process
from fleetfed.shared.monitoring.samples import Histogram, Samples


def page(role: Role) -> tuple[dict[str, float], bytes]:
    """Every metric of a role with some value, and what is rendered of it."""
    samples, values = Samples(role), {}
    for number, (name, metric) in enumerate(of_role(role).items()):
        if metric.kind is Kind.HISTOGRAM:
            histogram = Histogram(name)
            histogram.observe(0.3)
            histogram.observe(1e9)
            samples.histogram(histogram)
        else:
            values[name] = number + 0.5
            samples.set(name, values[name], *metric.labels)
    return values, render(samples)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
@pytest.mark.parametrize("role", Role)
def test_prometheus_own_tool_finds_nothing_wrong(role: Role) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=page(role)[1], capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.mark.parametrize("role", Role)
def test_everything_in_the_catalog_can_be_read_back(role: Role) -> None:
    values, rendered = page(role)
    read = parsed(rendered.decode())
    assert list(read.kinds) == list(of_role(role))
    for name, metric in of_role(role).items():
        assert read.kinds[name] == metric.kind
        assert read.helps[name] == CATALOG[name].help
        if metric.kind is Kind.HISTOGRAM:
            assert read.value(f"{name}_count") == 2
            assert read.value(f"{name}_sum") == pytest.approx(1e9)
            assert read.value(f"{name}_bucket", le="0.25") == 0
            assert read.value(f"{name}_bucket", le="0.5") == 1
            assert read.value(f"{name}_bucket", le="+Inf") == 2
        else:
            assert read.value(name, **{label: label for label in metric.labels}) == values[name]


@pytest.mark.parametrize("label", ['a"b', "a\\b", "a\nb", "a\\nb", "größe", "", "a,b=c}"])
def test_any_text_can_be_a_label(label: str) -> None:
    samples = Samples(Role.GATEWAY)
    samples.set("fleetfed_device_model_version", 3, label)
    assert parsed(render(samples).decode()).value("fleetfed_device_model_version", device=label) == 3


@pytest.mark.parametrize("value", [0, -1, 0.1, 1e-9, 1e300, 2.0**63, math.inf, -math.inf, 1763728533123])
def test_a_value_comes_back_as_it_was(value: float) -> None:
    samples = Samples(Role.GATEWAY)
    samples.set("fleetfed_round_number", value)
    assert parsed(render(samples).decode()).value("fleetfed_round_number") == min(value, 2.0**64)


def test_not_a_number_is_one_of_prometheus_values() -> None:
    samples = Samples(Role.COORDINATOR)
    samples.set("fleetfed_model_loss", math.nan, "validation")
    found = parsed(render(samples).decode()).value("fleetfed_model_loss", data="validation")
    assert found is not None
    assert math.isnan(found)


def test_what_is_not_in_the_catalog_cannot_be_exposed() -> None:
    samples = Samples(Role.GATEWAY)
    with pytest.raises(KeyError):
        samples.set("fleetfed_made_up", 1)
    with pytest.raises(AssertionError, match="not gateway's"):
        samples.set("fleetfed_privacy_epsilon", 1)
    with pytest.raises(AssertionError, match="fleetfed_rejected_total"):
        samples.set("fleetfed_rejected_total", 1, "late")


def test_what_a_trust_keeper_says() -> None:
    samples = Samples(Role.HELPER)
    facts.trust(samples, {})
    assert not list(samples.metrics())
    facts.trust(samples, {"expiries": {"root": 2000}, "versions": {"root": 3}, "stale": True, "warnings": []})
    assert samples.value("fleetfed_trust_expiry_timestamp_seconds", "root") == 2
    assert samples.value("fleetfed_trust_version", "root") == 3
    assert samples.value("fleetfed_trust_stale") == 1


def test_the_process_as_the_kernel_sees_it() -> None:
    samples = Samples(Role.HELPER)
    process(samples)
    assert 0 < (samples.value("process_cpu_seconds_total") or 0) <= sum(os.times()[:2]) + 0.02
    assert 1e6 < (samples.value("process_resident_memory_bytes") or 0) < 1e10
    assert 0 < time.time() - (samples.value("process_start_time_seconds") or 0) < 86_400
    assert 3 <= (samples.value("process_open_fds") or 0) <= (samples.value("process_max_fds") or 0)
