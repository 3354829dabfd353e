"""A split round at a gateway on its bench, step by step: devices that mask, a coordinator that commits and unmasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fleetfed.shared.secure.buckets import check_nonce, deal
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Head, MessageId, parse_head
from fleetfed.shared.wire.messages import Reveal
from fleetfed.shared.wire.topics import Kind, Verb
from fleetfed_testing.gateway_bench import Bench

COIN = b"coordinator coin"


class SplitRound:
    """A gateway's own devices in a split round.

    Args:
        bench: of the gateway.
        count: devices, all of them present before the plan comes.
        prefix: of their names.
        tiers, quorum, cohort: of the plan.
        split: as of `SignedFleet.split`.
    """

    def __init__(self, bench: Bench, count: int, *, prefix: str = "d", **split: Any) -> None:
        self.bench = bench
        self.fleet = bench.fleet
        self.names = [f"{prefix}-{number}" for number in range(count)]
        self.helper = bool(split.get("helper"))
        self._plan = {name: split.pop(name) for name in ("tiers", "quorum", "cohort", "number") if name in split}
        self._split = split
        self.updates: dict[str, Message] = {}

    async def open(self) -> SplitRound:
        """The plan comes, and the cosignature goes out."""
        self.bench.present(*self.names)
        number = self._plan.pop("number", 1)
        self.plan, self.hash = self.bench.open_round(number, split=self.fleet.split(**self._split), **self._plan)
        await self.bench.quiet()
        return self

    def update(self, name: str, **changes: Any) -> Message:
        """The one update that a device makes, or with ``changes`` another."""
        if changes:
            return self.bench.masked(name, self.plan, self.hash, **changes)  # type: ignore[no-any-return]
        if name not in self.updates:
            number = self.names.index(name)
            self.updates[name] = self.bench.masked(name, self.plan, self.hash, number=number)
        return self.updates[name]

    async def answer(self, *names: str) -> SplitRound:
        """Devices, all by default, send their updates."""
        for name in names or self.names:
            self.bench.update(name, self.update(name))
        await self.bench.quiet()
        return self

    def ids(self, *names: str) -> list[MessageId]:
        """Message ids of what these devices, all by default, sent."""
        return [self.updates[name].id for name in names or self.names]

    def commit(self, *names: str, more: Sequence[bytes] = (), **changes: Any) -> Message:
        """The coordinator's word for these devices, all by default; ``more`` members from elsewhere."""
        members = [*self.ids(*names), *more] if names or not more else list(more)
        proposal = changes.pop("proposal", None) or self.bench.proposals()[-1][0].hash
        settings = {"gateway": self.bench.name, "round": self.plan.round, "nonce": COIN, **changes}
        return self.fleet.commit(self.hash, proposal, members, **settings)

    async def committed(self, *names: str, **changes: Any) -> Message:
        """The commit arrives."""
        message = self.commit(*names, **changes)
        self.bench.commit(message)
        await self.bench.quiet()
        return message

    def acknowledge(self) -> None:
        """The tier above has the reveal."""
        topic = self.bench.upstream.down(Kind.GATEWAY, self.bench.name, Verb.RECEIPT)
        self.bench.inbound.receive(topic, self.fleet.receipt(self.bench.reveals()[-1][0]))

    def heads(self, *names: str) -> list[Head]:
        """Heads of what these devices, all by default, sent, as the coordinator has them."""
        return [parse_head(self.updates[name].encode()) for name in names or self.names]

    def unmasked(self, reveal: Reveal, *names: str) -> Any:
        """The values that coordinator (and helper) find in the reveal of one sum over these devices."""
        assert not reveal.buckets
        values, meta = self.fleet.unmask(self.heads(*names), reveal.words, helper=self.helper)
        assert int(meta[0]) == reveal.count == len(names or self.names)
        return values

    def dealt(self, gateway_nonce: bytes, *names: str) -> tuple[tuple[MessageId, ...], ...]:
        """The members of each own bucket, once the gateway has opened its share of the coin."""
        assert self.plan.split is not None
        split = self.plan.split
        owners = {self.updates[name].id: self.fleet.owners.get(name, "") for name in names or self.names}
        return deal(
            owners,
            split.bucket,
            minimum_owners=split.minimum_owners,
            gateway_nonce=gateway_nonce,
            coordinator_nonce=COIN,
        )

    def unmasked_buckets(self, reveal: Reveal, commitment: bytes, *names: str) -> list[Any]:
        """The values in each own bucket over these devices, whose deal is made again from the opened coin."""
        own = [bucket for bucket in reveal.buckets if bucket.site == self.bench.site.site]
        check_nonce(own[0].nonce, commitment)
        heads = {head.header.message_id: head for head in self.heads(*names)}
        dealt = self.dealt(own[0].nonce, *names)
        assert [(bucket.index, bucket.count) for bucket in own] == [(i, len(each)) for i, each in enumerate(dealt)]
        found = []
        for bucket, members in zip(own, dealt, strict=True):
            values, meta = self.fleet.unmask([heads[i] for i in members], bucket.words, helper=self.helper)
            assert int(meta[0]) == bucket.count
            found.append(values)
        return found

    def sum(self, *names: str) -> Any:
        """What these devices, all by default, hold together."""
        return sum(self.fleet.values(self.names.index(name)) for name in names or self.names) + np.int64(0)
