"""Which devices a plan selects: drawn from the plan itself, so that every tier computes the same answer."""

from __future__ import annotations

from fleetfed.shared.wire.envelope import Digest, digest

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
