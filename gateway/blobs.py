"""Objects that the gateway relays, as files: chunks go in at their offsets, and come out as they went in.

Nothing here is promised to anybody, and all of it can be fetched again: so nothing is synced to the disk, which would
hold up every round, and what a power cut has damaged is found by its hashes at the next start.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fleetfed.shared.wire.blobs import part_count, part_size, unwrap
from fleetfed.shared.wire.envelope import digest
from fleetfed.shared.wire.messages import BlobRef


class BlobStore:
    """A folder of content-addressed objects.

    Args:
        directory: made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, ref: BlobRef) -> bool:
        """Whether the whole object is here."""
        path = self._path(ref)
        return path.exists() and path.stat().st_size == ref.size

    def stored_chunks(self, ref: BlobRef) -> list[int]:
        """Chunks of an unfinished object that an earlier attempt left intact."""
        part = self._part(ref)
        return self._good_chunks(ref, part) if part.exists() else []

    def _good_chunks(self, ref: BlobRef, path: Path) -> list[int]:
        good = []
        with path.open("rb") as file:
            for index in range(part_count(ref)):
                data = file.read(part_size(ref, index))
                if digest(data)[:16] == ref.parts[16 * index : 16 * index + 16]:
                    good.append(index)
        return good

    def write(self, ref: BlobRef, offset: int, data: bytes) -> None:
        """Put a checked chunk in its place."""
        part = self._part(ref)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)

    def finish(self, ref: BlobRef) -> None:
        """All chunks are there: give the object its name."""
        self._part(ref).replace(self._path(ref))

    def check(self, ref: BlobRef) -> bool:
        """Whether the whole object is here and intact; a damaged one is removed."""
        if not self.has(ref):
            return False
        if len(self._good_chunks(ref, self._path(ref))) == part_count(ref):
            return True
        self.discard(ref)
        return False

    def put(self, ref: BlobRef, data: bytes) -> None:
        """Store a whole object that was made here."""
        self.write(ref, 0, data)
        self.finish(ref)

    def chunk(self, ref: BlobRef, index: int) -> bytes:
        """Chunk ``index`` as published."""
        with self._path(ref).open("rb") as file:
            file.seek(index * ref.chunk)
            return file.read(part_size(ref, index))

    def raw(self, ref: BlobRef) -> bytes:
        """The object, checked and decompressed.

        Raises:
            RemoteProtocolError: the file is not the object that was named.
        """
        return unwrap(ref, self._path(ref).read_bytes())

    def discard(self, ref: BlobRef) -> None:
        """Remove an object that turned out damaged."""
        self._path(ref).unlink(missing_ok=True)

    def keep_only(self, refs: Iterable[BlobRef]) -> None:
        """Remove everything else, unfinished objects included."""
        names = {path.name for ref in refs for path in (self._path(ref), self._part(ref))}
        for path in self._directory.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _path(self, ref: BlobRef) -> Path:
        return self._directory / ref.digest.hex()

    def _part(self, ref: BlobRef) -> Path:
        return self._directory / f"{ref.digest.hex()}.part"
