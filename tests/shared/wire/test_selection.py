from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.selection import selected

devices = [f"d-{number:04}" for number in range(2000)]


@given(st.binary(min_size=32, max_size=32), st.text("abc", min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_selects_all_of_a_smaller_one(plan: bytes, device: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert not selected(Digest(plan), device, low) or selected(Digest(plan), device, high)


def test_everybody_or_nobody() -> None:
    plan = Digest(os.urandom(32))
    assert all(selected(plan, device, 1.0) for device in devices)
    assert not any(selected(plan, device, 0.0) for device in devices)


def test_the_fraction_is_met_and_every_plan_draws_anew() -> None:
    first, second = ({d for d in devices if selected(Digest(bytes([n]) * 32), d, 0.3)} for n in (1, 2))
    for drawn in (first, second):
        assert 500 < len(drawn) < 700  # 600 expected, five standard deviations are 102
    assert 100 < len(first & second) < 260  # independent draws share 180
