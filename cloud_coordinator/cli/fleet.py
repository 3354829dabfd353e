"""`fleetfed fleet`: gateways and devices as the coordinator sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.cli.control import ask, control_options
from fleetfed.shared.wire.messages import Command


@click.group(epilog=output.example("fleetfed fleet list", "fleetfed fleet show g-north", "fleetfed fleet release d-07"))
def fleet() -> None:
    """See gateways and devices; set devices aside and let them back in."""


@fleet.command(name="list", epilog=output.example("fleetfed fleet list", "fleetfed fleet list --json"))
@control_options
@output.json_option
def list_(config: Path, timeout: float, as_json: bool) -> None:
    """List the gateways, with how many devices each has."""
    result = ask(config, Command.FLEET_LIST, timeout=timeout)
    if as_json:
        output.print_json(result)
        return
    gateways = result.get("gateways", [])
    columns = ("id", "life", "site", "level", "devices", "ready", "sleeping", "lost", "model_version")
    output.table(
        [name if name in ("id", "life", "site") else f"{name}>" for name in columns],
        ([gateway.get(name) for name in columns] for gateway in gateways),
        empty="no gateway has shown itself yet",
    )


@fleet.command(epilog=output.example("fleetfed fleet show g-north", "fleetfed fleet show d-07 --json"))
@click.argument("member")
@control_options
@output.json_option
def show(member: str, config: Path, timeout: float, as_json: bool) -> None:
    """Show one gateway with its devices, or one device."""
    result = ask(config, Command.FLEET_SHOW, {"id": member}, timeout=timeout)
    if as_json:
        output.print_json(result)
        return
    members: list[dict[str, Any]] = result.get("members", [])
    output.pairs(
        {key: value for key, value in result.items() if key != "members"}, first=("id", "kind", "life", "since")
    )
    if members:
        output.table(
            ("id", "site", "life", "since", "software"),
            (
                (
                    each.get("id"),
                    each.get("site"),
                    each.get("life"),
                    output.when(each.get("since", 0)),
                    each.get("software"),
                )
                for each in members
            ),
        )


@fleet.command(
    epilog=output.example("fleetfed fleet quarantine", "fleetfed fleet quarantine d-07 --reason 'sensor is broken'")
)
@click.argument("device", required=False)
@click.option("--reason", default="", help="For whoever wonders later.")
@control_options
@output.json_option
def quarantine(device: str | None, reason: str, config: Path, timeout: float, as_json: bool) -> None:
    """List the devices that are set aside, or set one aside from the next round on.

    Rounds with a [rounds.defence] set aside by themselves who is an outlier again and again ([rounds.quarantine]).
    """
    if device is not None:
        arguments = {"id": device} | ({"reason": reason} if reason else {})
        result = ask(config, Command.FLEET_ASIDE, arguments, timeout=timeout)
        if as_json:
            output.print_json(result)
        else:
            print(f"{device} takes no part from the next round on; `fleetfed fleet release {device}` lifts it")
        return
    rows = ask(config, Command.FLEET_LIST, timeout=timeout).get("quarantined", [])
    if as_json:
        output.print_json({"quarantined": rows})
        return
    output.table(
        ("device", "since", "round>", "by", "reason"),
        (
            (row["device"], output.when(row["since"]), row["round"], row["by"] or "the defence", row["reason"])
            for row in rows
        ),
        empty="no device is quarantined",
    )


@fleet.command(epilog=output.example("fleetfed fleet release d-07"))
@click.argument("device")
@control_options
@output.json_option
def release(device: str, config: Path, timeout: float, as_json: bool) -> None:
    """Let a quarantined device take part again from the next round on; its strikes are forgotten."""
    result = ask(config, Command.FLEET_RELEASE, {"id": device}, timeout=timeout)
    if as_json:
        output.print_json(result)
    else:
        print(f"{device} takes part again from the next round on")
