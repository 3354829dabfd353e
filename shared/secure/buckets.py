"""Deals the committed members of a site into buckets by a coin that gateway and coordinator toss together.

The gateway commits to its nonce when it proposes, the coordinator draws its own when it commits to the set, and the
gateway opens its nonce when it reveals: neither can steer a victim into a bucket of accomplices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

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
    members: Iterable[MessageId], size: int, *, gateway_nonce: bytes, coordinator_nonce: bytes
) -> tuple[tuple[MessageId, ...], ...]:
    """Return the buckets: as many as have at least ``size`` members each, as equal as they can be.

    Args:
        members: of one site, in any order.
        size: fewest in a bucket; fewer members than that make one bucket.
        gateway_nonce, coordinator_nonce: the two shares of the coin, 16 bytes each.
    """
    coin = b"ff-deal" + gateway_nonce + coordinator_nonce
    ordered = sorted(members, key=lambda member: digest(coin + member))
    count = max(len(ordered) // size, 1)
    edges = [len(ordered) * i // count for i in range(count + 1)]
    return tuple(tuple(ordered[start:stop]) for start, stop in itertools.pairwise(edges))
