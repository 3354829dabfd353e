"""Deals the committed members of a site into buckets by a coin that gateway and coordinator toss together.

The gateway commits to its nonce when it proposes, the coordinator draws its own when it commits to the set, and the
gateway opens its nonce when it reveals: neither can steer a victim into a bucket of accomplices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.envelope import Digest, MessageId, digest


def commit_nonce(nonce: bytes) -> Digest:
    """The commitment to a nonce of 16 bytes."""
    return digest(b"ff-nonce" + nonce)


def check_nonce(nonce: bytes, commitment: bytes) -> None:
    """Raise RemoteProtocolError (BAD_NONCE) unless the nonce opens the commitment."""
    if commit_nonce(nonce) != commitment:
        raise RemoteProtocolError(RejectReason.BAD_NONCE, "the nonce is not the one that was committed to")


def deal(
    owners: Mapping[MessageId, str], size: int, *, minimum_owners: int, gateway_nonce: bytes, coordinator_nonce: bytes
) -> tuple[tuple[MessageId, ...], ...]:
    """Return the buckets, as equal as they can be: as many as have ``size`` members of ``minimum_owners`` owners each.

    The coin may give one owner all of a bucket but one device, whose update that owner would then know: where it does,
    the same order is cut into fewer buckets, down to one. Whether the one has enough, who committed to it has judged.

    Args:
        owners: of the members of one site, by message id, in any order; those without one have one together.
        size: fewest members in a bucket; fewer members than that make one bucket.
        minimum_owners: fewest owners in a bucket.
        gateway_nonce, coordinator_nonce: the two shares of the coin, 16 bytes each.
    """
    coin = b"ff-deal" + gateway_nonce + coordinator_nonce
    ordered = sorted(owners, key=lambda member: digest(coin + member))
    for count in range(len(ordered) // size, 1, -1):
        if all(len({owners[member] for member in bucket}) >= minimum_owners for bucket in _cut(ordered, count)):
            return tuple(map(tuple, _cut(ordered, count)))
    return (tuple(ordered),)


def _cut(ordered: Sequence[MessageId], count: int) -> Iterator[Sequence[MessageId]]:
    edges = (len(ordered) * i // count for i in range(count + 1))
    return (ordered[start:stop] for start, stop in itertools.pairwise(edges))
