"""What this device has spent of its privacy, per fleet: in how many noisy rounds it took part, and in which last.

A guarantee of differential privacy holds for so many participations, so far apart; nobody but the device can hold the
fleet to that. Rules (docs/protocol.md, "Privacy ledger"):

1. A participation is debited, and durable, before its update exists on disk or leaves. A crash may so debit what was
   never sent; nothing is ever sent that was not debited.
2. The same plan is debited once: after a crash the device may make the plan's one update again.
3. Only plans that promise differential privacy are debited. What is spent stays spent: no plan, policy or restart
   lowers it.
4. Where the policy has a floor, what all participations cost together stays within its epsilon and delta, whatever each
   plan says of itself.
5. What a coordinator said whom the owners list no more counts for the separation no longer, or whoever stole its key
   could keep the fleet out of noisy rounds for ever; as participations they stay.
6. A ledger that is damaged, missing or older than the record beside it stops the device; it never begins anew by
   itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

from fleetfed.device.disk import Disk
from fleetfed.shared.errors import LocalProtocolError, RemoteProtocolError, StorageError
from fleetfed.shared.trust.policy import PrivacyFloor
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.envelope import KeyId, digest
from fleetfed.shared.wire.fields import Count, Id
from fleetfed.shared.wire.messages import DeclineReason, Plan

_DIGEST: Final = 32
_FORMAT: Final = 1
_MOST_FLEETS: Final = 64
_MOST_SIGNERS: Final = 16
"""Coordinators' keys of which an account remembers the last round."""

