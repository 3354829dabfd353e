"""A coordinator with an open round of masked updates, and two gateways that do as told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Commit, Plan
from fleetfed.shared.wire.topics import Verb
from fleetfed_testing.cloud import ScriptedGateway, Update, World, facts
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper

NORTH = [f"n{i}" for i in range(10)]
SOUTH = [f"s{i}" for i in range(4)]


@dataclass
class Open:
    """A world with an open split round and two gateways."""

    world: World
    north: MaskedGateway
    south: MaskedGateway
    helper: ScriptedHelper
    plan: Plan
    hash: Digest
    ring: Ring

    def update(self, device: str, **changes: Any) -> Update:
        gateway = self.north if device in self.north.site_of else self.south
        return gateway.update(device, self.plan, self.hash, self.ring, **changes)

    def heads(self, *devices: str) -> list[bytes]:
        return [self.update(device).message.head.encode() for device in devices]

    async def propose(self, gateway: MaskedGateway, heads: list[bytes] | None = None, **changes: Any) -> Commit:
        heads = self.heads(*gateway.devices) if heads is None else heads
        message = gateway.propose(self.plan, self.hash, heads, **changes)
        await self.world.deliver(gateway.name, Verb.PROPOSE, message)
        return self.world.commits(gateway.name)[-1][0]

    def reveal(self, gateway: MaskedGateway, **changes: Any) -> Message:
        commit, commit_hash, _ = self.world.commits(gateway.name)[-1]
        return gateway.reveal(self.plan, self.ring, commit, commit_hash, **changes)

    async def refused(self, gateway: ScriptedGateway, verb: Verb, message: Message, reason: RejectReason) -> None:
        """The message is refused with this reason, to its sender too, and nothing has changed."""
        before = facts(self.world)
        count = self.world.coordinator.rejected.snapshot().get(reason, 0)
        await self.world.deliver(gateway.name, verb, message)
        assert facts(self.world) == before
        assert self.world.coordinator.rejected.snapshot()[reason] > count
        receipt = self.world.receipts(gateway.name)[-1]
        assert (receipt.reason, receipt.message_id, receipt.head) == (reason, message.id, message.head.hash)


def reasons(commit: Commit) -> dict[str, int]:
    return dict(Counter(commit.excluded.values()))


def members(commit: Commit) -> int:
    return len(commit.members) // 16
