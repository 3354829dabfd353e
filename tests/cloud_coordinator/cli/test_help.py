"""Every command says how it is called, and finds its modules."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from fleetfed.cloud_coordinator.cli.app import cli


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, (*path, name))


ALL = dict(commands(cli))
LEAVES = [path for path, command in ALL.items() if not isinstance(command, click.Group)]


def test_the_commands_are_those_of_the_manual() -> None:
    assert {path[0] for path in LEAVES} == {
        "demo",
        "coordinator",
        "round",
        "model",
        "fleet",
        "privacy",
        "keys",
        "broker",
    }
    wanted = {
        "round": {"start", "pause", "resume", "abort", "status", "watch"},
        "model": {"build", "publish", "list", "show", "rollback", "export"},
        "fleet": {"list", "show", "quarantine", "release"},
        "privacy": {"plan", "explain"},
        "keys": {"init", "issue", "revoke", "list", "crl", "policy", "sign", "renew", "rotate", "publish", "status"},
        "coordinator": {"init", "run", "status"},
        "broker": {"run", "render"},
    }
    assert {group: {path[1] for path in LEAVES if path[0] == group} for group in wanted} == wanted


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "fleetfed")
def test_help_has_an_example_that_names_the_command(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    _, found, example = result.output.partition("Example:\n")
    assert found
    assert "fleetfed " + " ".join(path) in example


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_speaks_json_but_those_that_run_for_ever(path: tuple[str, ...]) -> None:
    options = {name for parameter in ALL[path].params for name in parameter.opts}
    assert ("--json" in options) == (path[-1] != "run")


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_examples_name_options_that_exist(path: tuple[str, ...]) -> None:
    options = {name for parameter in ALL[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    for line in (ALL[path].epilog or "").splitlines():
        if line.strip().startswith("fleetfed " + " ".join(path)):
            call = line.partition("|")[0]
            assert {word for word in call.split() if word.startswith("--")} <= options
