"""Updates within a public subspace: linear, so that sums of projections are projections of sums, masked or not.

A plan may give each large tensor a basis B of random signs, drawn from the plan's seed and new in every round. Written
as a matrix X, the tensor then travels as ``B^T X``, which is ``rank / rows`` of its values, and the coordinator lifts
the mean of what travelled to the nearest matrix that has it: ``B (B^T B)^-1 Y``. An update of the form ``B Z`` comes
back whole, so devices train ``Z`` (`device.confined`) and nothing of what they learned is thrown away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.wire.projection import Factor, Projection

Floats = NDArray[np.floating[Any]]
Matrix = NDArray[np.float64]


def check_projection(projection: Projection, sizes: tuple[int, ...]) -> None:
    """Refuse a projection that does not fit the model, or whose bases would be larger than it.

    Args:
        projection: the plan's.
        sizes: values of each tensor of the model.

    Raises:
        ValueError: it does not fit.
    """
    travelling = list(sizes)
    last = -1
    for factor in projection.factors:
        if not last < factor.tensor < len(sizes):
            raise ValueError(f"a basis for tensor {factor.tensor} of {len(sizes)} after {last}")
        last = factor.tensor
        columns, left = divmod(sizes[last], factor.rows)
        if left or not 0 < factor.rank < factor.rows or factor.rank > columns:
            raise ValueError(f"a basis of {factor.rows} rows and rank {factor.rank} for {sizes[last]} values")
        travelling[last] = factor.rank * columns
    if tuple(travelling) != projection.sizes:
        raise ValueError(f"{projection.dimension} values are said to travel, {sum(travelling)} do")


class Subspace:
    """A projection's bases.

    Args:
        projection: fits ``sizes`` (`check_projection`).
        sizes: values of each tensor.
        by_rows: normalize the rows of the bases instead of their columns: a value then moves about as far as one of
            the numbers that it is made of.
    """

    def __init__(self, projection: Projection, sizes: tuple[int, ...], *, by_rows: bool = False) -> None:
        self.dimension = projection.dimension
        self.parameters = sum(sizes)
        self._sizes = tuple(zip(sizes, projection.sizes, strict=True))
        self._bases = {factor.tensor: _basis(projection.seed, factor, by_rows) for factor in projection.factors}

    def project(self, delta: Floats) -> Floats:
        """What travels: ``B^T X``, of the dtype of ``delta``, which has shape (parameters,) and is not changed."""
        out = np.empty(self.dimension, dtype=delta.dtype)
        for basis, whole, small in self._spans(delta, out):
            if basis is None:
                small[:] = whole
            else:
                typed = basis.astype(delta.dtype, copy=False)
                np.matmul(typed.T, whole.reshape(len(basis), -1), out=small.reshape(basis.shape[1], -1))
        return out

    def expand(self, numbers: Floats) -> Floats:
        """``B Z``: the update that ``numbers``, of shape (dimension,), stand for; of their dtype."""
        out = np.empty(self.parameters, dtype=numbers.dtype)
        for basis, whole, small in self._spans(out, numbers):
            if basis is None:
                whole[:] = small
            else:
                typed = basis.astype(numbers.dtype, copy=False)
                np.matmul(typed, small.reshape(basis.shape[1], -1), out=whole.reshape(len(basis), -1))
        return out

    def lift(self, mean: Matrix) -> Matrix:
        """The nearest update to what travelled, float64 of shape (parameters,).

        Without BLAS, whose order of additions changes with the number of threads.

        Args:
            mean: float64, shape (dimension,).
        """
        out = np.empty(self.parameters)
        for basis, whole, small in self._spans(out, mean):
            if basis is None:
                whole[:] = small
                continue
            exact = basis.astype(np.float64)
            gram = np.einsum("ij,ik->jk", exact, exact)
            # In a small basis two columns of signs may be the same: then the shortest solution.
            dual = np.einsum("ij,jk->ik", exact, np.linalg.pinv(gram, hermitian=True))
            np.einsum("ij,jk->ik", dual, small.reshape(exact.shape[1], -1), out=whole.reshape(len(exact), -1))
        return out

    def _spans(self, whole: Floats, small: Floats) -> Iterator[tuple[NDArray[np.float32] | None, Floats, Floats]]:
        at = to = 0
        for tensor, (size, travelling) in enumerate(self._sizes):
            yield self._bases.get(tensor), whole[at : at + size], small[to : to + travelling]
            at, to = at + size, to + travelling


def _basis(seed: bytes, factor: Factor, by_rows: bool) -> NDArray[np.float32]:
    """Signs times a constant, float32 of shape (rows, rank): bits of SHAKE-128 of seed and tensor, row by row."""
    count = factor.rows * factor.rank
    stream = hashlib.shake_128(b"ff-signs" + seed + factor.tensor.to_bytes(4, "little")).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=count, bitorder="little")
    scale = np.float32((factor.rank if by_rows else factor.rows) ** -0.5)
    return np.where(bits == 1, scale, -scale).reshape(factor.rows, factor.rank)
