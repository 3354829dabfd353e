"""Plain updates of a site looked at side by side, from the journal, with little memory however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from fleetfed.gateway import robust
from fleetfed.gateway.robust import Matrix
from fleetfed.gateway.summation import Source
from fleetfed.shared.aggregate.accumulator import Partial, Ring
from fleetfed.shared.aggregate.lanes import Values
from fleetfed.shared.wire.defence import Defence, Rule
from fleetfed.shared.wire.envelope import MessageId

_IN_MEMORY: Final = 1 << 25
"""Bytes of a matrix up to which no file is needed."""


Decode = Callable[[bytes, bytes], Values]
"""Head and body of a stored update to its integers."""


def leave_out(
    members: Sequence[MessageId], source: Source, decode: Decode, *, ring: Ring, defence: Defence
) -> dict[MessageId, float]:
    """Which updates do not look like the others, with their scores.

    Args:
        members: of the own devices; their order does not matter.
        source: holds them.
        decode: head and body to values.
        ring: the plan's arithmetic.
        defence: the plan's.
    """
    ordered = sorted(members)
    if len(ordered) < defence.minimum:
        return {}
    with _matrix(ordered, source, decode, ring) as matrix:
        return {ordered[each.row]: each.score for each in robust.outliers(matrix, defence)}


def combine(own: Partial, members: Sequence[MessageId], source: Source, decode: Decode, *, defence: Defence) -> Partial:
    """The own sum by the plan's rule; the very same where the rule is to add.

    Meta words are added in any case: a count or a loss that lies is bounded by its range.
    """
    if defence.rule in (Rule.SUM, Rule.KRUM) or len(members) < defence.minimum:
        return own
    with _matrix(sorted(members), source, decode, own.ring) as matrix:
        values = robust.combine(matrix, defence)
    assert values is not None
    layout = own.ring.layout
    return Partial(own.ring, layout.pack(values, own.words[layout.value_words :]), own.count)


@contextmanager
def _matrix(members: Sequence[MessageId], source: Source, decode: Decode, ring: Ring) -> Iterator[Matrix]:
    """The updates as rows, in the order of ``members``; on disk where they are large."""
    kind: Any = np.int8 if ring.bits <= 8 else np.int16
    shape = len(members), ring.layout.dimension
    size = shape[0] * shape[1] * np.dtype(kind).itemsize
    with source.scratch() as file:
        matrix: Matrix = np.empty(shape, dtype=kind) if size <= _IN_MEMORY else np.memmap(file, kind, "w+", shape=shape)
        for row, (head, body) in enumerate(source.updates(members)):
            matrix[row] = decode(head, body)
        yield matrix
