"""Presence of members whose broker is bridged: who is behind a link that is down is lost, whatever it said last.

A member that speaks with its own site's broker alone has its last will there; when the way from that broker to the node
above breaks, nobody is left to say so but the broker above, for the bridge: `Verb.LINK`. Both are unsigned and decide
only who is waited for (docs/protocol.md, rule 5). No I/O.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.messages import Life, Presence

_LINK: Final = {b"1": True, b"0": False, b"": None}


def parse_link(payload: bytes) -> bool | None:
    """Whether a bridge says that it is up; None for a retained word that was cleared: there is no bridge.

    Raises:
        RemoteProtocolError: `RejectReason.MALFORMED` if it is none of the three that Mosquitto says.
    """
    if payload not in _LINK:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"link {payload[:8]!r}")
    return _LINK[payload]


class Uplinks:
    """Puts the words of members and of their bridges together.

    Args:
        limit: most members that are remembered; of further ones the presence counts as it is.
    """

    def __init__(self, *, limit: int = limits.MAX_COHORT) -> None:
        self._limit = limit
        self._said: dict[str, Presence] = {}
        self._down: set[str] = set()

    def presence(self, member: str, presence: Presence | None) -> Presence | None:
        """Take what a member, or its will, says; None for a cleared one. Return what counts."""
        if presence is None:
            self._said.pop(member, None)
            return None
        before = self._said.get(member)
        # The will of a connection that a newer one has replaced: whoever is told ignores it.
        stale = presence.life is Life.LOST and before is not None and before.session != presence.session
        if not stale and (before is not None or len(self._said) < self._limit):
            self._said[member] = presence
        return self._counts(member, presence)

    def link(self, member: str, up: bool | None) -> Presence | None:
        """Take what the bridge of a member says, as `parse_link` reads it.

        Returns:
            what counts of the member now; None if it has said nothing yet.
        """
        if up is not False:
            self._down.discard(member)
        elif len(self._down) < self._limit:
            self._down.add(member)
        said = self._said.get(member)
        return None if said is None else self._counts(member, said)

    def _counts(self, member: str, said: Presence) -> Presence:
        # Who has stopped in good order is not waited for in any case.
        if member in self._down and said.life is Life.READY:
            return replace(said, life=Life.LOST)
        return said
