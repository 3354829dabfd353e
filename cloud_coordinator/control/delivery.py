"""Revocation lists to and from the coordinator, for the command lines of those who sign them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fleetfed.cloud_coordinator.control.client import ControlClient, OperatorConfig
from fleetfed.cloud_coordinator.control.errors import NoAnswerError
from fleetfed.shared.wire.messages import Command, Revocations


def list_in_force(operator: Path) -> Revocations | None:
    """The list that the fleet obeys, which somebody else may have signed; None also where nobody answers.

    Args:
        operator: ``operator.toml``.
    """

    async def ask() -> Revocations | None:
        async with ControlClient(OperatorConfig.load(operator)) as client:
            return await client.revocations()

    try:
        return asyncio.run(ask())
    except NoAnswerError:
        return None


def deliver_list(operator: Path | None, signed: bytes, *, again: str) -> tuple[bool, str]:
    """Send a signed list to the coordinator; return whether it has it, and what to tell the operator.

    Args:
        operator: ``operator.toml``; None: nothing is sent.
        signed: the list.
        again: the command that sends it later.

    Raises:
        RefusedError: the coordinator will not take it.
    """
    if operator is None:
        return False, f"Not sent to the coordinator: no --config was given. When it can be reached: {again}"
    path = operator

    async def send() -> None:
        async with ControlClient(OperatorConfig.load(path)) as client:
            await client.request(Command.KEYS_REVOKE, {"revocations": signed})

    try:
        asyncio.run(send())
    except NoAnswerError as error:
        # The list is signed and safe on disk; only its delivery is left.
        return False, f"Not delivered yet: {error}. When it can be reached: {again}"
    return True, "The coordinator has the new list and publishes it to every site."


def deliver_bundle(operator: Path, bundle: bytes) -> None:
    """Hand a part of the trust metadata to the coordinator, which signs it as current and publishes it.

    Raises:
        NoAnswerError: nobody answered.
        RefusedError: the coordinator will not take it.
    """

    async def send() -> None:
        async with ControlClient(OperatorConfig.load(operator)) as client:
            await client.request(Command.KEYS_PUBLISH, {"bundle": bundle})

    asyncio.run(send())
