"""A committed round with two seed holders, as the coordinator would lay it before the helper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fleetfed.shared.secure.buckets import commit_nonce
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest, MessageKind, digest
from fleetfed.shared.wire.masking import MaskRequest
from fleetfed.shared.wire.messages import Mode, Plan
from fleetfed_testing.signed_fleet import SignedFleet

GATEWAY_NONCE, COMMIT_NONCE = b"g" * 16, b"c" * 16


@dataclass
class HelperRound:
    """One plan, its updates, and requests about them.

    Attributes:
        fleet: signs.
        plan, message: the plan.
        updates: made so far, by device.
    """

    fleet: SignedFleet
    plan: Plan
    message: Message
    updates: dict[str, Message] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        fleet: SignedFleet,
        *,
        helper: bytes | None = None,
        round: int = 1,
        split: dict[str, Any] | None = None,
        **changes: Any,
    ) -> HelperRound:
        """A round whose plan names the helper's signed key (a fixed one by default)."""
        masks = replace(fleet.split(helper=True, **(split or {})), **({} if helper is None else {"helper": helper}))
        plan, message = fleet.plan(round, mode=Mode.SPLIT, split=masks, **changes)
        return cls(fleet, plan, message)

    @property
    def hash(self) -> Digest:
        """What everything in the round names the plan by."""
        return self.message.head.hash

    def add(self, *devices: str, site: str = "north", **changes: Any) -> None:
        """Updates of these devices."""
        for device in devices:
            self.updates[device] = self.fleet.split_update(
                device,
                self.plan,
                self.hash,
                gateway_key=self.fleet.seal("g-" + site).public,
                number=len(self.updates),
                site=site,
                **changes,
            )

    def proposal(self, gateway: str = "g-north", devices: Sequence[str] | None = None, **changes: Any) -> Message:
        """Signed by the gateway, with a committed nonce where the plan has buckets."""
        site = gateway.removeprefix("g-")
        sites = dict.fromkeys(self.fleet.signer(name).certificate.site for name in self.updates)
        buckets = self.plan.split is not None and self.plan.split.bucket
        values = {"nonces": [(each, commit_nonce(GATEWAY_NONCE)) for each in sites] if buckets else [], **changes}
        chosen = [self.updates[name] for name in (self.updates if devices is None else devices)]
        return self.fleet.proposal(gateway, self.plan, self.hash, chosen, site=site, **values)

    def commit(self, proposal: Message, devices: Sequence[str] | None = None, gateway: str = "g-north") -> Message:
        """Of all devices, or of some."""
        members = [self.updates[name].id for name in (self.updates if devices is None else devices)]
        return self.fleet.commit(
            self.hash, proposal.head.hash, members, gateway=gateway, round=self.plan.round, nonce=COMMIT_NONCE
        )

    def request(
        self, devices: Sequence[str] | None = None, *, gateway: str = "g-north", proposed: Sequence[str] | None = None
    ) -> MaskRequest:
        """About a commit of some of the proposed devices."""
        proposal = self.proposal(gateway, proposed)
        return self.ask(proposal, self.commit(proposal, devices, gateway))

    def ask(self, proposal: Message, commit: Message, **changes: Any) -> MaskRequest:
        """About these two messages."""
        sites = dict.fromkeys(self.fleet.signer(name).certificate.site for name in self.updates)
        buckets = self.plan.split is not None and self.plan.split.bucket
        request = MaskRequest(
            plan=self.message.encode(),
            proposal=proposal.encode(),
            commit=commit.encode(),
            nonces=dict.fromkeys(sites, GATEWAY_NONCE) if buckets else {},
        )
        return replace(request, **changes)

    def signed(self, request: MaskRequest) -> Message:
        """As the coordinator sends it."""
        return self.fleet.coordinator.sign(MessageKind.MASK_REQUEST, request, now=self.fleet.now, round=self.plan.round)


def question(request: MaskRequest) -> Digest:
    """What names a request."""
    return digest(codec.encode(request))
