"""Split mode around a coordinator without a broker: devices that mask, gateways that add, a helper that answers.

As in `cloud`, everybody signs and encrypts for real; a test takes one of them and makes it lie.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.secure import split as masked
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.secure.buckets import commit_nonce, deal
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.chunks import split as frames_of
from fleetfed.shared.wire.envelope import Digest, Head, Header, MessageId, MessageKind, open_body, parse_head
from fleetfed.shared.wire.masking import Bucket, MaskRequest, MaskSums, NonceHash, SealKey
from fleetfed.shared.wire.messages import Commit, Life, Plan, Presence, Proposal, Reveal
from fleetfed.shared.wire.topics import Kind, Verb
from fleetfed.shared.wire.update import BOX_SIZE, EXTENSION_SIZE, SPLIT
from fleetfed_testing.cloud import START, Fleet, ScriptedGateway, Update, World, contribution_of, extension_of


class MaskedGateway(ScriptedGateway):
    """A direct gateway in split mode, with devices of its own and of sites below it.

    Args:
        fleet: identities.
        name: of the gateway; it serves the site of the same name.
        devices: of its own site.
        below: devices of leaf gateways below it, by site.
    """

    def __init__(
        self, fleet: Fleet, name: str, devices: Sequence[str], *, below: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.site_of = dict.fromkeys(devices, name)
        for site, others in (below or {}).items():
            self.site_of |= dict.fromkeys(others, site)
        super().__init__(fleet, name, list(self.site_of))
        self.seal = SealSecret.from_bytes(hashlib.sha256(b"seal" + name.encode()).digest())

    def update(self, device: str, plan: Plan, plan_hash: Digest, ring: Ring, /, **changes: Any) -> Update:
        """A masked update of a device below it; see `masked_update`."""
        made = masked_update(
            self.fleet, device, self.site_of[device], plan, plan_hash, ring, gateway_key=self.seal.public, **changes
        )
        self.updates[made.message.id] = made
        return made

    def train(self, plan: Plan, plan_hash: Digest, ring: Ring, *, seed: int = 0) -> list[Update]:
        """A masked update of each device."""
        return [self.update(device, plan, plan_hash, ring, seed=seed) for device in self.devices]

    def nonce(self, site: str, plan_hash: bytes) -> bytes:
        """The share of the coin of a site's gateway."""
        return hashlib.sha256(b"nonce" + site.encode() + plan_hash).digest()[:16]

    def propose(self, plan: Plan, plan_hash: Digest, heads: Iterable[bytes], /, **changes: Any) -> Message:
        """A signed proposal of these heads, with nonces where there are buckets."""
        assert plan.split is not None
        sites = sorted(set(self.site_of.values())) if plan.split.bucket else []
        nonces = tuple(NonceHash(site=site, hash=commit_nonce(self.nonce(site, plan_hash))) for site in sites)
        return super().propose(plan, plan_hash, heads, **{"nonces": nonces, **changes})

    def masked_sum(self, names: Iterable[bytes], ring: Ring) -> Words:
        """The masked words of these updates, opened and added."""
        total = ring.layout.zeros()
        for name in names:
            message = self.updates[name].message
            total += masked.open_words(message.head, message.body, secret=self.seal, n_words=ring.layout.n_words)
        return total

    def buckets(self, plan: Plan, ring: Ring, commit: Commit) -> list[Bucket]:
        """The sums that a right reveal has, own site first."""
        assert plan.split is not None
        by_site: dict[str, list[MessageId]] = {}
        for name in members_of(commit):
            by_site.setdefault(self.site_of[self.updates[name].device], []).append(name)
        found = []
        for site in sorted(by_site, key=lambda site: (site != self.name, site)):
            nonce = self.nonce(site, commit.plan)
            owners = {name: self.fleet.owners.get(self.updates[name].device, "") for name in by_site[site]}
            dealt = deal(
                owners,
                plan.split.bucket,
                minimum_owners=plan.split.minimum_owners,
                gateway_nonce=nonce,
                coordinator_nonce=commit.nonce,
            )
            for index, names in enumerate(dealt):
                words = self.masked_sum(names, ring).astype("<u8").tobytes()
                found.append(Bucket(site=site, nonce=nonce, index=index, count=len(names), words=words))
        return found

    def reveal(self, plan: Plan, ring: Ring, commit: Commit, commit_hash: Digest, /, **changes: Any) -> Message:
        """A signed reveal of exactly the committed members."""
        assert plan.split is not None
        names = members_of(commit)
        fields: dict[str, Any] = {"plan": commit.plan, "commit": commit_hash, "count": len(names), "words": b""}
        if plan.split.bucket:
            fields["buckets"] = tuple(self.buckets(plan, ring, commit))
        else:
            fields["words"] = self.masked_sum(names, ring).astype("<u8").tobytes()
        return self.signer.sign(MessageKind.REVEAL, Reveal(**{**fields, **changes}), now=plan.opened, round=plan.round)


