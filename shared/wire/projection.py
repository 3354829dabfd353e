"""What a plan says about updates that travel as projections: a few numbers for each large tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.fields import Positive


class Side(StrEnum):
    """Which side of a tensor, seen as a matrix (its last axis is the columns), a basis belongs to."""

    ROWS = "rows"
    """``B^T X`` travels: rank x columns."""
    COLUMNS = "columns"
    """``X B`` travels: rows x rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """How one tensor travels.

    Attributes:
        tensor: its index in the card.
        side: which side is projected.
        rows: of the basis: the length of the side that it belongs to.
        rank: columns of the basis, fewer than its rows.
        basis: int8, column after column; every column stands for the direction it points to, whatever its length.
            Empty for random signs, which everybody draws from ``seed``.
        seed: of a basis of random signs; empty for one that is given.
    """

    tensor: Annotated[int, Range(0, limits.MAX_TENSORS - 1)]
    side: Side
    rows: Annotated[int, Range(2, limits.MAX_SIDE)]
    rank: Annotated[int, Range(1, limits.MAX_SIDE)]
    basis: Annotated[bytes, Length(0, limits.MAX_BASIS)] = b""
    seed: Annotated[bytes, Length(0, 32)] = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How the tensors of an update travel; those without a factor travel whole.

    Attributes:
        factors: by tensor, growing.
        sizes: numbers of each tensor that travel.
    """

    factors: Annotated[tuple[Factor, ...], Length(1, limits.MAX_TENSORS)]
    sizes: Annotated[tuple[Positive, ...], Length(1, limits.MAX_TENSORS)]

    @property
    def dimension(self) -> int:
        """Numbers that travel in all."""
        return sum(self.sizes)
