"""`fleetfed-enroll`: the enrolment service's command line; exit codes are those of `fleetfed`."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from fleetfed.cloud_coordinator.cli import app, output
from fleetfed.cloud_coordinator.enroll.cli_log import log
from fleetfed.cloud_coordinator.enroll.cli_token import token
from fleetfed.cloud_coordinator.enroll.config import SETTINGS
from fleetfed.cloud_coordinator.enroll.enroller import Enroller
from fleetfed.cloud_coordinator.enroll.folder import dir_option, open_enroller, settings_of
from fleetfed.cloud_coordinator.enroll.lists import verified_list
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.telemetry import FORMATS
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.version import VERSION
from fleetfed.shared.wire.enrolment import MAX_REQUEST, SPENT_ALL

_TEMPLATE: Final = """\
# fleetfed-enroll: who certifies devices. docs/enrolment.md explains every line.
identity = "identity"
state = "state"
authority = "authority"
host = "0.0.0.0"
port = 8443
days = 30          # validity of a certificate; devices renew at half of it
grace_days = 60    # for so long after its end it may still be renewed

# [monitoring]
# listen = "127.0.0.1:9467"    # /metrics, /healthz and /readyz for Prometheus

# What a broker reads after a revocation; its broker.toml or mosquitto.conf names broker/current/acl and so on.
# [broker]
# out = "broker"
# reload = ["systemctl", "reload", "mosquitto"]
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=output.example(
        "fleetfed-enroll init --identity keys/identities/enroller --keys keys",
        "fleetfed-enroll token create --owner ward-3 --site north",
        "fleetfed-enroll run",
    )
    + "\n\nExit codes: 0 done, 1 failed, 2 wrong option or configuration, 3 damaged store, 4 no answer, 5 refused.",
)
@click.version_option(VERSION, prog_name="fleetfed-enroll")
def cli() -> None:
    """Certify devices for one-time tokens, and take certificates back."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return app.run(arguments, command=cli, program="fleetfed-enroll")


@cli.command(epilog=output.example("fleetfed-enroll init --identity keys/identities/enroller --keys keys --dir enroll"))
@click.option(
    "--identity",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="From `fleetfed keys issue enroller --role enroller --host NAME`; it is copied.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path, file_okay=False), help="The key folder, to import from at once."
)
@dir_option
@output.json_option
def init(identity: Path, keys: Path | None, directory: Path, as_json: bool) -> None:
    """Make the service's folder: settings, register, and the TLS authority of enrolled devices."""
    from fleetfed.cloud_coordinator.enroll.store import Store
    from fleetfed.cloud_coordinator.enroll.x509 import DeviceCa

    own = Identity.load(identity, role=Role.ENROLLER)
    if (directory / SETTINGS).exists():
        raise ConfigError(f"{directory / SETTINGS} exists already; keys are never overwritten, choose another --dir")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    own.save(directory / "identity")
    for name, mode in (("ca.pem", 0o644), ("cert.pem", 0o644), ("key.pem", 0o600)):
        write_atomic(directory / "identity" / "tls" / name, (identity / "tls" / name).read_bytes(), mode=mode)
    certificate = own.certificate
    Store(directory / "state" / "enroll.sqlite").close()
    DeviceCa.create(directory / "state", certificate.fleet, certificate.id, now=unix_ms())
    imported = _import(keys, directory / "authority") if keys is not None else []
    # Last, because every other command begins with it.
    write_atomic(directory / SETTINGS, _TEMPLATE.encode())
    if as_json:
        output.print_json({"dir": directory, "fleet": certificate.fleet, "key": own.key.public, "imported": imported})
        return
    print(f"Enrolment service of fleet {certificate.fleet} in {directory}. Back it up; delete {identity}.")
    print(f"Its key, for the trust metadata (roles: device): {own.key.public.hex()}")
    print("\nNext: fleetfed-enroll token create --owner OWNER --site SITE\n      fleetfed-enroll run")


@cli.command(name="import", epilog=output.example("fleetfed-enroll import --keys keys"))
@click.option("--keys", type=click.Path(path_type=Path, file_okay=False), required=True, help="The key folder.")
@dir_option
@output.json_option
def import_(keys: Path, directory: Path, as_json: bool) -> None:
    """Copy what the offline authority says: sites, gateways, TLS authorities, revocations. Nothing of it is secret."""
    files = _import(keys, settings_of(directory).authority)
    if as_json:
        output.print_json({"files": files})
        return
    for path in files:
        print(path)


def _import(keys: Path, directory: Path) -> list[Path]:
    from fleetfed.cloud_coordinator.enroll.brokerfiles import import_authority
    from fleetfed.cloud_coordinator.keys.keyring import Keyring

    return import_authority(Keyring.load(keys), directory)


