"""The sum of the open round: one vector, whatever the number of devices; built again from the journal after a crash.

What a body is, how it adds and what is revealed is each mode's own (`plain`, `masked`). Common to them: what the own
devices sent and what came from below stay apart until the reveal, so that there is one place, `Summation.release`,
where a sum of own contributions becomes what leaves the gateway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from fleetfed.gateway.events import CommitArrived
from fleetfed.shared.aggregate.accumulator import Accumulator, Partial, Ring
from fleetfed.shared.privacy.mechanism import add_gateway_noise
from fleetfed.shared.wire.envelope import Head, MessageId, parse_head
from fleetfed.shared.wire.masking import NonceHash
from fleetfed.shared.wire.messages import Reveal


class Source(Protocol):
    """What is asked of the journal."""

    def updates(self, message_ids: Iterable[MessageId]) -> Iterator[tuple[bytes, bytes]]:
        """Heads and bodies of stored updates, one at a time."""

    def reveals(self) -> Iterator[bytes]:
        """The stored reveals of gateways below, one message at a time."""

    def scratch(self) -> BinaryIO:
        """An empty file on the journal's disk, gone once it is closed."""


class Summation(ABC):
    """A round's sum. All but `open` only in one thread at a time.

    Args:
        ring: the plan's arithmetic.
        capacity: the plan's cohort limit.
    """

    def __init__(self, ring: Ring, *, capacity: int) -> None:
        self.ring = ring
        self._own = Accumulator(ring, capacity=capacity)
        self._below = Accumulator(ring, capacity=capacity)

    @property
    def count(self) -> int:
        """Contributors in the sum."""
        return self._own.count + self._below.count

    # --- What a mode does -----------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, head: Head, body: bytes | memoryview) -> Any:
        """Check an update's body, all that the mode lets a gateway see of it, and return what `add` takes.

        Args:
            head: verified and admitted.
            body: as received.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH`, and whatever else is wrong with it.
        """

    @abstractmethod
    def add(self, opened: Any) -> None:
        """Add one opened update."""

    @abstractmethod
    def subtract(self, opened: Any) -> None:
        """Take one opened update out again."""

    @abstractmethod
    def open_below(self, reveal: bytes) -> Partial | None:
        """What a stored reveal from below adds to the sum; None where it is passed on as it is."""

    @abstractmethod
    def reveal(self, commit: CommitArrived, own: Mapping[MessageId, str], source: Source) -> Reveal:
        """Hand over what the tier above gets; the sum is gone afterwards.

        Args:
            commit: that it answers.
            own: the committed updates of the own devices, in order, with the owners of those.
            source: holds them, and the reveals from below.
        """

    def nonces(self) -> tuple[NonceHash, ...]:
        """What a proposal with own updates says of this site's coin."""
        return ()

    @property
    def noise_secret(self) -> bytes:
        """What noise is drawn from: a secret of the round that the journal holds until the reveal; empty for none.

        Only rounds of masked updates have one, and only in those do gateways add noise (`mechanism.check_privacy`).
        """
        return b""

    def leave_out(self, members: Sequence[MessageId], source: Source) -> dict[MessageId, float]:
        """Which own updates do not look like the others, with their scores; asked once, before the proposal.

        Args:
            members: all that could be proposed.
            source: holds them.
        """
        return {}

    def release(self, own: Partial, members: Sequence[MessageId], source: Source) -> Partial:
        """What a sum of own contributions becomes before it leaves the gateway; asked once for each sum, in the worker.

        Noise, and whatever else is due to own contributions alone, stands here and nowhere else; whoever overrides
        this ends with it. The same sum becomes the same again after a crash, or on a journal that was put back.

        Args:
            own: their exact sum.
            members: whose it is.
            source: holds their updates.
        """
        return add_gateway_noise(own, self.noise_secret)

    # --- Common to all --------------------------------------------------------------------------------------------

    def merge(self, partial: Partial | None) -> None:
        """Add what a reveal from below holds."""
        if partial is not None:
            self._below.merge(partial)

    def drop(self, updates: Iterable[tuple[bytes, bytes]]) -> None:
        """Take out updates, given their stored heads and bodies."""
        for head, body in updates:
            self.subtract(self.open(parse_head(head), body))

    def rebuild(self, updates: Iterable[tuple[bytes, bytes]], reveals: Iterable[bytes]) -> None:
        """Add what the journal holds: heads and bodies of updates, whole reveal messages."""
        for head, body in updates:
            self.add(self.open(parse_head(head), body))
        for raw in reveals:
            self.merge(self.open_below(raw))

    def total(self, members: Sequence[MessageId], source: Source) -> Partial:
        """Hand over own contributions, released, and those from below in one sum."""
        own, below = self._own.report(), self._below.report()
        if not own.count:
            return below
        released = self.release(own, members, source)
        total = Accumulator(self.ring, capacity=self._own.capacity, words=released.words, count=own.count)
        if below.count:
            total.merge(below)
        return total.report()
