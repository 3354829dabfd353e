"""Keeps a small process small: what a board with little memory has, every other program on it wants too.

Linux with glibc only; elsewhere these functions do nothing.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_OWN_PAGES_FROM: Final = 128 * 1024
_MADV_DONTNEED: Final = 4

WORTH_TRIMMING: Final = 250_000
"""Parameters from which a model's training is so large that it is worth the 20 ms that `trim` takes."""


def _libc(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), function)
    except (OSError, AttributeError):
        return None


def settle_in() -> None:
    """Once, before numpy is imported: one heap for all threads, and large blocks that go back when they are freed.

    glibc would otherwise make a heap per thread and learn to keep large blocks. The threads of a linear algebra
    library, which a device does not need, are not started. paho-mqtt's `urllib.request`, with which it would look for
    proxies, is loaded when it does: never, since `link` opens the sockets itself.
    """
    _put_off("urllib", "request")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_FROM)
        mallopt(_M_TRIM_THRESHOLD, _OWN_PAGES_FROM)


class _Later(ModuleType):
    """Stands for a module until something of it is used.

    `importlib.util.LazyLoader` would load it at the second import, which looks at its ``__spec__``.
    """

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _put_off(package: str, name: str) -> None:
    full = f"{package}.{name}"
    if full not in sys.modules:
        sys.modules[full] = later = _Later(full)
        setattr(importlib.import_module(package), name, later)


def trim() -> None:
    """Give back what was freed, and code that was needed once.

    Of what a process imports most runs only at its start. Those pages are clean copies of files: they are dropped
    here, and the kernel brings back what is used again from its cache. So the process holds what it works with.
    """
    gc.collect()
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
    release_clean_pages()


_clean: set[str] = set()
"""Lines of ``/proc/self/maps`` whose pages nobody has written to, nor can."""


def release_clean_pages() -> None:
    """Drop the resident pages of program code and of read-only shared file mappings; they come back on demand."""
    madvise = _libc("madvise")
    if madvise is None or not sys.platform.startswith("linux"):
        return
    try:
        candidates = [line for line in Path("/proc/self/maps").read_text().splitlines() if _is_code_or_file(line)]
        if not _clean.issuperset(candidates):
            _clean.clear()
            _clean.update(_without_own_pages(Path("/proc/self/smaps").read_text()))
    except OSError:
        return
    for line in candidates:
        if line in _clean:
            start, end = (int(bound, 16) for bound in line.split(" ", 1)[0].split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _is_code_or_file(line: str) -> bool:
    """Code (r-xp), and files that are only read (r--s): the model, while the runtime maps it."""
    return line.partition(" ")[2].startswith(("r-xp", "r--s")) and "/" in line


def _without_own_pages(smaps: str) -> Iterator[str]:
    """The mappings of which every page is a copy of its file: a page that was written to exists nowhere else."""
    mapping = ""
    for line in smaps.splitlines():
        key, _, value = line.partition(" ")
        if not key.endswith(":"):
            mapping = line
        elif key == "Anonymous:" and int(value.split()[0]) == 0 and _is_code_or_file(mapping):
            yield mapping
