"""The embedded broker as a process of its own, and its command line.

``python -m fleetfed.broker run --config broker.toml`` prints ``listening on HOST:PORT`` when it is ready, reads its
ACL, certificates and revocation list again on SIGHUP, and stops gracefully on SIGTERM.
``python -m fleetfed.broker render --inventory inventory.toml --config broker.toml --directory out`` writes the ACL
and Mosquitto's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fleetfed.broker.config import BrokerConfig, load_config
from fleetfed.broker.embedded import EmbeddedBroker, tune_process
from fleetfed.broker.monitoring import BrokerView
from fleetfed.broker.mosquitto import find_mosquitto, probe
from fleetfed.broker.render import load_inventory, render
from fleetfed.shared.errors import ConfigError, FleetFedError
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.systemd import Notifier, beat
from fleetfed.shared.telemetry import FORMATS, configure_logging

_LOG = logging.getLogger(__name__)


def run_broker(config: BrokerConfig) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        the exit status, 0.

    Raises:
        ConfigError: a file is wrong, or the address cannot be listened on.
        StorageError: the durable state cannot be used, or could not be written any more.
    """
    return asyncio.run(_serve(config))


async def _serve(config: BrokerConfig) -> int:
    if config.bridge is not None:
        raise ConfigError("[bridge] needs Mosquitto: the embedded broker has no way to another one")
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    hangup = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    broker = EmbeddedBroker(config)
    await broker.start()
    try:
        monitoring = MonitoringServer(config.monitoring, BrokerView(broker, config))
    except BaseException:
        await broker.stop()
        raise
    tune_process()
    print(f"listening on {config.host}:{broker.port}", flush=True)
    if broker.plain_port is not None:
        print(f"plain listener on 127.0.0.1:{broker.plain_port}", flush=True)
    reloader = asyncio.create_task(_reload(broker, hangup), name="broker-reload")
    failure = asyncio.create_task(broker.failed.wait(), name="broker-failure")
    stop = asyncio.create_task(stopped.wait(), name="broker-stop")
    notifier = Notifier()
    life = asyncio.create_task(beat(notifier), name="broker-systemd")
    notifier.ready(f"listening on {config.host}:{broker.port}")
    try:
        await asyncio.wait((failure, stop), return_when=asyncio.FIRST_COMPLETED)
    finally:
        notifier.stopping()
        for task in (reloader, failure, stop, life):
            task.cancel()
        monitoring.close()
        await broker.stop()
    if broker.failure is not None:
        raise broker.failure
    return 0


async def _reload(broker: EmbeddedBroker, hangup: asyncio.Event) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await broker.reload()
        except FleetFedError as error:
            # Whoever broke the file is told, and the fleet goes on under the rules that it had.
            _LOG.error("nothing reloaded: %s", error)
        else:
            _LOG.info("reloaded")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for a mistake that the person at the keyboard can mend."""
    parser = argparse.ArgumentParser(prog="python -m fleetfed.broker", description="The fleet's MQTT broker.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the embedded broker")
    run.add_argument("--config", type=Path, required=True, help="broker.toml")
    run.add_argument("--log-format", choices=FORMATS, default=FORMATS[0], help="of stderr")
    make = commands.add_parser("render", help="write the ACL and mosquitto.conf")
    make.add_argument("--inventory", type=Path, required=True, help="inventory.toml")
    make.add_argument("--config", type=Path, required=True, help="broker.toml")
    make.add_argument("--directory", type=Path, required=True, help="where the files go")
    options = parser.parse_args(arguments)
    configure_logging("broker", log_format=getattr(options, "log_format", FORMATS[0]))
    try:
        config = load_config(options.config)
        if options.command == "run":
            return run_broker(config)
        inventory = load_inventory(options.inventory)
        if find_mosquitto() is not None:
            written = render(inventory, config, options.directory, version=probe())
        else:
            written = render(inventory, config, options.directory)
        for path in written:
            print(path)
    except FleetFedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
