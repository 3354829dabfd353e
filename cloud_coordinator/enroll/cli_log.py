"""`fleetfed-enroll log`: export, verify and audit the log of all certificates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.enroll import audit as audits
from fleetfed.cloud_coordinator.enroll.folder import dir_option, open_enroller
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError

_FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
_KEY = click.option("--key", help="The service's key in hex; without, the export's own, which you have to compare.")
_SINCE = click.option(
    "--since",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="An older export: it must be the beginning of this one. May be repeated.",
)


@click.group(epilog=output.example("fleetfed-enroll log export --out log.jsonl", "fleetfed-enroll log audit log.jsonl"))
def log() -> None:
    """Export, verify and audit the log of all certificates."""


@log.command(epilog=output.example("fleetfed-enroll log export --out log.jsonl"))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where the log goes.")
@dir_option
@output.json_option
def export(out: Path, directory: Path, as_json: bool) -> None:
    """Write the whole log with its signed head; it can be given to anybody."""
    enroller = open_enroller(directory)
    try:
        leaves = enroller.log()
        head = enroller.head(now=unix_ms())
        # Somebody may have been enrolled between the two.
        if len(enroller.log()) != len(leaves):
            leaves = enroller.log()
            head = enroller.head(now=unix_ms())
        identity = enroller.identity
    finally:
        enroller.close()
    lines = audits.export(identity.certificate.fleet, identity.key.public, leaves, head)
    out.write_text("".join(f"{line}\n" for line in lines))
    if as_json:
        output.print_json({"out": out, "size": len(leaves)})
        return
    print(f"{out}: {len(leaves)} entries")


@log.command(epilog=output.example("fleetfed-enroll log verify log.jsonl --key 3b6a… --since january.jsonl"))
@_FILE
@_KEY
@_SINCE
@output.json_option
def verify(file: Path, key: str | None, since: tuple[Path, ...], as_json: bool) -> None:
    """Check an export: its entries, its signed head, and that an older one is its beginning. Needs no service."""
    checked = _verified(file, key, since)
    if as_json:
        output.print_json(
            {"size": checked.head.size, "root": checked.head.root, "at": checked.head.at, "key": checked.key}
        )
        return
    print(f"{checked.head.size} entries are those of the head signed on {output.when(checked.head.at)}")
    print(f"root  {checked.head.root.hex()}")
    print(f"key   {checked.key.hex()}" + ("" if key else "  (compare it with the trust metadata)"))


@log.command(epilog=output.example("fleetfed-enroll log audit log.jsonl --key 3b6a…"))
@_FILE
@_KEY
@_SINCE
@output.json_option
def audit(file: Path, key: str | None, since: tuple[Path, ...], as_json: bool) -> int:
    """Verify an export, then count: devices per owner, growth per day, keys and hardware that appear twice.

    Exits with 1 where there is something that an honest service does not write.
    """
    found = audits.audit(_verified(file, key, since), now=unix_ms())
    if as_json:
        output.print_json({**dataclasses.asdict(found), "suspicious": found.suspicious})
        return int(found.suspicious)
    output.table(
        ("owner", "valid>", "enrolled>", "renewed>", "revoked>"),
        ((owner, f.valid, f.enrolled, f.renewed, f.revoked) for owner, f in sorted(found.owners.items())),
        empty="no devices",
    )
    output.table(
        ("day", "owner", "enrolled>"),
        ((day, owner, n) for day, owners in sorted(found.growth.items()) for owner, n in sorted(owners.items())),
        title="Growth",
    )
    problems: list[tuple[str, Any]] = [
        ("one key under several ids", found.keys_of_many),
        ("one id with several keys", found.ids_of_many),
        ("one piece of hardware with several valid devices", found.hardware_of_many),
        ("serial numbers given out twice, or not this service's", found.serials_twice),
        ("renewed on other hardware (moved, or copied)", found.moved),
    ]
    for text, what in problems:
        if what:
            print(f"{text}: {json.dumps(what)}")
    if not found.suspicious:
        print("No key, id, serial number or piece of hardware stands for two devices.")
    return int(found.suspicious)


def _verified(file: Path, key: str | None, since: tuple[Path, ...]) -> audits.Log:
    try:
        public = bytes.fromhex(key) if key is not None else None
    except ValueError:
        raise ConfigError("--key: 64 hex digits") from None
    earlier = [audits.read(path).head for path in since]
    return audits.verify(audits.read(file), key=public, earlier=earlier)
