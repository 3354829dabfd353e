"""Objects on disk, named by their content: model files, patches, partial sums, optimizer state.

An object is written to a temporary file, synced and renamed, so a name that exists holds the whole object, whatever
crashed. Nothing is ever changed in place, so writing twice is harmless and readers need no lock. What nobody refers
to is collected by whoever knows the references::

    store = BlobStore(Path("state/blobs"))
    name, _ = store.put(data, more)
    assert store.get(name) == data
    store.collect({name})
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from fleetfed.shared.errors import StorageError
from fleetfed.shared.files import sync_directory
from fleetfed.shared.wire.envelope import Digest, digest

_TEMPORARY: Final = ".new-"


class BlobStore:
    """See the module.

    Args:
        root: the folder; made where it is missing.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{root}: {error.strerror}") from error

    def path(self, name: bytes) -> Path:
        """Where the object is, or would be."""
        return self._root / name.hex()

    def put(self, *objects: bytes | memoryview) -> list[Digest]:
        """Store objects durably; return their names, BLAKE2b-256 of the content, in order.

        Several at once share the sync of the folder.

        Raises:
            StorageError: the disk refuses.
        """
        names = [digest(each) for each in objects]
        try:
            written = [
                (self._write(data), name) for data, name in zip(objects, names, strict=True) if not self.has(name)
            ]
            for temporary, name in written:
                os.replace(temporary, self.path(name))
            if written:
                sync_directory(self._root)
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror}; free some space and start again") from error
        return names

    def _write(self, data: bytes | memoryview) -> Path:
        path = self._root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        # Sums, optimizer and noise states are nobody else's business.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return path

    def has(self, name: bytes) -> bool:
        """Whether the object is here."""
        return self.path(name).exists()

    def get(self, name: bytes) -> bytes:
        """Read an object.

        Raises:
            StorageError: it is missing, or its content is not what its name says.
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; restore the state folder from a backup") from error
        if digest(data) != name:
            raise StorageError(f"{path} is damaged; restore the state folder from a backup")
        return data

    def part(self, name: bytes, offset: int, size: int) -> bytes:
        """Read a part of an object, unchecked: whoever gets it knows its hash.

        Raises:
            StorageError: it is missing.
        """
        path = self.path(name)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; restore the state folder from a backup") from error

    def remove(self, name: bytes) -> None:
        """Delete an object that nothing refers to any more, without waiting for `collect`."""
        self.path(name).unlink(missing_ok=True)

    def collect(self, keep: set[bytes]) -> int:
        """Delete every object that is not in ``keep``, and what writes that crashed left behind; return how many.

        Not to be called while another thread stores something that ``keep`` does not have.
        """
        gone = 0
        kept = {name.hex() for name in keep}
        for path in self._root.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
                gone += 1
        return gone
