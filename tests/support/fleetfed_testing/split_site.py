"""The other parties of a masked round for one device: they say what a plan carries, and open what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind
from fleetfed.shared.wire.masking import SEALED_BOX, Cosign, SealKey, Split
from fleetfed.shared.wire.messages import Mode, Plan
from fleetfed_testing.lone_gateway import Authority, signer_of


def _secret(number: int, suite: int = SEALED_BOX) -> SealSecret:
    return SealSecret.from_bytes(bytes([number]) * 32, suite)


@dataclass
class SplitSite:
    """Coordinator, gateway and helper of one round, with their secrets.

    Attributes:
        authority: of the fleet.
        helper: whether there is a second seed holder.
        suite: of the plan and of all keys.
    """

    authority: Authority
    helper: bool = False
    suite: int = SEALED_BOX
    gateway_secret: SealSecret = field(init=False)
    coordinator_secret: SealSecret = field(init=False)
    helper_secret: SealSecret = field(init=False)

    def __post_init__(self) -> None:
        self.gateway_secret, self.coordinator_secret, self.helper_secret = (_secret(n, self.suite) for n in (1, 2, 3))
        self.helper_signer = signer_of(self.authority.member(Role.HELPER, "h-1", "_"))

    def helper_word(self, *, signer: Signer | None = None, now: int = 0, lifetime: int = 0, **changes: Any) -> bytes:
        """The helper's signed key; by default its own, valid for ever."""
        word = SealKey(**{"helper": "h-1", "seal_key": self.helper_secret.public, **changes})
        author = signer or self.helper_signer
        return author.sign(MessageKind.SEAL_KEY, word, now=now or unix_ms(), lifetime=lifetime).encode()

    def block(self, **changes: Any) -> Split:
        """What the plan says of masks."""
        whole: dict[str, Any] = {
            "suite": self.suite,
            "seal_key": self.coordinator_secret.public,
            "helper": self.helper_word() if self.helper else b"",
        }
        return Split(**{**whole, **changes})

    def changes(self, **changes: Any) -> dict[str, Any]:
        """What a plan needs to be one in split mode."""
        return {"mode": Mode.SPLIT, "split": self.block(), **changes}

    def cosign(self, plan: Plan, plan_hash: Digest, signer: Signer, *, lifetime: int = 90_000) -> Message:
        """The gateway's word for a plan."""
        body = Cosign(plan=plan_hash, seal_key=self.gateway_secret.public)
        return signer.sign(MessageKind.COSIGN, body, now=unix_ms(), round=plan.round, lifetime=lifetime)

    def open(self, head: Head, body: bytes, ring: Ring) -> tuple[Values, Words]:
        """All parties together: the values and meta words that the device sent."""
        words = split.open_words(head, body, secret=self.gateway_secret, n_words=ring.layout.n_words).copy()
        bound = split.binding_of(head)
        readers = [(Reader.COORDINATOR, self.coordinator_secret)]
        if self.helper:
            readers.append((Reader.HELPER, self.helper_secret))
        seeds = [split.open_seed(head, reader, secret) for reader, secret in readers]
        split.add_masks(words, (split.mask_key(seed, bound) for seed in seeds), negate=True)
        return ring.layout.unpack(words)
