"""One round in split mode, as its parties see it: updates that are masked, sealed and signed for real."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.lanes import LaneLayout, Words
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest, Head, Header, MessageKind
from fleetfed.shared.wire.masking import SEALED_BOX
from fleetfed.shared.wire.update import EXTENSION_SIZE, SPLIT, UpdateExtension, box_size
from fleetfed_testing.signed_fleet import SignedFleet


def new_secret(suite: int = SEALED_BOX) -> SealSecret:
    """A key pair of a round."""
    return SealSecret.from_bytes(secrets.token_bytes(32), suite)


@dataclass
class MaskedRound:
    """Makes updates, and is gateway, coordinator and helper to them.

    Attributes:
        fleet: signs.
        layout: of the words.
        holders: whoever has seeds, with their secrets: the coordinator, and perhaps the helper.
        gateway: the leaf gateway's secret.
        plan: head hash of the plan.
        hedge: the devices' own secret.
    """

    fleet: SignedFleet
    layout: LaneLayout
    holders: dict[Reader, SealSecret]
    gateway: SealSecret = field(default_factory=new_secret)
    plan: Digest = field(default_factory=lambda: Digest(secrets.token_bytes(32)))
    hedge: bytes = bytes(32)

    @classmethod
    def of(cls, layout: LaneLayout, *, helper: bool = False, suite: int = SEALED_BOX) -> MaskedRound:
        """A round with fresh keys."""
        readers = (Reader.COORDINATOR, Reader.HELPER) if helper else (Reader.COORDINATOR,)
        return cls(SignedFleet(), layout, {reader: new_secret(suite) for reader in readers}, new_secret(suite))

    def update(
        self,
        device: str,
        words: Words,
        *,
        randomness: Callable[[int], bytes] = secrets.token_bytes,
        **changes: Any,
    ) -> Message:
        """A device's signed update of these packed words; ``changes`` are of the extension."""
        fixed = UpdateExtension(
            mode=SPLIT,
            suite=self.gateway.suite,
            bits=8,
            lane_bits=self.layout.lane_bits,
            dimension=self.layout.dimension,
            meta_words=self.layout.meta_words,
            plan=self.plan,
            model_sha256=b"m" * 32,
        )
        extension = replace(fixed, **changes)

        def fill(header: Header) -> tuple[bytes, bytes]:
            body, boxes = split.mask(
                words.copy(),
                split.binding(header, extension.fixed()),
                gateway_key=self.gateway.public,
                seed_keys=[(reader, secret.public) for reader, secret in self.holders.items()],
                randomness=randomness,
                hedge=self.hedge,
                suite=self.gateway.suite,
            )
            return body, replace(extension, boxes=boxes).encode()

        return self.fleet.signer(device, Role.DEVICE).sign_bound(
            MessageKind.UPDATE,
            fill,
            body_size=split.body_size(self.layout.n_words),
            extension_size=EXTENSION_SIZE + box_size(self.gateway.suite) * (1 + len(self.holders)),
            now=self.fleet.now,
            round=1,
            lifetime=120_000,
        )

    def opened(self, update: Message) -> Words:
        """What the gateway sees of an update."""
        return split.open_words(update.head, update.body, secret=self.gateway, n_words=self.layout.n_words)

    def mask_of(self, head: Head, reader: Reader) -> Words:
        """What a seed holder takes away for an update."""
        words = self.layout.zeros()
        seed = split.open_seed(head, reader, self.holders[reader])
        split.add_masks(words, [split.mask_key(seed, split.binding_of(head))])
        return words

    def unmask(self, words: Words, heads: list[Head]) -> Words:
        """The sum less the masks of all seed holders."""
        out = words.copy()
        for reader, secret in self.holders.items():
            keys = [split.mask_key(split.open_seed(head, reader, secret), split.binding_of(head)) for head in heads]
            split.add_masks(out, keys, negate=True)
        return out


def random_words(layout: LaneLayout, rng: np.random.Generator, *, largest: int = 100) -> Words:
    """Packed words of random values and meta."""
    values = rng.integers(-largest, largest + 1, layout.dimension)
    meta = rng.integers(0, 1 << 40, layout.meta_words, dtype=np.uint64)
    return layout.pack(values, meta)
