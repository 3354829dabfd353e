"""What the coordinator's site holds retained: objects in chunks, manifest, plan, revocations, presence, status.

Rules (`docs/protocol.md`, "Rules for all", 4):

- chunks before the manifest that names them, the manifest before the plan that trains from it;
- an object is entered in the database before its first chunk leaves, so that every chunk the broker may hold is known
  after a crash, and can be cleared;
- chunks are cleared once neither the current manifest nor the one before it names them, after the current one is out;
- all of it is published again whenever the broker may have lost it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.restore import own_message
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared.wire.blobs import part_count, part_size
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import BlobRef, Manifest, Need
from fleetfed.shared.wire.topics import Broadcast, SiteTopics

MANIFEST: Final = "manifest"
PREVIOUS: Final = "previous_manifest"
PLAN: Final = "plan"
REVOCATIONS: Final = "revocations"

_AGAIN_AFTER: Final = 2_000
"""Milliseconds in which a chunk that was asked for is not published once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One packet to publish.

    Attributes:
        topic: where.
        payload: the bytes, or what reads them when their turn has come.
        retain: whether the broker keeps it; such a packet is published again when the connection breaks first.
        done: called once the broker has confirmed.
    """

    topic: str
    payload: bytes | Callable[[], bytes]
    retain: bool = False
    done: Callable[[], None] | None = None


class Publisher:
    """Says what to publish; `runtime` sends it, in the order of the calls.

    Args:
        topics: of the coordinator's site.
        store, blobs: what is durable.
        send: takes a packet for the broker.
    """

    def __init__(self, topics: SiteTopics, *, store: Store, blobs: BlobStore, send: Callable[[Outgoing], None]) -> None:
        self._topics = topics
        self._store = store
        self._blobs = blobs
        self._send = send
        self._served: dict[tuple[bytes, int], int] = {}
        self._published = store.published()
        self._current = self._parsed(MANIFEST)
        self._previous = self._parsed(PREVIOUS)

    def store_manifest(self, message: bytes) -> None:
        """Make a signed manifest the current one; its objects count as published from now on."""
        with self._store.transaction():
            if self._current is not None:
                self._store.put_document(PREVIOUS, self._current.message)
            self._store.put_document(MANIFEST, message)
            self._previous, self._current = self._current, _Signed(message, _manifest(message))
            for ref in self._current.refs:
                if ref.digest not in self._published:
                    self._store.add_published(ref)
                    self._published[Digest(ref.digest)] = ref

    def model(self) -> None:
        """Publish what the current manifest has beyond the one before it, then the manifest; clear what is obsolete."""
        if self._current is None:
            return
        old = set() if self._previous is None else {ref.digest for ref in self._previous.refs}
        self._chunks(ref for ref in self._current.refs if ref.digest not in old)
        self._retain(Broadcast.MODEL, self._current.message)
        self._clear(old | {ref.digest for ref in self._current.refs})

    def plan(self) -> None:
        """Publish the plan, or the end of the round in its place."""
        self._document(PLAN, Broadcast.PLAN)

    def revocations(self) -> None:
        """Publish the revocation list."""
        self._document(REVOCATIONS, Broadcast.REVOKED)

    def trust(self, bundle: bytes) -> None:
        """Publish trust metadata; it comes before everything that it lets members believe."""
        self._retain(Broadcast.TRUST, bundle)

    def everything(self) -> None:
        """Publish all durable retained messages: the broker may have lost them."""
        self.revocations()
        if self._current is not None:
            signed = (self._current,) if self._previous is None else (self._previous, self._current)
            refs = {ref.digest: ref for each in signed for ref in each.refs}
            self._chunks(refs.values())
            self._retain(Broadcast.MODEL, self._current.message)
            self._clear(set(refs))
        self.plan()

    def need(self, need: Need, now: int) -> int:
        """Publish chunks again that a member cannot get; return how many.

        Needs are unsigned: only objects that are on the broker are served, each chunk at most every two seconds.
        """
        ref = self._published.get(Digest(need.digest))
        if ref is None or not self._blobs.has(ref.digest):
            return 0
        self._served = {key: at for key, at in self._served.items() if now - at < _AGAIN_AFTER}
        wanted = [i for i in need.missing if i < part_count(ref) and (ref.digest, i) not in self._served]
        for index in wanted:
            self._served[ref.digest, index] = now
            self._chunk(ref, index)
        return len(wanted)

    def _parsed(self, name: str) -> _Signed | None:
        message = self._store.document(name)
        return None if message is None else _Signed(message, _manifest(message))

    def _cleared(self, digest: Digest) -> None:
        # A rollback may have named it again, and published it after the clearing, before the broker confirmed that.
        named = (ref for signed in (self._current, self._previous) if signed is not None for ref in signed.refs)
        if any(ref.digest == digest for ref in named):
            return
        self._published.pop(digest, None)
        self._store.drop_published([digest])

    def _document(self, name: str, what: Broadcast) -> None:
        message = self._store.document(name)
        if message is not None:
            self._retain(what, message)

    def _retain(self, what: Broadcast, payload: bytes) -> None:
        self._send(Outgoing(topic=self._topics.broadcast(what), payload=payload, retain=True))

    def _chunks(self, refs: Iterable[BlobRef]) -> None:
        for ref in refs:
            for index in range(part_count(ref)):
                self._chunk(ref, index)

    def _chunk(self, ref: BlobRef, index: int) -> None:
        topic = self._topics.blob(ref.digest, index)
        offset, size = index * ref.chunk, part_size(ref, index)
        self._send(Outgoing(topic=topic, payload=partial(self._blobs.part, ref.digest, offset, size), retain=True))

    def _clear(self, keep: set[bytes]) -> None:
        for digest, ref in list(self._published.items()):
            if digest in keep:
                continue
            count = part_count(ref)
            for index in range(count):
                topic = self._topics.blob(digest, index)
                done = partial(self._cleared, digest) if index == count - 1 else None
                self._send(Outgoing(topic=topic, payload=b"", retain=True, done=done))


@dataclass(frozen=True, slots=True)
class _Signed:
    """A manifest as it was signed, and what it says."""

    message: bytes
    manifest: Manifest

    @property
    def refs(self) -> list[BlobRef]:
        return refs_of(self.manifest)


def refs_of(manifest: Manifest) -> list[BlobRef]:
    """Every object that a manifest names."""
    return [manifest.card, *(patch.blob for patch in manifest.patches), manifest.full]


def _manifest(message: bytes) -> Manifest:
    return own_message(message, Manifest)[0]
