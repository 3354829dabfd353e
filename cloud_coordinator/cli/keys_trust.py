"""`fleetfed keys sign|renew|rotate|publish|status`: the owners' part of trust metadata."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.keys import signing
from fleetfed.cloud_coordinator.keys.equip import equip, owners_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.cloud_coordinator.keys.owners import OFFLINE, ROLES, ROOT_DAYS, TARGETS_DAYS, Missing, Owners
from fleetfed.cloud_coordinator.keys.state import Row, rows
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import tuf
from fleetfed.shared.trust.keys import SigningKey

_COLUMNS = ("role", "version", "keys", "signatures", "expires", "days>", "what to do")

dir_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("keys"),
    show_default=True,
    help="The key folder.",
)
config_option = click.option(
    "--config",
    "-c",
    "operator",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FLEETFED_CONFIG",
    help="operator.toml; with it the coordinator is asked.",
)
key_option = click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A key file that is not in the key folder; may be repeated.",
)


def opened(directory: Path) -> tuple[Keyring, Owners]:
    """The fleet's keys and its owners' part.

    Raises:
        ConfigError: the fleet has none.
    """
    keyring = Keyring.load(directory)
    owners = owners_of(keyring)
    if owners is None:
        raise ConfigError(f"{directory} belongs to a fleet without trust metadata: `fleetfed keys init` made it before")
    return keyring, owners


def finish(keyring: Keyring, owners: Owners, missing: Sequence[Missing], as_json: bool, **more: Any) -> None:
    """Say what came of signing; equip the identity folders once it is in force."""
    if not missing:
        equip(keyring, owners, keyring.members)
    if as_json:
        output.print_json({"in_force": not missing, "missing": list(missing), **more})
        return
    for name, value in more.items():
        print(f"{name.replace('_', ' ')}: {value}")
    if missing:
        for each in missing:
            print(f"{each.role}: {each.needs} more of: {', '.join(each.by)}")
        print("Next: fleetfed keys sign --key FILE, or --export FILE for keys that are elsewhere.")
    else:
        print("In force here. Next: fleetfed keys publish --config operator.toml")


@click.command(
    epilog=output.example(
        "fleetfed keys sign",
        "fleetfed keys sign --export next.json",
        "fleetfed keys sign --file next.json --key /media/stick/targets-2.key",
        "fleetfed keys sign --import next.json",
    )
)
@click.option("--export", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write what waits to a file.")
@click.option("--file", "request", type=click.Path(path_type=Path, dir_okay=False), help="Sign such a file, anywhere.")
@click.option("--import", "back", type=click.Path(path_type=Path, dir_okay=False), help="Take its signatures back.")
@click.option("--discard", is_flag=True, help="Forget what waits for signatures.")
@key_option
@dir_option
@output.json_option
def sign(
    out: Path | None,
    request: Path | None,
    back: Path | None,
    discard: bool,
    keys: tuple[Path, ...],
    directory: Path,
    as_json: bool,
) -> None:
    """Sign what waits for signatures; with enough of them it is in force.

    Keys that are kept elsewhere sign a file: export it, sign it there with --file (which needs no key folder), bring it
    back and import it.
    """
    if sum((out is not None, request is not None, back is not None, discard)) > 1:
        raise click.UsageError("give one of --export, --file, --import and --discard")
    held = [SigningKey.load(path) for path in keys]
    if request is not None:
        if not held:
            raise click.UsageError("--file needs --key FILE")
        said = signing.sign_file(request, held)
        if as_json:
            output.print_json({"signed": said, "policy": signing.policy_in(request)})
            return
        print(*(f"Signed: {each}" for each in said), sep="\n")
        print(f"With this policy:\n{signing.policy_in(request)}")
        return
    keyring, owners = opened(directory)
    if discard:
        owners.discard()
        finish(keyring, owners, [], as_json)
    elif out is not None:
        missing = signing.export(owners, out)
        if as_json:
            output.print_json({"file": out, "missing": missing})
            return
        print(f"{out}: carry it to whoever has the keys, then: fleetfed keys sign --file {out.name} --key KEY")
        for each in missing:
            print(f"{each.role}: {each.needs} more of: {', '.join(each.by)}")
    elif back is not None:
        finish(keyring, owners, signing.take_back(owners, back), as_json)
    else:
        finish(keyring, owners, owners.sign(held), as_json)


@click.command(epilog=output.example("fleetfed keys renew targets", "fleetfed keys renew root --days 365"))
@click.argument("role", type=click.Choice(OFFLINE))
@click.option(
    "--days", type=click.IntRange(1, 3650), help=f"Validity; {ROOT_DAYS} for root, {TARGETS_DAYS} for targets."
)
@key_option
@dir_option
@output.json_option
def renew(role: str, days: int | None, keys: tuple[Path, ...], directory: Path, as_json: bool) -> None:
    """Sign root or targets again, unchanged, before they expire."""
    keyring, owners = opened(directory)
    if role == tuf.Root.type:
        owners.stage_root(now=unix_ms(), days=days or ROOT_DAYS)
    else:
        owners.stage_targets(now=unix_ms(), days=days or TARGETS_DAYS)
    finish(keyring, owners, owners.sign([SigningKey.load(path) for path in keys]), as_json)


@click.command(
    epilog=output.example("fleetfed keys rotate timestamp", "fleetfed keys rotate targets --replace targets-2")
)
@click.argument("role", type=click.Choice(ROLES))
@click.option("--replace", "names", multiple=True, help="Only this key; may be repeated. Without: all of the role.")
@key_option
@dir_option
@output.json_option
def rotate(role: str, names: tuple[str, ...], keys: tuple[Path, ...], directory: Path, as_json: bool) -> None:
    """Replace keys of a role by new ones: a new root, signed by enough of the old keys and of the new.

    A coordinator's key is replaced with `keys issue ID --role coordinator`, which lists the new one, and `keys revoke`
    of the old one, which lists it no more.
    """
    keyring, owners = opened(directory)
    made = owners.stage_root(now=unix_ms(), rotate=role, remove=names)
    if role == tuf.Targets.type:
        owners.stage_targets(now=unix_ms())
    missing = owners.sign([SigningKey.load(path) for path in keys])
    place = owners.directory / ("offline" if role in OFFLINE else "online")
    finish(keyring, owners, missing, as_json, new_keys=", ".join(str(place / f"{name}.key") for name in made))
    if not as_json and role not in OFFLINE:
        print(f"Copy {keyring.directory}/identities/ID/trust to the coordinator's identity folder before you publish.")


@click.command(
    epilog=output.example("fleetfed keys publish --config operator.toml", "fleetfed keys publish --file b.bin")
)
@config_option
@click.option("--file", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to a file instead.")
@dir_option
@output.json_option
def publish(operator: Path | None, out: Path | None, directory: Path, as_json: bool) -> None:
    """Hand what is in force here to the running coordinator, which signs it as current and publishes it.

    A coordinator that cannot be reached takes the file as trust/bundle.bin of its identity folder at its next start.
    """
    _, owners = opened(directory)
    bundle = owners.bundle()
    if out is not None:
        write_atomic(out, bundle)
        output.print_json({"file": out}) if as_json else print(f"{out}: put it into the coordinator's identity folder")
        return
    if operator is None:
        raise ConfigError("give --config operator.toml, or --file FILE")
    status = _ask(operator, bundle)
    if as_json:
        output.print_json(status)
    else:
        output.pairs(_plain(status))


@click.command(epilog=output.example("fleetfed keys status", "fleetfed keys status --config operator.toml --json"))
@config_option
@dir_option
@output.json_option
def status(operator: Path | None, directory: Path, as_json: bool) -> int:
    """Show every key, version and expiry; exit with 1 if something has to be done soon.

    With --config also what the coordinator calls current.
    """
    keyring, owners = opened(directory)
    now = unix_ms()
    live = None if operator is None else _trust_of(operator)
    found = rows(owners, keyring, live, now=now)
    bad = any(row.warning for row in found)
    if as_json:
        output.print_json({"fleet": keyring.fleet, "now": now, "roles": found, "soon": bad})
    else:
        _show(found)
        left = owners.offline_keys
        if left:
            print(f"{len(left)} offline keys are still in {owners.directory / 'offline'}: move each to its owner.")
    return output.EXIT_FAILED if bad else 0


def _show(found: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        grid.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in found:
        style = "red" if row.days < 0 else "yellow" if row.warning else "green"
        cells = (row.role, str(row.version or "-"), ", ".join(row.keys), row.signatures, output.when(row.expires))
        grid.add_row(*map(Text, cells), Text(f"{row.days:.1f}", style=style), Text(row.warning or "-"))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(grid)


def _plain(status: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: value for name, value in status.items() if name not in ("expiries", "expires", "warnings")},
        "current_until": output.when(status.get("expires", 0)),
        "warnings": "; ".join(status.get("warnings", [])),
    }


def _ask(operator: Path, bundle: bytes) -> dict[str, Any]:
    from fleetfed.cloud_coordinator.cli.control import ask
    from fleetfed.shared.wire.messages import Command

    return ask(operator, Command.KEYS_PUBLISH, {"bundle": bundle}, timeout=30.0)


def _trust_of(operator: Path) -> dict[str, Any]:
    from fleetfed.cloud_coordinator.cli.control import ask
    from fleetfed.shared.wire.messages import Command

    found: dict[str, Any] = ask(operator, Command.ROUND_STATUS, timeout=30.0).get("trust", {})
    return found
