"""Numbers that never repeat for one identity, whatever crashes in between."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fleetfed.shared.errors import StorageError
from fleetfed.shared.files import write_atomic

_BLOCK: Final = 1024


class SequenceFile:
    """Hands out growing numbers; the file always holds a number larger than any handed out.

    It is written once per block of 1024 numbers, so a crash skips some and repeats none, and flash is spared.

    Raises:
        StorageError: the file is damaged. Do not delete it: numbers would repeat.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_text()
            self._next = int(text)
        except FileNotFoundError:
            self._next = 1
        except ValueError as error:
            raise StorageError(f"{path}: {text!r:.40} is no number; restore it or issue the identity again") from error
        self._reserved = self._next

    def __call__(self) -> int:
        """The next number."""
        if self._next >= self._reserved:
            self._reserved = self._next + _BLOCK
            write_atomic(self._path, str(self._reserved).encode())
        number = self._next
        self._next += 1
        return number
