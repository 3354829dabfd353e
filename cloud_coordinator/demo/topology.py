"""The tree of a fleet: the coordinator's site at the top, gateways below it, devices at the leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import CLOUD_SITE

_REGIONS: Final = ("north", "south", "east", "west")
_LEVELS: Final = ("", "area", "zone", "land", "part", "half", "rim", "core")
MAX_TIERS: Final = len(_LEVELS)


@dataclass(frozen=True, slots=True)
class GatewayPlace:
    """One gateway: the site that it serves, and the site that it is a member of."""

    id: str
    site: str
    upstream: str
    level: int


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """One device and its site."""

    id: str
    site: str


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole tree; gateways leaves first."""

    gateways: tuple[GatewayPlace, ...]
    devices: tuple[DevicePlace, ...]

    @property
    def tiers(self) -> int:
        """Gateways between a device and the coordinator."""
        return 1 + max(gateway.level for gateway in self.gateways)


def plan(*, devices: int, gateways: int, tiers: int) -> Topology:
    """Lay out a tree.

    Args:
        devices: spread over the leaf gateways in turn.
        gateways: leaf gateways.
        tiers: gateways between a device and the coordinator; each level above the leaves has half as many.

    Raises:
        ConfigError: fewer devices than gateways, or more tiers than a plan allows.
    """
    if not 1 <= tiers <= MAX_TIERS:
        raise ConfigError(f"{tiers} tiers: give 1 to {MAX_TIERS}")
    if gateways < 1 or devices < gateways:
        raise ConfigError(f"{devices} devices behind {gateways} gateways: give each gateway at least one device")
    levels = [[_region(number) for number in range(gateways)]]
    for level in range(1, tiers):
        levels.append([f"{_LEVELS[level]}-{number + 1}" for number in range(-(-len(levels[-1]) // 2))])
    places = []
    for level, sites in enumerate(levels):
        for number, site in enumerate(sites):
            upstream = levels[level + 1][number // 2] if level + 1 < tiers else CLOUD_SITE
            places.append(GatewayPlace(f"g-{site}", site, upstream, level))
    width = max(2, len(str(devices)))
    leaves = levels[0]
    return Topology(
        tuple(places),
        tuple(DevicePlace(f"d-{n + 1:0{width}d}", leaves[n % len(leaves)]) for n in range(devices)),
    )


def _region(number: int) -> str:
    return _REGIONS[number] if number < len(_REGIONS) else f"region-{number + 1}"
