"""What all commands that ask the coordinator share: their options, and one question with its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from fleetfed.cloud_coordinator.control.client import DEFAULT_TIMEOUT, ControlClient, OperatorConfig
from fleetfed.shared.wire.messages import Command

F = TypeVar("F", bound=Callable[..., Any])


def control_options(function: F) -> F:
    """The options ``--config`` and ``--timeout``."""
    function = click.option(
        "--timeout",
        type=click.FloatRange(0.1, 3600),
        default=DEFAULT_TIMEOUT,
        show_default=True,
        help="Seconds to wait for the broker, and again for the coordinator.",
    )(function)
    return click.option(
        "--config",
        "-c",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("operator.toml"),
        show_default=True,
        envvar="FLEETFED_CONFIG",
        help="operator.toml: an identity and a broker; also from $FLEETFED_CONFIG.",
    )(function)


def ask(
    path: Path, command: Command, arguments: Mapping[str, Any] | None = None, *, timeout: float = DEFAULT_TIMEOUT
) -> dict[str, Any]:
    """Connect, ask the coordinator one thing, and return its result.

    Raises:
        ConfigError: the operator's file or identity is wrong.
        NoAnswerError: nobody answered.
        RefusedError: the coordinator will not.
    """

    async def run() -> dict[str, Any]:
        async with ControlClient(OperatorConfig.load(path), timeout=timeout) as client:
            return await client.request(command, arguments)

    return asyncio.run(run())
