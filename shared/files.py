"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetfed.shared.errors import ConfigError


def write_atomic(path: Path, data: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: after a power cut it holds either the old or the new bytes.

    Args:
        path: its folder is made where it is missing.
        data: all of the file.
        mode: permissions of the new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from a state folder, which is made where it is missing; a crash frees it too.

    Raises:
        ConfigError: another process uses it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"state folder {directory}: {error.strerror}; it must be writable") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"state folder {directory} is in use by another process; stop that one first") from error
        yield
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make a rename or a new name in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