_WHAT_TO_DO: Final = (
    "what this device has spent of its privacy is not known, so it takes part in nothing: issue a new identity under a "
    "new id, with an empty state folder"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What is spent in one fleet.

    Attributes:
        participations: noisy rounds that an update was made for.
        rounds: the last of them per coordinator's key (hex, empty where it is not known).
        last_plan: head hash of the last plan that was debited.
        most: participations that the last plan or the policy allowed, whichever was less; for people.
        cost: of all participations (`privacy.cost`).
    """

    participations: Count = 0
    rounds: Annotated[dict[str, Count], Length(0, _MOST_SIGNERS)] = field(default_factory=dict)
    last_plan: Annotated[bytes, Length(0, _DIGEST)] = b""
    most: Count = 0
    cost: Annotated[tuple[float, ...], Length(0, 5)] = ()

    @property
    def last_round(self) -> int:
        """The last noisy round that the device took part in; 0 for none."""
        return max(self.rounds.values(), default=0)

    def refusal(self, plan: Plan, plan_hash: bytes, floor: PrivacyFloor | None) -> tuple[DeclineReason, str] | None:
        """Why the device may not take part in ``plan``; None if it may.

        Args:
            plan: one without differential privacy is never refused here.
            plan_hash: head hash of the plan.
            floor: the policy's, whose bounds count where they are stricter than the plan's.
        """
        if plan.privacy is None or plan_hash == self.last_plan:
            return None
        most, apart = _bounds(plan, floor)
        if self.participations >= most:
            return DeclineReason.PRIVACY_BUDGET, f"took part {self.participations} times of {most}"
        since = plan.round - self.last_round
        if self.rounds and since < apart:
            return DeclineReason.TOO_SOON, f"{since} rounds after round {self.last_round}, {apart} are due"
        if floor is None:
            return None
        # Imported late, as below: a device in plain rounds carries nothing of this.
        from fleetfed.shared.privacy.cost import within

        if not within(self._with(plan), floor.max_epsilon, floor.max_delta):
            return (
                DeclineReason.PRIVACY_BUDGET,
                f"one more would cost more than the policy's epsilon {floor.max_epsilon:g}",
            )
        return None

    def _with(self, plan: Plan) -> tuple[float, ...]:
        from fleetfed.shared.privacy.cost import participation, together

        assert plan.privacy is not None
        return together(self.cost, participation(plan.privacy, plan.dimension))

    def debited(self, plan: Plan, plan_hash: bytes, floor: PrivacyFloor | None, signer: bytes = b"") -> Account:
        """The account once the plan's update is made; the caller has asked `refusal`.

        Args:
            plan, plan_hash, floor: as for `refusal`.
            signer: key of the coordinator that signed the plan.
        """
        most, _ = _bounds(plan, floor)
        if plan_hash == self.last_plan:
            return self
        latest = sorted(self.rounds.items(), key=lambda each: each[1])[1 - _MOST_SIGNERS :]
        return Account(
            participations=self.participations + 1,
            rounds={**dict(latest), signer.hex(): plan.round},
            last_plan=bytes(plan_hash),
            most=most,
            cost=self._with(plan),
        )

    def forget(self, believed: Callable[[KeyId], bool]) -> Account:
        """The account without the rounds of coordinators that are believed no more."""
        rounds = {key: last for key, last in self.rounds.items() if not key or believed(KeyId(bytes.fromhex(key)))}
        return self if len(rounds) == len(self.rounds) else replace(self, rounds=rounds)

    def allowed(self, plan: Plan, floor: PrivacyFloor | None) -> Account:
        """The same account, with what an acceptable plan allows in all."""
        return replace(self, most=_bounds(plan, floor)[0]) if plan.privacy is not None else self


def _bounds(plan: Plan, floor: PrivacyFloor | None) -> tuple[int, int]:
    """Most participations and fewest rounds apart: the stricter of plan and policy."""
    privacy = plan.privacy
    assert privacy is not None
    if floor is None:
        return privacy.max_participations, privacy.min_separation
    return (
        min(privacy.max_participations, floor.max_participations),
        max(privacy.min_separation, floor.min_separation),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Book:
    format: Annotated[int, Range(_FORMAT, _FORMAT)] = _FORMAT
    accounts: Annotated[dict[Id, Account], Length(0, _MOST_FLEETS)] = field(default_factory=dict)


class Ledger:
    """The ledger's file: replaced whole, with a digest.

    Args:
        path: of the file; one that is missing is an empty ledger.
        disk: how to write.
        spent: participations that it must hold at least, in all fleets together.

    Raises:
        StorageError: the file is damaged, missing or too old.
    """

    def __init__(self, path: Path, *, disk: Disk, spent: int) -> None:
        self._path = path
        self._disk = disk
        self._accounts = self._read()
        if self.spent < spent:
            raise StorageError(
                f"{path}: a privacy ledger with {self.spent} participations where {spent} were made; {_WHAT_TO_DO}"
            )

    @property
    def spent(self) -> int:
        """Participations in all fleets together."""
        return sum(account.participations for account in self._accounts.values())

    def account(self, fleet: str) -> Account:
        """What is spent in a fleet."""
        return self._accounts.get(fleet, Account())

    def keep(self, fleet: str, account: Account) -> None:
        """Make an account durable.

        Raises:
            LocalProtocolError: it says that less is spent than before.
        """
        before = self.account(fleet)
        if account.participations < before.participations or account.last_round < before.last_round:
            raise LocalProtocolError(f"{before} may not become {account}")
        self._write({**self._accounts, fleet: account})

    def forget(self, believed: Callable[[KeyId], bool]) -> bool:
        """Forget rounds of coordinators that are believed no more; return whether there were any."""
        accounts = {fleet: account.forget(believed) for fleet, account in self._accounts.items()}
        if accounts == self._accounts:
            return False
        self._write(accounts)
        return True

    def _write(self, accounts: dict[str, Account]) -> None:
        if len(accounts) > _MOST_FLEETS:
            raise LocalProtocolError(f"{self._path}: more than {_MOST_FLEETS} fleets")
        raw = codec.encode(_Book(accounts=accounts))
        temporary = self._path.with_name(f"{self._path.name}.new")
        self._disk.write(temporary, raw, digest(raw))
        self._disk.replace(temporary, self._path)
        self._disk.sync(self._path.parent)
        self._accounts = accounts

    def _read(self) -> dict[str, Account]:
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        if digest(raw[:-_DIGEST]) != raw[-_DIGEST:]:
            raise StorageError(f"{self._path}: the privacy ledger is damaged; {_WHAT_TO_DO}")
        try:
            return codec.decode(_Book, raw[:-_DIGEST], limit=limits.MAX_SMALL_MESSAGE).accounts
        except RemoteProtocolError as error:
            raise StorageError(f"{self._path}: {error}; a newer program may have written it") from error
