"""Properties of every way to deal examples out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.demo import partition
from fleetfed.cloud_coordinator.demo.partition import Indices, Labels
from fleetfed.shared.errors import ConfigError

Dealer = Callable[[Labels, int, np.random.Generator, int], list[Indices]]

DEALERS: dict[str, Dealer] = {
    "uniform": lambda labels, devices, rng, minimum: partition.uniform(labels, devices, rng, minimum=minimum),
    "dirichlet": lambda labels, devices, rng, minimum: partition.dirichlet(
        labels, devices, rng, alpha=0.3, minimum=minimum
    ),
    "shards": lambda labels, devices, rng, minimum: partition.shards(labels, devices, rng, minimum=minimum),
}


@st.composite
def deals(draw: st.DrawFn) -> tuple[Labels, int, int, int]:
    devices = draw(st.integers(1, 12))
    minimum = draw(st.integers(2, 6))
    size = draw(st.integers(devices * minimum, 300))
    classes = draw(st.integers(1, 10))
    seed = draw(st.integers(0, 1000))
    return np.random.default_rng(seed).integers(0, classes, size), devices, minimum, seed


@pytest.mark.parametrize("name", DEALERS)
@given(deal=deals())
def test_every_example_has_one_owner_and_every_owner_enough(name: str, deal: tuple[Labels, int, int, int]) -> None:
    labels, devices, minimum, seed = deal
    parts = DEALERS[name](labels, devices, np.random.default_rng(seed), minimum)
    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    if name != "shards":
        assert min(len(part) for part in parts) >= minimum


@pytest.mark.parametrize("name", DEALERS)
def test_a_seed_repeats_a_deal(name: str) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 500)
    one, two = (DEALERS[name](labels, 7, np.random.default_rng(5), 4) for _ in range(2))
    other = DEALERS[name](labels, 7, np.random.default_rng(6), 4)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def skew(parts: list[Indices], labels: Labels) -> float:
    """Mean part of a device's examples that its most frequent label makes up."""
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def test_a_smaller_alpha_is_less_alike() -> None:
    labels = np.repeat(np.arange(10), 200)
    skews = [
        np.mean(
            [
                skew(partition.dirichlet(labels, 10, np.random.default_rng(seed), alpha=alpha, minimum=8), labels)
                for seed in range(10)
            ]
        )
        for alpha in (0.05, 0.5, 100.0)
    ]
    assert skews[0] > skews[1] > skews[2]
    assert skews[2] < 0.2


def test_the_smallest_alpha_does_not_underflow() -> None:
    labels = np.repeat(np.arange(3), 100)
    parts = partition.dirichlet(labels, 4, np.random.default_rng(0), alpha=1e-6, minimum=5)
    assert sum(len(part) for part in parts) == 300


def test_shards_give_each_device_few_labels() -> None:
    labels = np.repeat(np.arange(10), 60)
    parts = partition.shards(labels, 10, np.random.default_rng(0))
    assert max(len(np.unique(labels[part])) for part in parts) <= 4
    assert {len(part) for part in parts} == {60}


def test_a_limit_keeps_a_sample() -> None:
    parts = [np.arange(100), np.arange(100, 105)]
    kept = partition.limit(parts, 10, np.random.default_rng(0))
    assert [len(part) for part in kept] == [10, 5]
    assert set(kept[0]) <= set(parts[0])
    assert kept[0].max() > 10


@pytest.mark.parametrize("name", DEALERS)
def test_too_few_examples_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not enough"):
        DEALERS[name](np.zeros(9, np.int64), 5, np.random.default_rng(0), 2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        partition.dirichlet(np.zeros(9, np.int64), 2, np.random.default_rng(0), alpha=alpha)
