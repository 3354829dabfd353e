"""``fleetfed-gateway``: run a gateway, look at its status."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fleetfed.gateway.config import GatewayConfig, load
from fleetfed.gateway.status import read_status
from fleetfed.shared import health
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.files import locked
from fleetfed.shared.telemetry import FORMATS, LEVELS, configure_logging, name_logs
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity

_log = logging.getLogger(__name__)

OK: Final = 0
FAILED: Final = 1
BAD_CONFIG: Final = 2
BAD_STORAGE: Final = 3

_EPILOG: Final = """\
example:
  fleetfed-gateway run --config gateway.toml
  fleetfed-gateway status --config gateway.toml --json
  fleetfed-gateway status --config gateway.toml --healthy

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
        configure_logging("gateway", arguments.log_level or config.log_level, log_format=log_format)
        # Two processes with one journal and one sequence would promise in each other's name.
        with locked(config.state):
            return asyncio.run(_run(config))
    except ConfigError as error:
        print(f"fleetfed-gateway: {error}", file=sys.stderr)
        return BAD_CONFIG
    except StorageError as error:
        print(f"fleetfed-gateway: {error}", file=sys.stderr)
        return BAD_STORAGE
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleetfed-gateway",
        description="The regional gateway: adds the updates of its site into one partial.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until SIGTERM or SIGINT")
    run.add_argument("--config", type=Path, required=True, metavar="FILE", help="gateway.toml")
    run.add_argument("--log-level", choices=LEVELS, help="instead of the file's log_level")
    run.add_argument("--log-format", choices=FORMATS, help="instead of the file's log_format")
    status = commands.add_parser("status", help="what the gateway last wrote about itself")
    status.add_argument("--config", type=Path, required=True, metavar="FILE", help="gateway.toml")
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    status.add_argument("--healthy", action="store_true", help="exit 0 if it runs and is connected, else 1 and why")
    return parser


def _status(config: GatewayConfig, *, as_json: bool) -> int:
    table = read_status(config.state)
    if as_json:
        print(json.dumps(table, indent=2, sort_keys=True))
        return OK
    width = max(map(len, table))
    for key in sorted(table):
        print(f"{key:<{width}}  {_text(table[key])}")
    return OK


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return str(value)


async def _run(config: GatewayConfig) -> int:
    # Here, so that `--help` and `status` need no MQTT client.
    from fleetfed.gateway.runtime import Gateway

    identity = Identity.load(config.identity, role=Role.GATEWAY)
    name_logs(identity.certificate.id, identity.certificate.site)
    gateway = Gateway(config, identity)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, gateway.stop)
    try:
        await gateway.run()
    except* ConfigError as group:
        raise _first(group) from None
    except* StorageError as group:
        raise _first(group) from None
    except* OSError as group:
        # Connections handle their own: what is left is a disk that is full or broken under a chunk or a small file.
        raise StorageError(f"{config.state}: {_first(group)}") from None
    return OK


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
