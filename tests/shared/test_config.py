from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest

from fleetfed.shared.config import Length, Range, build, load
from fleetfed.shared.errors import ConfigError


class Mode(StrEnum):
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True, kw_only=True)
class Broker:
    host: str
    port: Annotated[int, Range(1, 65535)] = 8883


@dataclass(frozen=True, kw_only=True)
class Sample:
    broker: Broker
    data: Path = Path("data")
    mode: Mode = Mode.FAST
    rate: float = 1.0
    tags: Annotated[tuple[str, ...], Length(0, 2)] = ()
    labels: dict[str, str] = field(default_factory=dict)
    wait: float | None = None
    on: bool = True


def test_a_file_becomes_a_dataclass_and_paths_begin_at_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text(
        'data = "here"\nmode = "slow"\nrate = 2\ntags = ["a"]\nwait = 3\n[broker]\nhost = "h"\n[labels]\nk = "v"\n'
    )
    assert load(Sample, file) == Sample(
        broker=Broker(host="h"),
        data=tmp_path / "here",
        mode=Mode.SLOW,
        rate=2.0,
        tags=("a",),
        labels={"k": "v"},
        wait=3.0,
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "x.toml: broker: is missing"),
        ({"broker": {"hots": "h"}}, "x.toml: broker.hots: no such setting; did you mean 'host'?"),
        ({"broker": {"host": "h", "zzz": 1}}, "broker.zzz: no such setting; known here: host, port"),
        ({"broker": {"host": 1}}, "broker.host: expected str, found int"),
        ({"broker": {"host": "h", "port": 0}}, "broker.port: 0 is not between 1 and 65535"),
        ({"broker": {"host": "h", "port": True}}, "broker.port: expected int, found bool"),
        ({"broker": "h"}, "broker: expected a table"),
        ({"broker": {"host": "h"}, "mode": "quick"}, "mode: 'quick' is none of: fast, slow"),
        ({"broker": {"host": "h"}, "tags": ["a", "b", "c"]}, "tags: its length 3 is not between 0 and 2"),
        ({"broker": {"host": "h"}, "tags": ["a", 1]}, "tags.1: expected str, found int"),
        ({"broker": {"host": "h"}, "rate": float("nan")}, "rate: nan is not a finite number"),
        ({"broker": {"host": "h"}, "data": ""}, "data: expected a path"),
        ({"broker": {"host": "h"}, "wait": "soon"}, "wait: expected float, found str"),
    ],
)
def test_every_error_names_file_key_and_cure(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Sample, table, where="x.toml")
    assert message in str(caught.value)


def test_a_missing_or_broken_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(Sample, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load(Sample, tmp_path / "bad.toml")
