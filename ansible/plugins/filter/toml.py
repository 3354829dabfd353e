"""``to_toml``: what Ansible knows as a mapping, as the settings file of a FleetFed program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(value: Any) -> str:
    """The TOML of a mapping of texts, numbers, truths, lists and mappings; entries that are None are left out.

    Raises:
        ValueError: something that TOML cannot say.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"to_toml needs a mapping, not {type(value).__name__}")
    return "\n".join(_table(value, ())) + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    if path and not _only_tables(table):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for name, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{_key(name)} = {_scalar(value)}"
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _table(value, (*path, name))


def _only_tables(table: Mapping[str, Any]) -> bool:
    return bool(table) and all(isinstance(value, Mapping) for value in table.values())


def _key(name: Any) -> str:
    text = str(name)
    return text if _BARE.fullmatch(text) else _text(text)


def _text(value: str) -> str:
    # A text in JSON is one in TOML, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    # First: a truth is a number, too.
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {_scalar(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    raise ValueError(f"TOML has no {type(value).__name__}: {value!r}")


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"to_toml": to_toml}
