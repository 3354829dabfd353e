"""`fleetfed privacy`: plan what differential privacy costs; explain what the running settings promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.cli.control import ask, control_options
from fleetfed.shared.wire.messages import Command
from fleetfed.shared.wire.privacy import Mechanism

_FIRST = ("mechanism", "epsilon", "delta", "noise_multiplier")
_APART = frozenset({"adversaries", "warnings", "accuracy", "budgets"})
_PARAMETERS = 6_090


@click.group(
    epilog=output.example("fleetfed privacy plan --epsilon 8 --delta 1e-6 --rounds 200", "fleetfed privacy explain")
)
def privacy() -> None:
    """Plan and explain differential privacy."""


@privacy.command(
    epilog=output.example(
        "fleetfed privacy plan --epsilon 8 --delta 1e-6 --rounds 200 --devices 2000 --cohort 200",
        "fleetfed privacy plan --epsilon 4 --rounds 256 --mechanism matrix --band 16 --participations 16",
    )
)
@click.option("--epsilon", type=click.FloatRange(0.001, 1000), default=8.0, show_default=True, help="The budget.")
@click.option("--delta", type=click.FloatRange(1e-15, 0.01), default=1e-6, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 1_000_000), default=200, show_default=True)
@click.option(
    "--mechanism",
    type=click.Choice([each.value for each in Mechanism]),
    default=Mechanism.CENTRAL.value,
    show_default=True,
    help="Who adds the noise.",
)
@click.option("--devices", type=click.IntRange(1, 100_000_000), default=1000, show_default=True, help="Enrolled.")
@click.option("--cohort", type=click.IntRange(1, 100_000), default=100, show_default=True, help="In one round.")
@click.option("--sites", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Leaf gateways.")
@click.option(
    "--participations",
    type=click.IntRange(1, 1_000_000),
    help="Rounds that one device may take part in, ever.  [default: what few devices reach]",
)
@click.option("--separation", type=click.IntRange(1, 1_000_000), help="Rounds between two of them.  [default: band]")
@click.option("--band", type=click.IntRange(1, 100_000), help="With matrix: rounds that share noise.  [default: 8]")
@click.option("--honest", type=click.IntRange(2, 100_000), help="With skellam.  [default: four fifths of the cohort]")
@click.option("--model", "model", type=click.Path(path_type=Path, dir_okay=False), help="A model card, for its size.")
@click.option("--parameters", type=click.IntRange(1), help=f"Instead of a card.  [default: {_PARAMETERS}, digits]")
@click.option("--clip", type=click.FloatRange(1e-6, 1e6), default=1.0, show_default=True, help="Longest delta, L2.")
@click.option("--resolution", type=click.FloatRange(0.75, 1000), default=8.0, show_default=True, help="Levels.")
@output.json_option
def plan(
    epsilon: float,
    delta: float,
    rounds: int,
    mechanism: str,
    devices: int,
    cohort: int,
    sites: int,
    participations: int | None,
    separation: int | None,
    band: int | None,
    honest: int | None,
    model: Path | None,
    parameters: int | None,
    clip: float,
    resolution: float,
    as_json: bool,
) -> None:
    """Say what noise a budget needs, what it does to the signal, and who would learn what.

    Nothing is claimed for the chance that a device is not selected: who takes part is public here.
    """
    from fleetfed.cloud_coordinator.privacy import planner
    from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings

    size, tensors = _size(model, parameters)
    fleet = planner.Fleet(devices=devices, cohort=cohort, rounds=rounds, parameters=size, tensors=tensors, sites=sites)
    chosen = Mechanism(mechanism)
    width = (band or 8) if chosen is Mechanism.MATRIX else (band or 1)
    apart = separation or width
    most = participations or min(fleet.usual_participations(), -(-rounds // apart))
    settings = PrivacySettings(
        mechanism=chosen,
        epsilon=epsilon,
        delta=delta,
        participations=most,
        separation=apart,
        band=width,
        honest=(honest or max(cohort * 4 // 5, 2)) if chosen is Mechanism.SKELLAM else 0,
        sums=sites,
        clip=clip,
        resolution=resolution,
    )
    found = planner.plan(settings, fleet) | {"budgets": planner.compare(settings, fleet)}
    if as_json:
        output.print_json(found)
    else:
        _show(found)


def _size(model: Path | None, parameters: int | None) -> tuple[int, int]:
    if model is None:
        return parameters or _PARAMETERS, 6
    from fleetfed.shared.model.card import ModelCard

    card = ModelCard.decode(model.with_suffix(".card").read_bytes())
    return card.parameters, len(card.tensors)


def _show(found: dict[str, Any]) -> None:
    output.pairs({name: value for name, value in found.items() if name not in _APART}, first=_FIRST)
    known = found["accuracy"]
    lost = known["points_lost_at_most"]
    print(f"\naccuracy: {'unknown' if lost is None else f'about {lost:g} points lost'}, {known['basis']}\n")
    output.table(("who", "learns"), [(row["who"], row["learns"]) for row in found["adversaries"]])
    names = ("epsilon", "noise_multiplier", "noise_to_signal_run", "lane_bits")
    output.table([f"{name}>" for name in names], [[row[name] for name in names] for row in found["budgets"]])
    for text in found["warnings"]:
        print(f"warning: {text}")


@privacy.command(epilog=output.example("fleetfed privacy explain", "fleetfed privacy explain --json"))
@control_options
@output.json_option
def explain(config: Path, timeout: float, as_json: bool) -> None:
    """Say what the coordinator's rounds promise, what has been spent, and who has to be honest."""
    result = ask(config, Command.ROUND_STATUS, timeout=timeout).get("privacy", {})
    if as_json:
        output.print_json(result)
    elif not result:
        print("the rounds promise no differential privacy; see `fleetfed privacy plan` and [rounds.privacy]")
    else:
        output.pairs(result, first=_FIRST)
