"""What a plan says about updates that travel as projections: a few numbers for each large tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.fields import Bytes16, Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """How one tensor travels.

    Attributes:
        tensor: its index in the card.
        rows: of the matrix that its values are written into, row by row; a divisor of their number.
        rank: numbers that travel of each column, fewer than its rows.
    """

    tensor: Annotated[int, Range(0, limits.MAX_TENSORS - 1)]
    rows: Annotated[int, Range(2, limits.MAX_ROWS)]
    rank: Annotated[int, Range(1, limits.MAX_ROWS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How the tensors of an update travel; those without a factor travel whole.

    Attributes:
        seed: of the bases, which everybody draws alike.
        factors: by tensor, growing.
        sizes: numbers of each tensor that travel.
    """

    seed: Bytes16
    factors: Annotated[tuple[Factor, ...], Length(1, limits.MAX_TENSORS)]
    sizes: Annotated[tuple[Positive, ...], Length(1, limits.MAX_TENSORS)]

    @property
    def dimension(self) -> int:
        """Numbers that travel in all."""
        return sum(self.sizes)
