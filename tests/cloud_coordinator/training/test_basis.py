"""Bases from what the last sums showed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.training.basis import choose, remember
from fleetfed.cloud_coordinator.training.step import ServerState
from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.aggregate.meta import meta_words
from fleetfed.shared.aggregate.projection import check_projection, lift, project
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.projection import Projection

CARD = zoo.load("fedkeeper_cnn", 1).card
SIZES = tuple(slot.size for slot in CARD.tensors)
NONCE = bytes(range(16))


def masked_bytes(projection: Projection, lane_bits: int) -> int:
    return body_size(LaneLayout(projection.dimension, lane_bits, meta_words(len(SIZES))).n_words)


@pytest.mark.parametrize(("budget", "lane_bits"), [(100_000, 8), (100_000, 16), (60_000, 8), (400_000, 16)])
def test_a_body_keeps_the_budget_and_uses_it(budget: int, lane_bits: int) -> None:
    covariances: dict[int, np.ndarray] = {}
    for _ in range(2):
        projection = choose(CARD, covariances, budget=budget, lane_bits=lane_bits, nonce=NONCE)
        assert projection is not None
        check_projection(projection, SIZES)
        assert 0.8 * budget < masked_bytes(projection, lane_bits) <= budget
        raw = codec.encode(projection)
        assert len(raw) < limits.MAX_PLAN
        assert codec.decode(Projection, raw, limit=len(raw)) == projection
        covariances = remember(covariances, np.ones(CARD.parameters), projection, CARD)


def test_a_budget_that_is_enough_needs_no_projection() -> None:
    assert choose(CARD, {}, budget=3_000_000, lane_bits=16, nonce=NONCE) is None


def test_a_budget_that_is_too_little_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match="at least") as caught:
        choose(CARD, {}, budget=2_000, lane_bits=16, nonce=NONCE)
    least = int(str(caught.value).partition("at least ")[2].split()[0])
    assert choose(CARD, {}, budget=least, lane_bits=16, nonce=NONCE) is not None


def test_an_update_of_low_rank_is_found_after_one_round_and_then_kept() -> None:
    rng = np.random.default_rng(3)
    update = rng.normal(0, 1e-3, CARD.parameters)
    starts = np.cumsum([0, *SIZES])
    for tensor, slot in enumerate(CARD.tensors):
        if slot.shape == (128, 512):
            low = rng.normal(size=(128, 4)) @ rng.normal(size=(4, 512))
            update[starts[tensor] : starts[tensor + 1]] += low.reshape(-1)
    kept, covariances = [], {}
    for number in range(3):
        projection = choose(CARD, covariances, budget=100_000, lane_bits=8, nonce=bytes([number]) * 16)
        assert projection is not None
        lifted = lift(project(update, projection, SIZES), projection, SIZES)
        kept.append(1 - np.square(update - lifted).sum() / np.square(update).sum())
        covariances = remember(covariances, lifted, projection, CARD)
    assert kept[0] < 0.5
    assert kept[1] > 0.95
    assert kept[2] > 0.95


def test_the_state_keeps_covariances() -> None:
    covariances = {4: np.arange(9, dtype=np.float32).reshape(3, 3)}
    state = ServerState(name="fedavg", covariances=covariances)
    back = ServerState.decode(state.encode())
    assert back.covariances.keys() == {4}
    assert np.array_equal(back.covariances[4], covariances[4])
    assert ServerState.decode(replace(state, covariances={}).encode()).covariances == {}
