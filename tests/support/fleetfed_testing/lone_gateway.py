"""A gateway and a coordinator in one, for one device: it signs for real, speaks over a real broker, and does as told.

Everything happens in the caller's thread, inside `LoneGateway.wait`.
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fleetfed.device.mqtt import Connected, DeviceSession, Received
from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.secure import split as masked
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind
from fleetfed.shared.wire.masking import Cosign, SealKey, Split
from fleetfed.shared.wire.messages import (
    Decline,
    Life,
    Manifest,
    Mode,
    Need,
    Outcome,
    PatchRef,
    Plan,
    Presence,
    Quantization,
    Receipt,
    RoundEnd,
    Training,
)
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb, parse
from fleetfed_testing.waiting import PATIENCE

FLEET, SITE = "demo", "north"
_YEAR = 365 * 86_400_000

T = TypeVar("T")


class Authority:
    """Certifies members of one fleet."""

    def __init__(self, fleet: str = FLEET) -> None:
        self.fleet = fleet
        self.key = SigningKey.generate()
        self._serials = itertools.count(1)

    def member(self, role: Role, name: str, site: str = SITE, *, owner: str = "") -> Identity:
        """A new identity."""
        key = SigningKey.generate()
        now = unix_ms()
        certificate = Certificate(
            serial=next(self._serials),
            role=role,
            fleet=self.fleet,
            id=name,
            site=site,
            owner=owner,
            not_before=now - _YEAR,
            not_after=now + _YEAR,
            public_key=key.public,
        )
        encoded = certificates.issue(certificate, self.key)
        return Identity(key=key, certificate=certificate, encoded_certificate=encoded, authority_key=self.key.public)


def signer_of(identity: Identity) -> Signer:
    """Signs in the name of ``identity``."""
    return identity.signer(sequence=itertools.count(1).__next__, randomness=os.urandom)


@dataclass(frozen=True)
class Published:
    """A model version as the fleet knows it."""

    manifest: Manifest
    message: bytes
    blobs: tuple[Publishable, ...]


def manifest_of(
    file: bytes, card: ModelCard, *, version: int, sha256: bytes, patches: tuple[tuple[PatchRef, Publishable], ...] = ()
) -> tuple[Manifest, tuple[Publishable, ...]]:
    """A manifest and the objects that it names."""
    card_blob, full = publishable(card.encode()), publishable(file, level=1)
    manifest = Manifest(
        version=version,
        parent=version - 1,
        name=card.name,
        sha256=sha256,
        size=len(file),
        card=card_blob.ref,
        full=full.ref,
        full_version=version,
        full_sha256=sha256,
        patches=tuple(ref for ref, _ in patches),
    )
    return manifest, (card_blob, full, *(blob for _, blob in patches))


def plan_for(
    card: ModelCard, manifest: Manifest, *, round_: int = 1, seconds: float = 60.0, clip: float = 0.05, **changes: Any
) -> Plan:
    """A plan for a manifest's model."""
    now = unix_ms()
    settings: dict[str, Any] = {
        "round": round_,
        "model_version": manifest.version,
        "model_sha256": manifest.sha256,
        "dimension": card.parameters,
        "quantization": Quantization(
            bits=4, lane_bits=16, clips=(clip,) * len(card.tensors), weight_cap=1000, error_feedback=True
        ),
        "training": Training(learning_rate=0.05),
        "opened": now,
        "deadline": now + round(seconds * 1000),
        "expires": now + round(seconds * 1500),
        "nonce": os.urandom(16),
        "mode": Mode.SPLIT if changes.get("split") else Mode.PLAIN,
    }
    return Plan(**{**settings, **changes})


