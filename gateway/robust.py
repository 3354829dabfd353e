"""Which updates of a site do not look like the others, and sums that a few hostile ones cannot move. Pure.

An update is a row of integers on the plan's grid. Everything is computed exactly (products and sums of integers stay
below 2**53) or elementwise in float64, column block by column block, so that a matrix on disk needs little memory and
a gateway that starts again comes to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.lanes import Values
from fleetfed.shared.wire.defence import Defence, Rule

_BLOCK: Final = 1 << 22
"""Cells of the matrix at a time: 32 MB as float64."""
_MAD_TO_SIGMA: Final = 0.6745

Matrix = NDArray[np.signedinteger[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """Why a row is left out.

    Attributes:
        row: its index.
        why: ``norm``, ``direction`` or ``krum``.
        score: how far out it is; for ``krum`` its sum of distances over the median one.
    """

    row: int
    why: str
    score: float


def norm(values: Values) -> float:
    """L2 norm of an update, in levels."""
    wide = values.astype(np.float64)
    return float(np.sqrt(np.dot(wide, wide)))


def outliers(matrix: Matrix, defence: Defence) -> tuple[Outlier, ...]:
    """The rows that the plan's defence leaves out, by row; never half of them or more.

    Args:
        matrix: integers, shape (updates, dimension); may be a memory map.
        defence: the plan's.
    """
    count = len(matrix)
    if count < defence.minimum or (not defence.outlier_score and defence.rule is not Rule.KRUM):
        return ()
    gram = _gram(matrix)
    found = _scored(gram, defence.outlier_score) if defence.outlier_score else {}
    if defence.rule is Rule.KRUM:
        left = [row for row in range(count) if row not in found]
        found |= _krum(gram, left, hostile=int(defence.hostile * count) - len(found))
    # Where half of the devices seem odd nobody knows which half: leave out the oddest only.
    most = (count - 1) // 2
    oddest = sorted(found.values(), key=lambda each: (-each.score, each.row))[:most]
    return tuple(sorted(oddest, key=lambda each: each.row))


def combine(matrix: Matrix, defence: Defence) -> NDArray[np.int64] | None:
    """The sum of the rows by the plan's rule, as integers; None where it is the plain sum.

    The rule's mean is multiplied by the number of rows and rounded half up, so that it adds to other sites' sums as a
    sum of as many updates would.

    Args:
        matrix: integers, shape (updates, dimension); may be a memory map.
        defence: the plan's.
    """
    count = len(matrix)
    if defence.rule not in (Rule.TRIMMED_MEAN, Rule.MEDIAN) or count < defence.minimum:
        return None
    cut = (count - 1) // 2 if defence.rule is Rule.MEDIAN else int(defence.hostile * count)
    kept = count - 2 * cut
    out = np.empty(matrix.shape[1], dtype=np.int64)
    for columns in _blocks(matrix):
        ordered = np.sort(matrix[:, columns], axis=0)[cut : count - cut]
        total = ordered.sum(axis=0, dtype=np.int64) * count
        out[columns] = (2 * total + kept) // (2 * kept)
    return out


def _blocks(matrix: Matrix) -> Iterator[slice]:
    width = max(_BLOCK // max(len(matrix), 1), 1)
    for start in range(0, matrix.shape[1], width):
        yield slice(start, start + width)


def _gram(matrix: Matrix) -> Floats:
    """All inner products, exact."""
    gram = np.zeros((len(matrix), len(matrix)))
    for columns in _blocks(matrix):
        part = matrix[:, columns].astype(np.float64)
        gram += part @ part.T
    return gram


def _scored(gram: Floats, limit: float) -> dict[int, Outlier]:
    norms = np.sqrt(np.diag(gram))
    safe = np.where(norms > 0, norms, 1.0)
    # Every update with the same say, so that a long one cannot bend the direction that it is compared with; and
    # compared with the others, without itself.
    cosines = gram / np.outer(safe, safe)
    own = np.diag(cosines)
    length = np.sqrt(np.maximum(cosines.sum() - 2 * cosines.sum(axis=1) + own, 1e-30))
    direction = (cosines.sum(axis=1) - own) / length
    found: dict[int, Outlier] = {}
    for why, scores in (("norm", _robust(norms)), ("direction", _robust(-direction))):
        for row in np.flatnonzero(scores > limit):
            score = float(scores[row])
            if row not in found or found[int(row)].score < score:
                found[int(row)] = Outlier(row=int(row), why=why, score=score)
    return found


def _robust(values: Floats) -> Floats:
    """How far above the median each value is, in robust standard deviations."""
    middle = np.median(values)
    deviation = np.median(np.abs(values - middle))
    # Where most are equal any other would be infinitely far out: a thousandth of the median is the least scale.
    scale = max(float(deviation), 1e-3 * abs(float(middle)), 1e-12)
    return np.asarray(_MAD_TO_SIGMA * (values - middle) / scale)


def _krum(gram: Floats, rows: list[int], *, hostile: int) -> dict[int, Outlier]:
    """The ``hostile`` rows that are farthest from their nearest neighbours."""
    count = len(rows)
    if hostile < 1 or count < 2 * hostile + 3:
        return {}
    part = gram[np.ix_(rows, rows)]
    squares = np.diag(part)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * part, 0)
    near = np.sort(distances, axis=1)[:, 1 : count - hostile - 1]
    scores = near.sum(axis=1)
    middle = max(float(np.median(scores)), 1e-12)
    worst = sorted(range(count), key=lambda i: (-scores[i], rows[i]))[:hostile]
    return {rows[i]: Outlier(row=rows[i], why="krum", score=float(scores[i]) / middle) for i in worst}
