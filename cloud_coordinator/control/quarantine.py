"""Operators' commands about devices that are set aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleetfed.cloud_coordinator.control.errors import CommandError
from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.topics import check_id

Change = Callable[[], dict[str, Any]]
"""Changes the state, in the transaction around it."""


def put_aside(coordinator: Coordinator, device: str, *, reason: str, operator: str) -> Change:
    """Set a device aside from the next plan on.

    Raises:
        CommandError: no device's id, quarantined already, or no room for more.
    """
    try:
        check_id(device)
    except LocalProtocolError as error:
        raise CommandError("invalid", str(error)) from error
    asides = coordinator.book.asides
    aside = asides.devices()
    if device in aside:
        raise CommandError("already_quarantined", f"{device} is quarantined; see `fleetfed fleet quarantine`")
    if len(aside) >= limits.MAX_QUARANTINED:
        raise CommandError("quarantine_full", f"{len(aside)} devices are quarantined already; revoke some instead")
    return lambda: asides.put_aside(
        device, reason=reason, operator=operator, round=coordinator.machine.last_round, now=coordinator.clock()
    )


def release(coordinator: Coordinator, device: str) -> Change:
    """Let a device take part again from the next plan on.

    Raises:
        CommandError: it is not quarantined.
    """
    asides = coordinator.book.asides
    if device not in asides.devices():
        raise CommandError("not_quarantined", f"{device} is not quarantined; see `fleetfed fleet quarantine`")
    return lambda: asides.release(device)
