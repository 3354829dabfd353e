"""What is known of helpers: presence, which says whom to wait for, and the signed key that devices seal seeds to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import MessageKind, parse_head
from fleetfed.shared.wire.masking import MAX_HELPER_KEY, SEALED_BOX, SealKey, suite_of
from fleetfed.shared.wire.messages import Life, Presence

_MOST: Final = 16
"""Helpers that are remembered; presence is unsigned, so its number must be bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperKey:
    """A helper's newest signed key.

    Attributes:
        helper: its id.
        message: the `SealKey` message, byte for byte.
        order: by which the newer of two keys is known.
        expires: unix milliseconds; 0 for never.
        suite: that the key is of.
    """

    helper: str
    message: bytes
    order: tuple[int, int]
    expires: int
    suite: int = SEALED_BOX

    def lasts(self, until: int) -> bool:
        """Whether it is valid then."""
        return not self.expires or self.expires >= until


class Helpers:
    """See the module.

    Args:
        verifier: of the fleet.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._presences: dict[str, Presence] = {}
        self._keys: dict[str, HelperKey] = {}

    def presence(self, helper: str, presence: Presence | None) -> bool:
        """Take a helper's presence, None for a cleared one; return whether anything changed."""
        before = self._presences.get(helper)
        if presence is None:
            return self._presences.pop(helper, None) is not None
        if before is None and len(self._presences) >= _MOST:
            return False
        # The will of a connection that a newer one has replaced.
        stale = presence.life is Life.LOST and before is not None and before.session != presence.session
        if stale or presence == before:
            return False
        self._presences[helper] = presence
        return True

    def key(self, helper: str, message: bytes, *, now: int) -> bool:
        """Take a helper's key; return whether it is news.

        Raises:
            RemoteProtocolError: the first check that fails.
        """
        if not message:
            return self._keys.pop(helper, None) is not None
        if len(message) > MAX_HELPER_KEY:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(message)} bytes of key")
        body, head, _ = self._verifier.open(message, SealKey, kind=MessageKind.SEAL_KEY, now=now, sender=helper)
        if body.helper != helper:
            raise RemoteProtocolError(RejectReason.WRONG_SENDER, f"{helper} with the key of {body.helper}")
        key = HelperKey(
            helper=helper,
            message=message,
            order=(head.header.issued_at, head.header.sequence),
            expires=head.header.expires_at,
            suite=suite_of(body.seal_key),
        )
        before = self._keys.get(helper)
        if before is not None and key.order <= before.order:
            if key.message == before.message:
                return False
            raise RemoteProtocolError(RejectReason.REPLAYED, f"a key of {helper} that is older than its last")
        self._keys[helper] = key
        return True

    def fresh(self, *, now: int, until: int, suite: int = SEALED_BOX) -> HelperKey | None:
        """The newest key of a suite of a helper that is there, if it lasts until then and its bearer is not revoked."""
        there = [key for key in self._there() if key.suite == suite]
        found = [key for key in there if key.lasts(until) and self._trusted(key, now)]
        return max(found, key=lambda key: key.order, default=None)

    @property
    def ready(self) -> bool:
        """Whether a helper is there with a key, fresh or not."""
        return bool(self._there())

    def _there(self) -> list[HelperKey]:
        return [
            key
            for name, key in sorted(self._keys.items())
            if name in self._presences and self._presences[name].life is Life.READY
        ]

    def _trusted(self, key: HelperKey, now: int) -> bool:
        try:
            self._verifier.certificate(parse_head(key.message).certificate, now=now)
        except RemoteProtocolError:
            return False
        return True
