"""msgpack and zstd with every size known before a byte is allocated; frozen dataclasses in, frozen dataclasses out.

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
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar

import msgpack
import zstandard

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


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value)}
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
    value = _build(cls, unpack(data, limit=limit), cls.__name__)
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


@cache
def _schema(cls: type) -> tuple[tuple[str, Any, bool], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(
        (
            field.name,
            hints[field.name],
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
    )


def _build(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *bounds = typing.get_args(hint)
        built = _build(inner, value, where)
        for bound in bounds:
            _check(bound, built, where)
        return built
    if origin is types.UnionType or origin is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (inner,) = (option for option in options if option is not type(None))
        return _build(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _malformed(f"{where}: not an array")
        inner, dots = typing.get_args(hint)
        assert dots is Ellipsis
        return tuple(_build(inner, item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise _malformed(f"{where}: not a map")
        key_hint, item_hint = typing.get_args(hint)
        return {_build(key_hint, k, where): _build(item_hint, v, where) for k, v in value.items()}
    return _leaf(hint, value, where)


def _leaf(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type", hint), value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError as error:
            raise _malformed(f"{where}: {value!r:.40} is no {hint.__name__}") from error
    if hint is float and type(value) is int:
        value = float(value)
    if hint is Any:
        return value
    # An exact type: a bool is an int to isinstance, and would pass for a count.
    if type(value) is not hint:
        raise _malformed(f"{where}: {type(value).__name__} where {hint.__name__} is expected")
    if hint is float and not math.isfinite(value):
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"{where}: {value}")
    return value


def _dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _malformed(f"{where}: not a map")
    fields = {}
    for name, hint, optional in _schema(cls):
        if name in value:
            fields[name] = _build(hint, value[name], f"{where}.{name}")
        elif not optional:
            raise _malformed(f"{where}.{name} is missing")
    return cls(**fields)


def _check(bound: Any, value: Any, where: str) -> None:
    if isinstance(bound, Range):
        if not bound.low <= value <= bound.high:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"{where}: {value}")
    elif isinstance(bound, Length):
        if not bound.low <= len(value) <= bound.high:
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"{where}: length {len(value)}")
    else:
        raise LocalProtocolError(f"{where}: unknown bound {bound!r}")


def compress(data: bytes, level: int = 3) -> bytes:
    """Compress with zstd; the frame carries its content size."""
    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data)


def decompress(data: bytes | memoryview, *, size: int) -> bytes:
    """Decompress one zstd frame that must hold exactly ``size`` bytes.

    The declared size is compared before anything is allocated, so a decompression bomb costs nothing.

    Raises:
        RemoteProtocolError: `DECOMPRESSION`.
    """
    try:
        if zstandard.frame_content_size(data) != size:
            raise RemoteProtocolError(RejectReason.DECOMPRESSION, f"the frame does not declare {size} bytes")
        # One call with the frame's own size allocates exactly `size` and no window beside it.
        raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, str(error)) from error
    if len(raw) != size:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, f"{len(raw)} of {size} bytes")
    return raw
