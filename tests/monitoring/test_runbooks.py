"""Every command that a runbook tells somebody to type exists, with its options; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from fleetfed.cloud_coordinator.cli import cli as fleetfed
from fleetfed.cloud_coordinator.enroll.cli import cli as enroll
from fleetfed.cloud_coordinator.helper.cli import _parser as helper
from fleetfed.device.cli import _parser as device
from fleetfed.gateway.cli import _parser as gateway

ROOT: Final = Path(__file__).resolve().parents[2]
RUNBOOKS: Final = sorted((ROOT / "docs/runbooks").glob("*.md"))
_PARSERS: Final = {"fleetfed-gateway": gateway, "fleetfed-device": device, "fleetfed-helper": helper}
_CLICKED: Final = {"fleetfed": fleetfed, "fleetfed-enroll": enroll}


def commands(text: str) -> Iterator[list[str]]:
    """What stands in code and begins with one of our programs."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```\n.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        words = shlex.split(line)
        if len(words) > 1 and (words[0] in _PARSERS or words[0] in _CLICKED):
            yield words


def check(words: list[str]) -> None:
    """Raise unless such a command would be understood as far as its settings are read."""
    program, *rest = words
    if program in _PARSERS:
        _PARSERS[program]().parse_args(rest)
        return
    command: click.Command = _CLICKED[program]
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{program} has no command {name}"
        command = found
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    unknown = [word for word in rest if word.startswith("-") and word not in known]
    assert not unknown, f"{' '.join(words)}: no option {unknown}"


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: str(path.stem))
def test_what_a_runbook_says_can_be_typed_and_followed(path: Path) -> None:
    text = path.read_text()
    for words in commands(text):
        check(words)
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / link).exists(), link


def test_a_command_that_is_not_there_is_found_out() -> None:
    with pytest.raises(AssertionError, match="no command"):
        check(["fleetfed", "round", "dance"])
    with pytest.raises(AssertionError, match="no option"):
        check(["fleetfed", "round", "status", "--loud"])
    with pytest.raises(SystemExit):
        check(["fleetfed-gateway", "status", "--config", "x", "--loud"])
