"""The facts of one round: what is durable about it, and where the gateway stands in it. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from fleetfed.gateway.events import CommitArrived
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.secure.kdf import KEY_SIZE
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.masking import SEALED_BOX
from fleetfed.shared.wire.messages import Plan

_LABELS: Final = 64

_NONCE_SIZE: Final = 16

NEVER: Final = 1 << 62
"""A time that does not come."""


class RoundState(StrEnum):
    """Where the gateway's part of the round stands."""

    OPEN = "open"
    PROPOSED = "proposed"
    COMMITTED = "committed"
    REVEALED = "revealed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class RoundSecrets:
    """What a gateway alone may know in a round of masked updates; it dies with the reveal.

    Attributes:
        seal: opens the bodies of the round's updates.
        nonce: its share of the coin that deals them into buckets, until the reveal.
    """

    seal: SealSecret
    nonce: bytes = field(repr=False)

    @classmethod
    def new(cls, randomness: Callable[[int], bytes], suite: int = SEALED_BOX) -> RoundSecrets:
        """Fresh ones, for a round of that suite.

        Raises:
            RemoteProtocolError: `UNKNOWN_SUITE`.
        """
        return cls(SealSecret.from_bytes(randomness(KEY_SIZE), suite), randomness(_NONCE_SIZE))

    def encode(self) -> bytes:
        """For the journal."""
        return self.seal.encode() + self.nonce + bytes([self.seal.suite])

    @classmethod
    def decode(cls, stored: bytes) -> RoundSecrets:
        """What `encode` returned.

        Raises:
            StorageError: it is damaged.
        """
        if len(stored) != KEY_SIZE + _NONCE_SIZE + 1:
            raise StorageError(f"{len(stored)} bytes are no secrets of a round")
        try:
            seal = SealSecret.from_bytes(stored[:KEY_SIZE], stored[-1])
        except RemoteProtocolError as error:
            raise StorageError(f"the open round's secrets are of no use: {error}") from error
        return cls(seal, stored[KEY_SIZE:-1])


@dataclass(frozen=True, slots=True)
class Accepted:
    """An update in the journal: its message, its head's hash, its certificate's serial and owner, its bytes."""

    message_id: MessageId
    head: Digest
    serial: int
    size: int
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Child:
    """What a gateway below said in this round."""

    proposal: MessageId
    members: frozenset[MessageId]
    declined: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    reveal: MessageId | None = None
    count: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """An own message that was stored and sent."""

    message_id: MessageId
    head: Digest


@dataclass(slots=True, kw_only=True)
class RoundRecord:
    """Everything about a round that is durable; what `RoundMachine` is made from after a crash.

    Attributes:
        aborted: why the gateway refused the commit that is there, and with it the round; empty if it did not.
        answered: whether the tier above needs, or gets, nothing more.
    """

    plan: Plan
    hash: Digest
    accepted: dict[str, Accepted] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)
    proposal: Sent | None = None
    commit: CommitArrived | None = None
    reveal: Sent | None = None
    aborted: str = ""
    answered: bool = False

    def tallies(self, rejected: Counter[str]) -> tuple[dict[str, int], dict[str, int]]:
        """How many of the whole subtree declined, and were refused, by reason; ``rejected`` are the own refusals."""
        declined: Counter[str] = Counter(reason for name, reason in self.declined.items() if name not in self.accepted)
        refused = Counter(rejected)
        for child in self.children.values():
            declined.update(child.declined)
            refused.update(child.rejected)
        return bounded(declined), bounded(refused)

    def own_part(self) -> tuple[MessageId, ...]:
        """Message ids of the own updates that belong in the sum: the committed ones, or all as long as none are."""
        return tuple(self.own_owners())

    def own_owners(self) -> dict[MessageId, str]:
        """The owner of each of these, in order."""
        commit = self.commit
        own = ((update.message_id, update.owner) for update in self.accepted.values())
        return dict(sorted((i, owner) for i, owner in own if commit is None or i in commit.members))

    def child_part(self, gateway: str) -> frozenset[MessageId]:
        """Committed members that a gateway below proposed."""
        commit, child = self.commit, self.children.get(gateway)
        return child.members & commit.members if commit and child else frozenset()

    def state(self) -> RoundState:
        """The state that the durable facts amount to."""
        if self.answered:
            return RoundState.CLOSED
        if self.reveal:
            return RoundState.REVEALED
        if self.commit:
            return RoundState.COMMITTED
        return RoundState.PROPOSED if self.proposal else RoundState.OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this gateway stands.

    Attributes:
        gateway: its id.
        direct: whether the coordinator serves its upstream site.
        level: 0 with devices alone below it.
        settled: unix milliseconds before which presence is not complete, because the program has just started; until
            then a round closes at its deadline alone.
        journal_limit: bytes that one round may take on disk.
    """

    gateway: str
    direct: bool
    level: int = 0
    settled: int = NEVER
    journal_limit: int = 1 << 30


def close_time(plan: Plan, level: int) -> int:
    """When a gateway of ``level`` closes at the latest: ``deadline`` at the leaves, later above, before ``expires``."""
    step = (plan.expires - plan.deadline) / (plan.tiers + 1)
    return min(plan.expires, plan.deadline + round(level * step))


def bounded(counts: Counter[str]) -> dict[str, int]:
    """Counts that fit a proposal, whatever gateways below have counted."""
    return {label: min(count, limits.MAX_TALLY) for label, count in counts.most_common(_LABELS) if count > 0}
