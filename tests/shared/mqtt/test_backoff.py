from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.mqtt.backoff import FIRST, STABLE, Backoff


@settings(deadline=None)
@given(st.integers(), st.floats(0.0, 3600.0), st.integers(1, 100))
def test_delays_stay_below_a_bound_that_only_grows(seed: int, cap: float, attempts: int) -> None:
    backoff = Backoff(random.Random(seed), cap=cap)
    bounds = []
    for _ in range(attempts):
        bounds.append(backoff.bound)
        assert 0.0 <= backoff.delay() <= bounds[-1] <= cap
    assert bounds == sorted(bounds)
    assert bounds[0] <= FIRST


def test_only_a_connection_that_lasted_makes_the_next_retry_fast() -> None:
    backoff = Backoff(random.Random(1))
    for _ in range(5):
        backoff.delay()
    backoff.connected_for(STABLE / 2)
    assert backoff.bound == 16.0
    backoff.connected_for(STABLE)
    assert backoff.bound == FIRST


def test_bound_stays_finite_after_a_long_time_offline() -> None:
    backoff = Backoff(random.Random(1))
    for _ in range(5000):
        backoff.delay()
    assert backoff.bound == 60.0
