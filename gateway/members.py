"""Who is at the site: presence of devices and of the gateways one tier below, and the census of the subtree.

Presence is unsigned and decides only who is waited for (docs/protocol.md, rule 5). A will is the broker's word about a
connection that broke; one that names another session than the last birth speaks of a connection that was replaced
since and is ignored, as Sparkplug's bdSeq does. Who names a revoked certificate is not there: the broker refuses it by
then, and keeps its last word for ever. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.messages import Census, Life, MemberSummary, Presence
from fleetfed.shared.wire.topics import Kind

CENSUS_MEMBERS: Final = 400
"""Members named in one census, so that it fits one packet."""

_MAX_LEVEL: Final = 7
_AWAITED: Final = frozenset({Life.READY, Life.SLEEPING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What is known of one member.

    Attributes:
        life: its state.
        session: random per process of the member.
        since: unix milliseconds; when the state began, by the member's clock or ours for a will.
        software: name and version of its program.
        serial: of its certificate, as it says itself; 0 for unknown.
        census: of a gateway, the last it published.
    """

    life: Life
    session: int
    since: int
    software: str = ""
    serial: int = 0
    census: Census | None = None


class Members:
    """The site's members.

    Args:
        limit: most members of each kind that are remembered; more are refused as `OVERLOADED`.
    """

    def __init__(self, *, limit: int = limits.MAX_COHORT) -> None:
        self._limit = limit
        self._known: dict[Kind, dict[str, Member]] = {Kind.DEVICE: {}, Kind.GATEWAY: {}}
        self._revoked: frozenset[int] = frozenset()

    def presence(self, kind: Kind, member: str, presence: Presence, *, now: int) -> bool:
        """Take a retained presence or a will; return whether anything changed.

        Raises:
            RemoteProtocolError: `REPLAYED` for a stale will, `OVERLOADED` for too many members.
        """
        known = self._known[kind]
        old = known.get(member)
        serial = presence.serial
        if presence.life is Life.LOST and old is not None:
            if old.session != presence.session:
                raise RemoteProtocolError(RejectReason.REPLAYED, f"a will of {member}'s session before the last")
            # A will is older than the certificate that its device has renewed since.
            serial = old.serial
        if serial in self._revoked:
            return self.gone(kind, member)
        if old is None and len(known) >= self._limit:
            raise RemoteProtocolError(RejectReason.OVERLOADED, f"{len(known)} members of kind {kind.name}")
        if old is not None and (old.life, old.session, old.software, old.serial) == (
            presence.life,
            presence.session,
            presence.software or old.software,
            serial,
        ):
            return False
        # A will cannot carry its time or the labels of its birth.
        known[member] = Member(
            life=presence.life,
            session=presence.session,
            since=presence.since or now,
            software=presence.software or (old.software if old else ""),
            serial=serial,
            census=old.census if old else None,
        )
        return True

    def gone(self, kind: Kind, member: str) -> bool:
        """The retained presence was cleared: the member left the site for good. Return whether it was known."""
        return self._known[kind].pop(member, None) is not None

    def revoke(self, serials: frozenset[int]) -> list[tuple[Kind, str]]:
        """Take the revocation list in force: forget whose presence names a certificate on it; return whom."""
        self._revoked = serials - {0}
        void = [
            (kind, name)
            for kind, known in self._known.items()
            for name, member in known.items()
            if member.serial in self._revoked
        ]
        for kind, name in void:
            self.gone(kind, name)
        return void

    def census_of(self, gateway: str, census: Census, *, now: int) -> bool:
        """Take a verified census of a gateway below; return whether anything changed.

        Raises:
            RemoteProtocolError: `OVERLOADED` for too many gateways.
        """
        known = self._known[Kind.GATEWAY]
        old = known.get(gateway)
        if old is None:
            if len(known) >= self._limit:
                raise RemoteProtocolError(RejectReason.OVERLOADED, f"{len(known)} gateways")
            old = Member(life=Life.LOST, session=0, since=now)
        if old.census == census:
            return False
        known[gateway] = replace(old, census=census)
        return True

    def life(self, kind: Kind, member: str) -> Life | None:
        """The member's state; None if nothing was ever heard of it."""
        known = self._known[kind].get(member)
        return known.life if known else None

    def lives(self, kind: Kind) -> Iterator[tuple[str, Life]]:
        """Every member of a kind with its state, in the order in which they first came."""
        return ((name, member.life) for name, member in self._known[kind].items())

    def awaited_devices(self) -> Iterator[str]:
        """Devices that a round which opens now waits for: ready, or asleep on purpose."""
        return (name for name, member in self._known[Kind.DEVICE].items() if member.life in _AWAITED)

    def ready_gateways(self) -> Iterator[str]:
        """Gateways below that are ready."""
        return (name for name, member in self._known[Kind.GATEWAY].items() if member.life is Life.READY)

    @property
    def level(self) -> int:
        """0 with devices alone, else one more than the highest gateway below."""
        levels = [member.census.level if member.census else 0 for member in self._known[Kind.GATEWAY].values()]
        return min(_MAX_LEVEL, 1 + max(levels)) if levels else 0

    def census(self, site: str, *, model_version: int, round: int, answered: int, expected: int) -> Census:
        """Count the subtree: the own devices and what the gateways below counted."""
        own = self._known[Kind.DEVICE]
        below = [member.census for member in self._known[Kind.GATEWAY].values() if member.census]

        def lives(life: Life) -> int:
            return sum(member.life is life for member in own.values())

        summaries = [
            MemberSummary(id=name, site=site, life=member.life, since=member.since, software=member.software)
            # Only as many as are said: a site may have a hundred times more.
            for name, member in islice(own.items(), CENSUS_MEMBERS)
        ]
        summaries += [summary for census in below for summary in census.members]
        many = len(own) + len(summaries) - min(len(own), CENSUS_MEMBERS)
        return Census(
            site=site,
            level=self.level,
            devices=_bounded(len(own), (census.devices for census in below)),
            ready=_bounded(lives(Life.READY), (census.ready for census in below)),
            sleeping=_bounded(lives(Life.SLEEPING), (census.sleeping for census in below)),
            lost=_bounded(lives(Life.LOST), (census.lost for census in below)),
            members=tuple(summaries[:CENSUS_MEMBERS]),
            truncated=many > CENSUS_MEMBERS or any(census.truncated for census in below),
            model_version=model_version,
            round=round,
            answered=_bounded(answered, (census.answered for census in below if round and census.round == round)),
            expected=_bounded(expected, (census.expected for census in below if round and census.round == round)),
        )


def _bounded(own: int, below: Iterable[int]) -> int:
    """A sum that fits its field, whatever gateways below claim."""
    return min(own + sum(below), limits.MAX_TALLY)
