"""`fleetfed round`: start, stop and watch rounds."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.cli.control import ask, control_options
from fleetfed.cloud_coordinator.control.client import ControlClient, OperatorConfig
from fleetfed.cloud_coordinator.control.errors import NoAnswerError
from fleetfed.shared.wire.messages import Command, Status

_HISTORY = 12
_FIRST = ("state", "round", "made", "rounds", "version", "accepted", "expected", "devices_ready", "gateways_ready")


@click.group(name="round", epilog=output.example("fleetfed round start --rounds 20", "fleetfed round watch"))
def round_() -> None:
    """Start, stop and watch rounds."""


@round_.command(
    epilog=output.example(
        "fleetfed round start --rounds 20 --target 0.95",
        "fleetfed round start --fraction 0.2 --set training.epochs=2 --set training.learning_rate=0.01",
        "fleetfed round start --mode split --minimum-cohort 20 --minimum-owners 3",
        "fleetfed round start --mode split --bucket 64 --robust trimmed_mean --set trim=0.25",
    )
)
@click.option("--rounds", type=click.IntRange(0, 1_000_000), help="Versions to make, then stop; 0 for no limit.")
@click.option("--target", type=click.FloatRange(0, 1), help="Stop at this accuracy.")
@click.option("--fraction", type=click.FloatRange(0, 1), help="Part of the devices that takes part in each round.")
@click.option("--interval", type=click.FloatRange(0), help="Seconds between two rounds.")
@click.option("--deadline", type=click.FloatRange(0.05), help="Seconds until gateways close a round.")
@click.option("--expires", type=click.FloatRange(0.1), help="Seconds until the coordinator closes it.")
@click.option("--mode", type=click.Choice(["plain", "split"]), help="split: nobody can read a single update.")
@click.option("--minimum-cohort", type=click.IntRange(2), help="split: fewest devices in any sum that is revealed.")
@click.option("--minimum-owners", type=click.IntRange(1), help="split: fewest owners of a site's devices.")
@click.option(
    "--bucket", type=click.IntRange(0), help="split: devices in each of several sums per site; 0 for one sum."
)
@click.option("--seed-holders", type=click.IntRange(1, 2), help="split: 2 needs the helper as well.")
@click.option("--suite", type=click.IntRange(1, 3), help="split: 3 seals keys with ML-KEM-768 beside X25519.")
@click.option(
    "--robust",
    type=click.Choice(["none", "trimmed_mean", "geometric_median"]),
    help="split with buckets: how their means become one step.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of [rounds]; may be repeated.")
@control_options
@output.json_option
def start(
    rounds: int | None,
    target: float | None,
    fraction: float | None,
    interval: float | None,
    deadline: float | None,
    expires: float | None,
    mode: str | None,
    minimum_cohort: int | None,
    minimum_owners: int | None,
    bucket: int | None,
    seed_holders: int | None,
    suite: int | None,
    robust: str | None,
    settings: tuple[str, ...],
    config: Path,
    timeout: float,
    as_json: bool,
) -> None:
    """Start rounds, with the coordinator's settings or with others."""
    given = {
        "rounds": rounds,
        "target_accuracy": target,
        "fraction": fraction,
        "interval": interval,
        "deadline": deadline,
        "expires": expires,
        "mode": mode,
        "minimum_cohort": minimum_cohort,
        "minimum_owners": minimum_owners,
        "bucket": bucket,
        "seed_holders": seed_holders,
        "suite": suite,
        "robust": robust,
    }
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for text in settings:
        _set(arguments, text)
    _show(ask(config, Command.ROUND_START, arguments, timeout=timeout), as_json)


