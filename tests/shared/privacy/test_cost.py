"""What a plan's noise is worth, without an accountant: a promise that it does not earn is seen through."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fleetfed.shared.privacy.cost import check_promise, coefficients, fineness, gaussian_delta
from fleetfed.shared.wire.privacy import Mechanism, Privacy


def privacy(mechanism: Mechanism = Mechanism.SPLIT_CENTRAL, **given: Any) -> Privacy:
    defaults: dict[str, Any] = {
        "clip": 1e6,
        "noise_multiplier": 5.0,
        "max_participations": 50,
        "epsilon": 7.287,
        "delta": 1e-6,
        "honest": 8 if mechanism is Mechanism.SKELLAM else 0,
    }
    return Privacy(mechanism=mechanism, **(defaults | given))


def test_the_published_numbers() -> None:
    """Section 7.3 of the specification: 50 rounds of noise 5 are worth epsilon 7.286 at delta 1e-6."""
    assert gaussian_delta(math.sqrt(50) / 5, 7.2860) == pytest.approx(1e-6, rel=2e-3)
    check_promise(privacy(), 1000)
    with pytest.raises(ValueError, match="does not earn"):
        check_promise(privacy(epsilon=7.28), 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 1.0},
        {"noise_multiplier": 4.9},
        {"max_participations": 51},
        {"delta": 9e-7},
        {"delta": 0.0},
        {"clip": 20.0},
        {"flag_noise": 10.0},
        {"epsilon": 0.0},
    ],
)
@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_what_the_noise_does_not_earn_may_not_be_promised(mechanism: Mechanism, change: dict[str, Any]) -> None:
    """A coordinator that noise is to protect from could write any number into its plan."""
    if mechanism is Mechanism.MATRIX and "flag_noise" in change:
        pytest.skip("the plan is refused for having one")
    if mechanism in (Mechanism.MATRIX, Mechanism.SKELLAM) and "clip" in change:
        pytest.skip("its noise does not get coarser with fewer levels, or hardly")
    honest = privacy(mechanism)
    low, high = 1.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        try:
            check_promise(replace(honest, epsilon=middle), 1000)
            high = middle
        except ValueError:
            low = middle
    honest = replace(honest, epsilon=high * 1.0001)
    check_promise(honest, 1000)
    with pytest.raises(ValueError, match="does not earn"):
        check_promise(replace(honest, **change), 1000)


@pytest.mark.parametrize("ratio", [1e-5, 0.01, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5, 20.0, 600.0, 1e6])
def test_no_promise_is_beyond_its_arithmetic(ratio: float, epsilon: float) -> None:
    delta = gaussian_delta(ratio, epsilon)
    assert -1e-12 <= delta <= 1
    assert gaussian_delta(ratio, epsilon * 1.1) <= delta + 1e-12
    assert gaussian_delta(ratio * 1.1, epsilon) >= delta - 1e-12


def test_correlated_noise_is_as_fine_as_thirty_two_bits_hold() -> None:
    assert [fineness(sigma) for sigma in (4.0, 2000.0, 4096.0, 5000.0, 2.0**27)] == [65536, 65536, 32768, 16384, 1]
    assert all(2.0**31 / (sigma * fineness(sigma)) >= 16 for sigma in (4.0, 777.0, 123_456.0, 2.0**27))
    assert list(coefficients(100)) == sorted(coefficients(100), reverse=True)
