"""Makes `numbers.json`: updates, sums and patches from fixed inputs. Run after a change of a number format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.accumulator import Accumulator, Ring, encode_words
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.lanes import choose_lane_bits, levels
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.model.patch import make_patch
from fleetfed.shared.model.table import TensorSlot, WeightTable, write_weights

SIZES = (7, 4)


def contribution(device: int) -> Contribution:
    return Contribution(
        weight=device + 1,
        examples=100 * (device + 1),
        training_loss=0.5 + device,
        holdout_examples=10,
        holdout_correct=device,
        holdout_loss=0.25,
        clipped=(device, 0),
        log2_rms=(-7.5, -3.0 - device),
    )


def sums() -> list[dict[str, Any]]:
    out = []
    for bits in (2, 3, 4, 8, 16):
        ring = Ring.of(SIZES, bits=bits, lane_bits=choose_lane_bits(bits, 3), weight_cap=8)
        total = Accumulator(ring, capacity=3)
        updates = []
        for device in range(3):
            rng = np.random.default_rng(device)
            values = rng.integers(-levels(bits), levels(bits) + 1, sum(SIZES)).astype(np.int16)
            meta = ring.meta.encode(contribution(device))
            total.accumulate(values, meta)
            body = encode_body(values, meta, limit=levels(bits))
            updates.append({"values": values.tolist(), "meta": meta.tolist(), "body": body.hex()})
        partial = total.report()
        out.append(
            {
                "bits": bits,
                "lane_bits": ring.layout.lane_bits,
                "updates": updates,
                "words": partial.words.astype("<u8").tobytes().hex(),
                "sum": partial.values().tolist(),
                "reveal": encode_words(partial).hex(),
            }
        )
    return out


def patches() -> list[dict[str, Any]]:
    slots = tuple(
        TensorSlot(name=name, shape=(size,), dtype="float32", offset=offset)
        for name, size, offset in (("a", 5, 40), ("b", 3, 12), ("still", 2, 64))
    )
    table = WeightTable(tensors=slots)
    rng = np.random.default_rng(9)
    base = bytearray(rng.integers(0, 256, 76, dtype=np.uint8).tobytes())
    write_weights(base, table, rng.standard_normal(10).astype(np.float32))
    step = np.append(rng.standard_normal(8) * 0.1, [0.0, 0.0])
    return [
        {
            "bits": bits,
            "tensors": [[slot.offset, slot.size] for slot in slots],
            "base": bytes(base).hex(),
            "patch": (made := make_patch(bytes(base), step, table, bits=bits, clip=clip)).patch.hex(),
            "target": made.file.hex(),
        }
        for bits, clip in ((2, 2.0), (4, 4.0), (4, 12.0), (8, 4.0), (16, 4.0))
    ]


def build() -> dict[str, Any]:
    return {"tensors": list(SIZES), "sums": sums(), "patches": patches()}


if __name__ == "__main__":
    path = Path(__file__).with_name("numbers.json")
    path.write_text(json.dumps(build(), indent=1) + "\n")
