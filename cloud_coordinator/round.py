"""The bookkeeping of one open round: who was awaited, what was committed, who revealed. Pure.

Rules:

- one commit per gateway, ever; the first proposal counts, the same one again is answered as before;
- a device is in the round once, over all gateways; the first proposal that names it has it;
- a reveal must answer its gateway's commit, and count exactly its members unless none of it counts;
- the round is complete when every awaited gateway and every other that has a commit is done, and a gateway is done
  when it has revealed, or when its commit has no members; one that came back in mid-round is awaited while it is there,
  since it takes the retained plan and gives receipts for it;
- in split mode (`SiteRules`) no mask seed is in the round twice, and a site's members are committed only if they are
  enough, of enough owners, and hardly any of the site's is left out: its gateway would refuse such a commit, and must.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleetfed.cloud_coordinator.events import Member, ProposalVerified, RevealVerified
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.envelope import Digest, MessageId


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRules:
    """What holds for the members of each site in split mode; the leaf gateway applies the same before it reveals.

    Attributes:
        minimum_cohort: fewest members.
        minimum_owners: fewest distinct owners among them; members without one have one together.
    """

    minimum_cohort: int
    minimum_owners: int

    def judge(self, members: Sequence[Member], left_out: int) -> RejectReason | None:
        """Why a site's members cannot be committed.

        Args:
            members: that could be.
            left_out: how many more the site has proposed.
        """
        if len(members) < self.minimum_cohort:
            return RejectReason.BELOW_MINIMUM
        if len({member.owner for member in members}) < self.minimum_owners:
            return RejectReason.BELOW_OWNERS
        if left_out > 2 and 20 * left_out > len(members) + left_out:
            return RejectReason.TOO_MANY_EXCLUDED
        return None


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What passed between the coordinator and one gateway in a round.

    Attributes:
        proposal: head hash of the proposal that was committed.
        members: how many were committed.
        commit: head hash of the commit; None until it is stored.
        reveal: head hash of the partial; None until it is stored.
        contributors: members that the stored partial holds.
    """

    proposal: Digest
    members: int
    commit: Digest | None = None
    reveal: Digest | None = None
    contributors: int = 0

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
        rules: of each site, in split mode.
    """

    def __init__(
        self,
        *,
        number: int,
        plan: Digest,
        expires: int,
        minimum: int,
        cohort_cap: int,
        awaited: Iterable[str],
        rules: SiteRules | None = None,
    ) -> None:
        self.number = number
        self.plan = plan
        self.expires = expires
        self.minimum = minimum
        self.cohort_cap = cohort_cap
        self.awaited = set(awaited)
        self.rules = rules
        self.exchanges: dict[str, Exchange] = {}
        self.holder: dict[str, str] = {}
        self.seeds: set[bytes] = set()

    @property
    def committed(self) -> int:
        """Devices in all commits."""
        return len(self.holder)

    @property
    def revealed(self) -> int:
        """Contributors in the partials that are here."""
        return sum(each.contributors for each in self.exchanges.values())

    def complete(self, present: Iterable[str]) -> bool:
        """Whether nobody is waited for any more.

        Args:
            present: gateways that are ready now.
        """
        return all(each.done for each in self.exchanges.values()) and self.awaited.union(present) <= set(self.exchanges)

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
        devices: set[str] = set()
        seeds: set[bytes] = set()
        for member in event.members:
            # Message ids are their senders' to choose, and the commit names members by them alone.
            if member.device in self.holder or member.device in devices or member.message_id in named:
                excluded[member.head.hex()] = RejectReason.DUPLICATE
            elif member.seed and (member.seed in self.seeds or member.seed in seeds):
                excluded[member.head.hex()] = RejectReason.REUSED_SEED
            elif len(self.holder) + len(members) >= self.cohort_cap:
                excluded[member.head.hex()] = RejectReason.COHORT_FULL
            else:
                devices.add(member.device)
                named.add(member.message_id)
                seeds.add(member.seed)
                members.append(member)
        # The same head twice in one proposal: it is in, so it is not left out.
        for member in members:
            excluded.pop(member.head.hex(), None)
        members = self._heed_rules(event, members, excluded)
        self.holder |= {member.device: gateway for member in members}
        self.seeds |= {member.seed for member in members if member.seed}
        self.exchanges[gateway] = Exchange(proposal=event.message.head, members=len(members))
        return tuple(members), excluded

    def _heed_rules(
        self, event: ProposalVerified, members: list[Member], excluded: dict[str, RejectReason]
    ) -> list[Member]:
        """Leave out whole sites that break the rules of split mode; returns who stays."""
        if self.rules is None:
            return members
        site_of = event.sites | {member.head.hex(): member.site for member in event.members}
        left_out = Counter(site_of[head] for head in excluded if head in site_of)
        by_site: dict[str, list[Member]] = {}
        for member in members:
            by_site.setdefault(member.site, []).append(member)
        broken = {site: self.rules.judge(own, left_out[site]) for site, own in by_site.items()}
        for member in members:
            reason = broken[member.site]
            if reason is not None:
                excluded[member.head.hex()] = reason
        return [member for member in members if broken[member.site] is None]

    def judge_reveal(self, event: RevealVerified) -> RejectReason | None:
        """Why a reveal is refused; None for one to store or to answer again."""
        if event.plan != self.plan:
            return RejectReason.WRONG_PLAN
        known = self.exchanges.get(event.message.gateway)
        if known is None or known.commit is None or known.commit != event.commit or not known.members:
            return RejectReason.NOT_PROPOSED
        if known.reveal is not None:
            return None if known.reveal == event.message.head else RejectReason.CONFLICT
        counts = event.failed is not None or event.count == known.members
        return None if counts else RejectReason.OUT_OF_RANGE

    def validate(self) -> None:
        """Assert the invariants."""
        held: dict[str, int] = {}
        for gateway in self.holder.values():
            held[gateway] = held.get(gateway, 0) + 1
        for gateway, exchange in self.exchanges.items():
            assert exchange.members == held.get(gateway, 0), (gateway, exchange, held)
            assert exchange.reveal is None or exchange.commit is not None, (gateway, exchange)
            assert 0 <= exchange.contributors <= (exchange.members if exchange.reveal else 0), (gateway, exchange)
        assert set(held) <= set(self.exchanges), held
        assert self.committed <= self.cohort_cap, self.committed
