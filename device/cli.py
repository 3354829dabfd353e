"""``fleetfed-device``: run a device, check its settings, show its status.

Exit codes: 0 for success, 2 for settings that are wrong, 3 for damaged state, 1 for anything else.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetfed.device import cli_enroll, memory
from fleetfed.shared.errors import ConfigError, FleetFedError, StorageError
from fleetfed.shared.telemetry import FORMATS, LEVELS, configure_logging, name_logs

if TYPE_CHECKING:
    from fleetfed.device.config import DeviceConfig
    from fleetfed.shared.trust.identity import Identity

_log = logging.getLogger(__name__)

_EXAMPLE: Final = """example:
  fleetfed-device check --config device.toml
  fleetfed-device run --config device.toml
  fleetfed-device status --config device.toml --healthy

device.toml:
  identity = "identity"            # folder from `fleetfed keys issue`
  state = "state"                  # must outlive the process
  [broker]
  host = "broker.example.org"
  [data]
  path = "data.npz"                # arrays x and y; or a .csv, an IDX file with labels, or function = "module:name"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigError as error:
        print(f"fleetfed-device: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"fleetfed-device: {error}", file=sys.stderr)
        return 3
    except (FleetFedError, OSError) as error:
        print(f"fleetfed-device: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fleetfed-device",
        description="Trains the fleet's model on this device's own data and sends only what was learned.",
        epilog=_EXAMPLE,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="connect and take part in rounds until SIGTERM",
        epilog="example: fleetfed-device run --config device.toml",
        formatter_class=formatter,
    )
    run.add_argument("--log-level", choices=LEVELS, help="overrides [run] log_level")
    run.add_argument("--log-format", choices=FORMATS, help="overrides [run] log_format")
    check = commands.add_parser(
        "check",
        help="load settings, identity and data; train one step on the current model and say what would be sent",
        epilog="example: fleetfed-device check --config device.toml",
        formatter_class=formatter,
    )
    status = commands.add_parser(
        "status",
        help="show what the device wrote last",
        epilog="example: fleetfed-device status --config device.toml --json",
        formatter_class=formatter,
    )
    status.add_argument("--json", action="store_true", help="the whole status as JSON")
    status.add_argument("--healthy", action="store_true", help="exit 0 if it runs and is connected, else 1 and why")
    for command, function in ((run, _run), (check, _check), (status, _status)):
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="device.toml")
        command.set_defaults(command=function)
    cli_enroll.add_commands(commands, formatter)
    return parser


def _load(options: argparse.Namespace) -> tuple[DeviceConfig, Identity]:
    memory.settle_in()
    # Sensors, processing functions and trainers may lie beside the settings.
    sys.path.insert(0, str(options.config.resolve().parent))
    from fleetfed.device import config
    from fleetfed.shared.trust.certificates import Role
    from fleetfed.shared.trust.identity import Identity

    settings = config.load(options.config)
    return settings, Identity.load(settings.identity, role=Role.DEVICE)


def _run(options: argparse.Namespace) -> int:
    settings, identity = _load(options)
    log_format = options.log_format or settings.run.log_format
    configure_logging("device", options.log_level or settings.run.log_level, log_format=log_format)
    name_logs(identity.certificate.id, identity.certificate.site)
    from fleetfed.device.runtime import DeviceRuntime
    from fleetfed.device.store import Store
    from fleetfed.device.trainer import make_trainer
    from fleetfed.shared.version import software

    trainer = make_trainer(settings)
    # Before any thread exists, so that all of them leave these signals to the one that waits for them.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    runtime = DeviceRuntime(settings, identity, Store(settings.state), trainer, software=software("device"))

    def wait_for_signal() -> None:
        signal.sigwait(signals)
        runtime.request_stop()

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    runtime.run()
    return 0


def _check(options: argparse.Namespace) -> int:
    settings, identity = _load(options)
    configure_logging("device", "warning")
    from fleetfed.device.check import check

    for line in check(settings, identity):
        print(line)
    return 0


def _status(options: argparse.Namespace) -> int:
    from fleetfed.device import config

    path = config.load(options.config).state / "status.json"
    if options.healthy:
        return _healthy(path)
    text = _read(path)
    if options.json:
        sys.stdout.write(text)
        return 0
    try:
        status = json.loads(text)
        print("\n".join(_status_lines(status)))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: damaged: {error}; the device writes it anew when something changes") from error
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no status; has the device run?") from None


def _healthy(path: Path) -> int:
    from fleetfed.device.status import OLD
    from fleetfed.shared import health
    from fleetfed.shared.clock import unix_ms

    def read() -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads(_read(path))
            # A device at rest spares its disk and only touches the file.
            return status | {"updated": max(status["updated"], int(path.stat().st_mtime * 1000))}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: damaged: {error}") from error

    return health.report(read, now=unix_ms(), old=OLD)


def _status_lines(status: dict[str, Any]) -> list[str]:
    from fleetfed.device.status import privacy_line

    wire = status["wire"]
    model = f"version {status['model_version']}, {status['model_sha256'][:12]}" if status["model_version"] else "none"
    lines = [
        f"device     {status['id']} ({status['software']}, pid {status['pid']})",
        f"state      {status['state']}",
        f"model      {model}",
        f"traffic    {wire['sent']} bytes sent, {wire['received']} received",
        f"memory     {status['rss_mb_max']} MB at most",
        f"privacy    {privacy_line(status.get('privacy', {}))}",
        f"trust      {_trust(status.get('trust', {}), status.get('updated', 0))}",
        f"refused    {', '.join(f'{k} {v}' for k, v in status['rejected'].items()) or 'nothing'}",
    ]
    for row in status["rounds"][-10:]:
        seconds = max(row["train_ended"] - row["train_started"], 0) / 1000
        lines.append(
            f"round {row['round']:<5} {row['outcome']}, {row['steps']} steps in {seconds:.1f} s, "
            f"loss {row['loss']:.4f}, {row['update_bytes']} bytes"
        )
        if row.get("detail"):
            lines.append(f"           {row['detail']}")
    return lines


def _trust(trust: dict[str, Any], now: int) -> str:
    """What the trust metadata says of itself."""
    if not trust:
        return "certificates alone; this fleet has no trust metadata"
    hours = (trust["expires"] - now) / 3_600_000
    current = "NOT CURRENT: no update is made" if trust["stale"] else f"current for {hours:.1f} hours"
    return "; ".join([f"policy {trust['policy']}, {current}", *trust["warnings"]])


if __name__ == "__main__":
    sys.exit(main())
