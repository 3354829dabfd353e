"""Deals examples out to devices. Everything is drawn from a given generator, so a seed repeats a fleet.

All functions return one index array per device; no example is dealt twice, and each device gets at least
``minimum`` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError

Indices = NDArray[np.intp]
Labels = NDArray[np.integer[Any]]


def uniform(labels: Labels, devices: int, rng: np.random.Generator, *, minimum: int = 1) -> list[Indices]:
    """Every device gets the same mixture.

    Args:
        labels: shape (n,).
        devices: how many.
        rng: source of the deal.
        minimum: fewest examples of a device.

    Raises:
        ConfigError: there are not enough examples.
    """
    _enough(len(labels), devices, minimum)
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), devices)]


def dirichlet(
    labels: Labels, devices: int, rng: np.random.Generator, *, alpha: float, minimum: int = 1
) -> list[Indices]:
    """Non-IID: for every class, the devices' shares are drawn from a Dirichlet distribution.

    Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 3. A small ``alpha`` gives each class to few devices, a large one nears `uniform`.
    Devices that end up with fewer than ``minimum`` examples take some from the largest.

    Args:
        labels: shape (n,).
        devices: how many.
        rng: source of the deal.
        alpha: concentration, above 0.
        minimum: fewest examples of a device.

    Raises:
        ConfigError: ``alpha`` is not above 0, or there are not enough examples.
    """
    if not alpha > 0:
        raise ConfigError(f"alpha {alpha} must be above 0; 0.5 is common, 100 is nearly the same mixture for all")
    _enough(len(labels), devices, minimum)
    parts: list[list[Indices]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        # Logarithms of gamma variates keep tiny alphas from underflowing to 0 / 0.
        logs = np.log(rng.gamma(alpha + 1, size=devices)) + np.log(rng.random(devices)) / alpha
        shares = np.exp(logs - logs.max())
        cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(np.intp)
        for part, dealt in zip(parts, np.split(members, cuts), strict=True):
            part.append(dealt)
    return _level([np.concatenate(part) for part in parts], rng, minimum)


def shards(
    labels: Labels, devices: int, rng: np.random.Generator, *, per_device: int = 2, minimum: int = 1
) -> list[Indices]:
    """Non-IID: sort by label, cut into equal shards, deal ``per_device`` of them to each device.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section 3.

    Args:
        labels: shape (n,).
        devices: how many.
        rng: source of the deal.
        per_device: shards of a device; about as many labels.
        minimum: fewest examples of a device.

    Raises:
        ConfigError: there are not enough examples.
    """
    _enough(len(labels), devices, max(minimum, per_device))
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, devices * per_device)
    dealt = rng.permutation(len(pieces)).reshape(devices, per_device)
    return [np.sort(np.concatenate([pieces[number] for number in row])) for row in dealt]


def limit(parts: Sequence[Indices], most: int, rng: np.random.Generator) -> list[Indices]:
    """Leave each device at most ``most`` examples, drawn at random."""
    return [np.sort(rng.permutation(part)[:most]) for part in parts]


def _level(parts: list[Indices], rng: np.random.Generator, minimum: int) -> list[Indices]:
    """Move examples from the largest parts to those below ``minimum``."""
    parts = [rng.permutation(part) for part in parts]
    for number in range(len(parts)):
        while len(parts[number]) < minimum:
            donor = max(range(len(parts)), key=lambda each: len(parts[each]))
            spare = min(len(parts[donor]) - minimum, minimum - len(parts[number]))
            assert spare > 0, "enough examples for all were counted before"
            parts[number] = np.concatenate([parts[number], parts[donor][:spare]])
            parts[donor] = parts[donor][spare:]
    return [np.sort(part) for part in parts]


def _enough(examples: int, devices: int, minimum: int) -> None:
    if devices < 1:
        raise ConfigError(f"{devices} devices: give at least 1")
    if examples < devices * minimum:
        raise ConfigError(
            f"{examples} examples are not enough for {devices} devices of at least {minimum} each; use fewer devices"
        )
