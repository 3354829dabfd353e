"""Somebody who has a member's keys, and says with them what no member says."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetfed.shared.clock import unix_ms
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.signer import Signer
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import Commit, Decline, DeclineReason, Proposal
from fleetfed.shared.wire.topics import CLOUD_SITE, Kind, SiteTopics, Verb
from fleetfed_testing.waiting import PATIENCE

_VERSION_AT = 4
_BODY_SIZE_AT = 88
_MESSAGE_ID_AT = 72


@dataclass
class Impostor:
    """Connected in a device's name."""

    session: Session
    identity: Identity

    @property
    def topics(self) -> SiteTopics:
        """Of the device's site."""
        return SiteTopics(self.identity.certificate.fleet, self.identity.certificate.site)

    def topic(self, verb: Verb) -> str:
        """On which the device says something."""
        return self.topics.up(Kind.DEVICE, self.identity.certificate.id, verb)

    async def say(self, verb: Verb, payload: bytes, *, times: int = 1, qos: int = 1) -> None:
        """Publish the same so many times."""
        topic = self.topic(verb)
        await asyncio.gather(*(self.session.publish(topic, payload, qos=qos) for _ in range(times)))

    def message(self) -> bytes:
        """A small message, as the device would sign it."""
        decline = Decline(plan=bytes(32), reason=DeclineReason.BUSY)
        return _signer(self.identity).sign(MessageKind.DECLINE, decline, now=unix_ms(), round=1).encode()

    def forged(self) -> bytes:
        """The same with something changed after it was signed."""
        return _with(self.message(), _MESSAGE_ID_AT, bytes(16))

    def too_new(self) -> bytes:
        """The same of another version of the wire format."""
        return _with(self.message(), _VERSION_AT, b"\x63")

    def too_large(self) -> bytes:
        """The same with a body of four GB, as it claims."""
        return _with(self.message(), _BODY_SIZE_AT, b"\xff\xff\xff\xff")


def _with(message: bytes, at: int, patch: bytes) -> bytes:
    return message[:at] + patch + message[at + len(patch) :]


@contextlib.asynccontextmanager
async def impostor(identity: Path, port: int) -> AsyncIterator[Impostor]:
    """Connect with the keys in a device's identity folder; the device itself must not run."""
    own = Identity.load(identity)
    async with _connected(own, identity, port) as session:
        yield Impostor(session, own)


async def commit_to_one(identity: Path, port: int) -> None:
    """As whoever has the coordinator's key: take the next proposal, and ask for the sum of a single update of it."""
    own = Identity.load(identity)
    cloud = SiteTopics(own.certificate.fleet, CLOUD_SITE)
    proposals: asyncio.Queue[tuple[Head, Proposal]] = asyncio.Queue()
    assembler = Assembler(lambda head: None)

    async def hear(topic: str, payload: bytes, retained: bool) -> None:
        if topic.endswith(Verb.PROPOSE) and (whole := assembler.feed(payload)) is not None:
            body = open_body(whole[0].header, whole[1])
            proposals.put_nowait((whole[0], codec.decode(Proposal, body, limit=len(body))))

    heard = [cloud.all_up(Kind.GATEWAY, Verb.PROPOSE)]
    async with _connected(own, identity, port, subscriptions=heard, on_message=hear) as session:
        async with asyncio.timeout(PATIENCE):
            head, proposal = await proposals.get()
        gateway = certificates.verify(head.certificate, own.authority_key).id
        only = parse_head(proposal.heads[0]).header.message_id
        commit = Commit(plan=proposal.plan, gateway=gateway, proposal=head.hash, members=only)
        message = _signer(own).sign(MessageKind.COMMIT, commit, now=unix_ms(), round=head.header.round)
        for frame in split(message.id, message.encode()):
            await session.publish(cloud.down(Kind.GATEWAY, gateway, Verb.COMMIT), frame)


def _signer(identity: Identity) -> Signer:
    # Far beyond what the member itself has counted.
    return identity.signer(sequence=unix_ms, randomness=os.urandom)


@contextlib.asynccontextmanager
async def _connected(own: Identity, identity: Path, port: int, **settings: Any) -> AsyncIterator[Session]:
    endpoint = Endpoint(host="127.0.0.1", port=port)
    session = Session(endpoint.connection(client_id=own.certificate.id, identity=identity), **settings)
    task = asyncio.create_task(session.run())
    try:
        await session.wait_connected()
        yield session
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
