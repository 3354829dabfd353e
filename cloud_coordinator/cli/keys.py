"""`fleetfed keys`: make, list and revoke identities; what concerns trust metadata is in `keys_policy`, `keys_trust`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from fleetfed.cloud_coordinator.cli import keys_policy, keys_trust, output
from fleetfed.cloud_coordinator.keys.equip import follow, make_trust
from fleetfed.cloud_coordinator.keys.keyring import CRL_DAYS, DEFAULT_DAYS, Keyring, Member, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.owners import Missing
from fleetfed.cloud_coordinator.keys.pki import Listener
from fleetfed.shared import config
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_COLUMNS = ("id", "role", "site", "owner", "valid until", "revoked")
_CSV_COLUMNS = ("id", "role", "site", "upstream", "owner", "days", "hosts")

_dir_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("keys"),
    show_default=True,
    help="The key folder. It holds the fleet's authority: keep it off every device.",
)


@click.group(
    epilog=output.example(
        "fleetfed keys init --fleet demo",
        "fleetfed keys issue g-north --role gateway --site north",
        "fleetfed keys issue d-07 --role device --site north",
    )
)
def keys() -> None:
    """Make, list and revoke identities; set the policy that nobody can fall below."""


keys.add_command(keys_policy.policy)
for _command in (keys_trust.sign, keys_trust.renew, keys_trust.rotate, keys_trust.publish, keys_trust.status):
    keys.add_command(_command)


def _threshold(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """``2/3``: two of three keys sign."""
    threshold, _, count = value.partition("/")
    if not (threshold.isdigit() and count.isdigit() and 1 <= int(threshold) <= int(count) <= 16):
        raise click.BadParameter(f"{value!r}: give so many of so many keys, such as 2/3", ctx, param)
    return int(threshold), int(count)


def _keys_option(name: str, text: str) -> Callable[[F], F]:
    return click.option(name, callback=_threshold, default="2/3", metavar="K/N", show_default=True, help=text)


@keys.command(epilog=output.example("fleetfed keys init --fleet demo --dir keys"))
@click.option("--fleet", required=True, help="The fleet's name; it stands in every topic.")
@_keys_option("--root-keys", "So many of so many root keys must sign.")
@_keys_option("--targets-keys", "So many of so many targets keys must sign.")
@_dir_option
@output.json_option
def init(fleet: str, root_keys: tuple[int, int], targets_keys: tuple[int, int], directory: Path, as_json: bool) -> None:
    """Make the fleet's authority, its trust metadata, its TLS authority, a coordinator and a first operator."""
    keyring = Keyring.create(directory, fleet, now=unix_ms())
    members = keyring.issue(
        [
            NewMember(id="coordinator", role=MemberRole.COORDINATOR),
            NewMember(id="operator", role=MemberRole.OPERATOR),
        ],
        now=unix_ms(),
    )
    owners = make_trust(keyring, now=unix_ms(), root=root_keys, targets=targets_keys)
    if as_json:
        output.print_json(
            {
                "fleet": fleet,
                "authority": keyring.authority_key,
                "members": _rows(keyring, members),
                "offline_keys": owners.offline_keys,
            }
        )
        return
    print(f"Fleet {fleet}: its authority is in {directory}. Back it up, and keep it off every device.")
    _table(members)
    print(f"\n{len(owners.offline_keys)} offline keys are in {owners.offline_keys[0].parent}, without passphrases.")
    print(
        "Move each to a medium of its own, kept by another person, and leave none on this machine:\n"
        f"{root_keys[0]} of {root_keys[1]} root keys decide who the owners are, "
        f"{targets_keys[0]} of {targets_keys[1]} targets keys what they allow."
    )
    print(
        "\nNext: fleetfed keys issue broker --role broker --host BROKER-HOST\n"
        "      fleetfed keys issue g-north --role gateway --site north\n"
        "      fleetfed keys issue d-01 --role device --site north"
    )


