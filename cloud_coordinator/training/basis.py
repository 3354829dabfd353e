"""Chooses the projection of the next round: which tensors travel in part, and how large a part.

The budget is shared among the layers alike: those that fit into their share travel whole, the others in part. So small
tensors (biases, first convolutions, the last layer) always travel whole, and the largest layers pay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fleetfed.shared.aggregate.lanes import WORD_BITS
from fleetfed.shared.aggregate.meta import meta_words
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.secure.box import TAG_SIZE
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.projection import Factor, Projection

_SMALLEST: Final = 4096
"""Values of a tensor from which a projection is worth its computation."""
_USUAL_ROWS: Final = 128
_FEWEST_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor as the matrix that is projected."""

    rows: int
    columns: int

    def rank(self, share: int, of: int) -> int:
        """Numbers per column if ``of`` values of a layer have room for ``share``; 0 for all of them."""
        if share >= of:
            return 0
        return max(1, min(self.rows * share // of, self.rows - 1, self.columns))


def choose(card: ModelCard, *, budget: int, lane_bits: int, seed: bytes) -> Projection | None:
    """The projection of the next plan; None where the whole update fits the budget.

    Args:
        card: of the model.
        budget: most bytes of a masked body.
        lane_bits: of the plan.
        seed: 16 bytes, new in every round.

    Raises:
        ConfigError: the tensors that have to travel whole do not fit.
    """
    sizes = tuple(slot.size for slot in card.tensors)
    lanes = WORD_BITS // lane_bits
    room = ((budget - TAG_SIZE) // 8 - meta_words(len(sizes))) * lanes
    if sum(sizes) <= room:
        return None
    parts = {tensor: part for tensor, size in enumerate(sizes) if (part := _part(card.tensors[tensor].shape, size))}
    layers: dict[str, int] = {}
    for tensor in parts:
        layers[_layer(card, tensor)] = layers.get(_layer(card, tensor), 0) + sizes[tensor]

    def ranks(share: int) -> dict[int, int]:
        return {tensor: part.rank(share, layers[_layer(card, tensor)]) for tensor, part in parts.items()}

    def travelling(chosen: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(
            chosen[tensor] * parts[tensor].columns if chosen.get(tensor) else size for tensor, size in enumerate(sizes)
        )

    least = sum(travelling(ranks(0)))
    if least > room:
        needed = 8 * (math.ceil(least / lanes) + meta_words(len(sizes))) + TAG_SIZE
        raise ConfigError(
            f"update_bytes = {budget} is too little for {card.name}: at least {needed} bytes are needed; "
            "raise it, lower the bits in [clips] or cohort_cap, or set 0 for whole updates"
        )
    low, high = 0, max(layers.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(travelling(ranks(middle))) <= room else (low, middle)
    chosen = ranks(low)
    factors = tuple(
        Factor(tensor=tensor, rows=parts[tensor].rows, rank=rank) for tensor, rank in sorted(chosen.items()) if rank
    )
    return Projection(seed=seed, factors=factors, sizes=travelling(chosen))


def _layer(card: ModelCard, tensor: int) -> str:
    """A kernel that the file has in parts (``hidden/kernel[0:128]``) is one layer's."""
    return card.tensors[tensor].name.partition("[")[0]


def _part(shape: tuple[int, ...], size: int) -> _Part | None:
    """A large tensor as a matrix whose columns mix inputs of one output; None for one that travels whole."""
    if len(shape) < 2 or size < _SMALLEST:
        return None
    inputs = size // shape[-1]
    divisors = [rows for rows in range(_FEWEST_ROWS, min(inputs, limits.MAX_ROWS) + 1) if inputs % rows == 0]
    if not divisors:
        return None
    usual = [rows for rows in divisors if rows <= _USUAL_ROWS]
    rows = usual[-1] if usual else divisors[0]
    return _Part(rows, size // rows)
