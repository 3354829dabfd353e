"""What differential privacy costs: accuracy against epsilon for each mechanism, and how fast noise is drawn.

The digits model (6,090 parameters) on MNIST averaged down to 8x8 pixels: 2,000 devices with 30 examples each, 200 in a
round, 60 rounds. The unit is a device. Every arm goes through the functions that the roles use: clip and round, the
device's, gateway's or coordinator's noise, the ring, the mean. Devices keep their ledgers: none takes part more often,
or sooner, than its plan allows. Nothing is claimed for the chance of not being selected.

Run it with ``nice -n 15 python bench/privacy.py``; needs MNIST (``--data``). Minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.privacy import planner
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState
from fleetfed.cloud_coordinator.privacy.noising import Noise, add_coordinator_noise
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings, next_norm, privacy_of, quantization_of
from fleetfed.shared.aggregate.accumulator import Accumulator, Partial
from fleetfed.shared.aggregate.quantize import mean_delta
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.model.interpreter import Model, Sgd
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.privacy import noise as samplers
from fleetfed.shared.privacy.clipping import clip_and_round
from fleetfed.shared.privacy.mechanism import add_device_noise, add_gateway_noise
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Mode, Plan, Quorum, Weighting
from fleetfed.shared.wire.privacy import Mechanism

ROOT = Path(__file__).resolve().parent.parent
SIDE = 8

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    rounds: int
    devices: int
    cohort: int
    examples: int
    rate: float
    seed: int


class Fleet:
    """The devices' data and one interpreter to train with."""

    def __init__(self, data: Path, setting: Setting) -> None:
        self.setting = setting
        model = zoo.load("digits", setting.seed)
        self.card = model.card
        self.first = read_weights(model.data, model.card.table)
        self._model = Model(model.data, self.card)
        with np.load(data) as arrays:
            self._x, self._y = small(arrays["x_train"]), arrays["y_train"].astype(np.int64)
            self._test = small(arrays["x_test"]), arrays["y_test"].astype(np.int64)
        rng = np.random.default_rng(setting.seed)
        self._parts = rng.permutation(len(self._y))[: setting.devices * setting.examples].reshape(setting.devices, -1)

    def train(self, number: int, device: int, weights: Weights) -> Weights:
        order = np.random.default_rng((self.setting.seed, 2, number, device)).permutation(self._parts[device])
        self._model.set_weights(weights)
        self._model.train_epoch(self._x, self._y, optimizer=Sgd(lr=self.setting.rate, momentum=0.9), order=order)
        return self._model.get_weights() - weights

    def accuracy(self, weights: Weights) -> float:
        self._model.set_weights(weights)
        evaluation = self._model.evaluate(*self._test, chunk=500)
        return evaluation.correct / evaluation.examples


def small(images: NDArray[np.uint8]) -> Weights:
    """28x28 to 8x8: a border cut to 24, then means of 3x3."""
    cut = images[:, 2:26, 2:26].astype(np.float32) / np.float32(255)
    return cut.reshape(-1, SIDE, 3, SIDE, 3).mean(axis=(2, 4), dtype=np.float32)[..., None]


class Ledgers:
    """Who may take part: as devices themselves decide."""

    def __init__(self, setting: Setting, most: int, apart: int) -> None:
        self._setting, self._most, self._apart = setting, most, apart
        self._times = np.zeros(setting.devices, dtype=int)
        self._last = np.full(setting.devices, -(10**9))

    def cohort(self, number: int) -> NDArray[np.int64]:
        may = np.flatnonzero((self._times < self._most) & (number - self._last >= self._apart))
        rng = np.random.default_rng((self._setting.seed, 1, number))
        chosen = rng.choice(may, min(self._setting.cohort, len(may)), replace=False)
        self._times[chosen] += 1
        self._last[chosen] = number
        return chosen


def without(fleet: Fleet) -> tuple[float, list[float]]:
    weights, norms = fleet.first.copy(), []
    ledgers = Ledgers(fleet.setting, 10**9, 1)
    for number in range(fleet.setting.rounds):
        total = np.zeros(weights.size)
        chosen = ledgers.cohort(number)
        for device in chosen:
            delta = fleet.train(number, int(device), weights)
            norms.append(float(np.linalg.norm(delta)))
            total += delta
        weights = (weights + total / len(chosen)).astype(np.float32)
    return fleet.accuracy(weights), norms


def plan_of(fleet: Fleet, settings: PrivacySettings, norm: float) -> Plan:
    sizes = tuple(slot.size for slot in fleet.card.tensors)
    privacy = privacy_of(settings, sum(sizes))
    cohort = fleet.setting.cohort
    split = settings.mechanism in (Mechanism.SKELLAM, Mechanism.SPLIT_CENTRAL)
    return Plan(
        round=1,
        model_version=1,
        model_sha256=bytes(32),
        dimension=sum(sizes),
        quantization=quantization_of(
            settings, privacy, dimension=sum(sizes), tensors=len(sizes), cohort_cap=cohort, norm=norm
        ),
        quorum=Quorum(cohort_cap=cohort),
        mode=Mode.SPLIT if split else Mode.PLAIN,
        split=Split(seal_key=bytes(32), minimum_cohort=max(settings.honest, 2)) if split else None,
        weighting=Weighting.UNIFORM,
        opened=1,
        deadline=2,
        expires=3,
        nonce=bytes(16),
        privacy=privacy,
    )