@keys.command(
    epilog=output.example(
        "fleetfed keys issue d-07 --role device --site north --owner ward-3",
        "fleetfed keys issue d --role device --site north --count 50",
        "fleetfed keys issue --csv fleet.csv --role device",
        "fleetfed keys issue broker --role broker --host mqtt.example.org",
        "fleetfed keys issue b-north --role bridge --site north",
        "fleetfed keys issue h-two --role helper",
    )
)
@click.argument("member", required=False, metavar="[ID]")
@click.option("--role", type=click.Choice([role.value for role in MemberRole]), help="What the identity is for.")
@click.option("--site", help="A device's, or a bridge's, site, or the one that a gateway serves.")
@click.option("--upstream", help="The site above a gateway; left out: the coordinator's.")
@click.option("--owner", default="", help="Who answers for it.")
@click.option("--days", type=click.IntRange(1, 36_500), default=DEFAULT_DAYS, show_default=True, help="Validity.")
@click.option("--host", "hosts", multiple=True, help="Name or address of a broker or enroller; may be repeated.")
@click.option(
    "--listener",
    type=click.Choice([listener.value for listener in Listener]),
    help="Which clients a broker's port is for: a site's, or the cloud's, where no device may connect.",
)
@click.option("--count", type=click.IntRange(1, 100_000), help="Make so many: ID-1, ID-2, …")
@click.option(
    "--csv",
    "table",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help=f"Make one per line of a CSV file with the columns {', '.join(_CSV_COLUMNS)}; only id is needed in each.",
)
@_dir_option
@output.json_option
def issue(
    member: str | None,
    role: str | None,
    site: str | None,
    upstream: str | None,
    owner: str,
    days: int,
    hosts: tuple[str, ...],
    listener: str | None,
    count: int | None,
    table: Path | None,
    directory: Path,
    as_json: bool,
) -> None:
    """Issue identities and write their folders to DIR/identities."""
    if (member is None) == (table is None):
        raise click.UsageError("give either an ID or --csv FILE")
    if table is not None and count is not None:
        raise click.UsageError("--count goes with an ID, not with --csv")
    defaults: dict[str, Any] = {"owner": owner, "days": days, "hosts": list(hosts)}
    chosen = {"role": role, "site": site, "upstream": upstream, "listener": listener}
    defaults |= {name: value for name, value in chosen.items() if value is not None}
    if table is not None:
        wanted = _from_csv(table, defaults)
    else:
        width = len(str(count))
        names = [member] if count is None else [f"{member}-{number:0{width}d}" for number in range(1, count + 1)]
        wanted = [config.build(NewMember, {**defaults, "id": name}, where="keys issue") for name in names]
    keyring = Keyring.load(directory)
    if as_json or len(wanted) < 20:
        members = keyring.issue(wanted, now=unix_ms())
    else:
        with click.progressbar(length=len(wanted), label="Issuing") as bar:
            members = keyring.issue(wanted, now=unix_ms(), progress=lambda _: bar.update(1))
    missing = follow(keyring, members, now=unix_ms())
    if as_json:
        output.print_json({"members": _rows(keyring, members), "missing": missing})
        return
    _table(members)
    _unlisted(missing)
    first = keyring.identity_folder(members[0].id)
    where = first if len(members) == 1 else first.parent
    print(f"\n{where}: copy {'it' if len(members) == 1 else 'each folder'} to its machine over a safe way.")
    if any(member.role is not MemberRole.DEVICE for member in members):
        print("The broker's access list names gateways and operators: `fleetfed broker render` writes it again.")


def _from_csv(path: Path, defaults: dict[str, Any]) -> list[NewMember]:
    wanted = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        unknown = set(reader.fieldnames or ()) - set(_CSV_COLUMNS)
        if "id" not in (reader.fieldnames or ()) or unknown:
            raise ConfigError(
                f"{path}: its first line must name columns out of {', '.join(_CSV_COLUMNS)}, with id among them"
            )
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{where}: not as many values as the first line has names")
            values: dict[str, Any] = {name: value.strip() for name, value in row.items() if value.strip()}
            if "days" in values:
                try:
                    values["days"] = int(values["days"])
                except ValueError:
                    raise ConfigError(f"{where}: days: {values['days']!r} is no number") from None
            if "hosts" in values:
                values["hosts"] = values["hosts"].split()
            wanted.append(config.build(NewMember, {**defaults, **values}, where=where))
    if not wanted:
        raise ConfigError(f"{path}: no members in it")
    return wanted


