"""How private a demo is: what is asked for, what the tree allows, and who could have learned what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fleetfed.cloud_coordinator.demo.topology import Topology
from fleetfed.shared.errors import ConfigError


class Level(StrEnum):
    """What ``--privacy`` takes."""

    PLAIN = "plain"
    """Gateways read updates."""
    SPLIT = "split"
    """Masked updates: a gateway holds vectors, the coordinator seeds."""
    HELPER = "helper"
    """The same with a second seed holder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """What a demo does.

    Attributes:
        level: in force.
        minimum_cohort: fewest devices in a sum that is revealed; 0 in plain mode.
        note: why it is not what a demo does by default; empty otherwise.
    """

    level: Level
    minimum_cohort: int = 0
    note: str = ""

    @property
    def helper(self) -> bool:
        """Whether a helper runs."""
        return self.level is Level.HELPER

    def rounds(self, tree: Topology) -> Mapping[str, Any]:
        """What it adds to the coordinator's ``[rounds]``."""
        if self.level is Level.PLAIN:
            return {}
        return {
            "mode": "split",
            "minimum_cohort": self.minimum_cohort,
            "seed_holders": 2 if self.helper else 1,
            # Masked words do not compress: lanes no wider than this fleet needs.
            "cohort_cap": max(len(tree.devices), 2),
        }

    def who_learned_what(self) -> str:
        """One line for the summary."""
        match self.level:
            case Level.PLAIN:
                return (
                    "Privacy: plain. Every gateway could read its devices' updates; the coordinator, sums per gateway."
                )
            case Level.SPLIT:
                both = "A gateway and the coordinator together could have read its updates"
                other = f"{both} (--privacy helper adds a third party)."
            case Level.HELPER:
                other = "Gateway, coordinator and helper would all have had to work together to read an update."
        return (
            f"Privacy: split. Gateways saw uniform words, the coordinator sums of {self.minimum_cohort} devices or "
            f"more, the broker who sent when. {other}"
        )


def choose(asked: str, tree: Topology, *, fraction: float) -> Privacy:
    """What to do in this tree.

    Args:
        asked: of `Level`, or empty for split mode wherever it is possible.
        tree: who there is.
        fraction: of the devices that a round takes.

    Raises:
        ConfigError: a site is too small for what is asked.
    """
    sites = Counter(device.site for device in tree.devices)
    site, smallest = min(sites.items(), key=lambda item: item[1])
    if asked == Level.PLAIN:
        return Privacy(level=Level.PLAIN)
    if smallest < 2:
        alone = f"the site {site} has one device, whose sum would be its update"
        if not asked:
            return Privacy(level=Level.PLAIN, note=f"Updates are not masked: {alone}; give more --devices")
        raise ConfigError(f"--privacy {asked}: {alone}; give at least {2 * len(sites)} devices, or fewer --gateways")
    # Devices are drawn one by one: half of those expected leaves room for chance.
    minimum = max(2, int(smallest * fraction) if fraction == 1 else int(smallest * fraction / 2))
    return Privacy(level=Level(asked or Level.SPLIT), minimum_cohort=minimum)