@cli.command(epilog=output.example("fleetfed-enroll run --dir enroll"))
@click.option("--log-format", type=click.Choice(FORMATS), help="Instead of the file's.")
@dir_option
def run(directory: Path, log_format: str | None) -> None:
    """Serve devices over HTTPS until SIGTERM or Ctrl-C."""
    from fleetfed.cloud_coordinator.enroll.service import serve
    from fleetfed.shared.telemetry import configure_logging

    settings = settings_of(directory)
    configure_logging("enroll", log_format=log_format or settings.log_format)
    asyncio.run(serve(settings))


@cli.command(epilog=output.example("fleetfed-enroll sign d-07.request --out d-07.answer"))
@click.argument("request", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where the answer goes.")
@dir_option
@output.json_option
def sign(request: Path, out: Path, directory: Path, as_json: bool) -> None:
    """Answer a request that came as a file, from a device that cannot reach the service."""
    from fleetfed.shared.trust.enrolment import ANSWER

    with request.open("rb") as file:
        data = file.read(MAX_REQUEST + 1)
    enroller = open_enroller(directory)
    try:
        answer = enroller.answer(data, now=unix_ms())
        body = ANSWER.open(answer, key=enroller.identity.key.public).body
    except RemoteProtocolError as error:
        raise click.ClickException(f"refused: {error}") from error
    finally:
        enroller.close()
    write_atomic(out, answer)
    if as_json:
        output.print_json({"id": body.id, "owner": body.owner, "site": body.site, "spent": body.spent, "out": out})
        return
    print(
        f"{out}: {body.id} of {body.owner} at {body.site}; on the device: fleetfed-device enroll --response {out.name}"
    )


@cli.command(
    epilog=output.example(
        "fleetfed-enroll revoke d-07 --config operator.toml", "fleetfed-enroll revoke --config o.toml"
    )
)
@click.argument("names", nargs=-1, metavar="[ID|SERIAL]...")
@click.option(
    "--config",
    "-c",
    "operator",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FLEETFED_CONFIG",
    help="operator.toml; with it the list is sent to the coordinator at once.",
)
@dir_option
@output.json_option
def revoke(names: tuple[str, ...], operator: Path | None, directory: Path, as_json: bool) -> None:
    """Make devices void; without names, send the list in force again.

    One command does it all: the signed list, which stops updates at gateways and coordinator, and the brokers' TLS list
    and access list, which are replaced together.
    """
    from fleetfed.cloud_coordinator.control.delivery import deliver_list, list_in_force
    from fleetfed.cloud_coordinator.enroll.brokerfiles import REVOCATIONS, write_broker_files

    settings = settings_of(directory)
    now = unix_ms()
    enroller = Enroller.open(settings)
    try:
        known = [verified_list(settings.authority / REVOCATIONS, enroller.identity, now=now)]
        if operator is not None:
            known.append(list_in_force(operator))
        revoked, signed = enroller.revoke(
            list(names), now=now, others=tuple(each for each in known if each is not None)
        )
        files = None
        if settings.broker is not None:
            files = write_broker_files(enroller, settings.broker, settings.authority, now=now)
    finally:
        enroller.close()
    if signed is None:
        raise ConfigError("nobody was ever revoked: give an ID or a serial number")
    write_atomic(settings.state / REVOCATIONS, signed)
    delivered, detail = deliver_list(operator, signed, again="fleetfed-enroll revoke --config operator.toml")
    if as_json:
        output.print_json(
            {
                "revoked": [device.id for device in revoked],
                "delivered": delivered,
                "detail": detail,
                "list": settings.state / REVOCATIONS,
                "files": files,
            }
        )
        return
    for device in revoked:
        print(f"{device.id} of {device.owner} is revoked.")
    print(detail)
    if files is None:
        print("No [broker] in enroll.toml: brokers refuse these devices once they get `fleetfed-enroll files`.")
    else:
        print(f"{files}: acl, ca.pem and crl.pem are up to date.")


@cli.command(epilog=output.example("fleetfed-enroll files --out /etc/mosquitto/fleetfed"))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Instead of the folder in enroll.toml.")
@click.option("--listed", is_flag=True, help="Name every device in the access list.")
@dir_option
@output.json_option
def files(out: Path | None, listed: bool, directory: Path, as_json: bool) -> None:
    """Write a broker's access list, TLS authorities and TLS revocation lists again, all at once."""
    from fleetfed.cloud_coordinator.enroll.brokerfiles import write_broker_files
    from fleetfed.cloud_coordinator.enroll.config import BrokerFiles

    settings = settings_of(directory)
    wanted = settings.broker if out is None else BrokerFiles(out=out, listed=listed)
    if wanted is None:
        raise ConfigError(f"{directory / SETTINGS} has no [broker]; add one, or give --out DIR")
    enroller = Enroller.open(settings)
    try:
        folder = write_broker_files(enroller, wanted, settings.authority, now=unix_ms())
    finally:
        enroller.close()
    if as_json:
        output.print_json({"files": sorted(folder.iterdir())})
        return
    for path in sorted(folder.iterdir()):
        print(path)


@cli.command(name="list", epilog=output.example("fleetfed-enroll list --owner ward-3"))
@click.option("--owner", help="Only these.")
@click.option("--site", help="Only these.")
@dir_option
@output.json_option
def list_(owner: str | None, site: str | None, directory: Path, as_json: bool) -> None:
    """List enrolled devices."""
    enroller = open_enroller(directory)
    try:
        rows = [
            (device, newest)
            for device, newest in enroller.devices()
            if owner in (None, device.owner) and site in (None, device.site)
        ]
    finally:
        enroller.close()
    if as_json:
        output.print_json(
            {
                "devices": [
                    {
                        "id": device.id,
                        "owner": device.owner,
                        "site": device.site,
                        "serial": newest.serial,
                        "enrolled": device.enrolled,
                        "not_after": newest.not_after,
                        "spent": device.spent_rounds,
                        "revoked": device.revoked,
                    }
                    for device, newest in rows
                ]
            }
        )
        return
    output.table(
        ("id", "owner", "site", "serial>", "valid until", "spent>", "revoked"),
        (
            (d.id, d.owner, d.site, n.serial, output.when(n.not_after), _spent(d.spent_rounds), output.when(d.revoked))
            for d, n in rows
        ),
        empty="no devices",
    )


def _spent(rounds: int) -> str:
    return "all" if rounds >= SPENT_ALL else str(rounds)


@cli.command(
    epilog=output.example(
        "fleetfed-enroll publish --config operator.toml", "fleetfed-enroll publish --file bundle.bin --days 7"
    )
)
@click.option(
    "--config",
    "-c",
    "operator",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FLEETFED_CONFIG",
    help="operator.toml; to hand it to the coordinator.",
)
@click.option("--file", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to a file instead.")
@click.option("--days", type=click.IntRange(1, 366), default=7, show_default=True, help="Validity.")
@dir_option
@output.json_option
def publish(operator: Path | None, out: Path | None, days: int, directory: Path, as_json: bool) -> None:
    """Sign the log's head and the newest revocations for the fleet's trust metadata, and hand it to the coordinator.

    Run it from a timer: once a fleet has had this, it stops when it ends.
    """
    from fleetfed.cloud_coordinator.control.delivery import deliver_bundle
    from fleetfed.cloud_coordinator.enroll.brokerfiles import OWNERS
    from fleetfed.cloud_coordinator.enroll.directory import sign_directory

    if (operator is None) == (out is None):
        raise click.UsageError("give either --config operator.toml or --file FILE")
    settings = settings_of(directory)
    enroller = Enroller.open(settings)
    try:
        bundle = sign_directory(enroller, settings.authority / OWNERS, now=unix_ms(), days=days)
        said = enroller.directory()
    finally:
        enroller.close()
    if out is not None:
        write_atomic(out, bundle)
    else:
        assert operator is not None
        deliver_bundle(operator, bundle)
    if as_json:
        output.print_json({"size": said.size, "root": said.root, "revocations": said.revocations, "file": out})
        return
    where = f"is in {out}" if out is not None else "is in force"
    print(f"The log of {said.size} entries, revocations {said.revocations}, {where}; good for {days} days.")


@cli.command(epilog=output.example("fleetfed-enroll pin --key 3b6a… keys/identities/coordinator /srv/gateway/identity"))
@click.argument("identities", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--key", required=True, help="The service's key in hex, as `init` prints it.")
@output.json_option
def pin(identities: tuple[Path, ...], key: str, as_json: bool) -> None:
    """Tell members that were issued before the service, and that have no trust metadata, whose devices count.

    Identities that `fleetfed keys issue` makes later know it already. The member reads it when it starts.
    """
    try:
        public = bytes.fromhex(key)
    except ValueError:
        public = b""
    if len(public) != 32:
        raise click.UsageError("--key: give the 64 hex digits that `fleetfed-enroll init` prints")
    for folder in identities:
        identity = Identity.load(folder)
        if public not in identity.enrollers:
            dataclasses.replace(identity, enrollers=(*identity.enrollers, public)).save(folder)
    if as_json:
        output.print_json({"key": public, "identities": list(identities)})
        return
    for folder in identities:
        print(f"{folder}: devices of {public.hex()[:16]}… count here")


cli.add_command(token)
cli.add_command(log)
