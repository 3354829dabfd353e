"""The root command: finds the groups, turns every failure into one message and an exit code."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Final

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.shared.errors import FleetFedError
from fleetfed.shared.version import VERSION

_COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("fleetfed.cloud_coordinator.cli.demo:demo", "Run a whole fleet on this machine and watch it learn."),
    "coordinator": ("fleetfed.cloud_coordinator.cli.coordinator:coordinator", "Set up and run the coordinator."),
    "round": ("fleetfed.cloud_coordinator.cli.round:round_", "Start, stop and watch rounds."),
    "model": ("fleetfed.cloud_coordinator.cli.model:model", "Build, publish and roll back models."),
    "fleet": ("fleetfed.cloud_coordinator.cli.fleet:fleet", "See gateways and devices."),
    "privacy": ("fleetfed.cloud_coordinator.cli.privacy:privacy", "Plan and explain differential privacy."),
    "keys": ("fleetfed.cloud_coordinator.cli.keys:keys", "Make, list and revoke identities."),
    "broker": ("fleetfed.cloud_coordinator.cli.broker:broker", "Run the embedded broker, or configure Mosquitto."),
}
"""Name to (where it is, what it is for): `fleetfed --help` imports none of them."""


class _Groups(click.Group):
    """Imports a command when it is asked for, so that each starts without the others' libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(
    cls=_Groups,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=output.example("fleetfed demo --devices 10 --gateways 2")
    + "\n\nExit codes: 0 done, 1 failed, 2 wrong option or configuration, 3 damaged store, 4 no answer, 5 refused.",
)
@click.version_option(VERSION, prog_name="fleetfed")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens below the surface to stderr.")
def cli(verbose: bool) -> None:
    """Federated learning for fleets of IoT devices."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code; see the package for the codes."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None, *, command: click.Command = cli, program: str = "fleetfed") -> int:
    """Run a command line; return the exit code."""
    try:
        result = command.main(args=arguments, prog_name=program, standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if output.json_wanted(arguments):
            output.print_json({"error": "usage", "detail": error.format_message()})
        else:
            error.show()
        return output.EXIT_CONFIG if isinstance(error, click.UsageError | click.FileError) else output.EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return output.EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stderr.close()
        return 0
    except FleetFedError as error:
        label, code = output.classify(error)
        return _failed(program, label, str(error), code, arguments)
    except OSError as error:
        # The disk, a port, a permission: it names the file and the cause, and a traceback would add nothing.
        return _failed(program, "os_error", str(error), output.EXIT_FAILED, arguments)
    return result if isinstance(result, int) else 0


def _failed(program: str, label: str, detail: str, code: int, arguments: Sequence[str] | None) -> int:
    if output.json_wanted(arguments):
        output.print_json({"error": label, "detail": detail})
    else:
        print(f"{program}: {detail}", file=sys.stderr)
    return code
