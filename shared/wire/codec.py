"""msgpack with every size known before a byte is allocated; frozen dataclasses in, frozen dataclasses out.

A message body is a msgpack map with one entry per dataclass field. `decode` either returns a value whose every
field has the annotated type and lies inside its bounds, or raises `RemoteProtocolError`; nothing else. Entries that
the dataclass does not know are ignored, so a newer peer may say more; a field with a default may be missing.

>>> @dataclass(frozen=True)
... class Greeting:
...     text: Annotated[str, Length(1, 20)]
...     times: Annotated[int, Range(1, 5)] = 1
>>> decode(Greeting, encode(Greeting("hello")), limit=100)
Greeting(text='hello', times=1)
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar

import msgpack

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Bound of a number, both ends allowed. NaN and infinity are never inside."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Length:
    """Bound of the length of a string (characters), bytes, tuple or dict, both ends allowed."""

    low: int
    high: int


def _malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(RejectReason.MALFORMED, detail)


def encode(value: Any) -> bytes:
    """Encode a dataclass as a msgpack map; equal values give equal bytes."""
    packed = msgpack.packb(_plain(value), use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


_ATOMS = frozenset({int, str, bytes, float, bool, type(None)})


@cache
def _field_names(cls: type) -> tuple[str, ...] | None:
    """Of a dataclass, else None. Cached: to ask `dataclasses` each time costs more than encoding does."""
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else None


def _plain(value: Any) -> Any:
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if kind is tuple or kind is list:
        return [_plain(item) for item in value]
    if kind is dict:
        return {key: _plain(value[key]) for key in sorted(value)}
    names = _field_names(kind)
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Enum):
        return value.value
    return value


def decode(cls: type[T], data: bytes | memoryview, *, limit: int) -> T:
    """Decode a msgpack map into the dataclass ``cls``.

    Args:
        cls: a dataclass whose annotations are the schema.
        data: the bytes; refused unread if longer than ``limit``.
        limit: bytes.

    Raises:
        RemoteProtocolError: `TOO_LARGE`, `MALFORMED` or `OUT_OF_RANGE`.
    """
    plain = unpack(data, limit=limit)
    try:
        value = _decoder(typing.cast("Any", cls))(plain)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.reason, f"{cls.__name__}{error.detail}") from error.__cause__
    assert isinstance(value, cls)
    return value


def unpack(data: bytes | memoryview, *, limit: int) -> Any:
    """Unpack msgpack within bounds.

    Raises:
        RemoteProtocolError: `TOO_LARGE` or `MALFORMED`.
    """
    if len(data) > limit:
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(data)} bytes, limit {limit}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=min(len(data), limits.MAX_SMALL_MESSAGE),
            max_bin_len=len(data),
            max_array_len=min(len(data), limits.MAX_MSGPACK_ITEMS),
            max_map_len=min(len(data), limits.MAX_MSGPACK_ITEMS),
            max_ext_len=0,
        )
    # msgpack's C and Python variants document no common set of errors for bad bytes: ValueError and its children for
    # structure, UnicodeDecodeError for text, TypeError for unhashable keys, RecursionError for deep nesting.
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _malformed(f"msgpack: {error}") from error


# Annotations are read once per type and become functions: reading them for every value took longer than everything else
# that a small message costs. A decoder's errors begin with the place below its own; each dataclass on the way up puts
# its field's name before it.
_Decoder = Callable[[Any], Any]


@cache
def _decoder(hint: Any) -> _Decoder:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *bounds = typing.get_args(hint)
        decoder = _decoder(inner)
        for bound in bounds:
            decoder = _bounded(decoder, bound)
        return decoder
    if origin is types.UnionType or origin is typing.Union:
        options = typing.get_args(hint)
        assert type(None) in options
        (inner,) = (option for option in options if option is not type(None))
        return _optional(_decoder(inner))
    if origin is tuple:
        inner, dots = typing.get_args(hint)
        assert dots is Ellipsis
        return _array(_decoder(inner))
    if origin is dict:
        key_hint, item_hint = typing.get_args(hint)
        return _map(_decoder(key_hint), _decoder(item_hint))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(hint)
    if hint is Any:
        return lambda value: value
    return _number if hint is float else _exact(hint)


def _bounded(decoder: _Decoder, bound: Any) -> _Decoder:
    if not isinstance(bound, Range | Length):
        raise LocalProtocolError(f"unknown bound {bound!r}")
    low, high = bound.low, bound.high

    def ranged(value: Any) -> Any:
        built = decoder(value)
        if not low <= built <= high:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f": {built}")
        return built

    def sized(value: Any) -> Any:
        built = decoder(value)
        if not low <= len(built) <= high:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f": length {len(built)}")
        return built

    return ranged if isinstance(bound, Range) else sized


def _optional(decoder: _Decoder) -> _Decoder:
    return lambda value: None if value is None else decoder(value)


def _array(decoder: _Decoder) -> _Decoder:
    def array(value: Any) -> Any:
        if type(value) is not list:
            raise _malformed(": not an array")
        return tuple([decoder(item) for item in value])

    return array


def _map(key: _Decoder, item: _Decoder) -> _Decoder:
    def table(value: Any) -> Any:
        if type(value) is not dict:
            raise _malformed(": not a map")
        return {key(k): item(v) for k, v in value.items()}

    return table


def _record(cls: type) -> _Decoder:
    hints = typing.get_type_hints(cls, include_extras=True)
    schema = tuple(
        (
            field.name,
            _decoder(hints[field.name]),
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
    )

    def record(value: Any) -> Any:
        if type(value) is not dict:
            raise _malformed(": not a map")
        fields = {}
        for name, decoder, optional in schema:
            if name in value:
                try:
                    fields[name] = decoder(value[name])
                except RemoteProtocolError as error:
                    raise RemoteProtocolError(error.reason, f".{name}{error.detail}") from error.__cause__
            elif not optional:
                raise _malformed(f".{name} is missing")
        return cls(**fields)

    return record


def _member(cls: type[Enum]) -> _Decoder:
    def member(value: Any) -> Any:
        try:
            return cls(value)
        except ValueError as error:
            raise _malformed(f": {value!r:.40} is no {cls.__name__}") from error

    return member


def _number(value: Any) -> Any:
    if type(value) is int:
        value = float(value)
    if type(value) is not float:
        raise _malformed(f": {type(value).__name__} where float is expected")
    if not math.isfinite(value):
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f": {value}")
    return value


def _exact(hint: type) -> _Decoder:
    # An exact type: a bool is an int to isinstance, and would pass for a count.
    def exact(value: Any) -> Any:
        if type(value) is not hint:
            raise _malformed(f": {type(value).__name__} where {hint.__name__} is expected")
        return value

    return exact
