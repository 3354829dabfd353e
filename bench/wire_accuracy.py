"""What the wire costs and whether accuracy pays for it: FedKeeper's CNN on MNIST at 4 bits both ways against float32.

100 devices hold two label shards each (two digits, rarely more), 20 take part in a round, one local epoch of batch 10
with Adam 1e-3, 25 rounds: the setting of FedKeeper (582,026 parameters). Both arms begin with the same file, draw the
same devices and see every device's examples in the same order. The quantized arm goes through the functions that the
roles use, bytes and all: quantize, encode and decode the update, accumulate at a gateway, encode and decode the
partial, step the server optimizer, make the patch and apply it. Headers and signatures (a few hundred bytes) are not
counted.

Run it with ``python bench/wire_accuracy.py``; needs MNIST (``--data``) and the built model (``fleetfed model build``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.training.clips import ClipConfig, first_clips, next_clips
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, make_optimizer
from fleetfed.shared.aggregate.accumulator import Accumulator, Ring, check_partial, decode_words, encode_words
from fleetfed.shared.aggregate.body import decode_body, encode_body
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.aggregate.quantize import Grid, mean_delta, quantize
from fleetfed.shared.model.interpreter import Adam, Model
from fleetfed.shared.model.patch import DEFAULT_CLIP, apply_patch, make_patch
from fleetfed.shared.model.table import read_weights

ROOT = Path(__file__).resolve().parent.parent
MOST_UPDATE, MOST_PATCH, MOST_LOSS = 130_000, 150_000, 0.005
LAST = 10

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    accuracy: float
    update: float
    partial: int
    patch: int


@dataclass(frozen=True)
class Settings:
    rounds: int
    devices: int
    cohort: int
    bits: int
    multiplier: float
    first_bits: int
    patch_bits: int
    patch_clip: float
    error_feedback: bool
    seed: int


class Fleet:
    """The devices' data and one interpreter to train with."""

    def __init__(self, model: zoo.ZooModel, data: Path, settings: Settings) -> None:
        self.settings = settings
        self.card = model.card
        self.file = model.data
        self._model = Model(self.file, self.card)
        with np.load(data) as arrays:
            self._x, self._y = _examples(arrays["x_train"]), arrays["y_train"].astype(np.int64)
            self._test = _examples(arrays["x_test"]), arrays["y_test"].astype(np.int64)
        shards = np.array_split(np.argsort(self._y, kind="stable"), 2 * settings.devices)
        owners = np.random.default_rng(settings.seed).permutation(2 * settings.devices).reshape(-1, 2)
        self._parts = [np.concatenate([shards[i] for i in pair]) for pair in owners]

    def cohort(self, number: int) -> list[int]:
        rng = np.random.default_rng((self.settings.seed, 1, number))
        return [int(i) for i in rng.choice(self.settings.devices, self.settings.cohort, replace=False)]

    def train(self, number: int, device: int, weights: Weights) -> tuple[Weights, float]:
        """One local epoch: the delta and the mean loss."""
        part = self._parts[device]
        order = np.random.default_rng((self.settings.seed, 2, number, device)).permutation(part)
        self._model.set_weights(weights)
        loss = self._model.train_epoch(self._x, self._y, optimizer=Adam(lr=1e-3), order=order)
        return self._model.get_weights() - weights, loss

    def accuracy(self, weights: Weights) -> float:
        self._model.set_weights(weights)
        evaluation = self._model.evaluate(*self._test, chunk=500)
        return evaluation.correct / evaluation.examples


def _examples(images: NDArray[np.uint8]) -> Weights:
    return images.astype(np.float32)[..., None] / np.float32(255)


def in_float32(fleet: Fleet) -> Iterator[Round]:
    weights = read_weights(fleet.file, fleet.card.table)
    for number in range(fleet.settings.rounds):
        total = np.zeros(weights.size)
        for device in fleet.cohort(number):
            total += fleet.train(number, device, weights)[0]
        weights = (weights + total / fleet.settings.cohort).astype(np.float32)
        yield Round(fleet.accuracy(weights), 4 * weights.size, 4 * weights.size, 4 * weights.size)