def members_of(commit: Commit) -> list[MessageId]:
    """The committed message ids."""
    return [MessageId(commit.members[i : i + 16]) for i in range(0, len(commit.members), 16)]


def masked_update(
    fleet: Fleet,
    device: str,
    site: str,
    plan: Plan,
    plan_hash: Digest,
    ring: Ring,
    /,
    *,
    gateway_key: bytes,
    seed: int = 0,
    words: Words | None = None,
    randomness: Any = os.urandom,
    change: Any = None,
    round: int | None = None,
    **changes: Any,
) -> Update:
    """A device's masked update: the same contribution as `cloud.update_of` makes in plain mode.

    Args:
        fleet, device, site, plan, plan_hash, ring: whose, and for what.
        gateway_key: of the leaf gateway.
        seed: as of `cloud.update_of`.
        words: to mask in the place of the contribution: a device that lies.
        randomness: the device's; a broken one repeats.
        change: given binding and boxes, returns other boxes.
        round, changes: of the header, and of the extension.
    """
    assert plan.split is not None
    values, meta = contribution_of(device, ring, seed=seed)
    packed = ring.layout.pack(values, meta) if words is None else words.copy()
    seed_keys = [(Reader.COORDINATOR, plan.split.seal_key)]
    if plan.split.helper:
        seed_keys.append((Reader.HELPER, seal_key_of(plan.split.helper).seal_key))
    extension = extension_of(plan, plan_hash, ring, **{"mode": SPLIT, "suite": plan.split.suite, **changes})

    def fill(header: Header) -> tuple[bytes, bytes]:
        bound = masked.binding(header, extension.fixed())
        body, boxes = masked.mask(
            packed,
            bound,
            gateway_key=gateway_key,
            seed_keys=seed_keys,
            randomness=randomness,
            hedge=hashlib.sha256(device.encode()).digest(),
        )
        if change is not None:
            boxes = change(bound, boxes)
        return body, extension.fixed() + b"".join(boxes)

    message = fleet.signer(Role.DEVICE, device, site).sign_bound(
        MessageKind.UPDATE,
        fill,
        body_size=masked.body_size(packed.size),
        extension_size=EXTENSION_SIZE + BOX_SIZE * (1 + len(seed_keys)),
        now=plan.opened,
        round=plan.round if round is None else round,
    )
    return Update(device, message, values, meta)


def seal_key_of(message: bytes) -> SealKey:
    """What a signed key says."""
    head = parse_head(message)
    raw = open_body(head.header, message[head.size :])
    return codec.decode(SealKey, raw, limit=len(raw))


