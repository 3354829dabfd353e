"""Fleets and rounds to simulate: three gateways in two tiers, a few devices, plain or masked updates.

::

    broker 0 (site _ and s-3)                            broker 1 (sites s-1 and s-2)
    c-main, g-1 (above), g-3 -- d-4, d-5, d-7, d-8       g-1 (below) -- d-1, d-2;  g-2 (both) -- d-3, d-6
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetfed.shared.wire.messages import Mode

SITES = {"g-1": "s-1", "g-2": "s-2", "g-3": "s-3"}
BELOW = {site: gateway for gateway, site in SITES.items()}
DIRECT = {"g-1": "g-1", "g-2": "g-1", "g-3": "g-3"}
_HOMES = {1: "s-1", 2: "s-1", 3: "s-2", 4: "s-3", 5: "s-3", 6: "s-2", 7: "s-3", 8: "s-3"}


@dataclass(frozen=True, eq=False)
class Setting:
    """A fleet, and how its rounds run.

    Attributes:
        size: so many devices, ``d-1`` and so on.
        rounds: of `RoundSettings`, beside its times.
    """

    size: int
    rounds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def devices(self) -> dict[str, str]:
        """Device to site."""
        return {f"d-{number}": _HOMES[number] for number in range(1, self.size + 1)}

    @property
    def split(self) -> bool:
        """Whether updates are masked."""
        return self.rounds.get("mode") is Mode.SPLIT

    @property
    def minimum(self) -> int:
        """Fewest contributors to any sum that is revealed."""
        return int(self.rounds.get("minimum_cohort", 1))

    @property
    def helper(self) -> bool:
        """Whether there is a second seed holder."""
        return self.rounds.get("seed_holders", 1) == 2


_SPLIT = {"mode": Mode.SPLIT, "minimum_cohort": 2}
PLAIN = Setting(5)
"""A site of one device among them."""
SPLIT = Setting(7, _SPLIT)
"""Two sites fall below the minimum when one of their devices is missing, the third when two are."""
BUCKETS = Setting(8, {**_SPLIT, "bucket": 2})
"""The third site has two buckets when all are there."""
HELPED = Setting(7, {**_SPLIT, "seed_holders": 2})