def _set(arguments: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.UsageError(f"--set {text}: give KEY=VALUE")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        # Words need no quotes here, as the shell has eaten them.
        parsed = value
    *tables, name = key.split(".")
    for table in tables:
        arguments = arguments.setdefault(table, {})
        if not isinstance(arguments, dict):
            raise click.UsageError(f"--set {text}: {table} is a value, not a table")
    arguments[name] = parsed


def _simple(name: str, command: Command, text: str) -> None:
    @round_.command(name=name, help=text, epilog=output.example(f"fleetfed round {name}"))
    @control_options
    @output.json_option
    def run(config: Path, timeout: float, as_json: bool) -> None:
        _show(ask(config, command, timeout=timeout), as_json)


_simple("pause", Command.ROUND_PAUSE, "Open no further round; one that is open goes on to its end.")
_simple("resume", Command.ROUND_RESUME, "Go on where pause or abort stopped.")
_simple("status", Command.ROUND_STATUS, "Show what the coordinator is doing, and the last rounds.")


@round_.command(epilog=output.example('fleetfed round abort --reason "wrong learning rate"'))
@click.option("--reason", default="aborted by an operator", show_default=True, help="Kept with the round.")
@control_options
@output.json_option
def abort(reason: str, config: Path, timeout: float, as_json: bool) -> None:
    """End the open round without a new version, and pause."""
    _show(ask(config, Command.ROUND_ABORT, {"reason": reason}, timeout=timeout), as_json)


@round_.command(epilog=output.example("fleetfed round watch", "fleetfed round watch --json | jq .round"))
@click.option("--until-idle", is_flag=True, help="Stop when no further round is to come.")
@control_options
@output.json_option
def watch(until_idle: bool, config: Path, timeout: float, as_json: bool) -> None:
    """Follow the rounds as they run; Ctrl-C ends watching, not the rounds.

    What the broker kept of a coordinator that is away is shown, and said to be old; --until-idle waits until one runs.
    """
    if as_json:
        show: Callable[[Status], None] = lambda status: output.print_json(status, indent=None)  # noqa: E731
        _follow(config, timeout, until_idle, show)
    elif sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            _follow(config, timeout, until_idle, lambda status: live.update(_live(status), refresh=True))
    else:
        _follow(config, timeout, until_idle, lambda status: print(line(status), flush=True))


def _follow(config: Path, timeout: float, until_idle: bool, show: Callable[[Status], None]) -> None:
    async def run() -> None:
        async with ControlClient(OperatorConfig.load(config), timeout=timeout) as client:
            await follow(client, show, until_idle=until_idle)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


async def follow(
    client: ControlClient, show: Callable[[Status], None], *, until_idle: bool, timeout: float | None = None
) -> None:
    """Show every status, the retained one first; say so where nobody is there to say a newer one.

    Args:
        client: connected.
        show: takes a status.
        until_idle: return when the coordinator that runs now says that no further round is to come.
        timeout: seconds to wait for its answer; the client's own by default.
    """
    told = ""

    async def rests() -> bool:
        nonlocal told
        try:
            answer = await client.request(Command.ROUND_STATUS, timeout=timeout)
        except NoAnswerError as error:
            if str(error) != told:
                told = str(error)
                click.secho(f"The coordinator is away, its status is old: {told}", fg="yellow", err=True)
            return False
        told = ""
        return answer["state"] in _RESTING

    await rests()
    async for status in client.watch():
        show(status)
        # The broker keeps the last status for ever: only who runs now can say that nothing is to come.
        if until_idle and status.state in _RESTING and await rests():
            return


_RESTING = frozenset({"idle", "finished", "paused"})


def line(status: Status) -> str:
    """A status on one line."""
    last = status.history[-1] if status.history else {}
    accuracy = last.get("accuracy")
    shown = f", accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
    waits = f"; waits for {status.waiting_for}" if status.waiting_for else ""
    return (
        f"{status.state}: round {status.round}, version {status.version}, "
        f"{status.accepted} of {status.expected} devices{shown}{waits}"
    )


def _live(status: Status) -> Any:
    from rich.console import Group
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("devices"))
    bar.add_task(f"{status.state}, round {status.round}", total=max(1, status.expected), completed=status.accepted)
    waits = [Text(f"waits for {status.waiting_for}")] if status.waiting_for else []
    return Group(history_table(list(status.history)[-_HISTORY:]), bar, *waits)


def history_table(history: list[dict[str, Any]]) -> Any:
    """The last rounds as a rich table."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD)
    for name in ("round", "outcome", "mode", "version", "accuracy", "devices", "lost", "up", "patch", "seconds"):
        grid.add_column(name, justify="left" if name == "outcome" else "right")
    for row in history:
        grid.add_row(*history_row(row))
    return grid


def history_row(row: dict[str, Any]) -> tuple[str, ...]:
    """One round of the history as text, in the order of `history_table`."""
    accuracy = row.get("accuracy")
    seconds = row.get("seconds")
    return (
        str(row.get("round", "-")),
        str(row.get("outcome", "-")),
        str(row.get("mode", "-")),
        str(row.get("version") or "-"),
        f"{accuracy:.4f}" if isinstance(accuracy, float) else "-",
        str(row.get("contributors", "-")),
        lost(row),
        output.size(row["update_bytes"]) if "update_bytes" in row else "-",
        output.size(row["patch_bytes"]) if "patch_bytes" in row else "-",
        f"{seconds:.2f}" if isinstance(seconds, float) else "-",
    )


def lost(row: dict[str, Any]) -> str:
    """Committed devices that the version does not hold, and of how many sums they were."""
    contributors, committed = row.get("contributors"), row.get("committed")
    if not isinstance(contributors, int) or not isinstance(committed, int) or committed <= contributors:
        return "-"
    buckets = row.get("bucket_lost")
    return f"{committed - contributors} ({buckets} buckets)" if buckets else str(committed - contributors)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(result)
        return
    history = result.get("history", [])
    trust = result.get("trust") or {}
    hidden = {"history", "settings", "trust", *(() if result.get("waiting_for") else ("waiting_for",))}
    shown = {key: value for key, value in result.items() if key not in hidden}
    if trust:
        shown["trust"] = f"policy {trust['policy']}, current until {output.when(trust['expires'])}"
    output.pairs(shown, first=_FIRST)
    for warning in trust.get("warnings", ()):
        click.secho(f"  {warning}", fg="red" if trust["stale"] else "yellow", err=True)
    if history:
        from rich.console import Console

        Console(highlight=False).print(history_table(list(history)[-_HISTORY:]))