class ScriptedHelper:
    """The second seed holder: answers every request rightly, once per round and gateway.

    Args:
        fleet: identities.
        name: its id.
    """

    def __init__(self, fleet: Fleet, name: str = "h-main") -> None:
        self.name = name
        self.seal = SealSecret.from_bytes(hashlib.sha256(b"helper" + name.encode()).digest())
        self.signer = fleet.signer(Role.HELPER, name, "_")
        self.answers: dict[tuple[int, str], Message] = {}

    def key(self, *, now: int = START, lifetime: int = 30 * 86_400_000, **changes: Any) -> bytes:
        """Its signed key."""
        body = SealKey(**{"helper": self.name, "seal_key": self.seal.public, **changes})
        return self.signer.sign(MessageKind.SEAL_KEY, body, now=now, lifetime=lifetime).encode()

    async def hear(self, world: World, verb: Verb, payload: bytes) -> None:
        """It says something."""
        await world.inbox.message(world.topics.up(Kind.HELPER, self.name, verb), payload)
        await world.settle()

    async def join(self, world: World, life: Life = Life.READY, *, session: int = 1) -> None:
        """It comes up with its key."""
        presence = Presence(life=life, session=session, since=START, software="test")
        await self.hear(world, Verb.STATE, codec.encode(presence))
        await self.hear(world, Verb.KEY, self.key(now=world.clock.now))

    def asked(self, world: World) -> list[tuple[MaskRequest, Head]]:
        """What it was asked."""
        assembler = Assembler(lambda head: None)
        found = []
        for topic, payload, _ in world.sent.packets:
            if topic == world.topics.down(Kind.HELPER, self.name, Verb.ASK):
                whole = assembler.feed(payload)
                if whole is not None:
                    head, body = whole
                    raw = open_body(head.header, body)
                    found.append((codec.decode(MaskRequest, raw, limit=len(raw)), head))
        return found

    def answer(self, world: World, request: MaskRequest, /, **changes: Any) -> Message:
        """The sums of its masks."""
        plan, plan_head = world.opened(Plan, request.plan)
        commit, commit_head = world.opened(Commit, request.commit)
        proposal, _ = world.opened(Proposal, request.proposal)
        heads = {head.header.message_id: head for head in map(parse_head, proposal.heads)}
        names = members_of(commit)
        assert plan.split is not None
        groups: list[Sequence[MessageId]] = [names]
        if plan.split.bucket:
            sites: dict[str, list[MessageId]] = {site: [] for site in sorted(request.nonces)}
            for name in names:
                sites[world.site_of(heads[name])].append(name)
            groups = [
                group
                for site, own in sites.items()
                for group in deal(
                    dict.fromkeys(own, ""),
                    plan.split.bucket,
                    minimum_owners=1,
                    gateway_nonce=request.nonces[site],
                    coordinator_nonce=commit.nonce,
                )
            ]
        sums = tuple(self._sum([heads[name] for name in group], request, world) for group in groups)
        fields = {"plan": plan_head.hash, "commit": commit_head.hash, "gateway": commit.gateway, "sums": sums}
        return self.signer.sign(
            MessageKind.MASK_SUMS, MaskSums(**{**fields, **changes}), now=world.clock.now, round=plan.round
        )

    def _sum(self, heads: Iterable[Head], request: MaskRequest, world: World) -> bytes:
        del request
        keys = [
            masked.mask_key(masked.open_seed(head, Reader.HELPER, self.seal), masked.binding_of(head)) for head in heads
        ]
        current = world.coordinator.current
        assert current is not None
        words = np.zeros(current.ring.layout.n_words, dtype=np.uint64)
        masked.add_masks(words, keys)
        return words.astype("<u8").tobytes()

    async def answer_all(self, world: World) -> None:
        """Answer whatever was asked and not yet answered, with the stored answer where there is one."""
        for request, head in self.asked(world):
            commit, _ = world.opened(Commit, request.commit)
            key = head.header.round, commit.gateway
            if key not in self.answers:
                self.answers[key] = self.answer(world, request)
            await self.say(world, self.answers[key])

    async def say(self, world: World, message: Message) -> None:
        """A signed message of its arrives, in chunks."""
        for frame in frames_of(message.id, message.encode()):
            await self.hear(world, Verb.MASKS, frame)
