"""Which devices a plan selects: drawn from the plan itself, so that every tier computes the same answer."""

from __future__ import annotations

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.envelope import Digest, digest
from fleetfed.shared.wire.messages import Eligibility

_SPAN = 2**64


def selected(plan: Digest, device: str, fraction: float) -> bool:
    """Whether the plan's fraction takes in ``device``.

    Args:
        plan: head hash of the plan, which covers its nonce.
        device: the device's id.
        fraction: probability, 0 to 1; 1 selects everybody.
    """
    draw = int.from_bytes(digest(b"ff-select" + plan + device.encode())[:8], "little")
    return draw < fraction * _SPAN


def takes(plan: Digest, device: str, eligibility: Eligibility) -> bool:
    """Whether a round takes ``device``: it is selected, and not quarantined.

    Args:
        plan: head hash of the plan.
        device: the device's id.
        eligibility: the plan's.
    """
    return device not in eligibility.quarantined and selected(plan, device, eligibility.fraction)


def check_taken(plan: Digest, device: str, eligibility: Eligibility) -> None:
    """Refuse whom a round does not take; arguments as for `takes`.

    Raises:
        RemoteProtocolError: `QUARANTINED` or `NOT_SELECTED`.
    """
    if device in eligibility.quarantined:
        raise RemoteProtocolError(RejectReason.QUARANTINED, device)
    if not selected(plan, device, eligibility.fraction):
        raise RemoteProtocolError(RejectReason.NOT_SELECTED, device)
