"""The coordinator and the fleet's trust metadata: signs what is current, publishes it, says what expires soon.

In a fleet without metadata (an identity without ``trust/root.json``) all of this does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.verifier import Verifier

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.keys.online import OnlineTrust

_log = logging.getLogger(__name__)

_DAY: Final = 86_400_000


class TrustDesk:
    """See the module.

    Args:
        state: the coordinator's state folder.
        identity: the coordinator's.
        folder: its identity folder.
        verifier: the coordinator's own; gets what is in force.
        clock: unix milliseconds.
        publish: publishes a bundle, retained.

    Raises:
        ConfigError: the pinned root is damaged.
    """

    def __init__(
        self,
        state: Path,
        identity: Identity,
        folder: Path,
        verifier: Verifier,
        *,
        clock: Callable[[], int],
        publish: Callable[[bytes], None],
    ) -> None:
        self._verifier = verifier
        self._key = identity.certificate.key_id
        self._clock = clock
        self._publish = publish
        self._told = -_DAY
        self._online: OnlineTrust | None = None
        if identity.root:
            # Imported late: fleets without metadata need no TUF.
            from fleetfed.cloud_coordinator.keys.online import OnlineTrust

            self._online = OnlineTrust(state, identity, folder, verifier)

    def start(self) -> None:
        """Sign what is in force, if that is due, before the first message is judged.

        Raises:
            ConfigError: keys are missing.
        """
        if self._online is None:
            return
        self._try(self._online.start)
        if not self._verifier.is_coordinator(self._key):
            _log.error("the owners do not list this coordinator's key: the fleet will refuse all that it says")
        self._tell()

    def next_deadline(self) -> int | None:
        """When to call `timer`."""
        return None if self._online is None else self._online.next_deadline()

    def timer(self) -> None:
        """Sign again if that is due."""
        if self._online is None or self._clock() < self._online.next_deadline():
            return
        if self._try(self._online.renew):
            self.publish()
        self._tell()

    def publish(self) -> None:
        """Publish what is in force."""
        if self._online is not None and self._online.bundle:
            self._publish(self._online.bundle)

    def offer(self, bundle: bytes) -> dict[str, Any]:
        """Take what owners or the enrolment service signed, and publish it; return what is in force then.

        Raises:
            ConfigError: this fleet has no metadata, or keys are missing.
            RemoteProtocolError: it is not good; nothing has changed.
        """
        if self._online is None:
            raise ConfigError(
                "this fleet has no trust metadata; the coordinator's identity folder has no trust/root.json"
            )
        self._online.offer(bundle, now=self._clock())
        self.publish()
        return self.status()

    def status(self) -> dict[str, Any]:
        """Versions, expiries and warnings; empty without metadata."""
        return {} if self._online is None else self._online.status(self._clock())

    def _try(self, work: Callable[..., bool]) -> bool:
        try:
            return work(now=self._clock())
        except RemoteProtocolError as error:
            _log.error("trust metadata cannot be called current: %s", error)
            return False

    def _tell(self) -> None:
        """Log what expires soon, once a day."""
        now = self._clock()
        if now - self._told >= _DAY:
            self._told = now
            for warning in self.status().get("warnings", ()):
                _log.warning("%s", warning)
