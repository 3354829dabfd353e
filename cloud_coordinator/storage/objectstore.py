"""The coordinator's objects in a bucket as well, so that another machine can go on where this one was lost.

The folder of `BlobStore` stays what is read; the bucket gets every object before the folder does, and gives back what
the folder has not. So a coordinator with its database elsewhere (PostgreSQL) needs nothing of this machine's disk to
publish, to roll back or to go on with a round, and reads cost no network.

fsspec does the transport (``s3://bucket/prefix``, ``gs://``, ``file://``, ``memory://``; S3 needs the extra ``s3``).
One fleet has a bucket, or a prefix in it, to itself: what the fleet does not name any more is deleted.
"""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.wire.envelope import Digest, digest

_log = logging.getLogger(__name__)

_TEMPORARY: Final = ".new-"
_NAME: Final = 64
"""Digits of an object's name."""


class ObjectStore(BlobStore):
    """See the module.

    Args:
        root: the folder; what it has and the bucket has not, from before there was a bucket, is sent first.
        url: where the bucket is.
        options: keyword arguments for fsspec, such as ``key``, ``secret`` and ``endpoint_url``.

    Raises:
        ConfigError: the URL is none, or a package is missing for it.
        StorageError: the folder or the bucket cannot be used.
    """

    def __init__(self, root: Path, url: str, options: dict[str, Any] | None = None) -> None:
        super().__init__(root)
        # By itself, without what is overridden here.
        self._folder = BlobStore(root)
        self._url = url
        try:
            import fsspec

            self._bucket, prefix = fsspec.core.url_to_fs(url, **(options or {}))
        except ImportError as error:
            raise ConfigError(f"storage.blobs: {error}; pip install 'fleetfed[s3]'") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"storage.blobs: {url!r}: {error}") from error
        self._prefix = prefix.rstrip("/")
        self._bucket.use_listings_cache = False
        self._bucket.dircache.clear()
        # A rename is what makes a file whole at once; a bucket's objects are so from the beginning.
        self._renames = "file" in self._protocols()
        there = self._remote_names()
        for path in root.iterdir():
            if len(path.name) == _NAME and path.name not in there:
                self._send(path.name, path.read_bytes())

    def put(self, *objects: bytes | memoryview) -> list[Digest]:
        """Store objects durably, in the bucket and here; return their names.

        Raises:
            StorageError: the bucket or the disk refuses.
        """
        for each in objects:
            # What is in the folder is in the bucket: it came there first, or `__init__` sent it.
            name = digest(each)
            if not self._folder.has(name):
                self._send(name.hex(), bytes(each))
        return self._folder.put(*objects)

    def has(self, name: bytes) -> bool:
        """Whether the object is here, or was fetched from the bucket just now."""
        return self._folder.has(name) or self._fetch(name)

    def get(self, name: bytes) -> bytes:
        """Read an object.

        Raises:
            StorageError: it is missing, or its content is not what its name says.
        """
        self.has(name)
        return self._folder.get(name)

    def part(self, name: bytes, offset: int, size: int) -> bytes:
        """Read a part of an object.

        Raises:
            StorageError: it is missing.
        """
        self.has(name)
        return self._folder.part(name, offset, size)

    def remove(self, name: bytes) -> None:
        """Delete an object that nothing refers to any more."""
        self._folder.remove(name)
        self._drop([name.hex()])

    def collect(self, keep: set[bytes]) -> int:
        """Delete every object that is not in ``keep``, here and in the bucket; return how many were here."""
        gone = self._folder.collect(keep)
        self._drop(sorted(self._remote_names() - {name.hex() for name in keep}))
        return gone

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._bucket.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _at(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _send(self, name: str, data: bytes) -> None:
        try:
            if not self._renames:
                self._bucket.pipe_file(self._at(name), data)
                return
            self._bucket.makedirs(self._prefix, exist_ok=True)
            temporary = self._at(f"{_TEMPORARY}{secrets.token_hex(8)}")
            self._bucket.pipe_file(temporary, data)
            self._bucket.mv(temporary, self._at(name))
        except Exception as error:
            raise self._failed(error) from error

    def _fetch(self, name: bytes) -> bool:
        """Copy an object from the bucket; returns whether it is there. One that is damaged is not."""
        try:
            data = self._bucket.cat_file(self._at(name.hex()))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._failed(error) from error
        if digest(data) != name:
            _log.error("%s: object %s is damaged", self._url, name.hex())
            return False
        self._folder.put(data)
        return True

    def _remote_names(self) -> set[str]:
        try:
            found = self._bucket.find(self._prefix)
        except FileNotFoundError:
            return set()
        except Exception as error:
            raise self._failed(error) from error
        names = {str(path).rpartition("/")[2] for path in found}
        return {name for name in names if len(name) == _NAME}

    def _drop(self, names: list[str]) -> None:
        for name in names:
            try:
                self._bucket.rm_file(self._at(name))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> StorageError:
        # Whatever the transport's library raises: there is no class that all of them share.
        return StorageError(f"{self._url}: {error}; see to the bucket and start again")


def open_blobs(root: Path, url: str, options: Path | None) -> BlobStore:
    """The folder alone, or with a bucket behind it.

    Args:
        root: the folder.
        url: of the bucket; empty for none.
        options: a JSON file with keyword arguments for fsspec.

    Raises:
        ConfigError: the URL or the file is wrong, or a package is missing.
        StorageError: the folder or the bucket cannot be used.
    """
    if not url:
        return BlobStore(root)
    found: dict[str, Any] = {}
    if options is not None:
        try:
            found = json.loads(options.read_bytes())
        except OSError as error:
            raise ConfigError(f"storage.blobs_options: {options}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"storage.blobs_options: {options}: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"storage.blobs_options: {options}: expected an object")
    return ObjectStore(root, url, found)
