"""The table of metrics follows Prometheus' rules, and no reason is without a failure mode."""

import dataclasses
import re

import pytest

from fleetfed.broker.counters import Counters
from fleetfed.device.events import Fate
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.monitoring import failures
from fleetfed.shared.monitoring.catalog import CATALOG, PORTS, SERIES, Kind, Metric, Role, of_role
from fleetfed.shared.monitoring.failures import MODES, Failure
from fleetfed.shared.wire.messages import DeclineReason

_STANDARD = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
}


@pytest.mark.parametrize("metric", CATALOG.values(), ids=CATALOG.keys())
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert metric.name in _STANDARD or re.fullmatch(r"fleetfed(_[a-z0-9]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not re.search(r"_(count|sum|bucket|ms|kb|mb|minutes|hours|percent)$", metric.name)
    assert metric.help.endswith(".")
    assert metric.roles
    assert len(set(metric.labels)) == len(metric.labels)
    assert all(re.fullmatch(r"[a-z]+", label) and label not in ("le", "job", "instance") for label in metric.labels)
    assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_series_are_unambiguous() -> None:
    assert len(SERIES) == sum(len(metric.series) for metric in CATALOG.values())


def test_every_role_has_a_port_and_metrics() -> None:
    assert set(PORTS) == set(Role)
    assert len(set(PORTS.values())) == len(PORTS)
    for role in Role:
        assert {"fleetfed_build_info", "fleetfed_ready", "fleetfed_failures_total"} <= of_role(role).keys()


def test_every_reject_reason_has_a_failure_mode() -> None:
    assert set(failures.REJECTED) == set(RejectReason)


def test_every_decline_reason_has_a_failure_mode() -> None:
    assert set(failures.DECLINED) == set(DeclineReason)


def test_every_outcome_of_a_device_has_a_failure_mode() -> None:
    # What is pending has no outcome yet; a decline and a conflict are told beside the fates.
    assert set(failures.OUTCOMES) == {str(fate) for fate in Fate if fate is not Fate.PENDING} | {"declined", "conflict"}


def test_every_broker_counter_has_a_failure_mode_or_a_metric() -> None:
    shown = {"connections", "bytes_received", "bytes_sent", "messages_received", "messages_sent"}
    assert set(failures.BROKER) == {field.name for field in dataclasses.fields(Counters)} - shown


def test_every_mode_has_a_reason() -> None:
    tables = (failures.REJECTED, failures.DECLINED, failures.OUTCOMES, failures.ABORTS, failures.BROKER)
    assert {mode for table in tables for mode in table.values()} == {Failure.NONE, *MODES}


@pytest.mark.parametrize(
    ("reason", "step", "expected"),
    [
        ("below_minimum: 1 of at least 2 contributors", False, ("below_minimum", Failure.DROPOUT)),
        ("enough for today", False, ("operator", Failure.NONE)),
        ("late night", False, ("operator", Failure.NONE)),
        ("the round's sum cannot be applied: nan", True, ("step", Failure.DIVERGENCE)),
    ],
)
def test_aborts(reason: str, step: bool, expected: tuple[str, Failure]) -> None:
    assert failures.of_abort(reason, step=step) == expected


def test_what_somebody_made_up_is_other() -> None:
    assert failures.of_rejection("my_label") == ("other", Failure.NONE)
    assert failures.of_decline("late") == ("other", Failure.NONE)
    assert failures.of_rejection("late") == ("late", Failure.DROPOUT)
