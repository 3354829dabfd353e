"""Plain mode at a gateway: it reads every update, checks every value and adds the integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fleetfed.gateway import defence
from fleetfed.gateway.events import CommitArrived
from fleetfed.gateway.record import Accepted, RoundSecrets
from fleetfed.gateway.robust import norm
from fleetfed.gateway.summation import Source, Summation
from fleetfed.shared.aggregate.accumulator import Partial, Ring, decode_words, encode_words, max_words_body
from fleetfed.shared.aggregate.body import decode_body, max_body
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.defence import Defence
from fleetfed.shared.wire.envelope import Head, Header, MessageId, open_body, parse_head
from fleetfed.shared.wire.messages import Plan, Reveal
from fleetfed.shared.wire.update import PLAIN, UpdateExtension

REVEAL_LEVEL: Final = 3
"""zstd level of a partial: sums hardly compress further, and the coordinator waits for it."""
_HEAD_ROOM: Final = 4096
"""Bytes of a reveal beside its words."""


class PlainRules:
    """See `modes.Rules`."""

    cosigned = False

    def __init__(self, plan: Plan, ring: Ring) -> None:
        self._plan = plan
        self._ring = ring
        self._body_limit = max_body(ring.layout.dimension, ring.own_limit, ring.meta.words)

    def new_secrets(self, randomness: Callable[[int], bytes]) -> RoundSecrets | None:
        """Nothing is secret from a gateway that reads every update."""
        return None

    def summation(self, secrets: RoundSecrets | None, *, site: str) -> Summation:
        """A `PlainSum`."""
        return PlainSum(self._ring, capacity=self._plan.quorum.cohort_cap, rule=self._plan.defence)

    def check_update(self, header: Header, extension: UpdateExtension) -> None:
        """No boxes, and a body of no more bytes than the plan's values can need."""
        if (extension.mode, extension.suite, extension.boxes) != (PLAIN, 0, ()):
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"mode {extension.mode} in a plain round")
        if max(header.body_size, header.raw_size) > self._body_limit:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{header.raw_size} bytes, limit {self._body_limit}")

    def check_part(self, part: Sequence[Accepted], *, proposed: int) -> None:
        """Any set will do: plain mode promises nobody that a sum of few does not leave the gateway."""

    def reveal_limit(self, members: int) -> int:
        """Whatever so many values can need."""
        return max_words_body(self._ring, self._ring.capacity) + _HEAD_ROOM

    def open_reveal(self, head: Head, body: bytes | memoryview) -> tuple[Reveal, Partial | None]:
        """Every value and the count word are checked."""
        return decode_reveal(head.header, body, self._ring)

    def reveal_work(self, own: int) -> int:
        """One vector, whatever it is the sum of."""
        return self._ring.layout.dimension


class PlainSum(Summation):
    """The sum of updates that the gateway reads.

    Args:
        ring, capacity: as for `Summation`.
        rule: how outliers are met; None for not at all.
    """

    def __init__(self, ring: Ring, *, capacity: int, rule: Defence | None = None) -> None:
        super().__init__(ring, capacity=capacity)
        self._rule = rule

    def open(self, head: Head, body: bytes | memoryview) -> tuple[Values, Words]:
        """Integers and meta words of an update, all in the plan's range.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH`, `DECOMPRESSION`, `OUT_OF_RANGE` and what else `decode_body` raises;
                `OUTLIER` beyond the plan's norm bound.
        """
        values, meta = decode_values(open_body(head.header, body), self.ring)
        bound = self._rule.norm_bound if self._rule is not None else 0
        if bound:
            length = norm(values)
            if length > bound:
                raise RemoteProtocolError(RejectReason.OUTLIER, f"norm {length:.0f}, bound {bound:.0f}")
        return values, meta

    def leave_out(self, members: Sequence[MessageId], source: Source) -> dict[MessageId, float]:
        """By the plan's defence."""
        if self._rule is None:
            return {}
        return defence.leave_out(members, source, self._values, ring=self.ring, defence=self._rule)

    def release(self, own: Partial, members: Sequence[MessageId], source: Source) -> Partial:
        """The own sum by the plan's rule, with what every sum gets."""
        if self._rule is not None:
            own = defence.combine(own, members, source, self._values, defence=self._rule)
        return super().release(own, members, source)

    def _values(self, head: bytes, body: bytes) -> Values:
        return decode_values(open_body(parse_head(head).header, body), self.ring)[0]

    def add(self, opened: tuple[Values, Words]) -> None:
        """Add integers."""
        self._own.accumulate(*opened, checked=True)

    def subtract(self, opened: tuple[Values, Words]) -> None:
        """Subtract integers."""
        self._own.subtract(*opened)

    def open_below(self, reveal: bytes) -> Partial | None:
        """The sum in it."""
        head = parse_head(reveal)
        return decode_reveal(head.header, memoryview(reveal)[head.size :], self.ring)[1]

    def reveal(self, commit: CommitArrived, own: Mapping[MessageId, str], source: Source) -> Reveal:
        """One sum, compressed."""
        partial = self.total(tuple(own), source)
        words = encode_words(partial, level=REVEAL_LEVEL)
        return Reveal(plan=commit.plan, commit=commit.head, count=partial.count, words=words)


def decode_values(body: bytes | memoryview, ring: Ring) -> tuple[Values, Words]:
    """Decode a body whose hash was checked.

    Raises:
        RemoteProtocolError: as `PlainSum.open`.
    """
    layout = ring.layout
    values, meta = decode_body(body, dimension=layout.dimension, limit=ring.own_limit, meta_words=layout.meta_words)
    ring.meta.decode(meta, count=1)
    return values, meta


def decode_reveal(header: Header, body: bytes | memoryview, ring: Ring) -> tuple[Reveal, Partial]:
    """Check and decode a reveal from below.

    Raises:
        RemoteProtocolError: the message, the sum's own count word or a value is wrong.
    """
    raw = open_body(header, body)
    reveal = codec.decode(Reveal, raw, limit=len(raw))
    if reveal.buckets or reveal.reason is not None:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "buckets, or a refusal, in a plain round")
    return reveal, decode_words(reveal.words, ring, count=reveal.count)
