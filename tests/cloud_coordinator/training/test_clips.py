from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fleetfed.cloud_coordinator.training.clips import ClipConfig, ClipState, first_clips, next_clips
from fleetfed.shared.aggregate.meta import Contribution, MetaLayout, MetaSum
from fleetfed.shared.aggregate.quantize import Grid, quantize
from fleetfed.shared.errors import ConfigError, StorageError

CONFIG = ClipConfig(bits=4, first_bits=8, multiplier=6.0, target=0.01, first_share=1.0)


def meta(clipped: tuple[float, ...], log2_rms: tuple[float, ...]) -> MetaSum:
    return MetaSum(
        count=3,
        weight=3,
        examples=9,
        training_loss=1.0,
        holdout_examples=0,
        holdout_accuracy=None,
        holdout_loss=None,
        clipped=clipped,
        log2_rms=log2_rms,
    )


def state(clip: float, multiplier: float = 6.0) -> ClipState:
    return ClipState(bits=4, clips=(clip,), multipliers=(multiplier,))


def test_the_clip_is_a_multiple_of_the_geometric_mean_rms() -> None:
    after = next_clips(state(0.05), meta((0.004,), (-7.0,)), CONFIG)
    assert after.clips[0] == pytest.approx(6.0 * 2.0**-7)
    assert after.bits == 4


def test_too_much_clipping_widens_and_none_narrows_back_to_the_configured_multiple() -> None:
    now = state(6.0 * 2.0**-7)
    wider = next_clips(now, meta((0.05,), (-7.0,)), CONFIG)
    assert wider.multipliers[0] > now.multipliers[0]
    assert wider.clips[0] > now.clips[0]
    for _ in range(20):
        wider = next_clips(wider, meta((0.0,), (-7.0,)), CONFIG)
    assert wider.multipliers[0] == CONFIG.multiplier


def test_a_clip_that_never_fitted_does_not_blame_the_multiplier() -> None:
    after = next_clips(state(1e-4), meta((0.9,), (-7.0,)), CONFIG)
    assert after.multipliers[0] == CONFIG.multiplier
    assert after.clips[0] == pytest.approx(8e-4)


def test_one_round_moves_a_clip_by_at_most_eight_and_never_out_of_bounds() -> None:
    now = state(1.0)
    for lie in (-24.0, 8.0):
        after = next_clips(now, meta((0.0,), (lie,)), CONFIG)
        assert 1 / 8 <= after.clips[0] <= 8
    for lie in (-24.0, 8.0):
        moved = now
        for _ in range(60):
            moved = next_clips(moved, meta((0.5,), (lie,)), CONFIG)
            assert math.isfinite(moved.clips[0])
            Grid((3,), moved.clips, moved.bits)


def test_first_clips_come_from_the_weights_and_zeros_get_the_usual() -> None:
    weights = np.concatenate([np.full(4, 0.5), np.zeros(3), np.full(10, -0.02), np.full(2, 0.1)]).astype(np.float32)
    first = first_clips(weights, (4, 3, 10, 2), CONFIG)
    assert first.bits == 8
    assert first.clips == pytest.approx((0.5, 0.1, 0.02, 0.1))
    nothing = first_clips(np.zeros(7, dtype=np.float32), (4, 3), CONFIG)
    assert all(clip > 0 for clip in nothing.clips)


def test_clips_settle_on_real_quantization_from_a_start_a_thousand_times_off() -> None:
    sizes, spread = (3000, 500), (1e-3, 0.2)
    layout = MetaLayout(sizes)
    now = ClipState(bits=8, clips=(1.0, 2e-4), multipliers=(6.0, 6.0))
    for r in range(8):
        total = np.zeros(layout.words, dtype=np.uint64)
        for device in range(5):
            rng = np.random.default_rng((r, device))
            delta = np.concatenate([rng.standard_normal(n) * s for n, s in zip(sizes, spread, strict=True)])
            q = quantize(delta, Grid(sizes, now.clips, now.bits), weight=1, rng=rng)
            total += layout.encode(
                Contribution(weight=1, examples=1, training_loss=0, clipped=q.clipped, log2_rms=q.log2_rms)
            )
        now = next_clips(now, layout.decode(total), CONFIG)
    assert now.clips == pytest.approx([6.0 * s for s in spread], rel=0.05)
    assert now.bits == 4


def test_a_tensor_that_half_the_devices_do_not_move_keeps_a_useful_clip() -> None:
    sizes, layout = (3000,), MetaLayout((3000,))
    now = ClipState(bits=4, clips=(1.0,), multipliers=(CONFIG.multiplier,))
    clipped = []
    for r in range(25):
        total = np.zeros(layout.words, dtype=np.uint64)
        for device in range(6):
            rng = np.random.default_rng((r, device))
            delta = rng.standard_normal(3000) * (0.01 if device % 2 else 0.0)
            q = quantize(delta, Grid(sizes, now.clips, now.bits), weight=1, rng=rng)
            total += layout.encode(
                Contribution(weight=1, examples=1, training_loss=0, clipped=q.clipped, log2_rms=q.log2_rms)
            )
        summed = layout.decode(total)
        clipped.append(summed.clipped[0])
        now = next_clips(now, summed, CONFIG)
    # 2 rms clip 5 % of a normal distribution, half of that with half the devices.
    assert 0.02 < now.clips[0] < 0.2
    assert float(np.mean(clipped[-10:])) < 0.025


def test_state_survives_json() -> None:
    now = ClipState(bits=5, clips=(0.25, 3.0), multipliers=(6.0, 9.0))
    assert ClipState.from_dict(json.loads(json.dumps(now.to_dict()))) == now


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"bits": 4, "clips": [1.0], "multipliers": []},
        {"bits": 4, "clips": [], "multipliers": []},
        {"bits": 40, "clips": [1.0], "multipliers": [1.0]},
        {"bits": 4, "clips": [math.nan], "multipliers": [1.0]},
        {"bits": 4, "clips": [-1.0], "multipliers": [1.0]},
        {"bits": 4, "clips": ["x"], "multipliers": [1.0]},
        {"bits": 4, "clips": 3, "multipliers": [1.0]},
    ],
)
def test_a_damaged_state_is_refused(bad: dict) -> None:
    with pytest.raises(StorageError):
        ClipState.from_dict(bad)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="tensors"):
        next_clips(state(1.0), meta((0.0, 0.0), (0.0, 0.0)), CONFIG)
    with pytest.raises(ValueError, match="weights"):
        first_clips(np.zeros(3, dtype=np.float32), (4,), CONFIG)
    for bad in ({"bits": 1}, {"first_bits": 17}, {"multiplier": 0.0}, {"target": 0.0}, {"first_share": 0.0}):
        with pytest.raises(ConfigError):
            ClipConfig(**bad)
