"""What the commands print: tables for people, JSON for programs; and what they exit with."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fleetfed.cloud_coordinator.control.errors import NoAnswerError, RefusedError
from fleetfed.shared.errors import ConfigError, FleetFedError, StorageError

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_STORAGE: Final = 3
EXIT_NO_ANSWER: Final = 4
EXIT_REFUSED: Final = 5
EXIT_INTERRUPTED: Final = 130

F = TypeVar("F", bound=Callable[..., Any])


def classify(error: FleetFedError) -> tuple[str, int]:
    """The label that ``--json`` shows for ``error``, and the exit code."""
    match error:
        case ConfigError():
            return "config", EXIT_CONFIG
        case StorageError():
            return "storage", EXIT_STORAGE
        case NoAnswerError():
            return "no_answer", EXIT_NO_ANSWER
        case RefusedError():
            return error.label, EXIT_REFUSED
        case _:
            return "failed", EXIT_FAILED


def example(*lines: str) -> str:
    """The end of a command's help: how to call it."""
    # click keeps the lines of a paragraph that begins with a backspace as they are.
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


def json_option(function: F) -> F:
    """The option ``--json``, the same for every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def json_wanted(arguments: Sequence[str] | None) -> bool:
    """Whether ``--json`` is among the arguments, for errors that arise before the command sees its options."""
    return "--json" in (sys.argv[1:] if arguments is None else arguments)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print ``value`` as JSON on stdout: bytes as hex, dataclasses as objects."""
    print(json.dumps(value, indent=indent, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", empty: str = "none") -> None:
    """Print rows as a table; columns whose name ends in ``>`` are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    body = [[_cell(value) for value in row] for row in rows]
    if not body:
        print(f"{title}: {empty}" if title else empty)
        return
    grid = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        grid.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in body:
        grid.add_row(*(Text(cell) for cell in row))
    # Redirected output has no width: cutting it at 80 columns would lose text.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(grid)


_TIMES: Final = frozenset({"created", "since", "deadline", "opened", "closed", "not_before", "not_after"})


def pairs(values: Mapping[str, object], *, title: str = "", first: Sequence[str] = ()) -> None:
    """Print names and values below each other.

    Args:
        values: a table among them is printed on one line; names of times are known.
        title: a line above.
        first: names to begin with, in this order.
    """
    if title:
        print(title)
    width = max((len(name) for name in values), default=0)
    names = [name for name in first if name in values]
    for name in (*names, *(name for name in values if name not in names)):
        value = values[name]
        shown = when(value) if name in _TIMES and isinstance(value, int) else _cell(value)
        print(f"  {name.replace('_', ' '):<{width}}  {shown}")


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items()) or "-"
    return str(value)


def size(count: float) -> str:
    """Bytes as people read them.

    >>> size(950), size(148_000), size(2_398_000)
    ('950 B', '148.0 kB', '2.4 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    scale = min(int(math.log10(count) / 3), 3)
    return f"{count / 1000**scale:.1f} {('kB', 'MB', 'GB')[scale - 1]}"


def when(unix_ms: int) -> str:
    """A time as people read it, local; ``-`` for none."""
    if not unix_ms:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_ms / 1000))
