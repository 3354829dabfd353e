"""TOML files into frozen dataclasses: unknown keys are refused, and every error names the file, the key and the cure.

>>> @dataclass(frozen=True, kw_only=True)
... class Cup:
...     size: Annotated[int, Range(1, 5)] = 2
...     label: str = ""
>>> build(Cup, {"size": 9}, where="cup.toml")
Traceback (most recent call last):
fleetfed.shared.errors.ConfigError: cup.toml: size: 9 is not between 1 and 5
>>> build(Cup, {"sise": 3}, where="cup.toml")
Traceback (most recent call last):
fleetfed.shared.errors.ConfigError: cup.toml: sise: no such setting; did you mean 'size'?
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.codec import Length, Range

__all__ = ["Length", "Range", "build", "load"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in which file a value stands; the folder that relative paths begin at."""

    where: str
    key: str
    base: Path

    def into(self, key: str) -> _Place:
        return _Place(self.where, f"{self.key}.{key}" if self.key else key, self.base)

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self.key}: {text}" if self.key else f"{self.where}: {text}")


def load(cls: type[T], path: Path) -> T:
    """Read a TOML file as ``cls``; relative paths in it begin at the file's folder.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return build(cls, table, where=str(path), base=path.parent)


def build(cls: type[T], table: dict[str, Any], *, where: str, base: Path = Path()) -> T:
    """Build ``cls`` from a table.

    Args:
        cls: a dataclass; its annotations are the schema, `Range` and `Length` its bounds.
        table: parsed TOML.
        where: the file's name, for messages.
        base: the folder that relative `Path` values begin at.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    value = _dataclass(cls, table, _Place(where, "", base))
    assert isinstance(value, cls)
    return value


def _dataclass(cls: type, table: Any, place: _Place) -> Any:
    if not isinstance(table, dict):
        raise place.error("expected a table")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            import difflib  # only a mistake needs it

            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(fields)}"
            raise place.into(key).error(f"no such setting; {hint}")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], place.into(name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise place.into(name).error("is missing")
    try:
        return cls(**values)
    except ConfigError as error:
        raise place.error(str(error)) from error


def _value(hint: Any, value: Any, place: _Place) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *bounds = typing.get_args(hint)
        built = _value(inner, value, place)
        for bound in bounds:
            _check(bound, built, place)
        return built
    if origin in (types.UnionType, typing.Union):
        return _union(typing.get_args(hint), value, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise place.error("expected a list")
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, item, place.into(str(index))) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise place.error("expected a table")
        inner = typing.get_args(hint)[1]
        return {key: _value(inner, item, place.into(key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type", hint), value, place)
    return _scalar(hint, value, place)


def _union(options: tuple[Any, ...], value: Any, place: _Place) -> Any:
    """The first option that fits, in the order of the annotation."""
    error: ConfigError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _value(option, value, place)
        except ConfigError as caught:
            error = error or caught
    assert error is not None
    raise error


def _scalar(hint: Any, value: Any, place: _Place) -> Any:
    if hint is Path:
        if not isinstance(value, str) or not value:
            raise place.error("expected a path")
        return place.base / Path(value).expanduser()
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            names = ", ".join(str(member.value) for member in hint)
            raise place.error(f"{value!r} is none of: {names}") from None
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        value = float(value)
    # An exact type: TOML's booleans are ints to isinstance.
    if type(value) is not hint:
        raise place.error(f"expected {hint.__name__}, found {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise place.error(f"{value} is not a finite number")
    return value


def _check(bound: Any, value: Any, place: _Place) -> None:
    if isinstance(bound, Range) and not bound.low <= value <= bound.high:
        raise place.error(f"{value} is not between {bound.low:g} and {bound.high:g}")
    if isinstance(bound, Length) and not bound.low <= len(value) <= bound.high:
        raise place.error(f"its length {len(value)} is not between {bound.low} and {bound.high}")
