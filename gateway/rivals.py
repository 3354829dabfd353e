"""Other gateways that say that they serve our site. No I/O.

A site has one gateway, and the authority certifies no second; two of them would answer the same devices. Only what is
said live counts: a broker keeps for ever the last word of a gateway that went without a goodbye. So that a gateway
which starts learns of one that is there, the one that is there says its birth again, once per life of the other.

Nobody gives way. Presence is unsigned, and a gateway that stopped for it might leave its site with none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from fleetfed.shared.wire.messages import Life, Presence

_log = logging.getLogger(__name__)

_MOST: Final = 16


class Rivals:
    """See the module.

    Args:
        site: that we serve.
        serial: of our own certificate.
        revoked: whether a serial number is revoked.
    """

    def __init__(self, site: str, serial: int, revoked: Callable[[int], bool]) -> None:
        self._site = site
        self._serial = serial
        self._revoked = revoked
        self._there: dict[int, int] = {}

    def heard(self, presence: Presence, *, live: bool) -> bool:
        """Take a word of a node of our site; return whether to say our birth again.

        Args:
            presence: what was said.
            live: it was said just now, and is no copy that the broker had kept.
        """
        serial = presence.serial
        if serial in (0, self._serial):
            return False
        if presence.life is not Life.READY:
            if self._there.get(serial) == presence.session:
                del self._there[serial]
            return False
        if self._revoked(serial):
            if live:
                _log.warning("the broker lets in a gateway whose certificate %d was revoked: render its lists", serial)
            return False
        if not live:
            _log.warning(
                "the broker keeps the word of another gateway of site %s (certificate %d); if it still runs, stop it",
                self._site,
                serial,
            )
            return False
        if self._there.get(serial) == presence.session or len(self._there) >= _MOST:
            return False
        self._there[serial] = presence.session
        _log.error("%s", self.describe())
        return True

    @property
    def serials(self) -> tuple[int, ...]:
        """The certificates of those that are there."""
        return tuple(serial for serial in self._there if not self._revoked(serial))

    def describe(self) -> str:
        """What an operator should know and do; empty where we are alone."""
        serials = self.serials
        if not serials:
            return ""
        names = ", ".join(map(str, serials))
        return (
            f"another gateway serves site {self._site}, too (certificate {names}; `fleetfed keys list` says whose): "
            "stop one of them"
        )
