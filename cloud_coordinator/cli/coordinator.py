"""`fleetfed coordinator`: set up and run the coordinator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.control.errors import CommandFailedError
from fleetfed.shared.errors import StorageError
from fleetfed.shared.telemetry import FORMATS, LEVELS

TEMPLATE = """\
# Settings of the FleetFed coordinator. Relative paths begin at this file's folder. What is commented out shows the
# default, or an example.

identity = "{identity}"        # made by `fleetfed keys init` or `keys issue`
state = "state"                # the database, model files and status.json
# autostart = false            # true: rounds run from the first start on, without `fleetfed round start`
# log_level = "INFO"

[broker]
host = "{host}"
port = {port}

# Published as version 1 where there is no model yet: `fleetfed model build` makes both files.
[model]
file = "{model}"               # its card stands beside it with the suffix .card

# What every version is evaluated on; without it the devices' own held-out examples count.
# [validation]
# path = "validation.npz"

[rounds]
rounds = 20                    # versions to make; 0 for no limit
# target_accuracy = 0.95       # stop there
# interval = 0.0               # seconds between two rounds
start_when = 1                 # devices that must be ready before a round opens
# fraction = 1.0               # part of the devices in each round
# minimum_examples = 1
# labels = {{ ward = "3" }}      # only devices that carry these labels
# quorum_fraction = 1.0        # part of the expected devices that closes a gateway's round
# quorum_minimum = 1           # fewest devices for a new version
deadline = 600.0               # seconds until gateways close a round
expires = 900.0                # seconds until the coordinator closes it
# weighting = "examples"       # or "uniform"
# mode = "split"               # sums of updates that no gateway can read; default "plain"
# minimum_cohort = 5           # fewest devices in such a sum
# update_bytes = 100_000       # most of a masked update; goes with few bits in [clips] and momentum in [optimizer]

[rounds.training]
epochs = 1
optimizer = "sgd"              # or "adam"
learning_rate = 0.05
# momentum = 0.9
# proximal = 0.0               # FedProx

# [optimizer]
# name = "momentum"            # of the mean update, on the server; default "fedavg", which takes it as it is
# beta1 = 0.5

# [clips]
# bits = 4                     # of one coordinate of an update
# [patch]
# bits = 4                     # of one weight's difference on the way down
# [monitoring]
# listen = "127.0.0.1:9464"    # /metrics, /healthz and /readyz for Prometheus; default: nowhere
# [storage]
# database = "postgresql+psycopg://fleetfed@db/fleetfed"   # default: SQLite in the state folder
"""


@click.group(epilog=output.example("fleetfed coordinator init --host mqtt.example.org", "fleetfed coordinator run"))
def coordinator() -> None:
    """Set up and run the coordinator."""


_config = click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("coordinator.toml"),
    show_default=True,
    help="Its settings.",
)


@coordinator.command(epilog=output.example("fleetfed coordinator init --host mqtt.example.org --model digits.tflite"))
@_config
@click.option("--identity", default="keys/identities/coordinator", show_default=True, help="Its identity folder.")
@click.option("--host", default="localhost", show_default=True, help="The broker.")
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True)
@click.option("--model", default="models/digits.tflite", show_default=True, help="The first model.")
@output.json_option
def init(config: Path, identity: str, host: str, port: int, model: str, as_json: bool) -> None:
    """Write a commented coordinator.toml to start from, and an operator.toml beside it."""
    from fleetfed.cloud_coordinator.config import CoordinatorConfig

    operator = config.with_name("operator.toml")
    if config.exists():
        raise CommandFailedError(f"{config} exists; it is not overwritten")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(TEMPLATE.format(identity=identity, host=host, port=port, model=model))
    CoordinatorConfig.load(config)
    files = [config]
    if not operator.exists():
        member = Path(identity).with_name("operator")
        operator.write_text(
            f'# What `fleetfed round`, `model` and `fleet` read.\nidentity = "{member}"\n\n'
            f'[broker]\nhost = "{host}"\nport = {port}\n'
        )
        files.append(operator)
    if as_json:
        output.print_json({"files": files})
        return
    for path in files:
        print(path)
    print(f"\nNext: edit {config}, then: fleetfed coordinator run --config {config}")


@coordinator.command(epilog=output.example("fleetfed coordinator run --config coordinator.toml"))
@_config
@click.option("--log-level", type=click.Choice(LEVELS), help="Instead of the file's.")
@click.option("--log-format", type=click.Choice(FORMATS), help="Instead of the file's.")
def run(config: Path, log_level: str | None, log_format: str | None) -> int:
    """Run the coordinator until SIGTERM or Ctrl-C; a later start goes on where it stopped."""
    from fleetfed.cloud_coordinator.config import CoordinatorConfig
    from fleetfed.cloud_coordinator.runtime import run_coordinator
    from fleetfed.shared.telemetry import configure_logging

    settings = CoordinatorConfig.load(config)
    configure_logging("coordinator", log_level or settings.log_level, log_format=log_format or settings.log_format)
    return asyncio.run(run_coordinator(settings))


@coordinator.command(
    epilog=output.example("fleetfed coordinator status --json", "fleetfed coordinator status --healthy")
)
@_config
@click.option("--healthy", is_flag=True, help="Exit 0 if it runs and is connected, else 1 and say why.")
@output.json_option
def status(config: Path, healthy: bool, as_json: bool) -> int:
    """Show what the coordinator last wrote about itself; `fleetfed round status` asks the running one."""
    from fleetfed.cloud_coordinator.config import CoordinatorConfig
    from fleetfed.shared import health
    from fleetfed.shared.clock import unix_ms

    path = CoordinatorConfig.load(config).state / "status.json"

    def read() -> dict[str, Any]:
        return health.read(path, written="when the coordinator starts", damaged=StorageError)

    if healthy:
        return health.report(read, now=unix_ms())
    table = read()
    if as_json:
        output.print_json(table)
        return 0
    width = max(map(len, table))
    for name, item in sorted(table.items()):
        pairs = ", ".join(f"{key} {value}" for key, value in item.items()) if isinstance(item, dict) else item
        print(f"{name:<{width}}  {'none' if pairs == '' else pairs}")
    return 0
