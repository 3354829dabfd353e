"""What travels of a model within a budget."""

from __future__ import annotations

from typing import Any

import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.training.basis import choose
from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.aggregate.meta import meta_words
from fleetfed.shared.aggregate.projection import check_projection
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.projection import Projection

CARD = zoo.load("fedkeeper_cnn", 1).card
SIZES = tuple(slot.size for slot in CARD.tensors)
SEED = bytes(range(16))


def chosen(**changes: Any) -> Projection:
    projection = choose(CARD, **{"budget": 100_000, "lane_bits": 8, "seed": SEED, **changes})
    assert projection is not None
    return projection


@pytest.mark.parametrize(("budget", "lane_bits"), [(100_000, 8), (100_000, 16), (60_000, 8), (400_000, 16)])
def test_a_body_keeps_the_budget_and_uses_it(budget: int, lane_bits: int) -> None:
    projection = chosen(budget=budget, lane_bits=lane_bits)
    check_projection(projection, SIZES)
    layout = LaneLayout(projection.dimension, lane_bits, meta_words(len(SIZES)))
    assert 0.9 * budget < body_size(layout.n_words) <= budget
    raw = codec.encode(projection)
    assert len(raw) < 500
    assert codec.decode(Projection, raw, limit=len(raw)) == projection


def test_small_tensors_travel_whole_and_the_largest_layer_pays() -> None:
    projection = chosen()
    for slot, travelling in zip(CARD.tensors, projection.sizes, strict=True):
        if slot.size < 4096 or slot.name == "scores/kernel":
            assert travelling == slot.size
    hidden = [
        travelling
        for slot, travelling in zip(CARD.tensors, projection.sizes, strict=True)
        if slot.name.startswith("hidden/kernel")
    ]
    assert len(set(hidden)) == 1
    second = projection.sizes[[slot.name for slot in CARD.tensors].index("conv2/kernel")]
    assert 0.75 < sum(hidden) / second < 1.3


def test_the_same_question_has_the_same_answer() -> None:
    assert chosen() == chosen()
    assert chosen(seed=bytes(16)).factors == chosen().factors


def test_a_budget_that_is_enough_needs_no_projection() -> None:
    assert choose(CARD, budget=3_000_000, lane_bits=16, seed=SEED) is None


def test_a_budget_that_is_too_little_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match="at least") as caught:
        choose(CARD, budget=2_000, lane_bits=16, seed=SEED)
    least = int(str(caught.value).partition("at least ")[2].split()[0])
    chosen(budget=least, lane_bits=16)
    with pytest.raises(ConfigError, match="at least"):
        choose(CARD, budget=least - 8, lane_bits=16, seed=SEED)
