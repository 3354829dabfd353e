"""The secret of a round's seal key: made and stored before the plan leaves, gone from the disk when the round is over.

Whoever has it can open every mask seed of the round. So it lives in a table of its own, which is overwritten when a row
is deleted (SQLite's ``secure_delete``), and the write-ahead log is emptied after that: a copy of the database that is
taken later holds nothing that opens what was recorded earlier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.secure.kdf import KEY_SIZE
from fleetfed.shared.wire.masking import SEALED_BOX

_log = logging.getLogger(__name__)


class Seals:
    """See the module.

    Args:
        store: the database.
        randomness: returns so many unpredictable bytes.
    """

    def __init__(self, store: Store, randomness: Callable[[int], bytes]) -> None:
        self._store = store
        self._randomness = randomness
        # A process before us may have died between the deletion and the emptying of the log.
        self._due = True

    def make(self, suite: int = SEALED_BOX) -> SealSecret:
        """A fresh secret, stored nowhere yet.

        Raises:
            RemoteProtocolError: `UNKNOWN_SUITE`: a library is missing.
        """
        return SealSecret.from_bytes(self._randomness(KEY_SIZE), suite)

    def keep(self, number: int, secret: SealSecret) -> None:
        """Store the secret of round ``number``; durable with the transaction around the call."""
        self._store.add_seal(number, secret.encode())

    def of(self, number: int, suite: int = SEALED_BOX) -> SealSecret:
        """The secret of an open round, whose plan says the suite.

        Raises:
            StorageError: it is not here, or the library of its suite is not here any more.
        """
        secret = self._store.seal(number)
        if secret is None:
            raise StorageError(
                f"the seal secret of round {number} is missing although the round is open; "
                "restore the state folder from a backup of this round"
            )
        try:
            return SealSecret.from_bytes(secret, suite)
        except RemoteProtocolError as error:
            raise StorageError(f"the open round {number} cannot go on: {error}") from error

    def destroy(self, *, but: int = 0) -> None:
        """Delete every secret, or all but that of round ``but``; `wipe` follows once that is durable."""
        if self._store.drop_seals(but=but):
            self._due = True

    def wipe(self) -> None:
        """Leave no trace of deleted secrets; to be called outside of any transaction, does nothing twice.

        Whatever keeps the log from being emptied now, the next end of a round, or start, tries it again.
        """
        if self._due:
            self._due = False
            if not self._store.wipe():
                _log.warning(
                    "another program reads the database, so its log still holds the secret of the round that ended; "
                    "close that program: the log is emptied when the next round ends, or at the next start"
                )
