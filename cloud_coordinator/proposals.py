"""Verifies the heads that a gateway proposes: the coordinator believes devices, not the gateway that passes them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.secure import seeds
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.trust.certificates import claimed_site
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import Digest, MessageKind, digest, parse_head
from fleetfed.shared.wire.messages import Plan, Proposal
from fleetfed.shared.wire.selection import check_taken
from fleetfed.shared.wire.update import PLAIN, UpdateExtension

THREAD_FROM: Final = 64
"""Heads from which verifying is worth a thread: each costs 0.1 to 0.2 ms."""


_LEAF_MAY_ADMIT: Final = frozenset(
    {
        RejectReason.REVOKED,
        RejectReason.EXPIRED,
        RejectReason.EXPIRED_CERTIFICATE,
        RejectReason.BAD_BOX,
        RejectReason.NOT_SELECTED,
    }
)
"""What a leaf gateway cannot see, or not yet. Anything else it refuses itself: so junk in the name of a site, by a
gateway beside it in the tree, does not count against the site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInForce:
    """A signed plan with what heads are compared to.

    Attributes:
        plan: the plan.
        hash: its head hash.
        ring: its arithmetic, which gives the number of meta words.
        secret: what opens the coordinator's box of every update, in split mode; None once the round is over.
    """

    plan: Plan
    hash: Digest
    ring: Ring
    secret: SealSecret | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What the heads of a proposal are worth.

    Attributes:
        members: the good ones, in the given order.
        excluded: for each bad one its hash in hex and why.
        sites: for each bad one that its leaf gateway may have admitted in good faith, its hash in hex and its site.
    """

    members: tuple[Member, ...]
    excluded: dict[str, RejectReason] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)


def verify_proposal(proposal: Proposal, *, current: PlanInForce, verifier: Verifier, now: int) -> Verified:
    """Verify a proposal's heads; with buckets, also that each leaf gateway has committed to its share of the coin.

    Args:
        proposal: of this plan.
        current, verifier, now: as for `verify_heads`.
    """
    found = verify_heads(proposal.heads, current=current, verifier=verifier, now=now)
    split = current.plan.split
    if split is None or not split.bucket:
        return found
    committed = seeds.nonce_hashes(proposal.nonces)
    bad = [member for member in found.members if member.site not in committed]
    return Verified(
        members=tuple(member for member in found.members if member.site in committed),
        excluded=found.excluded | {member.head.hex(): RejectReason.BAD_NONCE for member in bad},
        sites=found.sites | {member.head.hex(): member.site for member in bad},
    )


def verify_heads(heads: Sequence[bytes], *, current: PlanInForce, verifier: Verifier, now: int) -> Verified:
    """Verify every head for itself.

    Args:
        heads: as the proposal lists them.
        current: the plan that they must answer.
        verifier: of the fleet; its certificate cache is changed, nothing else.
        now: unix milliseconds.
    """
    members, excluded, sites = [], {}, {}
    for raw in heads:
        try:
            members.append(verify_head(raw, current=current, verifier=verifier, now=now))
        except RemoteProtocolError as error:
            name, site = _claims(raw)
            excluded[name] = error.reason
            if site is not None and error.reason in _LEAF_MAY_ADMIT:
                sites[name] = site
    return Verified(tuple(members), excluded, sites)


def verify_head(raw: bytes, *, current: PlanInForce, verifier: Verifier, now: int) -> Member:
    """Verify one update's head against the plan.

    Raises:
        RemoteProtocolError: the first check that fails.
    """
    head = parse_head(raw)
    if head.size != len(raw):
        raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(raw) - head.size} bytes after the head")
    certificate = verifier.head(head, kind=MessageKind.UPDATE, now=now)
    plan = current.plan
    if head.header.round != plan.round:
        raise RemoteProtocolError(RejectReason.WRONG_ROUND, f"round {head.header.round}")
    extension = UpdateExtension.decode(head)
    if extension.plan != current.hash:
        raise RemoteProtocolError(RejectReason.WRONG_PLAN)
    if extension.model_sha256 != plan.model_sha256:
        raise RemoteProtocolError(RejectReason.WRONG_MODEL)
    layout = current.ring.layout
    shape = (extension.bits, extension.lane_bits, extension.dimension, extension.meta_words)
    wanted = (plan.quantization.bits, plan.quantization.lane_bits, layout.dimension, layout.meta_words)
    if shape != wanted:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{shape}, the plan says {wanted}")
    if plan.split is not None:
        seeds.check_shape(head, extension, plan.split, n_words=layout.n_words)
    elif (extension.mode, extension.suite, extension.boxes) != (PLAIN, 0, ()):
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"mode {extension.mode} where the plan is plain")
    check_taken(current.hash, certificate.id, plan.eligibility)
    seed = b""
    if plan.split is not None:
        if current.secret is None:
            raise RemoteProtocolError(RejectReason.LATE, "the round is over, its secret destroyed")
        seed = seeds.seed_hash(head, current.secret)
    return Member(
        device=certificate.id,
        site=certificate.site,
        owner=certificate.owner,
        message_id=head.header.message_id,
        head=head.hash,
        size=head.message_size,
        seed=seed,
    )


def _claims(raw: bytes) -> tuple[str, str | None]:
    """The hash that a receipt would name a bad head by, of all the bytes where they are none; and its site."""
    try:
        head = parse_head(raw)
    except RemoteProtocolError:
        return digest(raw).hex(), None
    return head.hash.hex(), claimed_site(head.certificate)
