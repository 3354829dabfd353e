"""What split mode adds to the plan and to the messages of a round (docs/privacy.md).

A device adds a mask to its words, encrypts the masked words to its gateway, and seals the mask's seed to the
coordinator; with a helper it adds a second mask, whose seed it seals to the helper. The gateway adds masked words
without reading them; the coordinator subtracts the masks of exactly the committed set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.fields import Bytes16, Bytes32, Count, Id, Text

SEALED_BOX: Final = 1
"""Suite: keys sealed with libsodium's `crypto_box_seal` (X25519, XSalsa20-Poly1305), body in ChaCha20-Poly1305."""

HYBRID: Final = 3
"""Suite: keys sealed with HPKE over ML-KEM-768 and X25519 (`secure.hybrid`), body in ChaCha20-Poly1305."""

KEY_SIZES: Final = {SEALED_BOX: 32, HYBRID: 1216}
"""Bytes of a public seal key, by suite."""

MAX_HELPER_KEY: Final = 2048
"""Bytes of a signed `SealKey` message in a plan."""

MAX_NAMED: Final = 32
"""Devices that a helper names in one refusal; those beyond it are named in a later round."""


PublicKey = Annotated[bytes, Length(32, 1216)]
"""Of `KEY_SIZES`; which of them, the plan's suite says (`check_key`)."""


def suite_of(public_key: bytes) -> int:
    """The suite that a seal key is of, by its length.

    Raises:
        RemoteProtocolError: `BAD_BOX`: of none.
    """
    for suite, size in KEY_SIZES.items():
        if len(public_key) == size:
            return suite
    raise RemoteProtocolError(RejectReason.BAD_BOX, f"a key of {len(public_key)} bytes is of no suite")


def check_key(suite: int, public_key: bytes) -> None:
    """Refuse a seal key that is not of the suite, before anything looks into it.

    Raises:
        RemoteProtocolError: `UNKNOWN_SUITE`, or `BAD_BOX` for another length.
    """
    due = KEY_SIZES.get(suite)
    if due is None:
        raise RemoteProtocolError(RejectReason.UNKNOWN_SUITE, f"suite {suite} is unknown here")
    if len(public_key) != due:
        raise RemoteProtocolError(RejectReason.BAD_BOX, f"a key of {len(public_key)} bytes in suite {suite}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the updates of a round are masked.

    Attributes:
        suite: how keys are sealed and bodies encrypted.
        seal_key: the coordinator's key of this round, of the suite; destroyed when the round is over.
        helper: the helper's own signed `SealKey` message, byte for byte, so that devices see whose key it is; empty
            for a round with one seed holder (h = 1).
        minimum_cohort: fewest contributors to any sum that leaves a leaf gateway, and to any bucket.
        minimum_owners: fewest distinct owners among those.
        bucket: contributors to each sum that is revealed apart from the others, so that one garbage update costs its
            bucket alone; 0 reveals one sum. At least ``minimum_cohort``.
    """

    suite: Annotated[int, Range(1, 255)] = SEALED_BOX
    seal_key: PublicKey
    helper: Annotated[bytes, Length(0, MAX_HELPER_KEY)] = b""
    minimum_cohort: Annotated[int, Range(2, limits.MAX_COHORT)] = 2
    minimum_owners: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    bucket: Annotated[int, Range(0, limits.MAX_COHORT)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosign:
    """A leaf gateway's word that this is the one plan of the round. Signed by it, retained at its site.

    A device seals nothing before it has its own gateway's cosignature of the very plan: two devices of a site can so
    never be given two plans, that is two models, for one sum (Pasquini et al. 2021, "Eluding Secure Aggregation").

    Attributes:
        plan: head hash of the plan.
        seal_key: the gateway's key of this round, of the plan's suite; destroyed when the round is over.
    """

    plan: Bytes32
    seal_key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SealKey:
    """A helper's current key, of the one suite that it serves.

    Signed by the helper, retained; its head says until when it is valid.
    """

    helper: Id
    seal_key: PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class NonceHash:
    """A leaf gateway's commitment to its share of the coin that deals updates into buckets.

    Attributes:
        site: the site that it serves.
        hash: BLAKE2b-256 of its nonce (16 bytes).
    """

    site: Id
    hash: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One of several sums in a reveal.

    Attributes:
        site: of the leaf gateway.
        nonce: what its `NonceHash` committed to; the same in all buckets of a site.
        index: place among the site's buckets, in the order that `secure.buckets` defines.
        count: contributors in it.
        words: masked words, little-endian.
    """

    site: Id
    nonce: Bytes16
    index: Count
    count: Count
    words: Annotated[bytes, Length(0, limits.MAX_PARTIAL)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRequest:
    """The coordinator asks the helper for the masks of one gateway's committed set; the helper checks all of it itself.

    Attributes:
        plan, proposal, commit: the signed messages, byte for byte.
        nonces: the sites' openings, from the reveal; empty without buckets.
    """

    plan: Annotated[bytes, Length(1, limits.MAX_PLAN)]
    proposal: Annotated[bytes, Length(1, limits.MAX_PROPOSAL)]
    commit: Annotated[bytes, Length(1, limits.MAX_PROPOSAL)]
    nonces: Annotated[dict[Id, Bytes16], Length(0, limits.MAX_COHORT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSums:
    """The helper's answer: sums, one set of them per round and gateway, ever; or why there are none.

    Attributes:
        plan, commit: head hashes.
        gateway: whose committed set it is.
        sums: the sum of the helper's masks, words little-endian: of the whole set, or of each bucket, ordered by site
            and then by index; none with a reason.
        reason, detail: why the helper gives no sums.
        bad: with `BAD_BOX` or `REUSED_SEED`, devices whose seed does not open, or is another's as well.
    """

    plan: Bytes32
    commit: Bytes32
    gateway: Id
    sums: Annotated[tuple[Annotated[bytes, Length(0, limits.MAX_PARTIAL)], ...], Length(0, limits.MAX_COHORT)]
    reason: RejectReason | None = None
    detail: Text = ""
    bad: Annotated[tuple[Id, ...], Length(0, MAX_NAMED)] = ()
