"""The bookkeeping of one open round: who was awaited, what was committed, who revealed. Pure.

Rules:

- one commit per gateway, ever; the first proposal counts, the same one again is answered as before;
- a device is in the round once, over all gateways; the first proposal that names it has it;
- a reveal must answer its gateway's commit and count exactly its members;
- the round is complete when every awaited gateway and every other that has a commit is done, and a gateway is done
  when it has revealed, or when its commit has no members.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fleetfed.cloud_coordinator.events import Member, ProposalVerified, RevealVerified
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.envelope import Digest, MessageId


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What passed between the coordinator and one gateway in a round.

    Attributes:
        proposal: head hash of the proposal that was committed.
        members: how many were committed.
        commit: head hash of the commit; None until it is stored.
        reveal: head hash of the partial; None until it is stored.
    """

    proposal: Digest
    members: int
    commit: Digest | None = None
    reveal: Digest | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self.commit is not None and (self.reveal is not None or not self.members)


class Round:
    """One open round.

    Args:
        number: of the round.
        plan: head hash of its plan.
        expires: when it closes, whoever is missing.
        minimum: fewest contributors for a version.
        cohort_cap: most contributors.
        awaited: gateways to wait for.
    """

    def __init__(
        self, *, number: int, plan: Digest, expires: int, minimum: int, cohort_cap: int, awaited: Iterable[str]
    ) -> None:
        self.number = number
        self.plan = plan
        self.expires = expires
        self.minimum = minimum
        self.cohort_cap = cohort_cap
        self.awaited = set(awaited)
        self.exchanges: dict[str, Exchange] = {}
        self.holder: dict[str, str] = {}

    @property
    def committed(self) -> int:
        """Devices in all commits."""
        return len(self.holder)

    @property
    def revealed(self) -> int:
        """Contributors in the partials that are here."""
        return sum(each.members for each in self.exchanges.values() if each.done)

    @property
    def complete(self) -> bool:
        """Whether nobody is waited for any more."""
        return all(each.done for each in self.exchanges.values()) and self.awaited <= set(self.exchanges)

    @property
    def enough(self) -> bool:
        """Whether a version may be made of what is here."""
        return self.revealed >= self.minimum

    def judge_proposal(self, event: ProposalVerified) -> RejectReason | None:
        """Why a proposal is refused outright; None for one to commit or to answer again."""
        if event.plan != self.plan:
            return RejectReason.WRONG_PLAN
        known = self.exchanges.get(event.message.gateway)
        if known is not None and known.proposal != event.message.head:
            return RejectReason.CONFLICT
        return None

    def is_repeated(self, event: ProposalVerified) -> bool:
        """Whether this very proposal has been committed."""
        return event.message.gateway in self.exchanges

    def admit(self, event: ProposalVerified) -> tuple[tuple[Member, ...], dict[str, RejectReason]]:
        """Enter a new proposal; return the members to commit and, per head hash (hex), why others are left out."""
        gateway = event.message.gateway
        assert gateway not in self.exchanges
        excluded = dict(event.excluded)
        members: list[Member] = []
        named: set[MessageId] = set()
        for member in event.members:
            # Message ids are their senders' to choose, and the commit names members by them alone.
            if member.device in self.holder or member.message_id in named:
                excluded[member.head.hex()] = RejectReason.DUPLICATE
            elif len(self.holder) >= self.cohort_cap:
                excluded[member.head.hex()] = RejectReason.COHORT_FULL
            else:
                self.holder[member.device] = gateway
                named.add(member.message_id)
                members.append(member)
        # The same head twice in one proposal: it is in, so it is not left out.
        for member in members:
            excluded.pop(member.head.hex(), None)
        self.exchanges[gateway] = Exchange(proposal=event.message.head, members=len(members))
        return tuple(members), excluded

    def judge_reveal(self, event: RevealVerified) -> RejectReason | None:
        """Why a reveal is refused; None for one to store or to answer again."""
        if event.plan != self.plan:
            return RejectReason.WRONG_PLAN
        known = self.exchanges.get(event.message.gateway)
        if known is None or known.commit is None or known.commit != event.commit or not known.members:
            return RejectReason.NOT_PROPOSED
        if known.reveal is not None:
            return None if known.reveal == event.message.head else RejectReason.CONFLICT
        return None if event.count == known.members else RejectReason.OUT_OF_RANGE

    def validate(self) -> None:
        """Assert the invariants."""
        held: dict[str, int] = {}
        for gateway in self.holder.values():
            held[gateway] = held.get(gateway, 0) + 1
        for gateway, exchange in self.exchanges.items():
            assert exchange.members == held.get(gateway, 0), (gateway, exchange, held)
            assert exchange.reveal is None or exchange.commit is not None, (gateway, exchange)
        assert set(held) <= set(self.exchanges), held
        assert self.committed <= self.cohort_cap, self.committed
