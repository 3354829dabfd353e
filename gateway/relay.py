"""Relays the model: fetches what a manifest names from the upstream site, publishes it below, clears what is obsolete.

The order that followers rely on: the card and the patches, then the manifest, byte for byte. The whole file comes last,
because only devices that hold nothing yet wait for it, and it is large. What was published is written down *before* it
is published (``published.json``), so that after a crash nothing stays retained that no manifest names.

One task works towards the newest manifest; anything that changes what is to be done wakes it, and it begins again at
the top, which is cheap because every step first asks whether it is done already.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fleetfed.gateway.blobs import BlobStore
from fleetfed.gateway.events import ModelServed
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.mqtt.errors import RefusedError, SessionLostError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.blobs import check_ref, part_count
from fleetfed.shared.wire.download import Action, Ask, Download, Store, Subscribe, Unsubscribe
from fleetfed.shared.wire.envelope import KeyId, open_body, parse_head
from fleetfed.shared.wire.messages import BlobRef, Manifest, Need
from fleetfed.shared.wire.topics import BlobTopic, Broadcast, SiteTopics

_log = logging.getLogger(__name__)

_WINDOW: Final = 8
"""Chunks published at a time."""
_NEED_EVERY: Final = 2_000
"""Milliseconds until the same chunk is published again for those who need it."""
_NEED_MEMORY: Final = 4096


class Side(Protocol):
    """What the relay asks of a connection."""

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None: ...  # noqa: D102
    async def subscribe(self, filters: list[str]) -> None: ...  # noqa: D102
    async def unsubscribe(self, filters: list[str]) -> None: ...  # noqa: D102


class _SupersededError(Exception):
    """There is something more important to do first."""


@dataclass(frozen=True, slots=True)
class _Offer:
    manifest: Manifest
    raw: bytes

    @property
    def essential(self) -> list[BlobRef]:
        return [self.manifest.card, *(patch.blob for patch in self.manifest.patches)]

    @property
    def all(self) -> list[BlobRef]:
        return [*self.essential, self.manifest.full]


class Relay:
    """See the module.

    Args:
        directory: for manifest, objects and what was published.
        above, below: connections to the upstream site and to the own; may be the same.
        upstream, site: their topics.
        ask: publishes a `Need` to the tier above.
        served: awaited when a manifest and what its followers need is out.
        believed: whether a coordinator's key still counts; what another one signed is no floor for the next manifest.
    """

    def __init__(
        self,
        directory: Path,
        *,
        above: Side,
        below: Side,
        upstream: SiteTopics,
        site: SiteTopics,
        ask: Callable[[Need], Awaitable[None]],
        served: Callable[[ModelServed], None],
        believed: Callable[[KeyId], bool] = lambda _: True,
    ) -> None:
        self._believed = believed
        self._directory = directory
        self._blobs = BlobStore(directory / "blobs")
        self._above, self._below = above, below
        self._upstream, self._site = upstream, site
        self._ask, self._served = ask, served
        self._held: _Offer | None = None
        self._target: _Offer | None = None
        self._announced: bytes = b""
        self._sizes: tuple[int, ...] = ()
        self._out: set[bytes] = set()
        self._manifest_out = b""
        self._downloads: dict[bytes, Download] = {}
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._urgent = False
        self._needed: dict[tuple[bytes, int], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._published: dict[str, int] = self._load_published()
        self._load_held()

    @property
    def manifest(self) -> Manifest | None:
        """What is served, or about to be."""
        return self._held.manifest if self._held else None

    def served_now(self) -> ModelServed | None:
        """What the files say is served; known before any connection is."""
        return self._event(self._held) if self._held else None

    def offer(self, manifest: Manifest, raw: bytes) -> None:
        """Take a verified manifest.

        Raises:
            RemoteProtocolError: `REPLAYED` for an older version, `CONFLICT` for another of the same, `MALFORMED`.
        """
        latest = self._target or self._held
        if latest is not None and self._believed(parse_head(latest.raw).header.sender):
            if manifest.version < latest.manifest.version:
                raise RemoteProtocolError(RejectReason.REPLAYED, f"version {manifest.version} after {latest.manifest}")
            if manifest.version == latest.manifest.version:
                if manifest.sha256 != latest.manifest.sha256:
                    raise RemoteProtocolError(RejectReason.CONFLICT, f"two files of version {manifest.version}")
                if raw == latest.raw:
                    return
        for ref in (manifest.card, manifest.full, *(patch.blob for patch in manifest.patches)):
            check_ref(ref)
        self._target = _Offer(manifest, raw)
        self._interrupt()

    def republish(self) -> None:
        """The site's broker may have lost everything: publish it again."""
        self._out.clear()
        self._manifest_out = b""
        self._interrupt()

    def resume(self) -> None:
        """The site's connection is new and its broker kept everything: go on where it broke."""
        self._wake.set()

    def reconnected(self) -> None:
        """The upstream connection is new: subscriptions to chunks are made again."""
        for digest, download in self._downloads.items():
            self._perform(digest, download, download.begin(unix_ms()))
        self._wake.set()

    def chunk(self, topic: BlobTopic, payload: bytes) -> None:
        """Take a chunk from the upstream site.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH`.
        """
        download = self._downloads.get(topic.digest)
        if download is None:
            # A process before us subscribed to it and died; the broker remembers.
            self._spawn(self._above.unsubscribe([self._upstream.blob(topic.digest, topic.index)]))
            return
        if not payload:
            return
        self._perform(topic.digest, download, download.chunk(topic.index, payload, unix_ms()))
        if download.complete:
            self._progress.set()

    def need(self, need: Need) -> None:
        """A member cannot get some chunks: publish them again, each at most every two seconds."""
        offers = [offer for offer in (self._held, self._target) if offer]
        ref = next((ref for offer in offers for ref in offer.all if ref.digest == need.digest), None)
        if ref is None or not self._blobs.has(ref):
            return
        now = unix_ms()
        if len(self._needed) > _NEED_MEMORY:
            self._needed.clear()
        wanted = [
            index
            for index in need.missing
            if index < part_count(ref) and now - self._needed.get((ref.digest, index), 0) >= _NEED_EVERY
        ]
        self._needed.update({(ref.digest, index): now for index in wanted})
        self._spawn(self._publish_chunks(ref, wanted))

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            StorageError: a file cannot be read or written.
        """
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._urgent = False
            try:
                await self._work()
            except _SupersededError:
                self._wake.set()
            except SessionLostError:
                _log.debug("relay: waiting for the connection")
            except (RemoteProtocolError, RefusedError) as error:
                _log.warning("relay: %s", error)
            except OSError as error:
                raise StorageError(f"{self._directory}: {error}") from error

    # --- Work ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        if self._held is not None and self._target is None:
            # After a restart: what was relayed before goes out again whatever the tier above does.
            self._target = self._held
        elif self._held is not None and self._held is not self._target and not self._manifest_out:
            await self._put_out(self._held)
        offer = self._target
        if offer is None:
            return
        for ref in offer.essential:
            await self._fetch(ref)
        self._sizes = self._read_card(offer.manifest.card)
        if self._held is not offer:
            self._keep("manifest.bin", offer.raw)
            self._held = offer
        await self._put_out(offer)
        if self._announced != offer.raw:
            self._announced = offer.raw
            self._served(self._event(offer))
        await self._fetch(offer.manifest.full)
        await self._publish(offer.manifest.full)
        await self._clear_obsolete(offer)

    async def _put_out(self, offer: _Offer) -> None:
        refs = [ref for ref in offer.essential if self._blobs.has(ref)]
        for ref in refs:
            await self._publish(ref)
        if self._manifest_out != offer.raw:
            await self._below.publish(self._site.broadcast(Broadcast.MODEL), offer.raw, retain=True)
            self._manifest_out = offer.raw

    async def _fetch(self, ref: BlobRef) -> None:
        if self._blobs.has(ref):
            return
        key = ref.digest[:16]
        download = self._downloads.get(key)
        if download is None:
            download = self._downloads[key] = Download(ref, have=self._blobs.stored_chunks(ref))
            self._perform(key, download, download.begin(unix_ms()))
        while not download.complete:
            self._progress.clear()
            wait = max(0, (download.next_deadline() or unix_ms() + 1000) - unix_ms()) / 1000
            try:
                async with asyncio.timeout(wait):
                    await self._progress.wait()
            except TimeoutError:
                self._perform(key, download, download.timer(unix_ms()))
            if self._urgent:
                raise _SupersededError
        del self._downloads[key]
        self._blobs.finish(ref)

    def _perform(self, key: bytes, download: Download, actions: Iterable[Action]) -> None:
        wanted, done = [], []
        for action in actions:
            match action:
                case Store(_, offset, data):
                    self._blobs.write(download.ref, offset, data)
                case Subscribe(index):
                    wanted.append(self._upstream.blob(key, index))
                case Unsubscribe(index):
                    done.append(self._upstream.blob(key, index))
                case Ask(missing):
                    self._spawn(self._ask(Need(digest=download.ref.digest, missing=missing)))
        if wanted:
            self._spawn(self._above.subscribe(wanted))
        if done:
            self._spawn(self._above.unsubscribe(done))

    def _spawn(self, work: Awaitable[None]) -> None:
        async def forgiving() -> None:
            # The session subscribes again by itself, and a lost Need is asked again.
            with contextlib.suppress(SessionLostError):
                await work

        task = asyncio.create_task(forgiving())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, ref: BlobRef) -> None:
        if ref.digest in self._out:
            return
        name = ref.digest[:16].hex()
        if name not in self._published:
            self._published[name] = part_count(ref)
            self._save_published()
        await self._publish_chunks(ref, range(part_count(ref)))
        self._out.add(ref.digest)

    async def _publish_chunks(self, ref: BlobRef, indices: Iterable[int]) -> None:
        room = asyncio.Semaphore(_WINDOW)

        async def one(index: int) -> None:
            async with room:
                topic = self._site.blob(ref.digest, index)
                await self._below.publish(topic, self._blobs.chunk(ref, index), retain=True)

        results = await asyncio.gather(*(one(index) for index in indices), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _clear_obsolete(self, offer: _Offer) -> None:
        current = {ref.digest[:16].hex() for ref in offer.all}
        obsolete = {name: count for name, count in self._published.items() if name not in current}
        for name, count in obsolete.items():
            for index in range(count):
                await self._below.publish(self._site.blob(bytes.fromhex(name), index), b"", retain=True)
            del self._published[name]
        if obsolete:
            self._save_published()
            self._out &= {ref.digest for ref in offer.all}
        for key in [key for key in self._downloads if key.hex() not in current]:
            download = self._downloads.pop(key)
            self._perform(key, download, download.cancel())
        self._blobs.keep_only(offer.all)

    # --- State on disk -------------------------------------------------------------------------------------------

    def _load_held(self) -> None:
        path = self._directory / "manifest.bin"
        if not path.exists():
            return
        raw = path.read_bytes()
        try:
            # It was verified when it came; its certificate may have expired since, which changes nothing.
            head = parse_head(raw)
            body = open_body(head.header, memoryview(raw)[head.size :])
            held = _Offer(codec.decode(Manifest, body, limit=len(body)), raw)
            for ref in held.all:
                self._blobs.check(ref)
            self._sizes = self._read_card(held.manifest.card)
        except (RemoteProtocolError, OSError) as error:
            _log.warning("relay: %s is of no use (%s); waiting for the tier above", path, error)
            return
        self._held = held

    def _read_card(self, ref: BlobRef) -> tuple[int, ...]:
        try:
            card = ModelCard.decode(self._blobs.raw(ref))
        except RemoteProtocolError:
            self._blobs.discard(ref)
            raise
        return tuple(slot.size for slot in card.tensors)

    def _load_published(self) -> dict[str, int]:
        try:
            content = json.loads((self._directory / "published.json").read_text())
            return {name: int(count) for name, count in content.items() if len(bytes.fromhex(name)) == 16}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            _log.warning("relay: published.json is of no use (%s); what was published before stays retained", error)
            return {}

    def _save_published(self) -> None:
        self._keep("published.json", json.dumps(self._published).encode())

    def _keep(self, name: str, data: bytes) -> None:
        """Replace a file; it survives the process, and after a power cut is old, new or unreadable."""
        temporary = self._directory / f".{name}"
        temporary.write_bytes(data)
        temporary.replace(self._directory / name)

    def _event(self, offer: _Offer) -> ModelServed:
        return ModelServed(version=offer.manifest.version, sha256=offer.manifest.sha256, sizes=self._sizes)

    def _interrupt(self) -> None:
        self._urgent = True
        self._wake.set()
        self._progress.set()
