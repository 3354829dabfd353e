"""How far one version's weights are from another's, and whether the policy's `largest_step` lets a member take it.

The bound is a root mean square over all trainable values. It holds for every step of a chain of patches, and for the
whole way from the version held: over n versions at most n times the bound, which is the triangle inequality. Versions
count as steps up to `MOST_STEPS`: their numbers are whoever signs manifests' to choose, and one number far ahead must
not buy a model without relation to the one before.

What the owners vouch for by name (`Policy.models`) is a start of its own: a rollback, another architecture, a model
that was trained elsewhere. Without a bound (0), or on a device that holds nothing yet, every version is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.model.table import WeightTable
from fleetfed.shared.trust.policy import Policy

MOST_STEPS: Final = 256
"""Steps that a difference of version numbers counts for at most: a device that slept through more has drifted less."""
_SLACK: Final = 1 + 1e-9
"""Sums of squares differ in the last digits from one machine's linear algebra to the next."""
_AT_ONCE: Final = 1 << 16
"""Values that are widened to float64 at a time, so that a small device needs no second model's worth of memory."""

Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StepBound:
    """What the policy says of steps.

    Attributes:
        largest: root mean square of one version's step; 0 for no bound.
        models: SHA-256 of files that are taken from wherever one stands.
    """

    largest: float = 0.0
    models: frozenset[bytes] = frozenset()

    def check(self, moved: float, *, versions: int, what: str) -> None:
        """Refuse a step that is too large.

        Args:
            moved: root mean square; not a number where weights are not finite.
            versions: from the one to the other.
            what: for the message.

        Raises:
            RemoteProtocolError: `LARGE_STEP`.
        """
        if not self.largest:
            return
        steps = min(max(versions, 1), MOST_STEPS)
        # The negation also refuses what is not a number.
        if not moved <= self.largest * steps * _SLACK:
            raise RemoteProtocolError(
                RejectReason.LARGE_STEP,
                f"{what}: weights moved by {moved:.6g}, allowed are {self.largest:.6g} for each of {steps} versions",
            )


def bound_of(policy: Policy) -> StepBound:
    """What a policy says of the step from one version to the next."""
    return StepBound(policy.largest_step, frozenset(policy.models))


def step_rms(before: Data, after: Data, table: WeightTable) -> float:
    """How far the weights moved between two files.

    Args:
        before, after: whole model files.
        table: where the weights are, in both.

    Returns:
        Root mean square over all values, in float64; NaN where a value of either file is not finite.

    Raises:
        RemoteProtocolError: `LARGE_STEP` where the files are not versions of one model: the bytes around the weights
            differ, which could say anything; `MALFORMED`, `TOO_LARGE` where the table does not fit the files.
    """
    table.validate(len(before))
    if len(before) != len(after) or not _same(_around(before, table), _around(after, table)):
        raise RemoteProtocolError(RejectReason.LARGE_STEP, "more than its weights differs from the model before")
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for slot in table.tensors:
            old, new = _values(before, slot.offset, slot.size), _values(after, slot.offset, slot.size)
            for at in range(0, slot.size, _AT_ONCE):
                change = new[at : at + _AT_ONCE].astype(np.float64)
                change -= old[at : at + _AT_ONCE]
                total += float(np.dot(change, change))
    return math.sqrt(total / table.parameters) if math.isfinite(total) else math.nan


class Walk:
    """The way from the version held to the one that is offered, step by step.

    Args:
        bound: of the policy in force.
        held: newest version that the member has; None for none, which bounds nothing.
        files: SHA-256 of the files that it has.
        start: SHA-256 of the file that the way begins at.
    """

    def __init__(self, bound: StepBound, *, held: int | None, files: frozenset[bytes], start: bytes) -> None:
        self._bound = bound
        self._held = held if bound.largest else None
        self._good = files | bound.models
        # From a file that the member took before, or that the owners named, bounded steps need no look at the whole.
        self._anchored = start in self._good

    def step(self, before: Data, after: Data, table: WeightTable, *, base: int, target: int, sha256: bytes) -> None:
        """One patch was applied.

        Args:
            before, after: the files.
            table: of both.
            base, target: their versions, as the manifest says.
            sha256: of ``after``.

        Raises:
            RemoteProtocolError: as `step_rms` and `StepBound.check`.
        """
        if self._held is None:
            return
        if sha256 in self._good:
            self._anchored = True
        elif self._anchored or base >= self._held:
            moved = step_rms(before, after, table)
            self._bound.check(moved, versions=target - base, what=f"version {target}")

    def needs_whole(self, version: int, sha256: bytes) -> bool:
        """Whether the file that resulted is still to be compared with the one held.

        Args:
            version: that results.
            sha256: of its file.
        """
        if self._held is None or self._anchored or sha256 in self._good:
            return False
        # Only what a coordinator said that is believed no more can lie above: nothing to hold on to.
        return version >= self._held

    def whole(self, before: Data, before_layout: bytes, after: Data, table: WeightTable, *, version: int) -> None:
        """Compare what resulted with the version held.

        Args:
            before, before_layout: the file held, and its table's `WeightTable.layout_hash`.
            after, table: what resulted.
            version: of that.

        Raises:
            RemoteProtocolError: as `step_rms` and `StepBound.check`.
        """
        assert self._held is not None
        if before_layout != table.layout_hash():
            raise RemoteProtocolError(RejectReason.LARGE_STEP, "its tensors are not those of the model before")
        moved = step_rms(before, after, table)
        self._bound.check(moved, versions=version - self._held, what=f"version {version}")


def _values(data: Data, offset: int, size: int) -> NDArray[np.float32]:
    return np.frombuffer(data, dtype="<f4", count=size, offset=offset)


def _around(data: Data, table: WeightTable) -> Iterator[memoryview]:
    """The parts of the file that hold no weights, in order of the file."""
    view, at = memoryview(data), 0
    for slot in sorted(table.tensors, key=lambda slot: slot.offset):
        yield view[at : slot.offset]
        at = slot.end
    yield view[at:]


def _same(one: Iterator[memoryview], other: Iterator[memoryview]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=True))
