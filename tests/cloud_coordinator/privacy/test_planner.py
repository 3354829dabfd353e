"""The planner: what it says follows from the budget, and it claims nothing that was not measured."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner
from fleetfed_testing.cloud import write_model

from fleetfed.cloud_coordinator.cli.app import cli
from fleetfed.cloud_coordinator.privacy import planner
from fleetfed.cloud_coordinator.privacy.planner import Fleet
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.privacy import Mechanism

dpa = pytest.importorskip("dp_accounting")
FLEET = Fleet(devices=2000, cohort=200, rounds=100, parameters=6090)


def test_the_noise_is_what_the_library_says() -> None:
    found = planner.plan(PrivacySettings(participations=16), FLEET)
    assert found["noise_multiplier"] == pytest.approx(dpa.get_sigma_gaussian(8.0, 1e-6) * 4, rel=2e-3)
    assert 7.9 < found["epsilon"] <= 8.0
    # One coordinate of the mean: z * clip / cohort, but for what rounding adds.
    assert found["sigma_per_weight"] == pytest.approx(found["noise_multiplier"] / 200, rel=0.01)
    ratio = found["noise_multiplier"] * math.sqrt(6090) / 200
    assert found["noise_to_signal_round"] == pytest.approx(ratio, rel=1e-6)
    assert found["noise_to_signal_run"] == pytest.approx(ratio / 10, rel=1e-6)
    assert found["warnings"] == []


def test_each_mechanism_says_whom_it_protects_against() -> None:
    for mechanism, extra, knows in (
        (Mechanism.CENTRAL, {}, "exact sums"),
        (Mechanism.MATRIX, {"band": 8, "separation": 8}, "exact sums"),
        (Mechanism.SPLIT_CENTRAL, {}, "gateway's noise"),
        (Mechanism.SKELLAM, {"honest": 160}, "devices' noise"),
    ):
        found = planner.plan(PrivacySettings(mechanism=mechanism, participations=12, **extra), FLEET)  # type: ignore[arg-type]
        rows = {row["who"]: row["learns"] for row in found["adversaries"]}
        assert set(rows) == {
            "device owner",
            "broker",
            "gateway",
            "coordinator",
            "helper",
            "gateway and coordinator",
            "the same, where there is a helper that helps neither",
            "public",
        }
        assert knows in rows["coordinator"]
        assert "every update" in rows["gateway and coordinator"]
        # A gateway knows its own noise, and can take it out of what the coordinator has; devices' noise nobody can.
        together = rows["the same, where there is a helper that helps neither"]
        assert ("exact sums" in together) == (mechanism is not Mechanism.SKELLAM)
        # Both of these run in plain mode too, where nothing is encrypted to anybody.
        plain = mechanism in (Mechanism.CENTRAL, Mechanism.MATRIX)
        assert ("plain mode" in rows["gateway"]) == ("plain mode" in rows["broker"]) == plain
        assert ("brokers" in found["honest"]) == plain


def test_correlated_noise_leaves_the_model_less_of_it() -> None:
    independent = planner.plan(PrivacySettings(participations=12), FLEET)
    matrix = planner.plan(PrivacySettings(mechanism=Mechanism.MATRIX, participations=12, band=8, separation=8), FLEET)
    assert matrix["noise_to_signal_run"] < independent["noise_to_signal_run"] / 2


def test_more_budget_less_noise() -> None:
    rows = planner.compare(PrivacySettings(participations=16), FLEET)
    ratios = [row["noise_to_signal_run"] for row in rows]
    assert ratios == sorted(ratios, reverse=True)


def test_accuracy_is_only_what_was_measured() -> None:
    known = [ratio for ratio, _ in planner.MEASURED]
    assert known == sorted(known)
    assert planner.accuracy(1e9)["points_lost_at_most"] is None
    assert "digits" in planner.accuracy(1e9)["basis"]
    for ratio, lost in planner.MEASURED:
        assert planner.accuracy(ratio)["points_lost_at_most"] == lost


def test_it_objects_to_what_a_careful_reader_would() -> None:
    loose = planner.plan(PrivacySettings(participations=2, delta=1e-3, separation=50, epsilon=20.0), FLEET)
    text = " ".join(loose["warnings"])
    for word in ("delta", "average", "rest", "little meaning"):
        assert word in text
    with pytest.raises(ConfigError, match="cohort"):
        Fleet(devices=10, cohort=11, rounds=1, parameters=10)
    assert Fleet(devices=100, cohort=100, rounds=30, parameters=10).usual_participations() == 30
    assert 10 < FLEET.usual_participations() < 20


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_the_command_speaks_to_people_and_programs(mechanism: Mechanism) -> None:
    call = ["privacy", "plan", "--epsilon", "4", "--rounds", "64", "--mechanism", mechanism.value]
    said = CliRunner().invoke(cli, call, catch_exceptions=False)
    assert said.exit_code == 0
    assert "noise multiplier" in said.output
    assert "gateway and coordinator" in said.output
    found = json.loads(CliRunner().invoke(cli, [*call, "--json"], catch_exceptions=False).output)
    assert found["epsilon"] <= 4
    assert len(found["budgets"]) == 5


def test_the_command_reads_a_models_size_from_its_card(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = write_model(tmp_path)
    call = ["privacy", "plan", "--model", str(model), "--resolution", "20", "--json"]
    found = json.loads(CliRunner().invoke(cli, call, catch_exceptions=False).output)
    assert found["clip_levels"] == pytest.approx(20 * math.sqrt(65), rel=0.01)
