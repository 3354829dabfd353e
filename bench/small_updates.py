"""Masked updates of at most 100 KB: FedKeeper's CNN within a subspace against whole updates at 4 bits.

The setting of ``wire_accuracy.py`` (582,026 parameters, MNIST, 100 devices with two label shards each, 20 in a round,
one epoch, 25 rounds). Masked words do not compress, so a body is 8 bytes for each word, whatever is in it. Arms:

``whole``      every value at 4 bits, as plain mode sends it, and no momentum; what the others are compared with
``momentum``   the same with the server momentum that the following have
``confined``   what the product does with ``update_bytes``: devices train within the subspace that travels
``projected``  devices train everything, and what lies in the same subspace travels
``blocks``     devices train everything; as many single values travel, in blocks of 64: those that moved most in the
               last rounds, and a quarter at random

All but the last go through the functions that the roles use: choose, train, project, quantize, pack into words (which
is what a mask is added to), add, unpack, lift, step, patch.

Run ``python bench/small_updates.py``; each arm takes five to ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from wire_accuracy import Fleet, Settings, Weights

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.training.basis import choose
from fleetfed.cloud_coordinator.training.clips import ClipConfig, first_clips, next_clips
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, OptimizerName, make_optimizer
from fleetfed.device.confined import Confined
from fleetfed.shared.aggregate.accumulator import Accumulator, Partial, Ring, check_partial
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.projection import Subspace
from fleetfed.shared.aggregate.quantize import Grid, mean_delta, quantize
from fleetfed.shared.model.interpreter import Adam
from fleetfed.shared.model.patch import DEFAULT_CLIP, apply_patch, make_patch
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.wire.projection import Projection

ROOT = Path(__file__).resolve().parent.parent
BUDGET, MOST_LOSS, LAST = 100_000, 0.01, 10
ARMS = ("whole", "momentum", "confined", "projected", "blocks")
WHOLE = ("whole", "momentum")


@dataclass(frozen=True)
class Arm:
    name: str
    bits: int
    multiplier: float
    budget: int
    momentum: float


@dataclass(frozen=True)
class Round:
    accuracy: float
    masked: int
    plain: float


class ConfinedFleet(Fleet):
    """The same devices, training within a subspace."""

    def train_confined(
        self, number: int, device: int, weights: Weights, projection: Projection
    ) -> tuple[Weights, float]:
        part, batch = self._parts[device], self.card.batch
        order = np.random.default_rng((self.settings.seed, 2, number, device)).permutation(part)
        self._model.set_weights(weights)
        confined = Confined(self._model, projection, Adam(lr=1e-3))
        total = 0.0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            total += confined.step(self._x[chosen], self._y[chosen]) * len(chosen)
        return confined.get_weights() - weights, total / len(order)


def rounds(fleet: ConfinedFleet, arm: Arm) -> Iterator[Round]:
    settings, table, file = fleet.settings, fleet.card.table, fleet.file
    sizes = tuple(slot.size for slot in table.tensors)
    config = ClipConfig(bits=arm.bits, first_bits=settings.first_bits, multiplier=arm.multiplier)
    clips = first_clips(read_weights(file, table), sizes, config)
    name = OptimizerName.MOMENTUM if arm.momentum else OptimizerName.FEDAVG
    optimizer = make_optimizer(OptimizerConfig(name=name, beta1=arm.momentum), table.parameters)
    blocks = Blocks(sizes) if arm.name == "blocks" else None
    residual = None
    for number in range(settings.rounds):
        weights = read_weights(file, table)
        lane_bits = choose_lane_bits(clips.bits, settings.cohort)
        seed = np.random.default_rng((settings.seed, 4, number)).bytes(16)
        projection = subspace = index = None
        travelling = sizes
        if blocks is not None:
            index, travelling = blocks.choose(arm.budget, lane_bits, seed)
        elif arm.name not in WHOLE:
            projection = choose(fleet.card, budget=arm.budget, lane_bits=lane_bits, seed=seed)
            assert projection is not None
            subspace, travelling = Subspace(projection, sizes), projection.sizes
        grid = Grid(travelling, clips.clips, clips.bits)
        ring = Ring.of(travelling, bits=clips.bits, lane_bits=lane_bits, weight_cap=1)
        total, plain = Accumulator(ring, capacity=settings.cohort), []
        for device in fleet.cohort(number):
            if arm.name == "confined" and projection is not None:
                delta, loss = fleet.train_confined(number, device, weights, projection)
            else:
                delta, loss = fleet.train(number, device, weights)
            if subspace is not None:
                delta = subspace.project(delta)
            elif index is not None:
                delta = delta[index]
            sent = quantize(delta, grid, weight=1, rng=np.random.default_rng((settings.seed, 3, number, device)))
            meta = ring.meta.encode(
                Contribution(weight=1, examples=600, training_loss=loss, clipped=sent.clipped, log2_rms=sent.log2_rms)
            )
            plain.append(len(encode_body(sent.values, meta, limit=grid.limit)))
            total.merge(Partial(ring, ring.layout.pack(sent.values, meta), 1))
        partial = total.report()
        summed = check_partial(partial)
        mean = mean_delta(partial.values(), grid, weight=summed.weight)
        if subspace is not None:
            mean = subspace.lift(mean)
        elif blocks is not None and index is not None:
            mean = blocks.scatter(mean, index)
        made = make_patch(file, optimizer.step(mean), table, residual=residual, bits=4, clip=DEFAULT_CLIP)
        residual, file = made.residual, bytes(apply_patch(file, table, made.patch))
        clips = next_clips(clips, summed, config)
        accuracy = fleet.accuracy(read_weights(file, table))
        yield Round(accuracy, body_size(ring.layout.n_words), float(np.mean(plain)))


class Blocks:
    """Single values in blocks, chosen by how far they moved."""

    def __init__(self, sizes: tuple[int, ...], block: int = 64) -> None:
        self.sizes, self.block = sizes, block
        starts, tensors, at = [], [], 0
        for tensor, size in enumerate(sizes):
            mine = range(at, at + size, block)
            starts += mine
            tensors += [tensor] * len(mine)
            at += size
        self.starts, self.tensor = np.array(starts), np.array(tensors)
        self.lengths = np.diff([*starts, at])
        self.moved = np.zeros(len(starts))
        self.fixed = np.array(sizes)[self.tensor] < 6000

    def choose(self, budget: int, lane_bits: int, seed: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        words = (budget - 16) // 8 - 7 - 2 * len(self.sizes)
        # One for every tensor may have to be added below.
        room = words * (64 // lane_bits) - int(self.lengths[self.fixed].sum()) - self.block * len(self.sizes)
        count = room // self.block
        free = np.flatnonzero(~self.fixed)
        known = free[np.argsort(-self.moved[free], kind="stable")][: count * 3 // 4 if self.moved.any() else 0]
        rest = np.setdiff1d(free, known)
        chosen = self.fixed.copy()
        chosen[known] = chosen[rng.choice(rest, count - len(known), replace=False)] = True
        for tensor in range(len(self.sizes)):
            mine = np.flatnonzero(self.tensor == tensor)
            chosen[mine[0]] |= not chosen[mine].any()
        lengths = self.lengths * chosen
        sizes = tuple(int(lengths[self.tensor == tensor].sum()) for tensor in range(len(self.sizes)))
        return np.flatnonzero(np.repeat(chosen, self.lengths)), sizes

    def scatter(self, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
        full = np.zeros(sum(self.sizes))
        full[index] = mean
        moved = np.add.reduceat(np.abs(full), self.starts) / self.lengths
        self.moved = np.where(moved > 0, moved, self.moved)
        return full


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mnist.npz")
    parser.add_argument("--arms", default="whole,confined", help=", ".join(ARMS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--bits", type=int, default=3, help="of the small arms")
    parser.add_argument("--first-bits", type=int, default=4, help="of their first round")
    parser.add_argument("--multiplier", type=float, default=4.0, help="clip of the small arms, in rms")
    parser.add_argument("--budget", type=int, default=BUDGET, help="most bytes of a masked body of the small arms")
    parser.add_argument("--momentum", type=float, default=0.5, help="of the server, in every arm but `whole`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep every round's figures here, and take arms measured before from")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if not arguments.data.exists() or not set(arms) <= set(ARMS):
        print(f"small_updates: needs {arguments.data} (--data mnist.npz) and arms of {ARMS}", file=sys.stderr)
        return 2
    found: dict[str, list[Round]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
        found = {arm: [Round(**each) for each in rows] for arm, rows in kept.items()}
    for arm in arms:
        if len(found.get(arm, ())) < arguments.rounds:
            found[arm] = run(arm, arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps({a: [asdict(r) for r in rows] for a, rows in found.items()}))
    return 0 if summarize({arm: found[arm][: arguments.rounds] for arm in arms}, arguments.budget) else 1


def run(name: str, arguments: argparse.Namespace) -> list[Round]:
    small = name not in WHOLE
    settings = Settings(
        rounds=arguments.rounds,
        devices=100,
        cohort=20,
        bits=0,
        multiplier=0,
        first_bits=arguments.first_bits if small else 8,
        patch_bits=4,
        patch_clip=0,
        error_feedback=False,
        seed=arguments.seed,
    )
    model = zoo.load("fedkeeper_cnn", arguments.seed)
    arm = Arm(
        name,
        bits=arguments.bits if small else 4,
        multiplier=arguments.multiplier if small else 16.0,
        budget=arguments.budget,
        momentum=0.0 if name == "whole" else arguments.momentum,
    )
    started, made = time.monotonic(), []
    for number, each in enumerate(rounds(ConfinedFleet(model, arguments.data, settings), arm), start=1):
        made.append(each)
        print(f"{name:10} round {number:3}: {each.accuracy:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return made


def summarize(found: dict[str, list[Round]], budget: int) -> bool:
    count = min(len(rows) for rows in found.values())
    shown = [number for number in (5, 10, 15, 20, 25) if number <= count]
    means = {arm: float(np.mean([each.accuracy for each in rows[-LAST:]])) for arm, rows in found.items()}
    print(
        f"\n{'':10}{'masked KB':>11}{'plain KB':>10}" + "".join(f"{number:>8}" for number in shown) + f"  last {LAST}"
    )
    for arm, rows in found.items():
        figures = "".join(f"{100 * rows[number - 1].accuracy:8.2f}" for number in shown)
        largest, plain = max(each.masked for each in rows), float(np.mean([each.plain for each in rows]))
        print(f"{arm:10}{largest / 1e3:11.1f}{plain / 1e3:10.1f}{figures}{100 * means[arm]:9.2f}")
    if not {"whole", "confined"} <= means.keys():
        return True
    loss, largest = means["whole"] - means["confined"], max(each.masked for each in found["confined"])
    met = loss <= MOST_LOSS and largest <= budget
    print(
        f"confined: {largest / 1e3:.1f} KB of {budget / 1e3:.0f}, {100 * loss:.2f} points lost, "
        f"goal <= {100 * MOST_LOSS:.0f}: {'met' if met else 'MISSED'}"
    )
    return met


if __name__ == "__main__":
    sys.exit(main())