class LoneGateway:
    """See the module.

    Args:
        config: how the gateway connects.
        authority: of the fleet.
        receipts: what to answer updates with: None accepts, a reason refuses; "silent" says nothing.
    """

    def __init__(self, config: ConnectionConfig, authority: Authority, *, receipts: RejectReason | str | None = None):
        self.receipts = receipts
        self.topics = SiteTopics(fleet=authority.fleet, site=SITE)
        self.coordinator = signer_of(authority.member(Role.COORDINATOR, "coordinator", "_"))
        identity = authority.member(Role.GATEWAY, config.client_id)
        self.signer = signer_of(identity)
        self.helper = signer_of(authority.member(Role.HELPER, "helper", "_"))
        self.verifier = identity.verifier()
        self.secrets = {reader: SealSecret.from_bytes(os.urandom(32)) for reader in Reader}
        self.presence: dict[str, Presence] = {}
        self.updates: list[tuple[str, Head, bytes]] = []
        self.messages: list[bytes] = []
        self.declines: list[tuple[str, Decline]] = []
        self.needs: list[Need] = []
        self._assemblers: dict[str, Assembler] = {}
        self._connects = 0
        self._inbox: queue.Queue[Any] = queue.Queue(10_000)
        self.session = DeviceSession(
            config,
            inbox=self._inbox,
            subscriptions=[
                self.topics.all_up(Kind.DEVICE, verb) for verb in (Verb.STATE, Verb.UPDATE, Verb.DECLINE, Verb.NEED)
            ],
        )
        self.session.start()
        self.wait(lambda: self._connects > 0)
        self.say_ready()

    def close(self) -> None:
        """Disconnect."""
        self.session.close()

    def say_ready(self, session: int | None = None) -> None:
        """Publish the node's presence; a new session number is a new birth."""
        number = int.from_bytes(os.urandom(6), "little") if session is None else session
        presence = Presence(life=Life.READY, session=number, since=unix_ms())
        self.session.publish(self.topics.broadcast(Broadcast.NODE), codec.encode(presence), retain=True)

    def publish_model(
        self, manifest: Manifest, blobs: tuple[Publishable, ...], *, missing: frozenset[int] = frozenset()
    ) -> bytes:
        """Publish objects, then the manifest. ``missing``: chunk indexes to leave out of every object."""
        for blob in blobs:
            for index in range(len(blob.ref.parts) // 16):
                if index not in missing:
                    self.publish(self.topics.blob(blob.ref.digest, index), blob.chunk(index))
        message = self.coordinator.sign(MessageKind.MANIFEST, manifest, now=unix_ms()).encode()
        self.publish(self.topics.broadcast(Broadcast.MODEL), message)
        return message

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish retained."""
        while self.session.statistics().queued > 40:
            self.turn(0.05)
        self.session.publish(topic, payload, retain=True)

    def publish_plan(self, plan: Plan) -> Digest:
        """Publish a plan; returns its hash."""
        message = self.coordinator.sign(
            MessageKind.PLAN, plan, now=unix_ms(), round=plan.round, lifetime=plan.expires - unix_ms()
        )
        self.publish(self.topics.broadcast(Broadcast.PLAN), message.encode())
        return message.head.hash

    def split(self, *, helper: bool = False, **changes: Any) -> Split:
        """How a plan masks updates, for ``plan_for(split=...)``; with a helper there are two seed holders."""
        key = SealKey(helper="helper", seal_key=self.secrets[Reader.HELPER].public)
        signed = self.helper.sign(MessageKind.SEAL_KEY, key, now=unix_ms(), lifetime=_YEAR).encode()
        settings: dict[str, Any] = {
            "seal_key": self.secrets[Reader.COORDINATOR].public,
            "helper": signed if helper else b"",
        }
        return Split(**{**settings, **changes})

    def publish_cosign(self, plan: Plan, hash_: Digest) -> Message:
        """Publish the gateway's cosignature of a plan."""
        message = self.signer.sign(
            MessageKind.COSIGN,
            Cosign(plan=hash_, seal_key=self.secrets[Reader.GATEWAY].public),
            now=unix_ms(),
            round=plan.round,
            lifetime=plan.expires - unix_ms(),
        )
        self.publish(self.topics.broadcast(Broadcast.COSIGN), message.encode())
        return message

    def unmask(self, head: Head, body: bytes, n_words: int, *, helper: bool = False) -> Words:
        """The words that a device masked: what only gateway, coordinator and helper together can know."""
        words = np.copy(masked.open_words(head, body, secret=self.secrets[Reader.GATEWAY], n_words=n_words))
        for reader in (Reader.COORDINATOR, *((Reader.HELPER,) if helper else ())):
            seed = masked.open_seed(head, reader, self.secrets[reader])
            masked.add_masks(words, [masked.mask_key(seed, masked.binding_of(head))], negate=True)
        return words

    def end_round(self, round_: int, plan: Digest, outcome: Outcome = Outcome.COMMITTED, version: int = 0) -> None:
        """Put the round's end in the plan's place."""
        end = RoundEnd(round=round_, plan=plan, outcome=outcome, version=version)
        message = self.coordinator.sign(MessageKind.ROUND_END, end, now=unix_ms(), round=round_)
        self.publish(self.topics.broadcast(Broadcast.PLAN), message.encode())

    def receipt(self, device: str, head: Head, reason: RejectReason | None = None) -> Message:
        """Answer an update."""
        body = Receipt(message_id=head.header.message_id, head=head.hash, reason=reason)
        message = self.signer.sign(MessageKind.RECEIPT, body, now=unix_ms(), round=head.header.round)
        self.session.publish(self.topics.down(Kind.DEVICE, device, Verb.RECEIPT), message.encode())
        return message

    def wait(self, condition: Callable[[], T], timeout: float = PATIENCE) -> T:
        """Deal with what comes in until ``condition`` holds; returns it.

        Raises:
            AssertionError: it does not within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            left = deadline - time.monotonic()
            assert left > 0, "nothing of what was waited for"
            self.turn(min(left, 0.2))
        return value

    def turn(self, timeout: float) -> None:
        """Deal with one thing, or with nothing for ``timeout`` seconds."""
        try:
            item = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return
        if isinstance(item, Connected):
            self._connects += 1
            if self._connects > 1:
                # As every node does: whoever sent something meanwhile sends it again.
                self.say_ready()
        elif isinstance(item, Received):
            self._received(item)
            self.session.ack(item)

    def _received(self, message: Received) -> None:
        topic: Any = parse(message.topic)
        device = topic.member
        match topic.verb:
            case Verb.STATE:
                self.presence[device] = codec.decode(Presence, message.payload, limit=10_000)
            case Verb.NEED:
                self.needs.append(codec.decode(Need, message.payload, limit=10_000))
            case Verb.DECLINE:
                decline, _, _ = self.verifier.open(
                    message.payload, Decline, kind=MessageKind.DECLINE, now=unix_ms(), sender=device
                )
                self.declines.append((device, decline))
            case Verb.UPDATE:
                self._update(device, message.payload)

    def _update(self, device: str, frame: bytes) -> None:
        def admit(head: Head) -> None:
            self.verifier.head(head, kind=MessageKind.UPDATE, now=unix_ms(), sender=device)

        whole = self._assemblers.setdefault(device, Assembler(admit)).feed(frame)
        if whole is None:
            return
        head, body = whole
        self.updates.append((device, head, bytes(body)))
        self.messages.append(head.encode() + bytes(body))
        if self.receipts != "silent":
            self.receipt(device, head, None if self.receipts is None else RejectReason(self.receipts))


def write_settings(directory: Path, identity: Identity, broker: ConnectionConfig, text: str) -> Path:
    """Write a device's identity and ``device.toml``; returns the latter's path."""
    identity.save(directory / "identity")
    if broker.tls is None:
        tls = "tls = false"
    else:
        tls = f'ca = "{broker.tls.ca}"\ncert = "{broker.tls.cert}"\nkey = "{broker.tls.key}"'
    path = directory / "device.toml"
    path.write_text(
        f'identity = "identity"\nstate = "state"\n{text}\n[broker]\nhost = "{broker.host}"\nport = {broker.port}\n'
        f"reconnect_cap = 0.2\n{tls}\n"
    )
    return path
