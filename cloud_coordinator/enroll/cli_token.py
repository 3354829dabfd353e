"""`fleetfed-enroll token`: make, list and take back one-time tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.enroll.enroller import DAY
from fleetfed.cloud_coordinator.enroll.folder import dir_option, open_enroller
from fleetfed.cloud_coordinator.enroll.store import Token
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.wire.enrolment import SPENT_ALL

_UNITS: Final = {"h": DAY // 24, "d": DAY}


class _Lifetime(click.ParamType):  # type: ignore[type-arg]
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,3})([hd])", value)
        if match is None or int(match[1]) * _UNITS[match[2]] > 366 * DAY:
            self.fail(f"{value!r}: give hours or days, like 12h or 7d, at most 366d", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


class _Spent(click.ParamType):  # type: ignore[type-arg]
    name = "rounds|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if value == "all":
            return SPENT_ALL
        if not value.isdecimal() or int(value) > SPENT_ALL:
            self.fail(f"{value!r}: give a number of rounds, or all", param, ctx)
        return int(value)


@click.group(epilog=output.example("fleetfed-enroll token create --owner ward-3 --site north"))
def token() -> None:
    """Make, list and take back one-time tokens."""


@token.command(
    epilog=output.example(
        "fleetfed-enroll token create --owner ward-3 --site north",
        "fleetfed-enroll token create --owner ward-3 --site north --count 20 --expires 12h",
        "fleetfed-enroll token create --owner ward-3 --site north --spent 40",
    )
)
@click.option("--owner", required=True, help="Who answers for the device.")
@click.option("--site", required=True, help="The site that the device belongs to.")
@click.option("--expires", type=_Lifetime(), default="7d", show_default=True, help="How long the token is good.")
@click.option("--id", "device", default="", help="The device's id, d-…; without, it comes from the device's key.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Make so many.")
@click.option(
    "--spent",
    type=_Spent(),
    help="Participations that the privacy ledger begins with; all, if the hardware was enrolled before, else 0.",
)
@dir_option
@output.json_option
def create(
    owner: str, site: str, expires: int, device: str, count: int, spent: int | None, directory: Path, as_json: bool
) -> None:
    """Make a token: 128 random bits, for one device of one owner at one site. It is shown once and kept nowhere."""
    if device and count > 1:
        raise click.UsageError("--id goes with one token, not with --count")
    enroller = open_enroller(directory)
    try:
        made = [
            enroller.create_token(owner=owner, site=site, lifetime=expires, now=unix_ms(), device=device, spent=spent)
            for _ in range(count)
        ]
    finally:
        enroller.close()
    if as_json:
        output.print_json({"tokens": [{"token": each.text, **_row(each.token)} for each in made]})
        return
    for each in made:
        print(each.text)
    click.echo(f"good for one device each, until {output.when(made[0].token.expires)}; shown only now", err=True)


@token.command(name="list", epilog=output.example("fleetfed-enroll token list --open"))
@click.option("--open", "only_open", is_flag=True, help="Only those that can still be used.")
@dir_option
@output.json_option
def list_(only_open: bool, directory: Path, as_json: bool) -> None:
    """List tokens by their labels."""
    now = unix_ms()
    enroller = open_enroller(directory)
    try:
        tokens = [each for each in enroller.tokens() if not only_open or _state(each, now) == "open"]
    finally:
        enroller.close()
    if as_json:
        output.print_json({"tokens": [{**_row(each), "state": _state(each, now)} for each in tokens]})
        return
    output.table(
        ("label", "owner", "site", "state", "expires", "used by"),
        ((t.label, t.owner, t.site, _state(t, now), output.when(t.expires), t.used_by) for t in tokens),
        empty="no tokens",
    )


@token.command(epilog=output.example("fleetfed-enroll token revoke 5e884898da"))
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
@dir_option
@output.json_option
def revoke(labels: tuple[str, ...], directory: Path, as_json: bool) -> None:
    """Take tokens back that were not used yet."""
    enroller = open_enroller(directory)
    try:
        for label in labels:
            enroller.revoke_token(label, now=unix_ms())
    finally:
        enroller.close()
    if as_json:
        output.print_json({"revoked": list(labels)})
        return
    for label in labels:
        print(f"{label} was taken back")


def _row(each: Token) -> dict[str, Any]:
    return {
        "label": each.label,
        "owner": each.owner,
        "site": each.site,
        "id": each.device,
        "expires": each.expires,
        "used": each.used,
        "used_by": each.used_by,
        "revoked": each.revoked,
    }


def _state(each: Token, now: int) -> str:
    if each.used:
        return "used"
    if each.revoked:
        return "taken back"
    return "open" if now < each.expires else "expired"
