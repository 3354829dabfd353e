"""The durable side of the open round: signs and stores its plan, its commits, its sums and its end.

`service` decides nothing here either: `state` says what is to be stored, this says how, and every method is part of the
transaction around it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from fleetfed.cloud_coordinator import events as ev
from fleetfed.cloud_coordinator.asides import Asides
from fleetfed.cloud_coordinator.config import CoordinatorConfig, RoundSettings
from fleetfed.cloud_coordinator.control import report
from fleetfed.cloud_coordinator.privacy.book import PrivacyBook, PrivacyBudgetError
from fleetfed.cloud_coordinator.privacy.noising import Noise
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings
from fleetfed.cloud_coordinator.proposals import PlanInForce
from fleetfed.cloud_coordinator.publish import PLAN
from fleetfed.cloud_coordinator.round import Round
from fleetfed.cloud_coordinator.secure.helper import HelperKey
from fleetfed.cloud_coordinator.secure.seals import Seals
from fleetfed.cloud_coordinator.secure.unmask import Unmasked
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord, RevealResult, RoundRecord, VersionRecord
from fleetfed.cloud_coordinator.storage.restore import own_message, restore_round
from fleetfed.cloud_coordinator.storage.rows import GOOD
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.plans import make_plan
from fleetfed.cloud_coordinator.training.robust import Robust, RobustRule
from fleetfed.cloud_coordinator.training.step import ring_of
from fleetfed.cloud_coordinator.training.sums import RoundSum, encode_parts
from fleetfed.shared.aggregate.accumulator import Partial
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import Digest, KeyId, MessageKind, parse_head
from fleetfed.shared.wire.masking import SEALED_BOX, Split
from fleetfed.shared.wire.messages import Commit, Mode, Outcome, Plan, Proposal, Receipt, RoundEnd

_log = logging.getLogger(__name__)

NO_HELPER = (
    "no helper with a key that is of the rounds' suite and lasts until the round ends; start `fleetfed-helper run`, or "
    "set seed_holders = 1"
)
"""What an operator reads while rounds wait for the helper."""
_ASIDE = "round %d: %s is quarantined; see `fleetfed fleet quarantine`"
_ANY_HELPER = b"\0"
"""Stands for a helper's key where only the rest of a plan is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revealed:
    """What a reveal brought, ready to be stored.

    Attributes:
        stored: bytes from which a restart reads the sums.
        parts: the sums.
        result: what it came to.
        refusal: whether the gateway itself says that there is no sum, and is right to.
        bad: members whose seeds the helper cannot use.
    """

    stored: bytes
    parts: tuple[Partial, ...]
    result: RevealResult = GOOD
    refusal: bool = False
    bad: tuple[str, ...] = ()

    @classmethod
    def none(cls, reason: RejectReason) -> Revealed:
        """Of a gateway that follows its commit in nothing."""
        return cls(stored=b"", parts=(), result=RevealResult(failed=reason.value), refusal=True)

    @classmethod
    def masked(cls, unmasked: Unmasked | None, failed: RejectReason | None, bad: tuple[str, ...] = ()) -> Revealed:
        """Of a reveal in split mode; None for one that failed."""
        if unmasked is None:
            result = RevealResult(failed="" if failed is None else failed.value)
            return cls(stored=b"", parts=(), result=result, bad=bad)
        result = RevealResult(buckets=unmasked.buckets, buckets_lost=unmasked.buckets_lost, lost=unmasked.lost)
        return cls(stored=encode_parts(unmasked.parts), parts=unmasked.parts, result=result)


