"""The number formats, four ways: shipped encoder, shipped decoder, second decoder, re-encoding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fleetfed.shared.aggregate.accumulator import Ring, decode_words, encode_words
from fleetfed.shared.aggregate.body import decode_body, encode_body
from fleetfed.shared.aggregate.lanes import levels
from fleetfed.shared.model.patch import apply_patch
from fleetfed.shared.model.table import TensorSlot, WeightTable

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


second_numbers, make_numbers = _load("second_numbers"), _load("make_numbers")
VECTORS: dict[str, Any] = json.loads((HERE / "numbers.json").read_text())
SIZES = tuple(VECTORS["tensors"])


@pytest.fixture(params=VECTORS["sums"], ids=lambda case: f"{case['bits']}-bit")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def ring_of(case: dict[str, Any]) -> Ring:
    return Ring.of(SIZES, bits=case["bits"], lane_bits=case["lane_bits"], weight_cap=8)


def test_updates(case: dict[str, Any]) -> None:
    ring, limit = ring_of(case), levels(case["bits"])
    for update in case["updates"]:
        body = bytes.fromhex(update["body"])
        values, meta = decode_body(body, dimension=sum(SIZES), limit=limit, meta_words=ring.meta.words)
        assert (values.tolist(), meta.tolist()) == (update["values"], update["meta"])
        assert encode_body(values, meta, limit=limit)[:8] == body[:8]
        assert second_numbers.body(body, sum(SIZES), ring.meta.words) == (update["values"], update["meta"])


def test_sums(case: dict[str, Any]) -> None:
    ring, body = ring_of(case), bytes.fromhex(case["reveal"])
    partial = decode_words(body, ring, count=len(case["updates"]))
    assert partial.words.astype("<u8").tobytes().hex() == case["words"]
    assert partial.values().tolist() == case["sum"]
    assert decode_words(encode_words(partial), ring, count=partial.count).words.tolist() == partial.words.tolist()
    values, meta = second_numbers.body(body, sum(SIZES), ring.meta.words)
    columns = zip(*(update["values"] for update in case["updates"]), strict=True)
    assert values == case["sum"] == [sum(column) for column in columns]
    assert meta == [sum(column) for column in zip(*(update["meta"] for update in case["updates"]), strict=True)]
    words = bytes.fromhex(case["words"])
    assert second_numbers.lanes(words, sum(SIZES), case["lane_bits"], ring.meta.words) == (values, meta)


@pytest.mark.parametrize("case", VECTORS["patches"])
def test_patches(case: dict[str, Any]) -> None:
    base, patch, target = (bytes.fromhex(case[name]) for name in ("base", "patch", "target"))
    table = WeightTable(
        tensors=tuple(
            TensorSlot(name=str(i), shape=(size,), dtype="float32", offset=offset)
            for i, (offset, size) in enumerate(case["tensors"])
        )
    )
    assert bytes(apply_patch(base, table, patch)) == target
    assert second_numbers.patch(base, [(o, s) for o, s in case["tensors"]], patch) == target


def test_the_vectors_are_what_the_code_makes_today() -> None:
    """But for the compressed bytes, which another release of zstd may choose otherwise."""
    made = make_numbers.build()
    for new, old in zip(made["sums"], VECTORS["sums"], strict=True):
        assert (new["words"], new["sum"], new["lane_bits"]) == (old["words"], old["sum"], old["lane_bits"])
        assert [u["meta"] for u in new["updates"]] == [u["meta"] for u in old["updates"]]
    for new, old in zip(made["patches"], VECTORS["patches"], strict=True):
        assert new["patch"][: 2 * 92] == old["patch"][: 2 * 92]
        assert new["target"] == old["target"]


def test_vectors_cover_every_packing() -> None:
    peaks = {int(np.abs(update["values"]).max()) for case in VECTORS["sums"] for update in case["updates"]}
    assert {1, 3} <= peaks
    assert any(4 <= peak <= 7 for peak in peaks)
    assert any(8 <= peak <= 127 for peak in peaks)
    assert any(peak > 255 for peak in peaks)
