"""What is wanted where something is refused: it is counted with its reason, and its sender is told. Pure."""

from __future__ import annotations

from typing import Any

from fleetfed.gateway import events as ev
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.topics import Kind


def refuse_device(event: ev.UpdateArrived | ev.DeclineArrived, error: RemoteProtocolError) -> list[Any]:
    """A device's update or decline, with why."""
    return [
        ev.Refused(what=f"update of {event.device}", reason=error.reason, detail=error.detail),
        ev.SendReceipt(
            kind=Kind.DEVICE,
            member=event.device,
            message_id=event.message_id,
            head=event.head,
            reason=error.reason,
            detail=error.detail,
        ),
    ]


def refuse_gateway(event: ev.ChildProposed | ev.ChildRevealed, reason: RejectReason, detail: str) -> list[Any]:
    """A proposal or reveal of a gateway below, with why."""
    return [
        ev.Refused(what=f"{type(event).__name__} of {event.gateway}", reason=reason, detail=detail),
        ev.SendReceipt(
            kind=Kind.GATEWAY,
            member=event.gateway,
            message_id=event.message_id,
            head=event.head,
            reason=reason,
            detail=detail,
        ),
    ]
