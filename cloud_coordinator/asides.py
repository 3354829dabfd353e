"""The quarantine as the database has it: what rounds tell of outliers, and what operators decide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from fleetfed.cloud_coordinator.quarantine import Aside, Quarantine, QuarantineConfig
from fleetfed.cloud_coordinator.storage.restore import own_message
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.messages import Proposal

QUARANTINE: Final = "quarantine"
"""Document: outliers and who is set aside."""
_SPOILT: Final = "it signed an update with a seal that does not open, or with another's seed"


class Asides:
    """See the module. Every change is part of the transaction around it.

    Args:
        store: the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self) -> Quarantine:
        """What is known.

        Raises:
            StorageError: it is damaged.
        """
        stored = self._store.document(QUARANTINE)
        if stored is None:
            return Quarantine()
        try:
            return codec.decode(Quarantine, stored, limit=len(stored))
        except RemoteProtocolError as error:
            raise StorageError(f"the stored quarantine is damaged: {error}") from error

    def devices(self) -> tuple[str, ...]:
        """Whom plans leave out."""
        return tuple(sorted(self.load().aside))

    def note_round(self, number: int, config: QuarantineConfig, *, now: int) -> tuple[str, ...]:
        """Take what the gateways told with the proposals of a round that is over; returns who is set aside now.

        A gateway may speak of whom it likes, so a device that is committed somewhere is no outlier.
        """
        exchanges = self._store.exchanges(number)
        committed = {member.device for exchange in exchanges for member in exchange.members}
        told: dict[str, tuple[float, str]] = {}
        for exchange in exchanges:
            proposal = own_message(exchange.proposal, Proposal)[0]
            told |= {name: (score, exchange.gateway) for name, score in proposal.outliers.items()}
        before = self.load()
        after = before.note(
            {name: each for name, each in told.items() if name not in committed},
            round=number,
            now=now,
            config=config,
        )
        if after != before:
            self._store.put_document(QUARANTINE, after.encode())
        return tuple(sorted(after.aside.keys() - before.aside.keys()))

    def put_spoilers(
        self, devices: Iterable[str], number: int, config: QuarantineConfig, *, now: int
    ) -> tuple[str, ...]:
        """Set aside whose seals do not open, at once: it is no matter of degree. Returns who is set aside now."""
        before = after = self.load()
        for device in sorted(devices if config.strikes else ()):
            if device not in after.aside and len(after.aside) < limits.MAX_QUARANTINED:
                after = after.put_aside(device, Aside(reason=_SPOILT, since=now, round=number))
        if after != before:
            self._store.put_document(QUARANTINE, after.encode())
        return tuple(sorted(after.aside.keys() - before.aside.keys()))

    def put_aside(self, device: str, *, reason: str, operator: str, round: int, now: int) -> dict[str, Any]:
        """An operator sets a device aside.

        Raises:
            ValueError: there is no room for more.
        """
        aside = Aside(reason=reason, since=now, round=round, by=operator)
        self._store.put_document(QUARANTINE, self.load().put_aside(device, aside).encode())
        return {"device": device, "quarantined": True, "reason": reason}

    def release(self, device: str) -> dict[str, Any]:
        """An operator lets a device back in.

        Raises:
            KeyError: it is not quarantined.
        """
        self._store.put_document(QUARANTINE, self.load().release(device).encode())
        return {"device": device, "quarantined": False}
