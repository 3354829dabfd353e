"""Split mode's own steps: a device masks its words, a gateway opens them, whoever holds seeds takes the masks away.

Who holds what::

    device        words + mask(seed C) [+ mask(seed H)]   encrypted with the body key
    gateway       body key -> masked words; adds them
    coordinator   seed C of every member -> sum of masks C
    helper        seed H of every member -> sum of masks H

Every key is bound to the update's header (`binding`), and every mask is ChaCha20 under a key derived from seed and
binding. So a box or a body that is moved to another header, by whoever, opens to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import numpy as np

from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import prg
from fleetfed.shared.secure.box import TAG_SIZE, Reader, SealSecret, decrypt, encrypt, seal
from fleetfed.shared.secure.kdf import KEY_SIZE, Label, derive
from fleetfed.shared.wire.envelope import Digest, Head, Header, check_body, digest
from fleetfed.shared.wire.masking import SEALED_BOX
from fleetfed.shared.wire.update import EXTENSION_SIZE, UpdateExtension

_NO_HASH: Final = Digest(bytes(32))


def body_size(n_words: int) -> int:
    """Bytes of an encrypted body of so many words: the same for every update of a round."""
    return 8 * n_words + TAG_SIZE


def binding(header: Header, fixed: bytes) -> Digest:
    """What keys and masks of one update are bound to: its header less the body's hash, and its fixed extension."""
    return digest(b"ff-binding" + replace(header, body_hash=_NO_HASH).encode() + fixed)


def binding_of(head: Head) -> Digest:
    """The binding of a received update."""
    return binding(head.header, head.extension[:EXTENSION_SIZE])


def mask(
    words: Words,
    bound: Digest,
    *,
    gateway_key: bytes,
    seed_keys: Iterable[tuple[Reader, bytes]],
    randomness: Callable[[int], bytes],
    hedge: bytes,
    suite: int = SEALED_BOX,
) -> tuple[bytes, tuple[bytes, ...]]:
    """Mask and encrypt one contribution.

    Args:
        words: the packed contribution, uint64 of shape (n_words,); masked in place.
        bound: `binding` of the header that the update will have.
        gateway_key: the leaf gateway's key of the round, from its cosignature.
        seed_keys: the coordinator and its key of the round; with a second seed holder also the helper and its key.
        randomness: returns so many unpredictable bytes.
        hedge: the device's own secret, 32 bytes, mixed into every key.
        suite: of the plan.

    Returns:
        The body, and the boxes in the order of the extension.

    Raises:
        RemoteProtocolError: `BAD_BOX`: one of the public keys is no key of the suite; `UNKNOWN_SUITE`.
    """
    boxes = []
    for reader, public_key in seed_keys:
        # With the reader: to a frozen generator the coordinator's seed would be the helper's as well.
        seed = derive(randomness(KEY_SIZE) + hedge, Label.SEED, bound + reader.value)
        prg.add_mask(words, mask_key(seed, bound))
        boxes.append(seal(seed, reader, bound, public_key, suite))
    key = derive(randomness(KEY_SIZE) + hedge, Label.BODY_KEY, bound)
    body = encrypt(words.astype("<u8", copy=False).data.cast("B"), key, bound)
    return body, (seal(key, Reader.GATEWAY, bound, gateway_key, suite), *boxes)


def open_words(head: Head, body: bytes | memoryview, *, secret: SealSecret, n_words: int) -> Words:
    """The masked words of one update, as its gateway sees them: uniform, whatever the device has. Read-only.

    Args:
        head: verified and admitted.
        body: as received.
        secret: the gateway's key of the round.
        n_words: of the plan's layout.

    Raises:
        RemoteProtocolError: `BODY_MISMATCH`, `WRONG_SHAPE` or `BAD_BOX`.
    """
    check_body(head.header, body)
    if len(body) != body_size(n_words):
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{len(body)} bytes where {body_size(n_words)} are due")
    bound = binding_of(head)
    key = secret.open(_box(head, Reader.GATEWAY), Reader.GATEWAY, bound)
    return np.frombuffer(decrypt(body, key, bound), dtype="<u8").astype(np.uint64, copy=False)


def open_seed(head: Head, reader: Reader, secret: SealSecret) -> bytes:
    """The seed that an update has for one of its seed holders, 32 bytes.

    Raises:
        RemoteProtocolError: `BAD_BOX`, or `MALFORMED` for an update that has no such box.
    """
    return secret.open(_box(head, reader), reader, binding_of(head))


def mask_key(seed: bytes, bound: Digest) -> bytes:
    """The key of the mask's stream."""
    return derive(seed, Label.MASK, bound)


def add_masks(words: Words, keys: Iterable[bytes], *, negate: bool = False) -> None:
    """Add (or subtract) the masks of several updates to ``words`` in place; ``keys`` from `mask_key`."""
    prg.add_masks(words, keys, negate=negate)


def _box(head: Head, reader: Reader) -> bytes:
    boxes = UpdateExtension.decode(head).boxes
    if reader.place >= len(boxes):
        raise RemoteProtocolError(RejectReason.MALFORMED, f"an update without a box for the {reader.name.lower()}")
    return boxes[reader.place]
