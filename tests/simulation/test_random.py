"""Whatever happens to a fleet, in whatever order: nothing counts twice, nothing accepted is lost, all rounds end."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.simulation.ops import StartRound, operations
from tests.simulation.setting import BUCKETS, HELPED, PLAIN, SPLIT, Setting
from tests.simulation.world import simulate

_SETTINGS = {"plain": PLAIN, "split": SPLIT, "buckets": BUCKETS, "helped": HELPED}
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def run(setting: Setting, runs: int, **options: object) -> None:
    """So many random runs."""

    @settings(max_examples=runs, suppress_health_check=_QUIET, **options)  # type: ignore[arg-type]
    @given(st.integers(1, 2), operations(setting), st.integers(0, 1000))
    def look(rounds: int, done: list[object], seed: int) -> None:
        simulate([StartRound(rounds), *done], seed=seed, setting=setting)  # type: ignore[list-item]

    look()


# Time does not matter here: what a machine under load cannot do in a minute is no failure.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "runs"), [("plain", 12), ("split", 5), ("buckets", 5), ("helped", 5)])
def test_random_operations(name: str, runs: int) -> None:
    run(_SETTINGS[name], runs, phases=[Phase.explicit, Phase.generate, Phase.shrink])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", _SETTINGS)
def test_many_random_operations(name: str) -> None:
    run(_SETTINGS[name], 1500, derandomize=False, print_blob=True)