@keys.command(epilog=output.example("fleetfed keys revoke d-07 --config operator.toml", "fleetfed keys revoke 17"))
@click.argument("names", nargs=-1, metavar="[ID|SERIAL]...")
@click.option(
    "--config",
    "-c",
    "operator",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FLEETFED_CONFIG",
    help="operator.toml; with it the list is sent to the coordinator at once.",
)
@_dir_option
@output.json_option
def revoke(names: tuple[str, ...], operator: Path | None, directory: Path, as_json: bool) -> None:
    """Make identities void; without names, send the list in force again.

    The signed list goes to the coordinator, which publishes it to every site. The brokers refuse the TLS certificates
    once they have the new revocation list, DIR/tls/crl-site.pem or DIR/tls/crl-cloud.pem.
    """
    # Imported late: the other commands need no MQTT.
    from fleetfed.cloud_coordinator.control.delivery import deliver_list, list_in_force

    keyring = Keyring.load(directory)
    in_force = None if operator is None else list_in_force(operator)
    revoked = keyring.revoke(names, now=unix_ms(), in_force=in_force) if names or in_force is not None else ()
    signed = keyring.revocations()
    if signed is None:
        raise ConfigError("nobody was ever revoked: give an ID or a serial number")
    delivered, detail = deliver_list(operator, signed, again="fleetfed keys revoke --config operator.toml")
    missing = follow(keyring, (), now=unix_ms())
    if as_json:
        output.print_json(
            {
                "revoked": _rows(keyring, revoked),
                "delivered": delivered,
                "detail": detail,
                "list": directory / "revocations.bin",
                "crl": keyring.crl_file(),
                "missing": missing,
            }
        )
        return
    if revoked:
        _table(revoked)
    _unlisted(missing)
    print(detail)
    print(f"Brokers: copy {keyring.crl_file()} to each and reload it (SIGHUP), so that TLS refuses them too.")


@keys.command(epilog=output.example("fleetfed keys crl --days 90"))
@click.option("--days", type=click.IntRange(1, 3650), default=CRL_DAYS, show_default=True, help="Validity.")
@_dir_option
@output.json_option
def crl(days: int, directory: Path, as_json: bool) -> None:
    """Write the brokers' TLS revocation lists again, before they grow too old.

    A broker whose list has expired refuses everybody.
    """
    keyring = Keyring.load(directory)
    keyring.write_crl(now=unix_ms(), days=days)
    files = {listener.value: keyring.crl_file(listener) for listener in Listener}
    if as_json:
        output.print_json({"days": days, "files": files})
        return
    for listener, path in files.items():
        print(f"{path}: for the broker of a {listener}; valid for {days} days")


@keys.command(name="list", epilog=output.example("fleetfed keys list --site north"))
@click.option("--role", type=click.Choice([role.value for role in MemberRole]), help="Only these.")
@click.option("--site", help="Only these.")
@_dir_option
@output.json_option
def list_(role: str | None, site: str | None, directory: Path, as_json: bool) -> None:
    """List who was certified."""
    keyring = Keyring.load(directory)
    members = [
        member
        for member in keyring.members
        if (role is None or member.role == role) and (site is None or member.site == site)
    ]
    if as_json:
        output.print_json({"fleet": keyring.fleet, "members": _rows(keyring, members)})
    else:
        _table(members)


def _unlisted(missing: Sequence[Missing]) -> None:
    """Say who has to sign before the fleet knows of a change."""
    for each in missing:
        print(f"Not in force yet: {each.role} needs {each.needs} more of {', '.join(each.by)}: fleetfed keys sign")


def _rows(keyring: Keyring, members: tuple[Member, ...] | list[Member]) -> list[dict[str, Any]]:
    return [
        {
            "id": member.id,
            "role": member.role,
            "site": member.site,
            "upstream": member.upstream,
            "owner": member.owner,
            "serial": member.serial,
            "not_before": member.not_before,
            "not_after": member.not_after,
            "revoked": member.revoked,
            "folder": keyring.identity_folder(member.id),
        }
        for member in members
    ]


def _table(members: tuple[Member, ...] | list[Member]) -> None:
    output.table(
        ("serial>", *_COLUMNS),
        ((m.serial, m.id, m.role, m.site, m.owner, output.when(m.not_after), output.when(m.revoked)) for m in members),
        empty="no identities",
    )
