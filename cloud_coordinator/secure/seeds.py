"""Opens what the heads of a proposal hold for the coordinator: a mask seed each, checked and named by its hash.

Seeds are never stored. What is kept of them in memory is their hashes, which tell that two updates share one (a copied
card, a broken generator); for the unmasking they are opened again from the stored proposal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.secure.split import binding_of, body_size, mask_key, open_seed
from fleetfed.shared.wire.envelope import Digest, Head, digest, parse_head
from fleetfed.shared.wire.masking import NonceHash, Split
from fleetfed.shared.wire.update import SPLIT, UpdateExtension


def boxes_due(split: Split) -> int:
    """Boxes that every update of the round has: gateway, coordinator and, where there is one, helper."""
    return 3 if split.helper else 2


def check_shape(head: Head, extension: UpdateExtension, split: Split, *, n_words: int) -> None:
    """Refuse an update that is not masked as the plan says.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`.
    """
    header = head.header
    shape = (extension.mode, extension.suite, len(extension.boxes), header.body_size, header.raw_size)
    size = body_size(n_words)
    wanted = (SPLIT, split.suite, boxes_due(split), size, size)
    if shape != wanted or header.compressed:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"masked as {shape}, the plan says {wanted}")


def seed_hash(head: Head, secret: SealSecret) -> Digest:
    """What names an update's seed.

    Raises:
        RemoteProtocolError: `BAD_BOX`: nothing to open, or sealed for another header.
    """
    return digest(b"ff-seed" + open_seed(head, Reader.COORDINATOR, secret))


def seed_hashes(heads: Iterable[bytes], members: Collection[bytes], secret: SealSecret) -> set[bytes]:
    """The hashes of committed members' seeds, from a stored proposal: for a restart.

    Args:
        heads: of the proposal.
        members: hashes of the heads that were committed.
        secret: of the round.
    """
    return {seed_hash(head, secret) for head in map(parse_head, heads) if head.hash in members}


def mask_keys(heads: Iterable[bytes], members: Collection[bytes], secret: SealSecret) -> dict[bytes, bytes]:
    """The key of each committed member's mask, by the hash of its head.

    Raises:
        RemoteProtocolError: `BAD_BOX`; not for members that were committed with this secret.
    """
    return {
        head.hash: mask_key(open_seed(head, Reader.COORDINATOR, secret), binding_of(head))
        for head in map(parse_head, heads)
        if head.hash in members
    }


def nonce_hashes(nonces: Iterable[NonceHash]) -> Mapping[str, bytes]:
    """What each site committed to; a site that is named twice has committed to nothing."""
    found: dict[str, bytes] = {}
    twice = set()
    for each in nonces:
        if each.site in found:
            twice.add(each.site)
        found[each.site] = each.hash
    return {site: value for site, value in found.items() if site not in twice}
