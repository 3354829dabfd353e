"""One step: what it makes, that it repeats, and what it refuses."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import Fleet, small_model, update_of

from fleetfed.cloud_coordinator.config import PatchConfig, RoundSettings
from fleetfed.cloud_coordinator.storage.records import Origin, VersionRecord
from fleetfed.cloud_coordinator.training.clips import ClipConfig, first_clips
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, OptimizerName
from fleetfed.cloud_coordinator.training.plans import make_plan
from fleetfed.cloud_coordinator.training.step import ServerState, Step, StepConfig, StepError, ring_of, take_step
from fleetfed.shared.aggregate.accumulator import Accumulator
from fleetfed.shared.errors import StorageError
from fleetfed.shared.model.patch import apply_patch
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.wire.blobs import publishable
from fleetfed.shared.wire.envelope import Digest

FILE, CARD = small_model()
CLIPS = first_clips(read_weights(FILE, CARD.table), [slot.size for slot in CARD.tensors], ClipConfig())
BASE = VersionRecord(
    version=1,
    parent=0,
    origin=Origin.PUBLISHED,
    name="small",
    sha256=hashlib.sha256(FILE).digest(),
    size=len(FILE),
    file=b"f" * 32,
    card=b"c" * 32,
    card_ref=publishable(b"x").ref,
    created=0,
    clips=CLIPS,
)
PLAN = make_plan(
    RoundSettings(weight_cap=50), number=1, base=BASE, dimension=CARD.parameters, tiers=1, now=1, nonce=bytes(16)
)
RING = ring_of(PLAN, CARD)
FLEET = Fleet()
UPDATES = [update_of(FLEET, f"d{i}", "n", PLAN, Digest(b"h" * 32), RING) for i in range(3)]


def config(name: OptimizerName = OptimizerName.FEDAVG, **patch: Any) -> StepConfig:
    return StepConfig(
        optimizer=OptimizerConfig(name=name, learning_rate=0.5), clips=ClipConfig(), patch=PatchConfig(**patch)
    )


def step(settings: StepConfig, state: ServerState | None = None) -> Step:
    total = Accumulator(RING, capacity=10)
    for update in UPDATES:
        total.accumulate(update.values, update.meta)
    return take_step(
        total.report(),
        plan=PLAN,
        base=FILE,
        card=CARD,
        state=state or ServerState(),
        clips=CLIPS,
        config=settings,
    )


def test_the_version_is_what_devices_make_of_the_patch() -> None:
    made = step(config())
    assert bytes(apply_patch(FILE, CARD.table, made.patched.patch)) == made.patched.file
    assert hashlib.sha256(made.patched.file).digest() == made.patched.target_sha256


def test_sixteen_bits_move_the_model_by_the_weighted_mean() -> None:
    made = step(config(bits=16, clip=64.0))
    weights = np.array([float(update.meta[1]) for update in UPDATES])
    limit = RING.limit(1)
    expected = np.zeros(CARD.parameters)
    at = 0
    for slot, clip in zip(CARD.tensors, CLIPS.clips, strict=True):
        for update in UPDATES:
            # What a device sends is already scaled by its share of the weight cap.
            expected[at : at + slot.size] += update.values[at : at + slot.size] * clip / limit
        at += slot.size
    expected *= 0.5 * 50 / weights.sum()
    moved = read_weights(made.patched.file, CARD.table) - read_weights(FILE, CARD.table)
    assert np.allclose(moved, expected, atol=np.abs(expected).max() * 2e-3)


def test_the_same_inputs_give_the_same_bytes() -> None:
    for name in OptimizerName:
        first, second = step(config(name)), step(config(name))
        assert first.patched.file == second.patched.file
        assert first.patched.patch == second.patched.patch
        assert first.state.encode() == second.state.encode()


def test_the_servers_state_goes_on() -> None:
    first = step(config(OptimizerName.MOMENTUM))
    stored = ServerState.decode(first.state.encode())
    assert stored.residual is not None
    again, anew = step(config(OptimizerName.MOMENTUM), stored), step(config(OptimizerName.MOMENTUM))
    assert again.patched.file != anew.patched.file


def test_another_optimizer_begins_anew_but_keeps_what_the_patch_lost() -> None:
    momentum = step(config(OptimizerName.MOMENTUM)).state
    fresh = step(config(OptimizerName.ADAM), replace(momentum, optimizer=b"", name=""))
    assert step(config(OptimizerName.ADAM), momentum).patched.file == fresh.patched.file


def test_a_damaged_state_is_not_used() -> None:
    with pytest.raises(StorageError, match="damaged"):
        ServerState.decode(b"\x93\x01\x02")
    state = replace(step(config(OptimizerName.ADAM)).state, optimizer=b"short")
    with pytest.raises(StorageError):
        step(config(OptimizerName.ADAM), state)


def test_a_residual_of_another_model_is_refused() -> None:
    with pytest.raises(StepError, match="cannot be applied"):
        step(config(), ServerState(residual=np.zeros(3, dtype=np.float32)))
