"""A fleet that signs for real, without files: identities, a small model, and every message that a tier may say."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.lanes import Values, Words, levels
from fleetfed.shared.aggregate.meta import Contribution
from fleetfed.shared.model.card import Initializer, InitializerKind, ModelCard
from fleetfed.shared.model.table import TensorSlot, WeightTable
from fleetfed.shared.secure import split as masked
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.envelope import Digest, Head, Header, MessageKind
from fleetfed.shared.wire.masking import Cosign, NonceHash, SealKey, Split
from fleetfed.shared.wire.messages import (
    Commit,
    Decline,
    DeclineReason,
    Eligibility,
    Manifest,
    Mode,
    Outcome,
    Plan,
    Proposal,
    Quantization,
    Quorum,
    Receipt,
    Reveal,
    Revocations,
    RoundEnd,
)
from fleetfed.shared.wire.update import BOX_SIZE, EXTENSION_SIZE, SPLIT, UpdateExtension

YEAR = 366 * 86_400_000
T0 = 1_800_000_000_000
"""When the fleet's certificates begin, less a year; tests that fake the clock begin here."""


@dataclass
class SignedFleet:
    """An authority and whoever it certified.

    Attributes:
        name: the fleet's name.
        now: what messages are dated with; tests move it.
        sizes: values per tensor of the model.
        bits, cohort: of every plan, unless told otherwise.
        owners: member to owner, for certificates that are made from now on.
    """

    name: str = "demo"
    now: int = T0
    sizes: tuple[int, ...] = (6, 4)
    bits: int = 8
    lane_bits: int = 32
    cohort: int = 100
    owners: dict[str, str] = field(default_factory=dict)
    authority: SigningKey = field(default_factory=SigningKey.generate)
    _identities: dict[str, Identity] = field(default_factory=dict)
    _signers: dict[str, Signer] = field(default_factory=dict)
    _seals: dict[str, SealSecret] = field(default_factory=dict)
    _serials: Any = field(default_factory=lambda: itertools.count(1))

    def identity(self, name: str, role: Role, site: str) -> Identity:
        """The identity of a member; the same for the same name."""
        if name not in self._identities:
            key = SigningKey.generate()
            certificate = Certificate(
                serial=next(self._serials),
                role=role,
                fleet=self.name,
                id=name,
                site=site,
                owner=self.owners.get(name, ""),
                not_before=T0 - 10 * YEAR,
                not_after=T0 + 10 * YEAR,
                public_key=key.public,
            )
            self._identities[name] = Identity(
                key=key,
                certificate=certificate,
                encoded_certificate=issue(certificate, self.authority),
                authority_key=self.authority.public,
            )
        return self._identities[name]

    def signer(self, name: str, role: Role = Role.DEVICE, site: str = "north") -> Signer:
        """Signs as that member."""
        if name not in self._signers:
            counter = itertools.count(1)
            self._signers[name] = self.identity(name, role, site).signer(
                sequence=lambda: next(counter), randomness=secrets.token_bytes
            )
        return self._signers[name]

    @property
    def coordinator(self) -> Signer:
        """Signs as the coordinator."""
        return self.signer("c-main", Role.COORDINATOR, "_")

    @property
    def ring(self) -> Ring:
        """The arithmetic of `plan`."""
        return Ring.of(self.sizes, bits=self.bits, lane_bits=self.lane_bits, weight_cap=100)

    # --- The model -----------------------------------------------------------------------------------------------

    def file(self, version: int) -> bytes:
        """A model file of that version: weights behind a header."""
        rng = np.random.default_rng(version)
        return b"\0\0\0\0TFL3" + bytes(8) + rng.normal(size=sum(self.sizes)).astype("<f4").tobytes()

    def card(self) -> ModelCard:
        """The card of every version."""
        offset, slots = 16, []
        for index, size in enumerate(self.sizes):
            slots.append(TensorSlot(name=f"t{index}", shape=(size,), dtype="float32", offset=offset))
            offset += 4 * size
        return ModelCard(
            name="small",
            builder="test",
            file_bytes=offset,
            input_shape=(2,),
            classes=2,
            softmax=True,
            batch=1,
            tensors=tuple(slots),
            initializers=(Initializer(kind=InitializerKind.ZEROS, fan_in=1, fan_out=1),) * len(slots),
            layout=WeightTable(tensors=tuple(slots)).layout_hash(),
        )

    def model(self, version: int) -> tuple[Manifest, list[Publishable]]:
        """A manifest and the objects that it names."""
        file = self.file(version)
        card, full = publishable(self.card().encode()), publishable(file, chunk=32)
        manifest = Manifest(
            version=version,
            parent=version - 1,
            name="small",
            sha256=hashlib.sha256(file).digest(),
            size=len(file),
            card=card.ref,
            full=full.ref,
            full_version=version,
            full_sha256=hashlib.sha256(file).digest(),
            created=self.now,
        )
        return manifest, [card, full]

    def manifest(self, version: int) -> bytes:
        """The signed manifest."""
        return self.coordinator.sign(MessageKind.MANIFEST, self.model(version)[0], now=self.now).encode()

    # --- The coordinator -----------------------------------------------------------------------------------------

    def plan(self, round: int = 1, **changes: Any) -> tuple[Plan, Message]:
        """A plan that opens now, closes in a minute and expires in two."""
        version = changes.pop("model_version", 1)
        quorum = Quorum(fraction=changes.pop("quorum", 1.0), minimum=1, cohort_cap=changes.pop("cohort", self.cohort))
        plan = Plan(
            round=round,
            model_version=version,
            model_sha256=self.model(version)[0].sha256,
            dimension=sum(self.sizes),
            quantization=Quantization(
                bits=self.bits, lane_bits=self.lane_bits, clips=(1.0,) * len(self.sizes), weight_cap=100
            ),
            eligibility=Eligibility(fraction=changes.pop("fraction", 1.0)),
            quorum=quorum,
            mode=Mode.SPLIT if changes.get("split") else Mode.PLAIN,
            tiers=changes.pop("tiers", 1),
            opened=self.now,
            deadline=self.now + changes.pop("deadline", 60_000),
            expires=self.now + changes.pop("expires", 120_000),
            nonce=round.to_bytes(16, "big"),
        )
        plan = replace(plan, **changes)
        return plan, self.coordinator.sign(MessageKind.PLAN, plan, now=self.now, round=round)

    def seal(self, member: str = "c-main") -> SealSecret:
        """The X25519 keys of whoever opens boxes: the coordinator ``c-main``, the helper ``h-main``, or a gateway that
        is a script; the same for the same name."""
        if member not in self._seals:
            self._seals[member] = SealSecret.from_bytes(secrets.token_bytes(32))
        return self._seals[member]

    def split(self, *, helper: bool = False, **changes: Any) -> Split:
        """How a plan masks updates; with a helper there are two seed holders. For ``plan(split=...)``."""
        return Split(**{"seal_key": self.seal().public, "helper": self.seal_key() if helper else b"", **changes})

    def seal_key(self) -> bytes:
        """The helper's signed key."""
        body = SealKey(helper="h-main", seal_key=self.seal("h-main").public)
        signer = self.signer("h-main", Role.HELPER, "_")
        return signer.sign(MessageKind.SEAL_KEY, body, now=self.now, lifetime=YEAR).encode()

    def cosign(self, gateway: str, plan: Plan, hash: Digest, *, site: str, key: bytes | None = None) -> Message:
        """A gateway's signed word for a plan; ``key`` instead of its `seal`."""
        body = Cosign(plan=hash, seal_key=self.seal(gateway).public if key is None else key)
        return self.signer(gateway, Role.GATEWAY, site).sign(
            MessageKind.COSIGN, body, now=self.now, round=plan.round, lifetime=plan.expires - self.now
        )

    def unmask(
        self, heads: Iterable[Head], words: bytes | Words, *, helper: bool = False, ring: Ring | None = None
    ) -> tuple[Values, Words]:
        """What coordinator and helper make of a revealed sum over the updates with these heads: values and meta.

        ``ring`` is the fleet's own, unless told otherwise.
        """
        total = np.frombuffer(words, dtype="<u8").astype(np.uint64)
        readers = [(Reader.COORDINATOR, self.seal()), *([(Reader.HELPER, self.seal("h-main"))] if helper else [])]
        for head in heads:
            for reader, secret in readers:
                key = masked.mask_key(masked.open_seed(head, reader, secret), masked.binding_of(head))
                masked.add_masks(total, [key], negate=True)
        return (ring or self.ring).layout.unpack(total)

    def end(self, round: int, plan: bytes) -> bytes:
        """The signed end of a round."""
        body = RoundEnd(round=round, plan=plan, outcome=Outcome.COMMITTED, version=round + 1)
        return self.coordinator.sign(MessageKind.ROUND_END, body, now=self.now, round=round).encode()

    def commit(
        self,
        plan: bytes,
        proposal: bytes,
        members: Sequence[bytes],
        *,
        gateway: str,
        round: int = 1,
        nonce: bytes = bytes(16),
    ) -> Message:
        """The signed final set."""
        body = Commit(plan=plan, gateway=gateway, proposal=proposal, members=b"".join(sorted(members)), nonce=nonce)
        return self.coordinator.sign(MessageKind.COMMIT, body, now=self.now, round=round)

    def receipt(self, message: Any, *, signer: Signer | None = None, reason: Any = None) -> bytes:
        """The coordinator's receipt for a message with this head."""
        body = Receipt(message_id=message.header.message_id, head=message.hash, reason=reason)
        return (signer or self.coordinator).sign(MessageKind.RECEIPT, body, now=self.now).encode()

    def revocations(self, version: int, serials: tuple[int, ...]) -> bytes:
        """The authority's signed list."""
        if "authority" not in self._signers:
            certificate = Certificate(
                serial=10**6,
                role=Role.AUTHORITY,
                fleet=self.name,
                id="authority",
                site="_",
                not_before=T0 - 10 * YEAR,
                not_after=T0 + 10 * YEAR,
                public_key=self.authority.public,
            )
            counter = itertools.count(1)
            self._signers["authority"] = Signer(
                self.authority,
                certificate,
                issue(certificate, self.authority),
                sequence=lambda: next(counter),
                randomness=secrets.token_bytes,
            )
        body = Revocations(version=version, serials=serials)
        return self._signers["authority"].sign(MessageKind.REVOCATIONS, body, now=self.now).encode()

    # --- Devices -------------------------------------------------------------------------------------------------

    def values(self, number: int) -> Any:
        """One device's integers: one place of its own, so that counting it twice shows as a 2."""
        values = np.zeros(sum(self.sizes), dtype=np.int8)
        values[number % values.size] = 1 + number // values.size % levels(self.bits)
        return values

    def meta(self, *, weight: int = 10) -> Words:
        """One device's meta words."""
        tensors = len(self.sizes)
        return self.ring.meta.encode(
            Contribution(
                weight=weight,
                examples=weight,
                training_loss=0.5,
                clipped=(0,) * tensors,
                log2_rms=(-3.0,) * tensors,
            )
        )

    def body(self, values: Any, *, weight: int = 10, limit: int | None = None) -> bytes:
        """A plain update's body."""
        return encode_body(values, self.meta(weight=weight), limit=limit or levels(self.bits))

    def extension(self, plan: Plan, hash: Digest, **changes: Any) -> bytes:
        """An update's extension."""
        extension = UpdateExtension(
            bits=plan.quantization.bits,
            lane_bits=plan.quantization.lane_bits,
            dimension=plan.dimension,
            meta_words=self.ring.meta.words,
            plan=hash,
            model_sha256=plan.model_sha256,
        )
        return replace(extension, **changes).encode()

    def update(
        self,
        device: str,
        plan: Plan,
        hash: Digest,
        *,
        number: int = 0,
        site: str = "north",
        body: bytes | None = None,
        round: int | None = None,
        raw_size: int | None = None,
        compressed: bool = False,
        lifetime: int = 120_000,
        **extension: Any,
    ) -> Message:
        """A signed update."""
        body = self.body(self.values(number)) if body is None else body
        return self.signer(device, Role.DEVICE, site).sign_raw(
            MessageKind.UPDATE,
            body,
            raw_size=len(body) if raw_size is None else raw_size,
            compressed=compressed,
            now=self.now,
            round=plan.round if round is None else round,
            lifetime=lifetime,
            extension=self.extension(plan, hash, **extension),
        )

    def split_update(
        self,
        device: str,
        plan: Plan,
        hash: Digest,
        *,
        gateway_key: bytes,
        number: int = 0,
        words: Words | None = None,
        site: str = "north",
        round: int | None = None,
        lifetime: int = 120_000,
        change: Callable[[Header, bytes, tuple[bytes, ...]], tuple[bytes, tuple[bytes, ...]]] | None = None,
        boxes: int | None = None,
        **extension: Any,
    ) -> Message:
        """A signed masked update.

        Args:
            device: who sends it, of ``site``.
            plan, hash: with masks; a helper in it makes three boxes.
            gateway_key: from the cosignature of the plan.
            number: which `values` it has.
            words: to mask in the place of those, uint64 of shape (n_words,); not changed.
            round, lifetime, extension: as of `update`.
            change: given header, body and boxes, returns another body and boxes of the same sizes: a device that lies.
            boxes: how many there will be, where ``change`` returns fewer or more than are due.
        """
        assert plan.split is not None
        contribution = self.ring.layout.pack(self.values(number), self.meta()) if words is None else words.copy()
        seed_keys = [(Reader.COORDINATOR, plan.split.seal_key)]
        if plan.split.helper:
            seed_keys.append((Reader.HELPER, self.seal("h-main").public))

        def fill(header: Header) -> tuple[bytes, bytes]:
            fixed = self.extension(plan, hash, **{"mode": SPLIT, "suite": plan.split.suite, **extension})
            body, sealed = masked.mask(
                contribution,
                masked.binding(header, fixed),
                gateway_key=gateway_key,
                seed_keys=seed_keys,
                randomness=secrets.token_bytes,
                hedge=hashlib.sha256(device.encode()).digest(),
            )
            if change is not None:
                body, sealed = change(header, body, sealed)
            return body, fixed + b"".join(sealed)

        return self.signer(device, Role.DEVICE, site).sign_bound(
            MessageKind.UPDATE,
            fill,
            body_size=masked.body_size(contribution.size),
            extension_size=EXTENSION_SIZE + BOX_SIZE * (1 + len(seed_keys) if boxes is None else boxes),
            now=self.now,
            round=plan.round if round is None else round,
            lifetime=lifetime,
        )

    def decline(self, device: str, plan: Plan, hash: Digest) -> Message:
        """A signed decline."""
        body = Decline(plan=hash, reason=DeclineReason.TOO_FEW_EXAMPLES)
        return self.signer(device).sign(MessageKind.DECLINE, body, now=self.now, round=plan.round)

    # --- Gateways below ------------------------------------------------------------------------------------------

    def proposal(
        self,
        gateway: str,
        plan: Plan,
        hash: Digest,
        updates: list[Message],
        *,
        site: str,
        nonces: Iterable[tuple[str, bytes]] = (),
    ) -> Message:
        """A child's signed proposal; ``nonces`` are the hashes of sites' nonces."""
        hashes = tuple(NonceHash(site=name, hash=nonce) for name, nonce in nonces)
        body = Proposal(plan=hash, heads=tuple(update.head.encode() for update in updates), nonces=hashes)
        return self.signer(gateway, Role.GATEWAY, site).sign(MessageKind.PROPOSE, body, now=self.now, round=plan.round)

    def reveal(self, gateway: str, plan: Plan, reveal: Reveal, *, site: str) -> Message:
        """A child's signed reveal."""
        return self.signer(gateway, Role.GATEWAY, site).sign(MessageKind.REVEAL, reveal, now=self.now, round=plan.round)


def save_identity(identity: Identity, folder: Path) -> Path:
    """Write an identity folder, without TLS files."""
    identity.save(folder)
    return folder
