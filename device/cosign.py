"""What the own gateway says of the plans of a round: a device seals an update only for the one that it cosigned. Pure.

A cosignature may come before or after its plan and as often as the gateway likes. One round has one: whatever else the
gateway says of that round spoils it, and this device makes no update in it.
"""

from __future__ import annotations

from fleetfed.device.events import CosignArrived
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import KEY_SIZES
from fleetfed.shared.wire.messages import Plan


class Cosigns:
    """See the module."""

    def __init__(self) -> None:
        self._rounds: dict[int, CosignArrived | None] = {}

    def hear(self, cosign: CosignArrived, *, current: int) -> bool:
        """Remember a verified cosignature; return False where the gateway has said something else of the round.

        Args:
            cosign: verified.
            current: the round at hand; of all others only the one heard of last is remembered.
        """
        self._rounds = {round_: kept for round_, kept in self._rounds.items() if round_ in (current, cosign.round)}
        if cosign.round not in self._rounds:
            self._rounds[cosign.round] = cosign
            return True
        kept = self._rounds[cosign.round]
        if kept is not None and (kept.plan, kept.seal_key) == (cosign.plan, cosign.seal_key):
            return True
        self._rounds[cosign.round] = None
        return False

    def key(self, plan: Plan, plan_hash: Digest, now: int) -> bytes | None:
        """The gateway's key of the round, if it cosigned that plan, with a key of its suite, and its word is good."""
        kept = self._rounds.get(plan.round)
        if kept is None or kept.plan != plan_hash or (kept.expires and now > kept.expires):
            return None
        # The suite is in the plan that it cosigned: a key of another one is no way to fall behind that.
        if plan.split is None or len(kept.seal_key) != KEY_SIZES.get(plan.split.suite):
            return None
        return kept.seal_key

    def spoilt(self, round_: int, plan_hash: Digest) -> bool:
        """Whether the gateway cosigned another plan of the round, or more than one."""
        if round_ not in self._rounds:
            return False
        kept = self._rounds[round_]
        return kept is None or kept.plan != plan_hash
