"""A disk that loses power at a step of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetfed.device.disk import Disk


class PowerCutError(Exception):
    """Power is gone; nothing that follows happens."""


class FragileDisk(Disk):
    """Loses power at step ``cut`` (counted from 0): what was not made durable before is torn or undone.

    Args:
        cut: the step; -1 never.
        lossy: whether names that were not synced are lost too, as a file system may or may not do.
    """

    def __init__(self, cut: int = -1, *, lossy: bool = False) -> None:
        self.cut = cut
        self.steps = 0
        self._lossy = lossy
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    def _step(self, on_cut: Callable[[], None] = lambda: None) -> None:
        if self.steps == self.cut:
            on_cut()
            if self._lossy:
                for _, undo in reversed(self._undo):
                    undo()
            self.steps += 1
            raise PowerCutError
        self.steps += 1

    def write(self, path: Path, *parts: Any) -> None:
        whole = b"".join(bytes(part) for part in parts)
        existed = path.exists()
        self._step(lambda: None)
        self._step(lambda: path.write_bytes(whole[: len(whole) // 2]))
        super().write(path, *parts)
        if not existed:
            self._undo.append((path.parent, lambda: path.unlink(missing_ok=True)))
        self._step()

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        self._step(lambda: Disk.write_at(self, path, offset, data[: len(data) // 2]))
        super().write_at(path, offset, data)
        self._step()

    def replace(self, source: Path, target: Path) -> None:
        before = target.read_bytes() if target.exists() else None
        content = source.read_bytes()
        self._step()
        super().replace(source, target)

        def undo() -> None:
            source.write_bytes(content)
            if before is None:
                target.unlink(missing_ok=True)
            else:
                target.write_bytes(before)

        self._undo.append((target.parent, undo))
        self._step()

    def remove(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else None
        self._step()
        super().remove(path)
        if content is not None:
            self._undo.append((path.parent, lambda: path.write_bytes(content) and None))
        self._step()

    def sync(self, directory: Path) -> None:
        self._step()
        super().sync(directory)
        self._undo = [each for each in self._undo if each[0] != directory]
        self._step()
