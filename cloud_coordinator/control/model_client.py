"""Fetches the current model from the broker as any member would: manifest, chunks, patches, every hash checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass

from fleetfed.cloud_coordinator.control.client import OperatorConfig, diagnose
from fleetfed.cloud_coordinator.control.errors import CommandFailedError, NoAnswerError
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RemoteProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.patch import apply_patch
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire.blobs import check_ref, unwrap
from fleetfed.shared.wire.download import Action, Download, Store, Subscribe, Unsubscribe
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import BlobRef, Manifest
from fleetfed.shared.wire.topics import CLOUD_SITE, BlobTopic, Broadcast, SiteTopics, parse

_QUEUE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedModel:
    """The current model: its signed manifest, the whole .tflite, and the encoded card."""

    manifest: Manifest
    data: bytes
    card: bytes


async def fetch_model(config: OperatorConfig, *, timeout: float) -> FetchedModel:
    """Fetch the model that the coordinator published last.

    Args:
        config: identity and broker.
        timeout: seconds for all of it.

    Raises:
        ConfigError: the operator's file or identity is wrong.
        NoAnswerError: no broker, or it holds no model.
        CommandFailedError: what it holds is not what the coordinator signed.
    """
    identity = Identity.load(config.identity, role=Role.OPERATOR)
    topics = SiteTopics(identity.certificate.fleet, CLOUD_SITE)
    arrived: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(_QUEUE)

    async def on_message(topic: str, payload: bytes, retained: bool) -> None:
        del retained
        await arrived.put((topic, payload))

    manifest_topic = topics.broadcast(Broadcast.MODEL)
    connection = config.connection(identity.certificate.id)
    session = Session(connection, subscriptions=[manifest_topic], on_message=on_message)
    running = asyncio.create_task(session.run(), name="model-session")
    fetching = asyncio.create_task(_fetch(identity, session, topics, arrived))
    try:
        done, _ = await asyncio.wait({running, fetching}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if running in done:
            running.result()
        if not done:
            if not session.connected:
                raise NoAnswerError(await asyncio.to_thread(diagnose, connection))
            raise NoAnswerError(
                f"the broker at {connection.host}:{connection.port} did not deliver the whole model within {timeout:g} "
                "s; does the coordinator have one (`fleetfed model list`)?"
            )
        return fetching.result()
    except RemoteProtocolError as error:
        raise CommandFailedError(f"the broker's model is not what the coordinator signed: {error}") from error
    finally:
        for task in (fetching, running):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _fetch(
    identity: Identity, session: Session, topics: SiteTopics, arrived: asyncio.Queue[tuple[str, bytes]]
) -> FetchedModel:
    manifest_topic = topics.broadcast(Broadcast.MODEL)
    topic, payload = await arrived.get()
    while topic != manifest_topic:
        topic, payload = await arrived.get()
    manifest, _, _ = identity.verifier().open(payload, Manifest, kind=MessageKind.MANIFEST, now=unix_ms())

    async def blob(ref: BlobRef) -> bytes:
        return await _blob(ref, session, topics, arrived)

    encoded_card = await blob(manifest.card)
    card = ModelCard.decode(encoded_card)
    data = await blob(manifest.full)
    version = manifest.full_version
    for patch in manifest.patches:
        if patch.base_version == version:
            data = bytes(apply_patch(data, card.table, await blob(patch.blob)))
            version = patch.target_version
    if version != manifest.version or hashlib.sha256(data).digest() != manifest.sha256:
        raise CommandFailedError(
            f"file and patches make version {version} with another hash than version {manifest.version}; "
            "look into the coordinator's log"
        )
    return FetchedModel(manifest=manifest, data=data, card=encoded_card)


async def _blob(ref: BlobRef, session: Session, topics: SiteTopics, arrived: asyncio.Queue[tuple[str, bytes]]) -> bytes:
    download = Download(check_ref(ref))
    data = bytearray(ref.size)

    async def perform(actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Subscribe(index):
                    await session.subscribe([topics.blob(ref.digest, index)])
                case Unsubscribe(index):
                    await session.unsubscribe([topics.blob(ref.digest, index)])
                case Store(_, offset, chunk):
                    data[offset : offset + len(chunk)] = chunk
                case _:
                    # An operator cannot ask for a chunk to be published again; gateways do.
                    pass

    await perform(download.begin(unix_ms()))
    while not download.complete:
        deadline = download.next_deadline()
        wait = None if deadline is None else max(0, deadline - unix_ms()) / 1000
        try:
            topic, payload = await asyncio.wait_for(arrived.get(), wait)
        except TimeoutError:
            await perform(download.timer(unix_ms()))
            continue
        match parse(topic):
            case BlobTopic(digest=digest, index=index) if digest == ref.digest[:16]:
                await perform(download.chunk(index, payload, unix_ms()))
            case _:
                pass
    return unwrap(ref, bytes(data))
