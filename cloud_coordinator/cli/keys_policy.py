"""`fleetfed keys policy`: the floor under every plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.cli.keys_trust import dir_option, finish, key_option, opened
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust import files
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.policy import Policy


@click.group(epilog=output.example("fleetfed keys policy show > policy.toml", "fleetfed keys policy set policy.toml"))
def policy() -> None:
    """Show or change what plans may not fall below."""


@policy.command(epilog=output.example("fleetfed keys policy show"))
@dir_option
@output.json_option
def show(directory: Path, as_json: bool) -> None:
    """Print the policy in force as the file that its owners signed."""
    _, owners = opened(directory)
    if as_json:
        output.print_json(owners.policy)
    else:
        print(files.render_policy(owners.policy), end="")


@policy.command(
    name="set",
    epilog=output.example(
        "fleetfed keys policy set policy.toml", "fleetfed keys policy set policy.toml --key targets-1.key"
    ),
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--card",
    "cards",
    multiple=True,
    help="Digest (hex) of a model card to allow beside those in the file; `fleetfed model show` names it.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="SHA-256 (hex) of a model to vouch for beside those in the file: largest_step does not bind the step to it.",
)
@key_option
@dir_option
@output.json_option
def set_(
    file: Path,
    cards: tuple[str, ...],
    models: tuple[str, ...],
    keys: tuple[Path, ...],
    directory: Path,
    as_json: bool,
) -> None:
    """Make FILE the next policy, with the next version number, and sign it with the targets keys at hand.

    Before you ask for more than before, see to it that the coordinator's settings keep it: devices refuse weaker plans.

    largest_step bounds, as a root mean square over all weights, how far one version may be from the one before; 0 for
    no bound. To choose it, let rounds run and take three times the largest `step` that `fleetfed model list --json`
    shows: too low, and the coordinator pauses before a step that devices would refuse; too high, and a stolen
    coordinator key can plant more. A model that was not made by a round (published, or rolled back further than the
    bound) needs its SHA-256 in `models` first.
    """
    keyring, owners = opened(directory)
    try:
        wanted = files.parse_policy(file.read_text(), where=str(file))
        wanted = dataclasses.replace(
            wanted,
            cards=(*wanted.cards, *(_hash(each, "--card") for each in cards)),
            models=(*wanted.models, *(_hash(each, "--model") for each in models)),
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if _same(wanted, owners.policy):
        raise ConfigError(f"{file}: this is the policy in force already")
    owners.stage_targets(now=unix_ms(), policy=wanted)
    missing = owners.sign([SigningKey.load(path) for path in keys])
    finish(keyring, owners, missing, as_json, policy=owners.policy.version + (1 if missing else 0))


def _same(one: Policy, other: Policy) -> bool:
    return dataclasses.replace(one, version=0) == dataclasses.replace(other, version=0)


def _hash(text: str, option: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ConfigError(f"{option} {text}: expected 64 hex digits")
    return digest
