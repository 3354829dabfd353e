"""Objects of any size over retained topics: cut into content-addressed chunks, fetched by exact topic, resumable.

`publishable` cuts, `Fetch` puts together. Neither does I/O: whoever fetches subscribes to what `Fetch.wanted` names
and hands over what comes in; whoever publishes sends the chunks first and the manifest that names them last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.compression import compress, decompress
from fleetfed.shared.wire.envelope import digest
from fleetfed.shared.wire.messages import BlobRef

_PART = 16


def part_count(ref: BlobRef) -> int:
    """How many chunks the object has."""
    return len(ref.parts) // _PART


def part_size(ref: BlobRef, index: int) -> int:
    """Bytes of chunk ``index``."""
    return min(ref.chunk, ref.size - index * ref.chunk)


def check_ref(ref: BlobRef) -> BlobRef:
    """Return ``ref`` if its numbers fit each other.

    Raises:
        RemoteProtocolError: `MALFORMED`.
    """
    if len(ref.parts) % _PART or part_count(ref) != -(-ref.size // ref.chunk):
        raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(ref.parts)} bytes of parts for {ref.size} bytes")
    return ref


@dataclass(frozen=True, slots=True)
class Publishable:
    """An object ready to publish: what names it, and its chunks in order."""

    ref: BlobRef
    data: bytes

    def chunk(self, index: int) -> bytes:
        """Chunk ``index``."""
        return self.data[index * self.ref.chunk : (index + 1) * self.ref.chunk]


def publishable(raw: bytes, *, level: int = 9, chunk: int = limits.CHUNK_DATA) -> Publishable:
    """Compress and cut ``raw``.

    Raises:
        LocalProtocolError: it is empty or larger than `limits.MAX_BLOB`.
    """
    if not 0 < len(raw) <= limits.MAX_BLOB:
        raise LocalProtocolError(f"an object of {len(raw)} bytes; 1 to {limits.MAX_BLOB} are allowed")
    return wrap(compress(raw, level=level), raw_size=len(raw), chunk=chunk)


def wrap(data: bytes, *, raw_size: int, chunk: int = limits.CHUNK_DATA) -> Publishable:
    """Cut an object that is compressed already."""
    parts = b"".join(digest(data[start : start + chunk])[:_PART] for start in range(0, len(data), chunk))
    ref = BlobRef(digest=digest(data), size=len(data), raw_size=raw_size, chunk=chunk, parts=parts)
    return Publishable(ref, data)


def unwrap(ref: BlobRef, data: bytes | memoryview) -> bytes:
    """Check a whole object and decompress it.

    Raises:
        RemoteProtocolError: `BODY_MISMATCH` or `DECOMPRESSION`.
    """
    if len(data) != ref.size or digest(data) != ref.digest:
        raise RemoteProtocolError(RejectReason.BODY_MISMATCH, "the object is not the one that was named")
    return decompress(data, size=ref.raw_size)


class Fetch:
    """One object on its way in.

    Args:
        ref: a checked reference from a verified manifest.
        have: chunks that an earlier attempt already stored.
    """

    __slots__ = ("missing", "ref")

    def __init__(self, ref: BlobRef, have: Iterable[int] = ()) -> None:
        self.ref = check_ref(ref)
        self.missing = set(range(part_count(ref))) - set(have)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return not self.missing

    def wanted(self, window: int) -> list[int]:
        """The chunks to subscribe to now: the lowest missing ones, at most ``window``."""
        return sorted(self.missing)[:window]

    def accept(self, index: int, data: bytes) -> bool:
        """Check a chunk that came in; return whether it is new and is to be stored at ``index * ref.chunk``.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH`: not the chunk that the manifest names.
        """
        if index not in self.missing:
            return False
        if digest(data)[:_PART] != self.ref.parts[index * _PART : (index + 1) * _PART]:
            raise RemoteProtocolError(RejectReason.BODY_MISMATCH, f"chunk {index}")
        self.missing.discard(index)
        return True
