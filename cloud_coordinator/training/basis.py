"""Chooses the bases of the next round's projection from what the last sums showed.

The update of a dense layer is nearly of low rank, and on the side of its inputs the directions hardly change from
round to round: of FedKeeper's hidden layer the 16 best input directions of one round's mean hold 83 to 92 % of the
next one's energy, where as many of the best single values hold 30 % (docs/adr/0010). So for each large tensor the
coordinator keeps the covariance of the mean updates on its smaller side, older rounds counting half as much each, and
gives its first eigenvectors; an eighth of the basis is random signs, so that directions nobody asked for are found.
A tensor of which nothing is known yet is multiplied by random signs from its *larger* side, which shows the whole range
of the smaller one at once (Halko, Martinsson, Tropp 2011, "Finding Structure with Randomness", section 4.1).
Only sums that were revealed anyway are used, and the basis is in the signed plan for everybody to see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.lanes import WORD_BITS
from fleetfed.shared.aggregate.meta import meta_words
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.secure.box import TAG_SIZE
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.projection import Factor, Projection, Side

_SMALLEST: Final = 4096
"""Values of a tensor from which a projection is worth a basis."""
_LARGEST_SIDE: Final = 1024
"""Rows of a basis up to which a covariance is kept."""
_EXPLORED: Final = 1 / 8
_DECAY: Final = 0.5

Covariances = Mapping[int, NDArray[np.float32]]


def choose(
    card: ModelCard, covariances: Covariances, *, budget: int, lane_bits: int, nonce: bytes
) -> Projection | None:
    """The projection of the next plan; None where the whole update fits the budget.

    Args:
        card: of the model.
        covariances: what earlier rounds left, by tensor; may be empty.
        budget: most bytes of a masked body.
        lane_bits: of the plan.
        nonce: the plan's; the random part of the bases is drawn from it.

    Raises:
        ConfigError: the tensors that have to travel whole do not fit, or the bases do not fit into a plan.
    """
    sizes = tuple(slot.size for slot in card.tensors)
    room = ((budget - TAG_SIZE) // 8 - meta_words(len(sizes))) * (WORD_BITS // lane_bits)
    if sum(sizes) <= room:
        return None
    shapes = {tensor: shape for tensor, slot in enumerate(card.tensors) if (shape := _matrix(slot.shape))}
    whole = sum(size for tensor, size in enumerate(sizes) if tensor not in shapes)
    room -= whole
    spectra = _spectra(shapes, covariances)
    ranks = _ranks(shapes, room) if spectra is None else _ranks_by_energy(shapes, spectra, room)
    if not ranks:
        least = whole + sum(max(shape) for shape in shapes.values())
        bytes_ = 8 * (math.ceil(least / (WORD_BITS // lane_bits)) + meta_words(len(sizes))) + TAG_SIZE
        raise ConfigError(
            f"update_bytes = {budget} is too little for {card.name}: at least {bytes_} bytes are needed; "
            "raise it, lower the bits in [clips] or cohort_cap, or set 0 for whole updates"
        )
    rng = np.random.default_rng(int.from_bytes(nonce, "little"))
    factors = []
    travelling = list(sizes)
    for tensor, rank in sorted(ranks.items()):
        rows, columns = shapes[tensor]
        short, long = min(rows, columns), max(rows, columns)
        narrow, wide = (Side.ROWS, Side.COLUMNS) if rows <= columns else (Side.COLUMNS, Side.ROWS)
        covariance = covariances.get(tensor)
        if covariance is not None and covariance.shape == (short, short):
            basis = _basis(rank, covariance, rng)
            factors.append(Factor(tensor=tensor, side=narrow, rows=short, rank=rank, basis=basis))
            travelling[tensor] = rank * long
        else:
            # As many numbers as the other side would take.
            rank = max(1, min(rank * long // short, long - 1))
            factors.append(Factor(tensor=tensor, side=wide, rows=long, rank=rank, seed=nonce))
            travelling[tensor] = rank * short
    return Projection(factors=tuple(factors), sizes=tuple(travelling))


def remember(
    covariances: Covariances, update: NDArray[np.float64], projection: Projection, card: ModelCard
) -> dict[int, NDArray[np.float32]]:
    """The covariances after a round.

    Args:
        covariances: before it.
        update: the fleet's mean, lifted, of shape (parameters,).
        projection: of the round.
        card: of the model.
    """
    starts = np.cumsum([0, *(slot.size for slot in card.tensors)])
    after = {}
    for factor in projection.factors:
        columns = card.tensors[factor.tensor].shape[-1]
        matrix = update[starts[factor.tensor] : starts[factor.tensor + 1]].reshape(-1, columns)
        # Without BLAS: the same sums give the same covariance whatever the number of threads.
        if len(matrix) <= columns:
            fresh = np.einsum("ij,kj->ik", matrix, matrix)
        else:
            fresh = np.einsum("ij,ik->jk", matrix, matrix)
        before = covariances.get(factor.tensor)
        if before is not None and before.shape == fresh.shape:
            fresh += _DECAY * before
        after[factor.tensor] = fresh.astype(np.float32)
    return after


def _matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a tensor that a projection is worth its basis for."""
    if len(shape) < 2 or math.prod(shape) < _SMALLEST:
        return None
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (rows, columns) if 2 <= min(rows, columns) <= _LARGEST_SIDE else None