def private(fleet: Fleet, settings: PrivacySettings) -> tuple[float, float]:
    """The accuracy, and the last clip."""
    weights, norm = fleet.first.copy(), settings.clip
    ledgers = Ledgers(fleet.setting, settings.participations, settings.separation)
    sizes = tuple(slot.size for slot in fleet.card.tensors)
    state: MatrixState | None = None
    privacy = plan_of(fleet, settings, norm).privacy
    assert privacy is not None
    settings = replace(settings, noise_multiplier=privacy.noise_multiplier)
    keys = np.random.default_rng((fleet.setting.seed, 4))
    for number in range(fleet.setting.rounds):
        plan = plan_of(fleet, settings, norm)
        scheme = scheme_of(plan, sizes)
        ring = scheme.ring
        total = Accumulator(ring, capacity=fleet.setting.cohort)
        for device in ledgers.cohort(number):
            delta = fleet.train(number, int(device), weights)
            made = clip_and_round(delta, scheme.grid, clip=privacy.clip, rng=keys)
            meta = ring.meta.encode_private(beyond=made.beyond)
            values, meta = add_device_noise(made.values, meta, ring, privacy, keys.bytes(32))
            total.merge(Partial(ring, ring.layout.pack(values, meta), 1))
        released = add_gateway_noise(total.report(), keys.bytes(32))
        noise = Noise(key=keys.bytes(32), round=number, state=state, mechanism="bench")
        noised = add_coordinator_noise(released, privacy, noise)
        state = noised.state
        step = mean_delta(noised.values, scheme.grid, weight=noised.meta.weight)
        weights = (weights + step).astype(np.float32)
        norm = next_norm(plan, noised.meta, settings)
    return fleet.accuracy(weights), norm


def arms(clip: float, fleet: planner.Fleet, epsilons: list[float]) -> list[tuple[str, PrivacySettings]]:
    most = fleet.usual_participations()
    found = []
    for epsilon in epsilons:
        base = PrivacySettings(epsilon=epsilon, delta=1e-6, participations=most, clip=clip)
        apart = max(fleet.devices // fleet.cohort - 2, 2)
        found += [
            ("central", base),
            ("central, clip adapts", replace(base, quantile=0.5, flag_noise=fleet.cohort / 10)),
            ("split_central", replace(base, mechanism=Mechanism.SPLIT_CENTRAL, sums=1)),
            ("skellam", replace(base, mechanism=Mechanism.SKELLAM, honest=fleet.cohort * 4 // 5)),
            (
                "matrix",
                replace(
                    base,
                    mechanism=Mechanism.MATRIX,
                    band=apart,
                    separation=apart,
                    participations=min(most, -(-fleet.rounds // apart)),
                ),
            ),
        ]
    return found


def speed() -> list[dict[str, Any]]:
    rows = []
    count, key = 1 << 20, bytes(32)
    for name, sample in (("discrete gaussian", samplers.discrete_gaussian), ("skellam", samplers.skellam)):
        for sigma in (3.0, 8.0, 64.0, 1000.0, 8000.0, 30_000.0):
            started = time.perf_counter()
            sample(1, sigma, key)
            built = time.perf_counter() - started
            times = []
            for _ in range(5):
                started = time.perf_counter()
                sample(count, sigma, key)
                times.append(time.perf_counter() - started)
            rows.append({"sampler": name, "sigma": sigma, "table_ms": 1e3 * built, "ms": 1e3 * sorted(times)[2]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mnist.npz")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--cohort", type=int, default=200)
    parser.add_argument("--examples", type=int, default=30)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--clip", type=float, default=0.0, help="by default the median delta's norm")
    parser.add_argument("--epsilon", type=float, action="append", help="may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    rows = speed()
    print(f"{'sampler, 2^20 samples':24}{'sigma':>8}{'table ms':>10}{'ms':>8}")
    for row in rows:
        print(f"{row['sampler']:24}{row['sigma']:8g}{row['table_ms']:10.0f}{row['ms']:8.0f}", flush=True)
    if given.speed_only:
        return 0
    if not given.data.exists():
        print(f"privacy: {given.data} is not there: pass --data mnist.npz", file=sys.stderr)
        return 2
    setting = Setting(given.rounds, given.devices, given.cohort, given.examples, given.rate, given.seed)
    fleet = Fleet(given.data, setting)
    started = time.monotonic()
    plain, norms = without(fleet)
    clip = given.clip or float(np.median(norms))
    print(
        f"\nwithout: accuracy {100 * plain:.2f} %; deltas {np.percentile(norms, [10, 50, 90]).round(3)} long",
        flush=True,
    )
    print(f"\n{'mechanism':24}{'epsilon':>8}{'z':>8}{'noise/signal':>14}{'accuracy':>10}{'lost':>7}")
    planned = planner.Fleet(
        devices=given.devices,
        cohort=given.cohort,
        rounds=given.rounds,
        parameters=fleet.card.parameters,
        tensors=len(fleet.card.tensors),
    )
    found = []
    for name, settings in arms(clip, planned, given.epsilon or [2.0, 8.0]):
        expected = planner.plan(settings, planned)
        accuracy, last = private(fleet, settings)
        row = {
            "mechanism": name,
            "epsilon": expected["epsilon"],
            "z": expected["noise_multiplier"],
            "noise_to_signal_run": expected["noise_to_signal_run"],
            "accuracy": accuracy,
            "clip": last,
        }
        found.append(row)
        print(
            f"{name:24}{row['epsilon']:8.2f}{row['z']:8.3g}{row['noise_to_signal_run']:14.3f}"
            f"{100 * accuracy:9.2f}%{100 * (plain - accuracy):7.2f}",
            flush=True,
        )
    print(f"{time.monotonic() - started:.0f} s")
    if given.json:
        given.json.write_text(json.dumps({"samplers": rows, "without": plain, "private": found}, indent=1) + "\n")
    assert all(math.isfinite(row["accuracy"]) for row in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
