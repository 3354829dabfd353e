"""Brings the device's model to the manifest's version.

Decides which objects to fetch, in what order, and what to do when one is bad. Pure: `fleetfed.device.state` owns one
and passes events on to it.

Rules:

1. A manifest below the floor is refused; the floor is durable before anything else is done for a manifest.
2. The cheapest way is taken: nothing (the file is held already), the chain of patches from a held version, else the
   full file and the patches after it. The card comes first where it is missing.
3. Whatever cannot be used is counted with its reason. A bad patch is followed by the full file, a bad full file or
   card by a pause and another attempt. A step that the policy forbids is tried again after a pause with what is on
   disk. The model held stays in use all the while.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from fleetfed.device.events import (
    AskChunks,
    CountRejection,
    DropParts,
    FindParts,
    HeldModel,
    InstallCard,
    InstallFull,
    InstallPatches,
    RaiseFloor,
    StoreChunk,
    SubscribeChunk,
    UnsubscribeChunk,
)
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.blobs import check_ref
from fleetfed.shared.wire.download import Action, Ask, Download, Store, Subscribe, Unsubscribe
from fleetfed.shared.wire.messages import BlobRef, Manifest, PatchRef

_FIRST_PAUSE: Final = 60_000
_LONGEST_PAUSE: Final = 3_600_000
_MOST_MODELS: Final = 2


class ModelSync:
    """See the module.

    Args:
        models: held on disk, newest first, at most two.
        cards: digests of the cards on disk.
        floor: versions below it are refused.
        largest: bytes of the largest model file that this device takes.
    """

    def __init__(self, models: tuple[HeldModel, ...], *, cards: frozenset[bytes], floor: int, largest: int) -> None:
        self.models = models
        self.floor = floor
        self._cards = set(cards)
        self._largest = largest
        self._manifest: Manifest | None = None
        self._base: HeldModel | None = None
        self._chain: tuple[PatchRef, ...] = ()
        self._fetched: set[bytes] = set()
        self._download: Download | None = None
        self._finding: bytes | None = None
        self._installing = False
        self._online = False
        self._unusable: tuple[int, str] = (0, "")
        self._pause = _FIRST_PAUSE
        self._retry_at: int | None = None

    @property
    def wanted(self) -> Manifest | None:
        """The manifest that is being fetched; None when the newest is here."""
        return self._manifest

    def holds(self, version: int, sha256: bytes) -> HeldModel | None:
        """The held model of that version and hash."""
        return next((m for m in self.models if m.version == version and m.sha256 == sha256), None)

    def hopeless(self, version: int) -> str:
        """Why this device cannot get that version for now; empty where it may still come."""
        unusable, why = self._unusable
        return why if unusable == version else ""

    def next_deadline(self) -> int | None:
        """When to call `timer`."""
        if self._retry_at is not None:
            return self._retry_at
        return self._download.next_deadline() if self._download is not None and self._online else None

    def connected(self, now: int) -> list[Any]:
        """Subscriptions may be gone: make them again."""
        self._online = True
        return self._translate(self._download.begin(now)) if self._download is not None else []

    def disconnected(self) -> list[Any]:
        """Nothing can be fetched until the next `connected`, which subscribes once and not twice."""
        self._online = False
        return self._translate(self._download.cancel()) if self._download is not None else []

    def manifest(self, manifest: Manifest, now: int) -> list[Any]:
        """A verified manifest came in."""
        try:
            known = self._check(manifest)
        except RemoteProtocolError as error:
            if error.reason in (RejectReason.TOO_LARGE, RejectReason.MALFORMED):
                self._unusable = (manifest.version, str(error)[:200])
            return [CountRejection(error.reason, f"manifest {manifest.version}: {error.detail}")]
        if known:
            return []
        out = self._cancel()
        if manifest.version > self.floor:
            self.floor = manifest.version
            out.append(RaiseFloor(manifest.version))
        self._manifest = manifest
        self._pause = _FIRST_PAUSE
        self._choose(manifest)
        out.append(DropParts(tuple(ref.digest for ref in self._objects(manifest))))
        return out + self._advance(now)

    def _check(self, manifest: Manifest) -> bool:
        """Whether there is nothing to do for it.

        Raises:
            RemoteProtocolError: it is not to be followed.
        """
        version = manifest.version
        if version < self.floor:
            raise RemoteProtocolError(RejectReason.REPLAYED, f"older than {self.floor}")
        newest = self.models[0] if self.models else None
        if newest is not None and newest.version == version:
            if newest.sha256 != manifest.sha256:
                raise RemoteProtocolError(RejectReason.CONFLICT, "another file of the version held")
            return True
        if self._manifest is not None and self._manifest.version == version:
            if self._manifest.sha256 != manifest.sha256:
                raise RemoteProtocolError(RejectReason.CONFLICT, "another file of the version being fetched")
            return True
        if max(manifest.size, manifest.full.raw_size) > self._largest:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{manifest.size} bytes, limit {self._largest}")
        if manifest.full.raw_size != manifest.size:
            raise RemoteProtocolError(RejectReason.MALFORMED, "two sizes for one file")
        if manifest.full_sha256 != manifest.sha256 and not _chain(manifest, manifest.full_sha256):
            raise RemoteProtocolError(RejectReason.MALFORMED, "no way from the full file to this version")
        for ref in (manifest.card, manifest.full, *(patch.blob for patch in manifest.patches)):
            check_ref(ref)
            if ref.raw_size > self._largest:
                raise RemoteProtocolError(RejectReason.TOO_LARGE, f"an object of {ref.raw_size} bytes")
        return False

    def _choose(self, manifest: Manifest) -> None:
        """Set base and chain to the cheapest way; no base means that the chain begins at the full file."""
        self._choose_full(manifest)
        best = manifest.full.size + _size(self._chain)
        for model in self.models:
            if model.card != manifest.card.digest:
                continue
            if model.sha256 == manifest.sha256:
                self._base, self._chain = model, ()
                return
            chain = _chain(manifest, model.sha256)
            if chain and _size(chain) < best:
                self._base, self._chain, best = model, chain, _size(chain)

    def _choose_full(self, manifest: Manifest) -> None:
        self._base, self._chain = None, _chain(manifest, manifest.full_sha256)

    def _objects(self, manifest: Manifest) -> list[BlobRef]:
        """What has to be on disk before the model can be installed, in order."""
        card = [] if manifest.card.digest in self._cards else [manifest.card]
        full = [manifest.full] if self._base is None else []
        return [*card, *full, *(patch.blob for patch in self._chain)]

    def _advance(self, now: int) -> list[Any]:
        """Fetch the next object, or install what is complete."""
        manifest = self._manifest
        if manifest is None or self._installing:
            return []
        for ref in self._objects(manifest):
            if ref.digest not in self._fetched:
                self._finding = ref.digest
                return [FindParts(ref)]
            if ref is manifest.card:
                self._installing = True
                return [InstallCard(ref)]
        self._installing = True
        if self._base is None:
            return [InstallFull(self._chain, manifest)]
        return [InstallPatches(self._base, self._chain, manifest)]

    def parts(self, digest: bytes, have: tuple[int, ...], now: int) -> list[Any]:
        """The store told which chunks it has."""
        if digest != self._finding or self._manifest is None:
            return []
        self._finding = None
        ref = next(ref for ref in self._objects(self._manifest) if ref.digest == digest)
        download = Download(ref, have=have)
        if download.complete:
            self._fetched.add(digest)
            return self._advance(now)
        self._download = download
        return self._translate(download.begin(now)) if self._online else []

    def chunk(self, digest: bytes, index: int, data: bytes, now: int) -> list[Any]:
        """A chunk came in."""
        download = self._download
        if download is None or download.ref.digest[: len(digest)] != digest:
            # A process before us subscribed to it and died; the broker remembers.
            return [UnsubscribeChunk(digest, index)]
        if not data:
            return []
        try:
            out = self._translate(download.chunk(index, data, now))
        except RemoteProtocolError as error:
            return [CountRejection(error.reason, f"object {digest.hex()}: {error.detail}")]
        if not download.complete:
            return out
        self._fetched.add(download.ref.digest)
        self._download = None
        return out + self._advance(now)

    def card_installed(self, digest: bytes, now: int) -> list[Any]:
        """The card is on disk."""
        self._cards.add(digest)
        self._installing = False
        return self._advance(now)

    def model_installed(self, model: HeldModel, now: int) -> list[Any]:
        """A model is on disk; the one before it stays."""
        self._installing = False
        self.models = (model, *self.models)[:_MOST_MODELS]
        # The store keeps no other cards.
        self._cards = {held.card for held in self.models}
        if self._manifest is None:
            return []
        if self._manifest.version == model.version:
            self._reset()
            return [DropParts()]
        # A newer manifest came in meanwhile; from here its way may be shorter.
        if self._download is None and self._finding is None:
            self._choose(self._manifest)
            return self._advance(now)
        return []

    def failed(self, reason: RejectReason, detail: str, now: int) -> list[Any]:
        """What was fetched cannot be used."""
        self._installing = False
        out: list[Any] = [CountRejection(reason, detail)]
        manifest = self._manifest
        if manifest is None:
            return out
        if reason is RejectReason.LARGE_STEP:
            # Every way leads to the same file. What is on disk is tried again: the owners may change the policy.
            self._try_later(manifest, reason, detail, now)
            return out
        self._fetched.clear()
        card_is_here = manifest.card.digest in self._cards
        if self._base is not None and card_is_here:
            self._choose_full(manifest)
            return [*out, DropParts(), *self._advance(now)]
        self._try_later(manifest, reason, detail, now)
        return [*out, DropParts()]

    def _try_later(self, manifest: Manifest, reason: RejectReason, detail: str, now: int) -> None:
        self._unusable = (manifest.version, f"{reason}: {detail}"[:200])
        self._retry_at = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def timer(self, now: int) -> list[Any]:
        """The time of `next_deadline` came."""
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            return self._advance(now)
        if self._download is not None and self._online:
            return self._translate(self._download.timer(now))
        return []

    def _cancel(self) -> list[Any]:
        out = self._translate(self._download.cancel()) if self._download is not None else []
        self._reset()
        return out

    def _reset(self) -> None:
        self._manifest = None
        self._base, self._chain = None, ()
        self._fetched.clear()
        self._download = None
        self._finding = None
        self._retry_at = None

    def _translate(self, actions: list[Action]) -> list[Any]:
        assert self._download is not None
        ref = self._download.ref
        out: list[Any] = []
        for action in actions:
            match action:
                case Subscribe(index):
                    out.append(SubscribeChunk(ref.digest, index))
                case Unsubscribe(index):
                    out.append(UnsubscribeChunk(ref.digest, index))
                case Store(_, offset, data):
                    out.append(StoreChunk(ref, offset, data))
                case Ask(missing):
                    out.append(AskChunks(ref.digest, missing))
        return out

    def validate(self) -> None:
        """Assert the invariants."""
        assert len(self.models) <= _MOST_MODELS
        assert self._manifest is not None or (self._download is None and self._finding is None)
        assert self._manifest is None or self._manifest.version == self.floor


def _size(chain: tuple[PatchRef, ...]) -> int:
    """Bytes to fetch for the chain."""
    return sum(patch.blob.size for patch in chain)


def _chain(manifest: Manifest, start: bytes) -> tuple[PatchRef, ...]:
    """The patches that lead from the file ``start`` to the manifest's, or none."""
    patches = manifest.patches
    for first, patch in enumerate(patches):
        if patch.base_sha256 != start:
            continue
        chain = patches[first:]
        linked = all(a.target_sha256 == b.base_sha256 for a, b in pairwise(chain))
        if linked and chain[-1].target_sha256 == manifest.sha256:
            return chain
    return ()
