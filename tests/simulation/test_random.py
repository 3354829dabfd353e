"""Whatever happens to a fleet, in whatever order: nothing counts twice, nothing accepted is lost, all rounds end."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation.ops import Op, StartRound, operations
from tests.simulation.world import simulate

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=120, suppress_health_check=_QUIET)
@given(operations, st.integers(0, 1000))
def test_random_operations(done: list[Op], seed: int) -> None:
    simulate([StartRound(2), *done], seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, derandomize=False, suppress_health_check=_QUIET, print_blob=True)
@given(operations, st.integers(0, 1000))
def test_many_random_operations(done: list[Op], seed: int) -> None:
    simulate([StartRound(2), *done], seed=seed)
