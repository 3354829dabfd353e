"""The vectors in `wire.json`, four ways: our encoder, our decoder, a second decoder, and the length."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageKind, open_body, parse_head
from fleetfed.shared.wire.update import UpdateExtension

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


second_decoder, make_wire = _load("second_decoder"), _load("make_wire")
STORED: dict[str, Any] = json.loads((HERE / "wire.json").read_text())
AUTHORITY = bytes.fromhex(STORED["authority"])
NAMES = list(make_wire.EXAMPLES)


def stored(name: str) -> bytes:
    return bytes.fromhex(STORED["messages"][name])


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, _, _ in make_wire.EXAMPLES.values()} == set(MessageKind)
    assert list(STORED["messages"]) == NAMES


def plain(value: Any) -> Any:
    """A dataclass as the second decoder would see it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", NAMES)
def test_our_encoder_still_makes_these_bytes(name: str) -> None:
    # zstd promises the same frame only for the same library version, so compressed bodies are compared opened.
    made, kept = bytes.fromhex(make_wire.make()["messages"][name]), stored(name)
    head, old = parse_head(made), parse_head(kept)
    if not head.header.compressed:
        assert made == kept
    assert open_body(head.header, made[head.size :]) == open_body(old.header, kept[old.size :])


@pytest.mark.parametrize("name", NAMES)
def test_our_decoder_reads_them_and_encodes_the_same_bytes_again(name: str) -> None:
    data = stored(name)
    head = parse_head(data)
    assert len(data) == head.message_size
    assert head.header.encode() == data[: len(head.header.encode())]
    assert head.encode() == data[: head.size]
    kind, _, body = make_wire.EXAMPLES[name]
    if kind is MessageKind.UPDATE:
        extension = UpdateExtension.decode(head)
        assert extension.encode() == head.extension
        assert [box[:1] for box in extension.boxes] == ([b"G", b"C", b"H"] if name == "update_split" else [])
    else:
        raw = open_body(head.header, data[head.size :])
        decoded = codec.decode(type(body), raw, limit=len(raw))
        assert decoded == body
        assert codec.encode(decoded) == raw


@pytest.mark.parametrize("name", NAMES)
def test_a_second_decoder_reads_the_same(name: str) -> None:
    seen = second_decoder.message(stored(name), AUTHORITY)
    kind, role, body = make_wire.EXAMPLES[name]
    assert seen["body"] == plain(body)
    assert (seen["kind"], seen["round"], seen["sequence"]) == (kind.name.lower(), 4, 100)
    assert seen["from"]["role"] == role.name.lower()
    assert seen["from"]["fleet"] == "vectors"
    head = parse_head(stored(name))
    assert seen["head_hash"] == head.hash
    assert seen["message_id"] == head.header.message_id
    if kind is MessageKind.UPDATE:
        extension = UpdateExtension.decode(head)
        assert seen["extension"] == plain(extension)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_decoder_refuses_what_was_changed(name: str) -> None:
    data = bytearray(stored(name))
    data[44] ^= 1
    with pytest.raises(second_decoder.InvalidSignature):
        second_decoder.message(bytes(data), AUTHORITY)
