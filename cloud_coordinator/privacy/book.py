"""The durable side of differential privacy: what was spent, and what the next noise needs.

Written in the transaction that opens a round: the account with that round in it. A round that comes to nothing stays in
the account, because devices debited it too. Written in the transaction that stores a version: the name of the noise
state, an object as secret as the devices' data.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fleetfed.cloud_coordinator.privacy import accounting
from fleetfed.cloud_coordinator.privacy.accounting import Account, Segment
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState
from fleetfed.cloud_coordinator.privacy.noising import Noise
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings, privacy_of
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.store import NOISE, Store
from fleetfed.shared.errors import FleetFedError, RemoteProtocolError, StorageError
from fleetfed.shared.secure.kdf import Label, derive
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Plan
from fleetfed.shared.wire.privacy import Mechanism, Privacy

ACCOUNT: Final = "privacy"
"""Document: the `Account`."""
_SLACK: Final = 1e-6
"""Part by which rounding may carry a round beyond the budget."""


class PrivacyBudgetError(FleetFedError):
    """One more round would cost more than the budget; the message says what to do."""


class PrivacyBook:
    """See the module.

    Args:
        store, blobs: durable state.
        signer: id of the key that signs plans.
    """

    def __init__(self, store: Store, blobs: BlobStore, *, signer: bytes) -> None:
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._made: tuple[PrivacySettings, int, Privacy] | None = None
        self._old: bytes | None = None

    @staticmethod
    async def prepare(*settings: PrivacySettings | None) -> None:
        """Import in a thread what takes seconds, if any of these settings will need it."""
        if any(each is not None for each in settings):
            await asyncio.to_thread(accounting.load)

    def privacy_of(self, settings: PrivacySettings, dimension: int) -> Privacy:
        """What plans say; worked out once for the same settings.

        Raises:
            ConfigError: no noise keeps the budget, or dp-accounting is not installed.
        """
        if self._made is None or self._made[:2] != (settings, dimension):
            self._made = (settings, dimension, privacy_of(settings, dimension))
        return self._made[2]

    def account(self) -> Account:
        """What was spent.

        Raises:
            StorageError: it is damaged.
        """
        stored = self._store.document(ACCOUNT)
        if stored is None:
            return Account()
        try:
            return codec.decode(Account, stored, limit=len(stored))
        except RemoteProtocolError as error:
            raise StorageError(f"the stored privacy account is damaged: {error}") from error

    def check(self, plan: Plan, settings: PrivacySettings) -> None:
        """Refuse a round beyond the budget.

        Raises:
            PrivacyBudgetError: with what was spent, and what to do.
        """
        assert plan.privacy is not None
        now = self.account()
        then = now.after(self._segment(plan, plan.privacy), plan.round)
        cost = then.epsilon(plan.privacy.delta)
        if cost > settings.epsilon * (1 + _SLACK):
            raise PrivacyBudgetError(
                f"the privacy budget is spent: the rounds so far cost epsilon {now.epsilon(plan.privacy.delta):.4g} at "
                f"delta {plan.privacy.delta:g}, one more makes it {cost:.4g} of {settings.epsilon:g}; stop here, or "
                "raise rounds.privacy.epsilon and answer for it"
            )

    def spend(self, plan: Plan) -> dict[str, Any]:
        """Enter a round that is being opened; return what may be claimed from then on."""
        assert plan.privacy is not None
        after = self.account().after(self._segment(plan, plan.privacy), plan.round)
        self._store.put_document(ACCOUNT, codec.encode(after))
        return accounting.statement(plan.privacy, after, number=plan.round)

    def noise(self, plan: Plan, plan_hash: Digest, secret: bytes) -> Noise:
        """What the coordinator's noise of an open round is drawn from.

        Args:
            plan: of the round.
            plan_hash: its head hash.
            secret: of the round, stored with it and destroyed at its end.

        Raises:
            StorageError: the noise state is missing or damaged.
        """
        assert plan.privacy is not None
        state = None
        if plan.privacy.mechanism is Mechanism.MATRIX:
            name = self._store.document(NOISE)
            state = None if name is None else MatrixState.decode(self._blobs.get(name))
        return Noise(
            key=derive(secret, Label.NOISE, b"coordinator" + plan_hash),
            round=plan.round,
            state=state,
            # Under another key devices need not keep their separation from what the old one planned, so that noise of
            # its rounds may not be taken back in these.
            mechanism=f"{self._segment(plan, plan.privacy).name} {self._signer.hex()}",
        )

    def _segment(self, plan: Plan, privacy: Privacy) -> Segment:
        return Segment.of(privacy, plan.dimension, signer=self._signer)

    def keep(self, state: bytes | None) -> None:
        """Enter the object that holds the next round's noise state, in the transaction that stores the version."""
        if state is not None:
            before = self._store.document(NOISE)
            self._store.put_document(NOISE, state)
            self._old = before if before != state else None

    def forget(self) -> None:
        """Delete the state before the last; after the transaction in which it was replaced."""
        if self._old is not None:
            self._blobs.remove(self._old)
            self._old = None
