"""What the coordinator knows of its fleet from presence and censuses: decides who is waited for, nothing more. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Final

from fleetfed.cloud_coordinator.events import FleetChanged
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.messages import Census, Life, MemberSummary, Presence

MAX_GATEWAYS: Final = 10_000
"""Direct gateways that are remembered; presence is unsigned, so its number must be bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the devices of an open round are."""

    accepted: int
    expected: int


class Fleet:
    """The direct gateways with their last words."""

    def __init__(self) -> None:
        self.presences: dict[str, Presence] = {}
        self.censuses: dict[str, Census] = {}
        self._serials: dict[str, int] = {}
        self._expelled: set[str] = set()

    def presence(self, gateway: str, presence: Presence | None) -> bool:
        """Take a gateway's presence, None for a cleared one; return whether anything changed."""
        before = self.presences.get(gateway)
        if presence is None:
            return self.presences.pop(gateway, None) is not None
        if before is None and len(self.presences) >= MAX_GATEWAYS:
            return False
        # The will of a connection that a newer one has replaced (as Sparkplug's bdSeq).
        stale = presence.life is Life.LOST and before is not None and before.session != presence.session
        if stale or presence == before:
            return False
        self.presences[gateway] = presence
        return True

    def census(self, gateway: str, census: Census, serial: int = 0) -> bool:
        """Take a gateway's verified census, and its certificate's serial; return whether anything changed."""
        self._expelled.discard(gateway)
        if self.censuses.get(gateway) == census:
            return False
        if gateway not in self.censuses and len(self.censuses) >= MAX_GATEWAYS:
            return False
        self.censuses[gateway] = census
        self._serials[gateway] = serial
        return True

    def revoke(self, serials: Container[int]) -> bool:
        """Expel the gateways of revoked certificates; return whether anything changed."""
        revoked = [gateway for gateway, serial in self._serials.items() if serial in serials]
        expelled = [self.expel(gateway) for gateway in revoked]
        return any(expelled)

    def expel(self, gateway: str) -> bool:
        """Forget a gateway whose certificate was revoked; return whether anything changed.

        The broker refuses its words by then, its last among them: what it retained says for ever that it is ready.
        """
        self._serials.pop(gateway, None)
        known = self.censuses.pop(gateway, None) is not None or gateway in self.presences
        if gateway in self._expelled:
            return False
        # Also one that nothing is known of yet: a broker may deliver what it retained in any order.
        if known or len(self._expelled) < MAX_GATEWAYS:
            self._expelled.add(gateway)
        return known

    def life(self, gateway: str) -> Life:
        """A gateway's state; lost where it never said anything, disconnected where it was revoked."""
        if gateway in self._expelled:
            return Life.DISCONNECTED
        presence = self.presences.get(gateway)
        return Life.LOST if presence is None else presence.life

    def summary(self) -> FleetChanged:
        """What the machine is told."""
        ready = frozenset(name for name in self.presences if self.life(name) is Life.READY)
        return FleetChanged(
            gateways=ready,
            stopped=frozenset(name for name in self.presences if self.life(name) is Life.DISCONNECTED),
            devices=_total(c.ready + c.sleeping for name, c in self.censuses.items() if name in ready),
            known=_total(census.devices for census in self.censuses.values()),
        )

    @property
    def tiers(self) -> int:
        """Gateways between a device and the coordinator, at most."""
        return min(1 + max((census.level for census in self.censuses.values()), default=0), 8)

    def progress(self, round: int) -> Progress:
        """How far the round is."""
        current = [census for census in self.censuses.values() if census.round == round]
        return Progress(accepted=_total(c.answered for c in current), expected=_total(c.expected for c in current))

    def members(self) -> dict[str, tuple[str, MemberSummary]]:
        """Every device that a census names: direct gateway and summary, by id."""
        return {member.id: (name, member) for name, census in self.censuses.items() for member in census.members}


def _total(counts: Iterable[int]) -> int:
    """A sum that fits its field, whatever gateways claim."""
    return min(sum(counts), limits.MAX_TALLY)