def over_the_wire(fleet: Fleet) -> Iterator[Round]:
    settings, table, file = fleet.settings, fleet.card.table, fleet.file
    sizes = tuple(slot.size for slot in table.tensors)
    clip_config = ClipConfig(bits=settings.bits, first_bits=settings.first_bits, multiplier=settings.multiplier)
    clips = first_clips(read_weights(file, table), sizes, clip_config)
    optimizer = make_optimizer(OptimizerConfig(), table.parameters)
    carried: dict[int, Weights] = {}
    server_residual = None
    for number in range(settings.rounds):
        weights = read_weights(file, table)
        grid = Grid(sizes, clips.clips, clips.bits)
        lane_bits = choose_lane_bits(clips.bits, settings.cohort)
        ring = Ring.of(sizes, bits=clips.bits, lane_bits=lane_bits, weight_cap=grid.weight_cap)
        gateway = Accumulator(ring, capacity=settings.cohort)
        updates = []
        for device in fleet.cohort(number):
            delta, loss = fleet.train(number, device, weights)
            residual = carried.get(device, np.zeros_like(weights)) if settings.error_feedback else None
            rng = np.random.default_rng((settings.seed, 3, number, device))
            sent = quantize(delta, grid, weight=1, rng=rng, residual=residual)
            if sent.residual is not None:
                carried[device] = sent.residual
            meta = ring.meta.encode(
                Contribution(weight=1, examples=600, training_loss=loss, clipped=sent.clipped, log2_rms=sent.log2_rms)
            )
            body = encode_body(sent.values, meta, limit=grid.limit)
            updates.append(len(body))
            gateway.accumulate(
                *decode_body(body, dimension=grid.dimension, limit=grid.limit, meta_words=ring.meta.words)
            )
        partial_body = encode_words(gateway.report())
        partial = decode_words(partial_body, ring, count=settings.cohort)
        summed = check_partial(partial)
        step = optimizer.step(mean_delta(partial.values(), grid, weight=summed.weight))
        made = make_patch(
            file, step, table, residual=server_residual, bits=settings.patch_bits, clip=settings.patch_clip
        )
        server_residual = made.residual
        file = bytes(apply_patch(file, table, made.patch))
        clips = next_clips(clips, summed, clip_config)
        accuracy = fleet.accuracy(read_weights(file, table))
        yield Round(accuracy, float(np.mean(updates)), len(partial_body), len(made.patch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mnist.npz")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--bits", type=int, default=ClipConfig().bits)
    parser.add_argument("--multiplier", type=float, default=ClipConfig().multiplier)
    parser.add_argument("--first-bits", type=int, default=ClipConfig().first_bits)
    parser.add_argument("--patch-bits", type=int, default=4)
    parser.add_argument("--patch-clip", type=float, default=DEFAULT_CLIP)
    parser.add_argument("--error-feedback", action="store_true", help="devices keep what quantization lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        print(f"wire_accuracy: {arguments.data} is not there: pass --data mnist.npz", file=sys.stderr)
        return 2
    model = zoo.load("fedkeeper_cnn", arguments.seed)
    settings = Settings(
        rounds=arguments.rounds,
        devices=100,
        cohort=20,
        bits=arguments.bits,
        multiplier=arguments.multiplier,
        first_bits=arguments.first_bits,
        patch_bits=arguments.patch_bits,
        patch_clip=arguments.patch_clip,
        error_feedback=arguments.error_feedback,
        seed=arguments.seed,
    )
    started = time.monotonic()
    plain, wire = run(model, arguments.data, settings)
    met = summarize(plain, wire, 4 * model.card.parameters)
    print(f"{time.monotonic() - started:.0f} s")
    if arguments.json:
        report = {
            "settings": asdict(settings),
            "float32": [asdict(r) for r in plain],
            "wire": [asdict(r) for r in wire],
            "met": met,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if met else 1


def run(model: zoo.ZooModel, data: Path, settings: Settings) -> tuple[list[Round], list[Round]]:
    """Both arms, a thread each: the interpreter does its work outside Python's lock."""
    arms = in_float32(Fleet(model, data, settings)), over_the_wire(Fleet(model, data, settings))
    plain: list[Round] = []
    wire: list[Round] = []
    print("round  float32  quantized  update KB  partial KB  patch KB", flush=True)
    with ThreadPoolExecutor(len(arms)) as pool:
        for number in range(1, settings.rounds + 1):
            a, b = pool.map(next, arms)
            plain.append(a)
            wire.append(b)
            print(
                f"{number:5}  {a.accuracy:7.4f}  {b.accuracy:9.4f}  "
                f"{b.update / 1e3:9.1f}  {b.partial / 1e3:10.1f}  {b.patch / 1e3:8.1f}",
                flush=True,
            )
    return plain, wire


def summarize(plain: list[Round], wire: list[Round], float_bytes: int) -> bool:
    update, patch = float(np.mean([r.update for r in wire])), float(np.mean([r.patch for r in wire]))
    last = min(LAST, len(wire))
    reference = float(np.mean([r.accuracy for r in plain[-last:]]))
    ours = float(np.mean([r.accuracy for r in wire[-last:]]))
    rows = (
        ("mean update, KB", float_bytes / 1e3, update / 1e3, f"<= {MOST_UPDATE / 1e3:.0f}", update <= MOST_UPDATE),
        ("mean patch, KB", float_bytes / 1e3, patch / 1e3, f"<= {MOST_PATCH / 1e3:.0f}", patch <= MOST_PATCH),
        (f"accuracy, last {last}, %", 100 * reference, 100 * ours, ">= -0.5", ours >= reference - MOST_LOSS),
    )
    print(f"\n{'':22}{'float32':>10}{'quantized':>11}  goal")
    for name, a, b, goal, met in rows:
        print(f"{name:22}{a:10.2f}{b:11.2f}  {goal}: {'met' if met else 'MISSED'}")
    print(f"{'final accuracy, %':22}{100 * plain[-1].accuracy:10.2f}{100 * wire[-1].accuracy:11.2f}")
    print(f"update {float_bytes / update:.1f} times smaller, patch {float_bytes / patch:.1f} times", end="; ")
    return all(row[-1] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