class RoundBook:
    """See the module.

    Args:
        config: the settings.
        store, blobs: durable state.
        verifier: of the fleet, with the policy that plans must keep.
        sign: signs as the coordinator: kind, body, time, round.
        signer: id of the key that it signs with.
        randomness: returns so many unpredictable bytes.
        rejected: counts refusals.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        store: Store,
        blobs: BlobStore,
        verifier: Verifier,
        sign: Callable[[MessageKind, object, int, int], Message],
        signer: KeyId,
        randomness: Callable[[int], bytes],
        rejected: Counters,
    ) -> None:
        self.current: PlanInForce | None = None
        self.seals = Seals(store, randomness)
        self.privacy = PrivacyBook(store, blobs, signer=signer)
        self.asides = Asides(store)
        self._config = config
        self._store = store
        self._verifier = verifier
        self._sign = sign
        self._randomness = randomness
        self._rejected = rejected
        self._sum: RoundSum | None = None
        self._secret: SealSecret | None = None
        self._settings = config.rounds

    # --- Opening ------------------------------------------------------------------------------------------------------

    def check(self, settings: RoundSettings, *, base: VersionRecord, card: ModelCard, tiers: int, now: int) -> None:
        """Refuse settings of which no plan can be made that this fleet's policy allows.

        Raises:
            RemoteProtocolError: `BELOW_POLICY`, `STALE_TRUST`, `WRONG_SHAPE` or `UNKNOWN_SUITE`.
            ConfigError: differential privacy that cannot be had.
            PrivacyBudgetError: not one more round.
        """
        seal = self.seals.make(settings.suite) if settings.mode is Mode.SPLIT else None
        last = next(iter(self._store.rounds(limit=1)), None)
        number = 1 if last is None else last.number + 1
        self._plan(settings, base=base, card=card, tiers=tiers, now=now, number=number, seal=seal, helper=_ANY_HELPER)

    def open(
        self,
        instruction: ev.OpenRound,
        *,
        base: VersionRecord,
        card: ModelCard,
        tiers: int,
        helper: Callable[[int, int], HelperKey | None],
        now: int,
    ) -> ev.RoundOpened | ev.OpenRefused:
        """Sign and store a round's plan and, in split mode, its seal secret.

        Args:
            instruction: the round.
            base: the version that devices start from.
            card: its card.
            tiers: gateways between a device and the coordinator, at most.
            helper: returns a helper's key that lasts until a time, of a suite.
            now: unix milliseconds.
        """
        settings = instruction.settings
        key = helper(now + round(settings.expires * 1000), settings.suite) if settings.needs_helper else None
        if settings.needs_helper and key is None:
            return ev.OpenRefused(reason=NO_HELPER, passing=True)
        try:
            seal = self.seals.make(settings.suite) if settings.mode is Mode.SPLIT else None
            # In plain rounds it seals nothing, and the noise alone is drawn from it.
            secret = self.seals.make() if seal is None and settings.privacy is not None else seal
            plan = self._plan(
                settings,
                base=base,
                card=card,
                tiers=tiers,
                now=now,
                number=instruction.number,
                seal=seal,
                helper=b"" if key is None else key.message,
            )
        except RemoteProtocolError as error:
            return self._refused(error)
        except (ConfigError, PrivacyBudgetError) as error:
            _log.error("no round is opened: %s", error)
            return ev.OpenRefused(reason=str(error))
        message = self._sign(MessageKind.PLAN, plan, now, plan.round)
        encoded = message.encode()
        with self._store.transaction():
            promised = {} if plan.privacy is None else {report.PRIVACY: self.privacy.spend(plan)}
            self._store.open_round(
                RoundRecord(
                    number=plan.round,
                    plan_hash=message.head.hash,
                    plan=encoded,
                    base=base.version,
                    awaited=instruction.awaited,
                    opened=now,
                    expires=plan.expires,
                    report={"mode": plan.mode.value} | promised,
                )
            )
            if secret is not None:
                self.seals.keep(plan.round, secret)
            self._store.put_document(PLAN, encoded)
            self._store.forget_exchanges(below=plan.round - self._config.storage.keep_rounds)
        self._enter(plan, message.head.hash, card, secret, settings)
        _log.info("round %d: opened, waiting for %s", plan.round, ", ".join(sorted(instruction.awaited)))
        return ev.RoundOpened(plan=message.head.hash, expires=plan.expires)

    def _plan(
        self,
        settings: RoundSettings,
        *,
        base: VersionRecord,
        card: ModelCard,
        tiers: int,
        now: int,
        number: int,
        seal: SealSecret | None,
        helper: bytes,
    ) -> Plan:
        split, privacy = None, None
        if settings.privacy is not None:
            privacy = self.privacy.privacy_of(settings.privacy, card.parameters)
        if seal is not None:
            split = Split(
                suite=seal.suite,
                seal_key=seal.public,
                helper=helper if settings.needs_helper else b"",
                minimum_cohort=settings.minimum_cohort,
                minimum_owners=settings.minimum_owners,
                bucket=settings.bucket,
            )
        try:
            plan = make_plan(
                settings,
                number=number,
                base=base,
                dimension=card.parameters,
                tiers=tiers,
                now=now,
                nonce=self._randomness(16),
                split=split,
                policy=self._verifier.policy.version,
                privacy=privacy,
                quarantined=self.asides.devices(),
                card=card,
            )
        except ValueError as error:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, str(error)) from error
        ring_of(plan, card)
        if settings.privacy is not None:
            self.privacy.check(plan, settings.privacy)
        self._verifier.check_plan(plan, now=now)
        return plan

    def _refused(self, error: RemoteProtocolError) -> ev.OpenRefused:
        self._rejected.add(error.reason)
        _log.error("no round is opened: %s", error)
        # Newer trust metadata may come by itself; a setting does not change by itself.
        return ev.OpenRefused(reason=explain(error), passing=error.reason is RejectReason.STALE_TRUST)

    def _enter(
        self, plan: Plan, plan_hash: Digest, card: ModelCard, secret: SealSecret | None, settings: RoundSettings
    ) -> None:
        ring = ring_of(plan, card)
        seal = secret if plan.mode is Mode.SPLIT else None
        self.current = PlanInForce(plan=plan, hash=plan_hash, ring=ring, secret=seal)
        self._secret = secret
        self._settings = settings
        apart = settings.robust is not Robust.NONE
        self._sum = RoundSum(ring, capacity=plan.quorum.cohort_cap, apart=apart)

    def restore(self, record: RoundRecord, card: ModelCard, settings: RoundSettings) -> Round:
        """Go on with an open round.

        Args:
            record: of the round.
            card: of the version that devices start from.
            settings: that it was opened with.

        Raises:
            StorageError: what is stored is damaged.
        """
        plan, head = own_message(record.plan, Plan)
        secretive = plan.mode is Mode.SPLIT or plan.privacy is not None
        suite = SEALED_BOX if plan.split is None else plan.split.suite
        secret = self.seals.of(record.number, suite) if secretive else None
        self._enter(plan, head.hash, card, secret, settings)
        assert self.current is not None
        assert self._sum is not None
        return restore_round(self._store, record, current=self.current, total=self._sum)

    # --- The exchange with a gateway ----------------------------------------------------------------------------------

    def commit(self, instruction: ev.StoreCommit, proposal: bytes, now: int) -> ev.CommitStored:
        """Sign a commit and store it with its proposal."""
        current = self.current
        assert current is not None
        gateway = instruction.message.gateway
        commit = Commit(
            plan=current.hash,
            gateway=gateway,
            proposal=instruction.message.head,
            members=b"".join(sorted(member.message_id for member in instruction.members)),
            excluded={name: reason.value for name, reason in instruction.excluded.items()},
            nonce=self._randomness(16) if current.plan.mode is Mode.SPLIT else bytes(16),
        )
        signed = self._sign(MessageKind.COMMIT, commit, now, current.plan.round)
        for reason in instruction.excluded.values():
            self._rejected.add(reason)
        self._store.add_exchange(
            ExchangeRecord(
                round=current.plan.round,
                gateway=gateway,
                proposal_head=instruction.message.head,
                proposal=proposal,
                commit_head=signed.head.hash,
                commit=signed.encode(),
                members=instruction.members,
                declined=instruction.declined,
                rejected=instruction.rejected,
                excluded=report.tally(reason.value for reason in instruction.excluded.values()),
            )
        )
        bad = {name for name, reason in instruction.excluded.items() if reason is RejectReason.BAD_BOX}
        if bad:
            self._set_aside(self._senders(own_message(proposal, Proposal)[0], bad, now), now)
        counts = (current.plan.round, gateway, len(instruction.members), len(instruction.excluded))
        _log.info("round %d: %s: %d committed, %d left out", *counts, extra={"gateway": gateway})
        return ev.CommitStored(gateway=gateway, commit=signed.head.hash)

    def reveal(self, message: ev.Named, revealed: Revealed, now: int) -> None:
        """Store what a reveal brought, and its receipt."""
        assert self.current is not None
        assert self._sum is not None
        failed = RejectReason(revealed.result.failed) if revealed.result.failed else None
        if failed is not None:
            self._rejected.add(failed)
        reason = None if revealed.refusal else failed
        receipt = Receipt(message_id=message.message_id, head=message.head, reason=reason)
        signed = self._sign(MessageKind.RECEIPT, receipt, now, self.current.plan.round)
        self._store.add_reveal(
            round=self.current.plan.round,
            gateway=message.gateway,
            head=message.head,
            words=revealed.stored,
            receipt=signed.encode(),
            result=revealed.result,
        )
        self._sum.add(message.gateway, revealed.parts)
        if revealed.bad:
            exchange = self._store.exchange(self.current.plan.round, message.gateway)
            assert exchange is not None
            self._set_aside({member.device for member in exchange.members} & set(revealed.bad), now)

    def _senders(self, proposal: Proposal, heads: Collection[str], now: int) -> set[str]:
        """Who signed these heads of a proposal, by their hashes in hex."""
        found = set()
        for raw in proposal.heads:
            with contextlib.suppress(RemoteProtocolError):
                head = parse_head(raw)
                if head.hash.hex() in heads:
                    found.add(self._verifier.head(head, kind=MessageKind.UPDATE, now=now).id)
        return found

    def _set_aside(self, devices: Collection[str], now: int) -> None:
        """Leave out of later plans who spoilt its own seals: each time it would cost the others of its site a sum."""
        assert self.current is not None
        number = self.current.plan.round
        for device in self.asides.put_spoilers(devices, number, self._settings.quarantine, now=now):
            _log.warning(_ASIDE, number, device, extra={"device": device})

    # --- The end ------------------------------------------------------------------------------------------------------

    def total(self) -> tuple[Partial, RobustRule]:
        """The sum of all that was revealed, and how its buckets are to be combined."""
        assert self._sum is not None
        total, parts = self._sum.report()
        settings = self._settings
        rule = RobustRule(rule=settings.robust, trim=settings.trim, iterations=settings.iterations, parts=parts)
        return total, rule

    def noise(self) -> Noise | None:
        """What the coordinator's noise of the round is drawn from; None without differential privacy.

        Raises:
            StorageError: the noise state is missing or damaged.
        """
        current = self.current
        assert current is not None
        if current.plan.privacy is None:
            return None
        assert self._secret is not None
        return self.privacy.noise(current.plan, current.hash, self._secret.encode())

    def promise(self) -> dict[str, Any]:
        """What the last private round promised, all that was spent in it; empty for none."""
        last = next((each for each in self._store.rounds(limit=report.HISTORY) if report.PRIVACY in each.report), None)
        return {} if last is None else dict(last.report[report.PRIVACY])

    @property
    def step_privacy(self) -> PrivacySettings:
        """The settings of the open round's privacy."""
        return self._settings.privacy or PrivacySettings()

    def abort(self, number: int, reason: str, now: int) -> RoundRecord:
        """Store that the round ended without a version."""
        before = self.record(number)
        found = report.round_report(self._store.exchanges(number), None, {})
        record = replace(before, outcome=Outcome.ABORTED.value, reason=reason, closed=now, report=before.report | found)
        self.end(record, RoundEnd(round=number, plan=record.plan_hash, outcome=Outcome.ABORTED, reason=reason))
        _log.warning("round %d: aborted: %s", number, reason)
        return record

    def end(self, record: RoundRecord, end: RoundEnd) -> None:
        """Store a round's end and forget what only an open one needs, its secret above all."""
        signed = self._sign(MessageKind.ROUND_END, end, record.closed, record.number)
        with self._store.transaction():
            self._store.update_round(record)
            self._store.forget_words(record.number)
            self._store.put_document(PLAN, signed.encode())
            self.seals.destroy()
            if self._settings.defence is not None:
                aside = self.asides.note_round(record.number, self._settings.quarantine, now=record.closed)
                for device in aside:
                    _log.warning(_ASIDE, record.number, device, extra={"device": device})
        self._sum, self._secret = None, None
        if self.current is not None:
            self.current = replace(self.current, secret=None)

    def record(self, number: int) -> RoundRecord:
        """A round that there is."""
        record = self._store.round(number)
        assert record is not None
        return record


def explain(error: RemoteProtocolError) -> str:
    """Why no plan can be made, for an operator."""
    match error.reason:
        case RejectReason.BELOW_POLICY:
            return (
                f"the settings are below the fleet's pinned policy ({error.detail}): no device would obey the plan; "
                "raise them with `fleetfed round start`, or have the policy's owners sign another"
            )
        case RejectReason.STALE_TRUST:
            return f"the trust metadata has expired ({error.detail}); sign and publish it anew"
        case RejectReason.UNKNOWN_SUITE:
            return f"the coordinator cannot seal keys so: {error.detail}"
        case _:
            return f"no plan can be made: {error.detail}; change cohort_cap or the bits in [clips]"
