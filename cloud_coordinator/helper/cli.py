"""``fleetfed-helper``: run a helper, look at its status."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator.helper.config import HelperConfig, load
from fleetfed.cloud_coordinator.helper.status import read_status
from fleetfed.shared import health
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.files import locked
from fleetfed.shared.telemetry import FORMATS, LEVELS, configure_logging, name_logs
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity

OK: Final = 0
BAD_CONFIG: Final = 2
BAD_STORAGE: Final = 3

_EPILOG: Final = """\
example:
  fleetfed keys issue h-two --role helper
  fleetfed-helper run --config helper.toml
  fleetfed-helper status --config helper.toml --json
  fleetfed-helper status --config helper.toml --healthy

  with helper.toml:
    identity = "identities/h-two"
    state = "state"
    [broker]
    host = "broker.example.org"

exit codes:
  0 stopped in good order   1 failed   2 configuration error   3 the state folder is damaged or the disk is full
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        config = load(arguments.config)
        if arguments.command == "status":
            if arguments.healthy:
                return health.report(lambda: read_status(config.state), now=unix_ms())
            return _status(config, as_json=arguments.json)
        log_format = arguments.log_format or config.log_format
        configure_logging("helper", arguments.log_level or config.log_level, log_format=log_format)
        # Two processes with one folder would answer twice in each other's name.
        with locked(config.state):
            return asyncio.run(_run(config))
    except ConfigError as error:
        print(f"fleetfed-helper: {error}", file=sys.stderr)
        return BAD_CONFIG
    except StorageError as error:
        print(f"fleetfed-helper: {error}", file=sys.stderr)
        return BAD_STORAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleetfed-helper",
        description="The second holder of mask seeds: with it, gateway and coordinator together read no update either. "
        "Let somebody else run it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until SIGTERM or SIGINT")
    run.add_argument("--config", type=Path, required=True, metavar="FILE", help="helper.toml")
    run.add_argument("--log-level", choices=LEVELS, help="instead of the file's log_level")
    run.add_argument("--log-format", choices=FORMATS, help="instead of the file's log_format")
    status = commands.add_parser("status", help="what the helper last wrote about itself")
    status.add_argument("--config", type=Path, required=True, metavar="FILE", help="helper.toml")
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    status.add_argument("--healthy", action="store_true", help="exit 0 if it runs and is connected, else 1 and why")
    return parser


def _status(config: HelperConfig, *, as_json: bool) -> int:
    table = read_status(config.state)
    if as_json:
        print(json.dumps(table, indent=2, sort_keys=True))
        return OK
    width = max(map(len, table))
    for key in sorted(table):
        item = table[key]
        text = (
            ", ".join(f"{name} {value}" for name, value in item.items()) or "none" if isinstance(item, dict) else item
        )
        print(f"{key:<{width}}  {text}")
    return OK


async def _run(config: HelperConfig) -> int:
    # Here, so that `--help` needs no MQTT client.
    from fleetfed.cloud_coordinator.helper.runtime import Helper

    identity = Identity.load(config.identity, role=Role.HELPER)
    name_logs(identity.certificate.id, identity.certificate.site)
    helper = Helper(config, identity)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, helper.stop)
    try:
        await helper.run()
    except* (ConfigError, StorageError) as group:
        raise _first(group) from None
    except* OSError as group:
        raise StorageError(f"{config.state}: {_first(group)}") from None
    return OK


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
