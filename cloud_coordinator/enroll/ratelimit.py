"""How often one address may ask; bounded in memory, with the time as an argument."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

_MOST: Final = 10_000
"""Addresses remembered; whoever has so many can ask as often as it likes, and still not guess 128 bits."""


class RateLimit:
    """Token buckets: ``per_minute`` requests at once, refilled evenly over a minute."""

    def __init__(self, per_minute: int) -> None:
        self._size = float(per_minute)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Addresses remembered now."""
        return len(self._buckets)

    def allows(self, address: str, now: float) -> bool:
        """Whether ``address`` may ask once more.

        Args:
            address: IPv4 or IPv6.
            now: seconds of a clock that never goes back.
        """
        name = _network(address)
        left, since = self._buckets.pop(name, (self._size, now))
        left = min(self._size, left + (now - since) * self._size / 60)
        granted = left >= 1
        self._buckets[name] = (left - 1 if granted else left, now)
        if len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)
        return granted


def _network(address: str) -> str:
    """One household has one IPv4 address, or 2^64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
