"""Split mode at a gateway: it adds words that are uniform to it, and lets out no sum over fewer than the plan says.

Without buckets the one sum grows as updates come, and loses what the commit leaves out. With buckets nobody knows
before the commit who will be added to whom: an update is opened once when it comes, to see that it can be, and again
from the journal when the coin is tossed.

The set of one commit is revealed, and never another: two sums over sets that differ in one device are that device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, cast

from fleetfed.gateway.events import CommitArrived
from fleetfed.gateway.record import Accepted, RoundSecrets
from fleetfed.gateway.summation import Source, Summation
from fleetfed.shared.aggregate.accumulator import (
    Accumulator,
    Partial,
    Ring,
    decode_masked,
    encode_masked,
    masked_size,
)
from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.secure.box import check_suite
from fleetfed.shared.secure.buckets import commit_nonce, deal
from fleetfed.shared.secure.split import body_size, open_words
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import Head, Header, MessageId, open_body, parse_head
from fleetfed.shared.wire.masking import Bucket, NonceHash, Split, check_key
from fleetfed.shared.wire.messages import Plan, Reveal
from fleetfed.shared.wire.update import SPLIT, UpdateExtension

_HEAD_ROOM: Final = 4096
"""Bytes of a reveal beside its words."""
_BUCKET_ROOM: Final = 256
"""Bytes of a bucket beside its words."""
_LEFT_OUT: Final = 2
_LEFT_OUT_PART: Final = 20
"""A commit may leave out two of the own updates, or one in so many."""


class MaskedRules:
    """See `modes.Rules`.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`: the plan contradicts itself; `UNKNOWN_SUITE`; `BAD_BOX`: its key is of
            another suite.
    """

    cosigned = True

    def __init__(self, plan: Plan, split: Split, ring: Ring) -> None:
        self.split = split
        self.ring = ring
        self._cap = plan.quorum.cohort_cap
        self._body_size = body_size(ring.layout.n_words)
        check_suite(split.suite)
        check_key(split.suite, split.seal_key)
        if 0 < split.bucket < split.minimum_cohort:
            detail = f"buckets of {split.bucket} where no sum may have fewer than {split.minimum_cohort}"
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, detail)
        if self._body_size > limits.MAX_UPDATE:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"updates of {self._body_size} bytes")

    def new_secrets(self, randomness: Callable[[int], bytes]) -> RoundSecrets:
        """Keys of the round, and the own share of its coin."""
        return RoundSecrets.new(randomness, self.split.suite)

    def summation(self, secrets: RoundSecrets | None, *, site: str) -> Summation:
        """One sum, or one for every bucket."""
        if secrets is None:
            raise StorageError("the journal holds a round of masked updates without its key")
        if self.split.bucket:
            return BucketSums(self, secrets, capacity=self._cap, site=site)
        return MaskedSum(self, secrets, capacity=self._cap)

    def check_update(self, header: Header, extension: UpdateExtension) -> None:
        """Every update of the round has the same boxes and the same size."""
        boxes = 3 if self.split.helper else 2
        if (extension.mode, extension.suite, len(extension.boxes)) != (SPLIT, self.split.suite, boxes):
            detail = f"mode {extension.mode}, suite {extension.suite}, {len(extension.boxes)} boxes; {boxes} are due"
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, detail)
        if header.compressed or not header.body_size == header.raw_size == self._body_size:
            detail = f"{header.body_size} bytes of body where {self._body_size} are due"
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, detail)

    def check_part(self, part: Sequence[Accepted], *, proposed: int) -> None:
        """Refuse a set that would say too much about too few."""
        split, count = self.split, len(part)
        if count < split.minimum_cohort:
            raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, f"{count} of {split.minimum_cohort} contributors")
        # An unnamed owner is one owner: it cannot be told that there are two.
        owners = len({update.owner for update in part})
        if owners < split.minimum_owners:
            raise RemoteProtocolError(RejectReason.BELOW_OWNERS, f"{owners} of {split.minimum_owners} owners")
        if count > self._cap:
            raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{count} contributors, limit {self._cap}")
        left_out = proposed - count
        if left_out > _LEFT_OUT and left_out * _LEFT_OUT_PART > proposed:
            raise RemoteProtocolError(RejectReason.TOO_MANY_EXCLUDED, f"{left_out} of {proposed} are left out")
        if split.bucket and count // split.bucket * self._bucket_size > limits.MAX_PARTIAL:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{count // split.bucket} buckets in one reveal")

    def reveal_limit(self, members: int) -> int:
        """One sum, or as many as there can be buckets."""
        if not self.split.bucket:
            return masked_size(self.ring) + _HEAD_ROOM
        return max(members // self.split.minimum_cohort, 1) * self._bucket_size + _HEAD_ROOM

    def open_reveal(self, head: Head, body: bytes | memoryview) -> tuple[Reveal, Partial | None]:
        """Sizes and counts are all that can be checked; buckets go on upwards unchanged, and a refusal has neither."""
        raw = open_body(head.header, body)
        reveal = codec.decode(Reveal, raw, limit=len(raw))
        if reveal.reason is not None:
            if reveal.count or reveal.words or reveal.buckets:
                raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "a refusal with a sum")
            return reveal, None
        if not self.split.bucket:
            if reveal.buckets:
                raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "buckets in a round without them")
            return reveal, decode_masked(reveal.words, self.ring, count=reveal.count)
        size = masked_size(self.ring)
        if reveal.words or any(len(bucket.words) != size for bucket in reveal.buckets):
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"a round of buckets, each of {size} bytes")
        if any(bucket.count < self.split.minimum_cohort for bucket in reveal.buckets):
            detail = f"a bucket of fewer than {self.split.minimum_cohort} contributors"
            raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, detail)
        count = sum(bucket.count for bucket in reveal.buckets)
        if count != reveal.count:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"buckets of {count} in a sum of {reveal.count}")
        return reveal, None

    def reveal_work(self, own: int) -> int:
        """One vector, or every own update once more."""
        return self.ring.layout.dimension * (max(own, 1) if self.split.bucket else 1)

    @property
    def _bucket_size(self) -> int:
        return masked_size(self.ring) + _BUCKET_ROOM


class MaskedSum(Summation):
    """One sum of masked words.

    Args:
        rules: of the plan.
        secrets: of the round.
        capacity: the plan's cohort limit.
    """

    def __init__(self, rules: MaskedRules, secrets: RoundSecrets, *, capacity: int) -> None:
        super().__init__(rules.ring, capacity=capacity)
        self._rules = rules
        self._secrets = secrets

    @property
    def noise_secret(self) -> bytes:
        """The round's own; the other one, the nonce, is opened with the reveal."""
        return self._secrets.seal.encode()

    def open(self, head: Head, body: bytes | memoryview) -> Words:
        """The masked words of one update: uniform to us.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH` or `BAD_BOX`.
        """
        return open_words(head, body, secret=self._secrets.seal, n_words=self.ring.layout.n_words)

    def add(self, opened: Words) -> None:
        """Add words modulo 2**64."""
        self._own.merge(Partial(self.ring, opened, 1))

    def subtract(self, opened: Words) -> None:
        """Subtract words modulo 2**64."""
        self._own.unmerge(Partial(self.ring, opened, 1))

    def open_below(self, reveal: bytes) -> Partial | None:
        """The masked sum in it."""
        head = parse_head(reveal)
        return self._rules.open_reveal(head, memoryview(reveal)[head.size :])[1]

    def reveal(self, commit: CommitArrived, own: Mapping[MessageId, str], source: Source) -> Reveal:
        """One sum, as it is."""
        partial = self.total(tuple(own), source)
        return Reveal(plan=commit.plan, commit=commit.head, count=partial.count, words=_bytes(partial))


class BucketSums(MaskedSum):
    """A sum for every bucket, made when the coin is tossed.

    Args:
        rules, secrets, capacity: as of `MaskedSum`.
        site: that the gateway serves.
    """

    def __init__(self, rules: MaskedRules, secrets: RoundSecrets, *, capacity: int, site: str) -> None:
        super().__init__(rules, secrets, capacity=capacity)
        self._site = site

    def nonces(self) -> tuple[NonceHash, ...]:
        """What binds us to our share of the coin before the coordinator draws its own."""
        return (NonceHash(site=self._site, hash=commit_nonce(self._secrets.nonce)),)

    def add(self, opened: Words) -> None:
        """It opens, and that is all that is asked of it before the commit."""

    def drop(self, updates: Iterable[tuple[bytes, bytes]]) -> None:
        """Nothing was added."""

    def rebuild(self, updates: Iterable[tuple[bytes, bytes]], reveals: Iterable[bytes]) -> None:
        """There is nothing but the journal."""

    def reveal(self, commit: CommitArrived, own: Mapping[MessageId, str], source: Source) -> Reveal:
        """Own buckets in the order of the deal, then those from below, unchanged."""
        buckets = [self._bucket(index, members, source) for index, members in enumerate(self._deal(commit, own))]
        for raw in source.reveals():
            head = parse_head(raw)
            buckets += self._rules.open_reveal(head, memoryview(raw)[head.size :])[0].buckets
        count = sum(bucket.count for bucket in buckets)
        return Reveal(plan=commit.plan, commit=commit.head, count=count, words=b"", buckets=tuple(buckets))

    def _deal(self, commit: CommitArrived, own: Mapping[MessageId, str]) -> Sequence[Sequence[MessageId]]:
        if not own:
            return ()
        split = self._rules.split
        return deal(
            own,
            split.bucket,
            minimum_owners=split.minimum_owners,
            gateway_nonce=self._secrets.nonce,
            coordinator_nonce=commit.nonce,
        )

    def _bucket(self, index: int, members: Sequence[MessageId], source: Source) -> Bucket:
        total = Accumulator(self.ring, capacity=len(members))
        for head, body in source.updates(members):
            total.merge(Partial(self.ring, self.open(parse_head(head), body), 1))
        partial = self.release(total.report(), members, source)
        return Bucket(
            site=self._site, nonce=self._secrets.nonce, index=index, count=partial.count, words=_bytes(partial)
        )


def _bytes(partial: Partial) -> bytes:
    # A view: msgpack copies it into the message, and one copy of a large sum is enough.
    return cast("bytes", encode_masked(partial))
