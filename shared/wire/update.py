"""The signed extension of an update's head: what it was computed from and on which scale it stands.

It stands in the head, not in the body, because a gateway checks all of it against the plan before it reserves a
byte for the body, and because the coordinator verifies heads whose bodies it never sees.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX

_EXTENSION: Final = struct.Struct("<BBBBII32s32s")
EXTENSION_SIZE: Final = _EXTENSION.size

PLAIN: Final = 0
"""Code of `messages.Mode.PLAIN`."""
SPLIT: Final = 1
"""Code of `messages.Mode.SPLIT`."""

BOX_SIZE: Final = 113
"""Bytes of one sealed key of suite `masking.SEALED_BOX`: tag, key, binding, and 48 of libsodium's."""
BOX_SIZES: Final = {SEALED_BOX: BOX_SIZE, HYBRID: 1168}
"""Bytes of one sealed key, by suite."""
_MOST_BOXES: Final = 3


def box_size(suite: int) -> int:
    """Bytes of one box; of a suite that nobody knows, those of the first, so that the plan can be compared."""
    return BOX_SIZES.get(suite, BOX_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateExtension:
    """What the head of an update says beside the common header.

    Attributes:
        mode: code of the plan's mode: `PLAIN` or `SPLIT`.
        suite: code of the encryption suite; 0 in plain mode.
        bits, lane_bits: as in the plan.
        dimension: values in the vector; the plan's, or fewer where it takes a subset.
        meta_words: whole words after the lanes, as `aggregate.meta` lays them out.
        plan: head hash of the plan.
        model_sha256: the model file that training began with.
        boxes: sealed keys of `box_size` bytes each: none in plain mode; the body's key for the gateway, the seed for
            the coordinator and, with a helper, the seed for the helper in split mode.
    """

    mode: int = PLAIN
    suite: int = 0
    bits: int
    lane_bits: int
    dimension: int
    meta_words: int
    plan: Digest
    model_sha256: bytes
    boxes: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """The extension's bytes: `EXTENSION_SIZE` of them, and the boxes."""
        return self.fixed() + b"".join(self.boxes)

    def fixed(self) -> bytes:
        """The part that the boxes are bound to."""
        return _EXTENSION.pack(
            self.mode,
            self.suite,
            self.bits,
            self.lane_bits,
            self.dimension,
            self.meta_words,
            self.plan,
            self.model_sha256,
        )

    @classmethod
    def decode(cls, head: Head) -> UpdateExtension:
        """Read the extension of an update's head.

        Raises:
            RemoteProtocolError: `MALFORMED`: not an update, or of another length.
        """
        if head.header.kind is not MessageKind.UPDATE or len(head.extension) < EXTENSION_SIZE:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(head.extension)} bytes of update extension")
        mode, suite, bits, lane_bits, dimension, meta_words, plan, model = _EXTENSION.unpack_from(head.extension)
        size = box_size(suite)
        count, rest = divmod(len(head.extension) - EXTENSION_SIZE, size)
        if rest or count > _MOST_BOXES:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(head.extension)} bytes of update extension")
        starts = range(EXTENSION_SIZE, len(head.extension), size)
        return cls(
            mode=mode,
            suite=suite,
            bits=bits,
            lane_bits=lane_bits,
            dimension=dimension,
            meta_words=meta_words,
            plan=Digest(plan),
            model_sha256=model,
            boxes=tuple(head.extension[start : start + size] for start in starts),
        )