def _ranks(shapes: Mapping[int, tuple[int, int]], room: int) -> dict[int, int]:
    """The same part of every tensor's smaller side, as large as there is room for; empty where there is none."""
    best: dict[int, int] = {}
    for part in range(1, 1000):
        ranks = {tensor: max(1, min(shape) * part // 1000) for tensor, shape in shapes.items()}
        ranks = {tensor: min(rank, min(shapes[tensor]) - 1) for tensor, rank in ranks.items()}
        basis = sum(rank * min(shapes[tensor]) for tensor, rank in ranks.items())
        if sum(rank * max(shapes[tensor]) for tensor, rank in ranks.items()) > room or basis > limits.MAX_BASIS:
            break
        best = ranks
    return best


def _spectra(shapes: Mapping[int, tuple[int, int]], covariances: Covariances) -> dict[int, NDArray[np.float64]] | None:
    """Eigenvalues of every tensor's covariance, largest first; None where one is not known yet."""
    found = {}
    for tensor, shape in shapes.items():
        covariance = covariances.get(tensor)
        if covariance is None or covariance.shape != (min(shape), min(shape)):
            return None
        found[tensor] = np.linalg.eigvalsh(covariance.astype(np.float64))[::-1]
    return found


def _ranks_by_energy(
    shapes: Mapping[int, tuple[int, int]], spectra: Mapping[int, NDArray[np.float64]], room: int
) -> dict[int, int]:
    """Room where it holds most energy for each number that travels, and a little for every tensor to look around."""
    ranks = {tensor: max(2, min(shape) // 32) for tensor, shape in shapes.items()}
    ranks = {tensor: min(rank, min(shapes[tensor]) - 1) for tensor, rank in ranks.items()}
    left = room - sum(rank * max(shapes[tensor]) for tensor, rank in ranks.items())
    if left < 0:
        return _ranks(shapes, room)
    basis = limits.MAX_BASIS - sum(rank * min(shapes[tensor]) for tensor, rank in ranks.items())
    gains = [
        (-value / max(shapes[tensor]), place, tensor)
        for tensor, values in spectra.items()
        for place, value in enumerate(values[: min(shapes[tensor]) - 1 - ranks[tensor]])
    ]
    for _, _, tensor in sorted(gains):
        short, long = min(shapes[tensor]), max(shapes[tensor])
        if long <= left and short <= basis:
            ranks[tensor] += 1
            left, basis = left - long, basis - short
    return ranks


def _basis(rank: int, covariance: NDArray[np.float32], rng: np.random.Generator) -> bytes:
    """Eigenvectors, then random signs, as int8 columns."""
    known = rank - max(1, int(rank * _EXPLORED)) if rank > 1 else 1
    _, vectors = np.linalg.eigh(covariance.astype(np.float64))
    columns: list[NDArray[Any]] = [vectors[:, -1 - i] for i in range(known)]
    columns += [rng.choice([-1.0, 1.0], len(covariance)) for _ in range(rank - known)]
    scaled = [np.rint(127 * column / np.abs(column).max()).astype(np.int8) for column in columns]
    return np.concatenate(scaled).tobytes()
