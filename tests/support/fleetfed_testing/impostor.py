"""Somebody who has a device's keys, or only its place in the network, and sends what no device sends."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

from fleetfed.shared.clock import unix_ms
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Decline, DeclineReason
from fleetfed.shared.wire.topics import Kind, SiteTopics, Verb

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
        signer = self.identity.signer(sequence=lambda: unix_ms(), randomness=os.urandom)
        decline = Decline(plan=bytes(32), reason=DeclineReason.BUSY)
        return signer.sign(MessageKind.DECLINE, decline, now=unix_ms(), round=1).encode()

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
async def impostor(identity: Path, port: int, **changes: object) -> AsyncIterator[Impostor]:
    """Connect with the keys in a device's identity folder; the device itself must not run."""
    own = Identity.load(identity)
    endpoint = Endpoint(host="127.0.0.1", port=port)
    config: ConnectionConfig = endpoint.connection(client_id=own.certificate.id, identity=identity)
    session = Session(replace(config, **changes))  # type: ignore[arg-type]
    task = asyncio.create_task(session.run())
    try:
        await session.wait_connected()
        yield Impostor(session, own)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
