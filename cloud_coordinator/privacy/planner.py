"""What a budget buys before anything runs: noise, lanes, signal against noise, and what each party would learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

from fleetfed.cloud_coordinator.privacy import accounting
from fleetfed.cloud_coordinator.privacy.matrix import prefix_rmse
from fleetfed.cloud_coordinator.privacy.settings import (
    PrivacySettings,
    norm_levels,
    privacy_of,
    quantization_of,
)
from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.privacy.mechanism import ring_noise
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.wire.privacy import Mechanism, Privacy

_META_WORDS: Final = 2
_OWNERS: Final = 1.1
"""delta should be at most devices to the power of minus this."""

MEASURED: Final[tuple[tuple[float, float], ...]] = (
    (0.28, 1.2),
    (0.375, 3.4),
    (0.45, 9.5),
    (0.53, 9.5),
    (0.71, 21.0),
    (1.0, 42.0),
)
"""Noise to signal over the run, and points of accuracy that it cost the digits model (`bench/privacy.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is to be planned for.

    Attributes:
        devices: enrolled.
        cohort: that take part in one round.
        rounds: to run.
        parameters: of the model.
        tensors: of the model.
        sites: leaf gateways.
    """

    devices: int
    cohort: int
    rounds: int
    parameters: int
    tensors: int = 4
    sites: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.devices:
            raise ConfigError(f"a cohort of {self.cohort} out of {self.devices} devices: give 1 to {self.devices}")

    def usual_participations(self) -> int:
        """A cap that few devices reach when all come equally often: the mean and two standard deviations."""
        mean = self.rounds * self.cohort / self.devices
        return min(self.rounds, math.ceil(mean + 2 * math.sqrt(mean * (1 - self.cohort / self.devices))))


def plan(settings: PrivacySettings, fleet: Fleet) -> dict[str, Any]:
    """Everything that can be said about settings before a round runs, as plain values.

    Raises:
        ConfigError: no noise keeps the budget, or dp-accounting is not installed.
    """
    privacy = privacy_of(settings, fleet.parameters)
    quantization = quantization_of(
        settings,
        privacy,
        dimension=fleet.parameters,
        tensors=fleet.tensors,
        cohort_cap=fleet.cohort,
        norm=settings.clip,
    )
    layout = LaneLayout(fleet.parameters, quantization.lane_bits, _META_WORDS)
    noise = ring_noise(privacy)
    assert noise is not None
    total = total_noise(privacy, fleet)
    # The longest delta that is not clipped, as one level of it: noise in units of the weights.
    unit = settings.clip / norm_levels(settings, fleet.parameters)
    per_round = total / privacy.clip * math.sqrt(fleet.parameters) / fleet.cohort
    return {
        "mechanism": privacy.mechanism.value,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "unit": accounting.UNIT,
        "relation": accounting.RELATION,
        "max_participations": privacy.max_participations,
        "min_separation": privacy.min_separation,
        "noise_multiplier": privacy.noise_multiplier,
        "sigma_levels": privacy.noise_multiplier * privacy.clip,
        "sigma_per_weight": total * unit / fleet.cohort,
        "clip_levels": privacy.clip,
        "rounding_inflation": privacy.clip / norm_levels(settings, fleet.parameters),
        "bits": quantization.bits,
        "lane_bits": quantization.lane_bits,
        "lanes_per_word": layout.lanes,
        "bytes_per_update_masked": body_size(layout.n_words),
        "noise_to_signal_round": per_round,
        "noise_to_signal_run": per_round * run_factor(privacy, fleet.rounds),
        "honest": accounting.TRUSTED[privacy.mechanism],
        "adversaries": adversaries(privacy),
        "accuracy": accuracy(per_round * run_factor(privacy, fleet.rounds)),
        "warnings": warnings(settings, privacy, fleet),
    }


def total_noise(privacy: Privacy, fleet: Fleet) -> float:
    """Deviation of all noise in the sum of a round, in levels."""
    sigma = privacy.noise_multiplier * privacy.clip
    if privacy.mechanism is Mechanism.SPLIT_CENTRAL:
        return sigma * math.sqrt(fleet.sites + 1)
    if privacy.mechanism is Mechanism.SKELLAM:
        return sigma * math.sqrt(max(fleet.cohort / privacy.honest, 1.0))
    return sigma


def run_factor(privacy: Privacy, rounds: int) -> float:
    """Noise over signal of the model after all rounds, over that of one round, if every step points the same way."""
    if privacy.mechanism is Mechanism.MATRIX:
        return prefix_rmse(rounds, privacy.band) / rounds
    return 1 / math.sqrt(rounds)


def accuracy(ratio: float) -> dict[str, Any]:
    """What is known of the accuracy that noise costs; nothing is promised for another model or other data."""
    basis = "measured on the digits model only (bench/privacy.py, docs/privacy.md); other models differ"
    nearest = [lost for known, lost in MEASURED if known >= ratio]
    if not MEASURED or not nearest:
        return {"points_lost_at_most": None, "basis": f"beyond what was {basis}"}
    return {"points_lost_at_most": nearest[0], "basis": basis}


def adversaries(privacy: Privacy) -> list[dict[str, str]]:
    """What each party would learn; of parties together, what they learn beside what each of them does."""
    within = f"the noised models: epsilon {privacy.epsilon:.3g} at delta {privacy.delta:g}"
    exact = "exact sums of each cohort"
    broker = "who takes part and when; sizes, which are equal"
    gateway, coordinator, both, joined, device = within, within, "every update", exact, within
    match privacy.mechanism:
        case Mechanism.CENTRAL | Mechanism.MATRIX:
            coordinator = exact
            gateway = f"{within}; in plain mode every update of its site"
            broker = f"{broker}; in plain mode whatever passes it: updates, or exact sums"
        case Mechanism.SPLIT_CENTRAL:
            coordinator = f"sums with the gateway's noise: epsilon {privacy.epsilon:.3g}"
            gateway = f"its own noise, and models with the coordinator's: epsilon {privacy.epsilon:.3g}"
        case Mechanism.SKELLAM:
            coordinator = f"sums with the devices' noise: epsilon {privacy.epsilon:.3g}"
            both = "every update, with one device's share of the noise: nearly nothing hidden"
            joined = coordinator
            device = f"{within}; each knows its own share of the noise, {privacy.honest} honest others must remain"
    return [
        {"who": "device owner", "learns": device},
        {"who": "broker", "learns": broker},
        {"who": "gateway", "learns": gateway},
        {"who": "coordinator", "learns": coordinator},
        {"who": "helper", "learns": f"who takes part and when; {within}"},
        {"who": "gateway and coordinator", "learns": both},
        {"who": "the same, where there is a helper that helps neither", "learns": joined},
        {"who": "public", "learns": within},
    ]


def warnings(settings: PrivacySettings, privacy: Privacy, fleet: Fleet) -> list[str]:
    """What a careful reader would object to."""
    found = []
    least = fleet.devices**-_OWNERS
    if settings.delta > least:
        found.append(f"delta {settings.delta:g} is more than {least:.1e}, devices to the power of -1.1")
    mean = fleet.rounds * fleet.cohort / fleet.devices
    if privacy.max_participations < mean:
        found.append(
            f"devices would take part {mean:.0f} times on average and stop after {privacy.max_participations}: the "
            "cohort will shrink before the last round"
        )
    if privacy.min_separation > max(fleet.devices // fleet.cohort, 1):
        found.append(
            f"{fleet.devices} devices that rest {privacy.min_separation - 1} rounds cannot fill cohorts of "
            f"{fleet.cohort}"
        )
    if privacy.epsilon > 10:
        found.append(f"epsilon {privacy.epsilon:.3g} is a bound of little meaning")
    return found


def compare(
    settings: PrivacySettings, fleet: Fleet, epsilons: tuple[float, ...] = (1, 2, 4, 8, 16)
) -> list[dict[str, Any]]:
    """The same for several budgets."""
    rows = []
    for epsilon in epsilons:
        found = plan(replace(settings, epsilon=epsilon, noise_multiplier=0.0), fleet)
        rows.append({name: found[name] for name in ("epsilon", "noise_multiplier", "noise_to_signal_run", "lane_bits")})
    return rows
