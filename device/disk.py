"""The few operations that durable state is made of, one method each, so that a test can fail any of them."""

from __future__ import annotations

import os
from pathlib import Path


class Disk:
    """Writes to the file system. Nothing is durable before the method says so."""

    def write(self, path: Path, *parts: bytes | bytearray | memoryview) -> None:
        """Write a new file from ``parts`` and make its content durable; its name is after `sync`."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            os.fsync(descriptor)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """Write ``data`` into a file, which is made where it is missing; not durable."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``, in place of what has it; durable after `sync`."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file if it is there; never needs to be durable."""
        path.unlink(missing_ok=True)

    def sync(self, directory: Path) -> None:
        """Make the names in ``directory`` durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
