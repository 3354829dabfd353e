"""`fleetfed broker`: run the embedded broker, or write what another one needs in its place."""

from __future__ import annotations

from pathlib import Path

import click

from fleetfed.broker.config import BrokerConfig, load_config
from fleetfed.broker.engines import Engine, render_rights
from fleetfed.broker.mosquitto import find_mosquitto, probe
from fleetfed.broker.render import Inventory, load_inventory, render
from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.telemetry import FORMATS, configure_logging


@click.group(epilog=output.example("fleetfed broker run --config broker.toml"))
def broker() -> None:
    """Run the embedded broker, or configure another one."""


@broker.command(epilog=output.example("fleetfed broker run --config broker.toml"))
@click.option(
    "--config", "-c", type=click.Path(path_type=Path, dir_okay=False), default=Path("broker.toml"), show_default=True
)
@click.option("--log-format", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True)
def run(config: Path, log_format: str) -> int:
    """Run the embedded broker until SIGTERM or Ctrl-C; SIGHUP reads its files again.

    It is meant for the demo, for tests and for a small site; use Mosquitto for more.
    """
    from fleetfed.broker.service import run_broker

    configure_logging("broker", log_format=log_format)
    return run_broker(load_config(config))


@broker.command(
    name="render",
    epilog=output.example(
        "fleetfed broker render --keys keys --identity keys/identities/broker --out /etc/mosquitto/fleetfed",
        "fleetfed broker render --keys keys --site north --config north.toml --out north",
        "fleetfed broker render --inventory inventory.toml --config broker.toml --out out",
        "fleetfed broker render --for nats --keys keys --out /etc/nats",
    ),
)
@click.option("--keys", type=click.Path(path_type=Path, file_okay=False), help="Take the members from a key folder.")
@click.option("--inventory", type=click.Path(path_type=Path, dir_okay=False), help="… or from an inventory.toml.")
@click.option(
    "--for",
    "engine",
    type=click.Choice([str(each) for each in Engine]),
    default=str(Engine.MOSQUITTO),
    show_default=True,
    help="Whose files; for RabbitMQ and NATS these are the users and their rights alone.",
)
@click.option("--site", "sites", multiple=True, help="Only these sites are on this broker (with --keys).")
@click.option("--open", "open_devices", is_flag=True, help="List no devices: any certified one may connect.")
@click.option(
    "--config", "-c", type=click.Path(path_type=Path, dir_okay=False), help="broker.toml: address, limits, [bridge]."
)
@click.option("--identity", type=click.Path(path_type=Path, file_okay=False), help="… or the broker's identity folder.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on (with --identity).")  # noqa: S104
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the files go.")
@click.option("--at", type=click.Path(path_type=Path), help="Where the broker finds them, if that is elsewhere.")
@output.json_option
def render_(
    keys: Path | None,
    inventory: Path | None,
    engine: str,
    sites: tuple[str, ...],
    open_devices: bool,
    config: Path | None,
    identity: Path | None,
    host: str,
    port: int,
    out: Path,
    at: Path | None,
    as_json: bool,
) -> None:
    """Write the access list and mosquitto.conf for a broker, from the keys that were issued.

    For RabbitMQ it is the folder definitions and for NATS users.conf; the rest of their settings are shipped as they
    are, in deploy/brokers.
    """
    if (keys is None) == (inventory is None):
        raise click.UsageError("give either --keys or --inventory")
    if Engine(engine) is Engine.MOSQUITTO and (config is None) == (identity is None):
        raise click.UsageError("give either --config or --identity")
    if Engine(engine) is not Engine.MOSQUITTO and (config or identity or at):
        raise click.UsageError(f"--config, --identity and --at are Mosquitto's: see deploy/brokers/{engine}")
    if Engine(engine) is not Engine.MOSQUITTO and open_devices:
        raise click.UsageError(f"--open: {engine} has to know a device before it connects")
    members: Inventory
    if keys is not None:
        members = inventory_of(Keyring.load(keys), sites=sites or None, list_devices=not open_devices)
    else:
        assert inventory is not None
        members = load_inventory(inventory)
    if Engine(engine) is not Engine.MOSQUITTO:
        files = render_rights(Engine(engine), members, out)
        if as_json:
            output.print_json({"files": files, "members": len(members.members)})
        else:
            for path in files:
                print(path)
        return
    if config is not None:
        settings = load_config(config)
    else:
        assert identity is not None
        settings = BrokerConfig(host=host, port=port, tls=broker_tls(identity))
    version = probe() if find_mosquitto() is not None else None
    files = render(members, settings, out, at=at, **({"version": version} if version else {}))
    if as_json:
        output.print_json({"files": files, "mosquitto": version, "members": len(members.members)})
        return
    for path in files:
        print(path)


def broker_tls(identity: Path) -> TlsFiles:
    """The TLS files in a broker's identity folder.

    Raises:
        ConfigError: it has none.
    """
    tls = (identity / "tls").absolute()
    if not (tls / "crl.pem").exists():
        raise ConfigError(
            f"{identity} is no broker's identity; make one with `fleetfed keys issue broker --role broker --host NAME`"
        )
    return TlsFiles(ca=tls / "ca.pem", cert=tls / "cert.pem", key=tls / "key.pem", crl=tls / "crl.pem")
