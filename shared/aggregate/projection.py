"""Updates as projections: linear and public, so that sums of projections are projections of sums, masked or not.

A plan may give a basis for each large tensor. Seen as a matrix X, with the last axis as its columns, the tensor then
travels as ``B^T X`` (or ``X B``), where the columns of B are normalized. The coordinator lifts the mean of what
travelled to the nearest matrix that has it: ``B (B^T B)^-1 Y``. What lies outside of the basis is lost in that round,
and the basis is chosen anew for the next (`training.basis` of the coordinator, which alone lifts).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.wire.projection import Factor, Projection, Side

Floats = NDArray[np.floating[Any]]
Matrix = NDArray[np.float64]


def check_projection(projection: Projection, sizes: tuple[int, ...]) -> None:
    """Refuse a projection that does not fit the model.

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
        given = factor.rows * factor.rank if not factor.seed else 0
        if left or not columns or not factor.rank < factor.rows or len(factor.basis) != given:
            raise ValueError(
                f"a basis of {len(factor.basis)} numbers, {factor.rows} rows and rank {factor.rank} for {sizes[last]} "
                "values"
            )
        travelling[last] = factor.rank * columns
    if tuple(travelling) != projection.sizes:
        raise ValueError(f"{projection.dimension} values are said to travel, {sum(travelling)} do")


def basis_of(factor: Factor) -> Matrix:
    """The normalized basis, float64 of shape (rows, rank); a column of zeros stays one."""
    if factor.seed:
        bits = np.unpackbits(np.frombuffer(_stream(factor), dtype=np.uint8), count=factor.rows * factor.rank)
        signs = 2 * bits.astype(np.int8) - np.int8(1)
    else:
        signs = np.frombuffer(factor.basis, dtype=np.int8)
    columns = signs.reshape(factor.rank, -1).astype(np.float64)
    lengths = np.sqrt(np.square(columns).sum(axis=1))
    return np.ascontiguousarray((columns / np.where(lengths > 0, lengths, 1.0)[:, None]).T)


def _stream(factor: Factor) -> bytes:
    """Bits for a basis of random signs: SHAKE-128 of seed and tensor."""
    label = b"ff-signs" + factor.seed + factor.tensor.to_bytes(4, "little")
    return hashlib.shake_128(label).digest(-(-factor.rows * factor.rank // 8))


def project(delta: Floats, projection: Projection, sizes: tuple[int, ...]) -> Floats:
    """What travels of an update.

    Args:
        delta: float32 or float64, shape (sum of sizes,). Not changed.
        projection: fits ``sizes`` (`check_projection`).
        sizes: values of each tensor.

    Returns:
        The same dtype, shape (projection.dimension,).
    """
    factors = {factor.tensor: factor for factor in projection.factors}
    out = np.empty(projection.dimension, dtype=delta.dtype)
    at = to = 0
    for tensor, (size, travelling) in enumerate(zip(sizes, projection.sizes, strict=True)):
        part, target = delta[at : at + size], out[to : to + travelling]
        at, to = at + size, to + travelling
        factor = factors.get(tensor)
        if factor is None:
            target[:] = part
            continue
        basis = basis_of(factor).astype(delta.dtype)
        if factor.side is Side.ROWS:
            np.matmul(basis.T, part.reshape(len(basis), -1), out=target.reshape(factor.rank, -1))
        else:
            np.matmul(part.reshape(-1, len(basis)), basis, out=target.reshape(-1, factor.rank))
    return out


def lift(vector: Matrix, projection: Projection, sizes: tuple[int, ...]) -> Matrix:
    """The nearest update to what travelled, float64 of shape (sum of sizes,).

    Without BLAS, whose order of additions changes with the number of threads.

    Args:
        vector: float64, shape (projection.dimension,).
        projection, sizes: as for `project`.
    """
    factors = {factor.tensor: factor for factor in projection.factors}
    out = np.empty(sum(sizes))
    at = to = 0
    for tensor, (travelling, size) in enumerate(zip(projection.sizes, sizes, strict=True)):
        part, target = vector[at : at + travelling], out[to : to + size]
        at, to = at + travelling, to + size
        factor = factors.get(tensor)
        if factor is None:
            target[:] = part
            continue
        basis = basis_of(factor)
        # Two directions may be nearly the same one after rounding to int8: then the shortest solution.
        dual = np.einsum("ij,jk->ik", basis, np.linalg.pinv(np.einsum("ij,ik->jk", basis, basis), hermitian=True))
        if factor.side is Side.ROWS:
            lifted = np.einsum("ij,jk->ik", dual, part.reshape(factor.rank, -1))
        else:
            lifted = np.einsum("ij,kj->ik", part.reshape(-1, factor.rank), dual)
        target[:] = lifted.reshape(-1)
    return out
