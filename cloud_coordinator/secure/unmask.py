"""From what a gateway reveals to plain sums: which members are in which sum, masks taken away, the result judged.

A sum that was masked right decodes to a count word that equals its members, and to lanes within what so many
contributions can say. A wrong one looks like noise: with one bit of each lane kept free, garbage passes for a sum
with a chance of one in two per coordinate. Who of its members, or whether the gateway, made it wrong cannot be told; a
bad sum is dropped whole and never cut further.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.secure.seeds import mask_keys, nonce_hashes
from fleetfed.shared.aggregate.accumulator import Partial, Ring, check_partial
from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.secure.buckets import check_nonce, deal
from fleetfed.shared.secure.split import add_masks
from fleetfed.shared.wire.envelope import MessageId
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Proposal, Reveal

_BUCKET_OVERHEAD: Final = 256
"""Bytes of a bucket beside its words, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskedSum:
    """One revealed sum, from which masks are being taken.

    Attributes:
        members: whose updates it is to hold.
        words: uint64; changed in place.
    """

    members: tuple[Member, ...]
    words: Words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unmasked:
    """What a reveal came to.

    Attributes:
        parts: the good sums: one, or one per bucket.
        buckets: buckets that were revealed; 0 without buckets.
        lost: members of the buckets that were dropped.
        buckets_lost: how many those are.
    """

    parts: tuple[Partial, ...]
    buckets: int = 0
    lost: tuple[MessageId, ...] = ()
    buckets_lost: int = 0


def sums_due(members: Iterable[Member], bucket: int) -> int:
    """How many sums a reveal over these members has, at most."""
    if not bucket:
        return 1
    sites: dict[str, int] = {}
    for member in members:
        sites[member.site] = sites.get(member.site, 0) + 1
    return sum(max(count // bucket, 1) for count in sites.values())


def most_bytes(ring: Ring, sums: int) -> int:
    """Bytes of a message's body that holds so many sums, at most."""
    return sums * (8 * ring.layout.n_words + _BUCKET_OVERHEAD)


def read_sums(
    reveal: Reveal, members: Sequence[Member], *, proposal: Proposal, plan: Split, nonce: bytes, ring: Ring
) -> dict[tuple[str, int], MaskedSum]:
    """Assign the committed members to the sums of a reveal.

    Args:
        reveal: of the gateway that was committed these members.
        members: of the commit.
        proposal: that the commit answers; it binds the gateways' nonces.
        plan: what the plan says of masks.
        nonce: of the commit.
        ring: of the plan.

    Returns:
        Each sum by site and index, in that order; the one sum of a plan without buckets by ``("", 0)``.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE` or `BAD_NONCE`.
    """
    if not plan.bucket:
        if reveal.buckets:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "buckets where the plan has none")
        return {("", 0): MaskedSum(tuple(members), read_words(reveal.words, ring))}
    if reveal.words:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "one sum where the plan has buckets")
    dealt = _dealt(reveal, members, nonce_hashes(proposal.nonces), plan, nonce)
    found: dict[tuple[str, int], MaskedSum] = {}
    for each in reveal.buckets:
        place = each.site, each.index
        expected = dealt.pop(place, None)
        if expected is None or each.count != len(expected):
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"bucket {each.index} of {each.site} with {each.count} members is not due"
            )
        found[place] = MaskedSum(expected, read_words(each.words, ring))
    if dealt:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{len(dealt)} buckets are missing")
    return dict(sorted(found.items()))


def _dealt(
    reveal: Reveal, members: Sequence[Member], hashes: Mapping[str, bytes], plan: Split, nonce: bytes
) -> dict[tuple[str, int], tuple[Member, ...]]:
    nonces = nonces_of(reveal)
    by_site: dict[str, dict[MessageId, Member]] = {}
    for member in members:
        by_site.setdefault(member.site, {})[member.message_id] = member
    dealt: dict[tuple[str, int], tuple[Member, ...]] = {}
    for site, own in by_site.items():
        if site not in nonces:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"no bucket of {site}")
        check_nonce(nonces[site], hashes.get(site, b""))
        groups = deal(
            {name: member.owner for name, member in own.items()},
            plan.bucket,
            minimum_owners=plan.minimum_owners,
            gateway_nonce=nonces[site],
            coordinator_nonce=nonce,
        )
        dealt |= {(site, index): tuple(own[name] for name in group) for index, group in enumerate(groups)}
    return dealt


def nonces_of(reveal: Reveal) -> dict[str, bytes]:
    """The nonce of each site, by site in order.

    Raises:
        RemoteProtocolError: `BAD_NONCE`: two for one site.
    """
    found: dict[str, bytes] = {}
    for each in reveal.buckets:
        if found.setdefault(each.site, each.nonce) != each.nonce:
            raise RemoteProtocolError(RejectReason.BAD_NONCE, f"two nonces of {each.site}")
    return dict(sorted(found.items()))


def read_words(data: bytes, ring: Ring) -> Words:
    """Masked words as they travel.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`.
    """
    if len(data) != 8 * ring.layout.n_words:
        raise RemoteProtocolError(
            RejectReason.WRONG_SHAPE, f"{len(data)} bytes of words where {8 * ring.layout.n_words} are due"
        )
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def take_masks(sums: Iterable[MaskedSum], heads: Iterable[bytes], secret: SealSecret) -> None:
    """Take the coordinator's masks of all members away, in place.

    Args:
        sums: of one reveal.
        heads: of the stored proposal.
        secret: of the round.
    """
    sums = tuple(sums)
    keys = mask_keys(heads, {member.head for each in sums for member in each.members}, secret)
    for each in sums:
        add_masks(each.words, (keys[member.head] for member in each.members), negate=True)


def judge(sums: Mapping[tuple[str, int], MaskedSum], ring: Ring, *, bucket: int) -> Unmasked:
    """Check the unmasked sums; with buckets, drop those that cannot be right.

    Raises:
        RemoteProtocolError: `OUT_OF_RANGE` or `BELOW_MINIMUM`: the one sum of a plan without buckets is wrong.
    """
    parts, lost, bad = [], list[MessageId](), 0
    for each in sums.values():
        partial = Partial(ring, each.words, len(each.members))
        try:
            check_partial(partial)
        except RemoteProtocolError:
            if not bucket:
                raise
            lost += [member.message_id for member in each.members]
            bad += 1
        else:
            parts.append(partial)
    return Unmasked(parts=tuple(parts), buckets=len(sums) if bucket else 0, lost=tuple(sorted(lost)), buckets_lost=bad)
