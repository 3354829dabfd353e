"""Performs what the machine decides: signs, stores, computes, and hands packets over to be sent.

One event is one database transaction: the machine handles it, whatever its instructions store is written, what
follows from that is handled too, and only when all of it is durable do the packets leave, in order. An error in
between (a full disk) ends the program; a restart goes on from the last transaction.

No sockets and no clock here: `runtime` brings messages in, calls `Coordinator.timer` when `Coordinator.next_deadline`
has come, and sends what `send` is given. So tests run the coordinator without a broker, and stop it at any write.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from fleetfed.cloud_coordinator import events as ev
from fleetfed.cloud_coordinator.book import NO_HELPER, Revealed, RoundBook
from fleetfed.cloud_coordinator.config import CoordinatorConfig, RoundSettings
from fleetfed.cloud_coordinator.control import report
from fleetfed.cloud_coordinator.fleet import Fleet
from fleetfed.cloud_coordinator.monitoring import CoordinatorTally
from fleetfed.cloud_coordinator.proposals import PlanInForce
from fleetfed.cloud_coordinator.publish import MANIFEST, PLAN, REVOCATIONS, Outgoing, Publisher
from fleetfed.cloud_coordinator.round import Round
from fleetfed.cloud_coordinator.secure.helper import Helpers
from fleetfed.cloud_coordinator.secure.reveals import Reveals
from fleetfed.cloud_coordinator.state import CoordinatorMachine, State
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord, RoundRecord, VersionRecord
from fleetfed.cloud_coordinator.storage.restore import RUN, last_round, own_message, restore_machine, restore_run
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.evaluate import Evaluator
from fleetfed.cloud_coordinator.training.step import StepConfig, StepError
from fleetfed.cloud_coordinator.training.versions import (
    Cards,
    from_file,
    manifest_of,
    read_model,
    since_full,
    version_of_round,
)
from fleetfed.cloud_coordinator.trust import TrustDesk
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.errors import RejectReason, StorageError
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import MessageKind, parse_head
from fleetfed.shared.wire.messages import Mode, Outcome, Receipt, Revocations, RoundEnd, Status
from fleetfed.shared.wire.topics import CLOUD_SITE, Broadcast, Kind, SiteTopics, Verb

_log = logging.getLogger(__name__)

_STATUS_EVERY: Final = 500
"""Milliseconds between two statuses that only tell of progress."""
_COLLECT_EVERY: Final = 10
"""Versions between two collections of the blob store."""
_NEWEST: Final = 2 * limits.MAX_PATCH_CHAIN + 2
"""Versions that reach back to the last whole one for certain."""


class Coordinator:
    """See the module. All calls but the step's computation happen on one thread.

    Args:
        config: the settings.
        identity: the coordinator's.
        store, blobs: durable state.
        clock: unix milliseconds.
        signer: signs as the coordinator.
        randomness: returns so many unpredictable bytes.
        send: takes a packet for the broker; must not block.
        wake: called when `next_deadline` may have moved.

    Raises:
        ConfigError: the first model or the validation set cannot be used.
        StorageError: durable state is damaged.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        identity: Identity,
        store: Store,
        blobs: BlobStore,
        clock: Callable[[], int],
        signer: Signer,
        randomness: Callable[[int], bytes],
        send: Callable[[Outgoing], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.store = store
        self.blobs = blobs
        self.fleet = Fleet()
        self.verifier = identity.verifier()
        self.topics = SiteTopics(identity.certificate.fleet, CLOUD_SITE)
        self.rejected = Counters()
        self.tally = CoordinatorTally()
        self.clock = clock
        self.evaluator = None if config.validation is None else Evaluator(config.validation)
        self.helpers = Helpers(self.verifier)
        self.reveals = Reveals(self)
        self.failed: asyncio.Future[None] | None = None
        self.finished_rounds = 0
        self._signer = signer
        self._transport = send
        self.wake = wake
        self._outgoing: list[Outgoing] = []
        self._depth = 0
        self._broken = False
        self._step_due: int | None = None
        self._status_due: int | None = None
        self._timed = 0
        self._proposal = b""
        self._revealed: Revealed | None = None
        self._step: asyncio.Task[None] | None = None
        self.cards = Cards(blobs)
        self._recent = store.versions(limit=_NEWEST)
        self.publisher = Publisher(self.topics, store=store, blobs=blobs, send=self.send)
        self.trust = TrustDesk(
            config.state,
            identity,
            config.identity,
            self.verifier,
            clock=clock,
            publish=self.publisher.trust,
        )
        self.book = RoundBook(
            config,
            store=store,
            blobs=blobs,
            verifier=self.verifier,
            sign=lambda kind, body, now, number: self.sign(kind, body, now=now, round=number),
            signer=self._signer.certificate.key_id,
            randomness=randomness,
            rejected=self.rejected,
        )
        self._publish_first_model()
        self.machine = self._restore()
        self.history: deque[dict[str, object]] = deque(
            (report.history_row(record) for record in reversed(store.rounds(limit=report.HISTORY)) if record.outcome),
            maxlen=report.HISTORY,
        )
        blobs.collect(store.references())

    # --- Life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on where the database says; call once, on the event loop."""
        self.failed = asyncio.get_running_loop().create_future()
        self.trust.start()
        self.handle(ev.Started())
        self._take_over()
        if self.config.autostart and self.store.document(RUN) is None:
            self.handle(ev.StartRequested(self.config.rounds))

    def _take_over(self) -> None:
        """If another key signed what is stored, say it again in our name, and end a round that the other one planned.

        Members believe no key that the owners list no more.
        """
        own = self._signer.certificate.key_id
        manifest, plan = self.store.document(MANIFEST), self.store.document(PLAN)
        if manifest is not None and parse_head(manifest).header.sender != own:
            with self.durably():
                again = manifest_of(self._recent, available=self.blobs.has)
                self.publisher.store_manifest(self.sign(MessageKind.MANIFEST, again, now=self.clock()).encode())
        if plan is not None and parse_head(plan).header.sender != own and self.machine.state is State.COLLECTING:
            self.handle(ev.AbortRequested("the coordinator has another key than the one that planned this round"))

    async def stop(self) -> None:
        """Wait for a step in progress, so that it need not be repeated."""
        if self._step is not None:
            await asyncio.wait({self._step})

    async def idle(self) -> None:
        """Return when no step is being computed."""
        while self._step is not None and not self._step.done():
            await asyncio.wait({self._step})

    def next_deadline(self) -> int | None:
        """When to call `timer`, in unix milliseconds."""
        deadlines = (
            self.machine.next_deadline(),
            self._status_due,
            self.reveals.next_deadline(),
            self.trust.next_deadline(),
        )
        return min((at for at in deadlines if at is not None), default=None)

    def timer(self) -> None:
        """The time that `next_deadline` named has come."""
        now = self.clock()
        deadline = self.machine.next_deadline()
        if self._status_due is not None and now >= self._status_due:
            self.publish_status()
        self.reveals.timer(now)
        self.trust.timer()
        put_back, self._timed = now < self._timed, now
        if deadline is not None and (now >= deadline or put_back):
            self.handle(TimerFired())

    def handle(self, *events: object) -> None:
        """Let the machine handle events, store what follows, then send.

        Raises:
            StorageError: the database refuses; the coordinator must be started again.
        """
        now = self.clock()
        with self.durably():
            queue = deque(events)
            while queue:
                for instruction in self.machine.handle(queue.popleft(), now):
                    queue.extend(self._perform(instruction, now))
        self.wake()

    @contextmanager
    def durably(self) -> Iterator[None]:
        """Do what is inside in one transaction, then what waits for its end; may be nested.

        After an error the machine knows of things that the database does not: nothing is done any more.
        """
        if self._broken:
            raise StorageError("durable state could not be written before; start the coordinator again")
        self._depth += 1
        try:
            with self.store.transaction():
                yield
        except BaseException:
            self._broken = True
            self._outgoing.clear()
            self._step_due = None
            raise
        finally:
            self._depth -= 1
        self.flush()

    def send(self, packet: Outgoing) -> None:
        """Send a packet once everything written so far is durable."""
        self._outgoing.append(packet)
        self.flush()

    def flush(self) -> None:
        """Hand packets over to the transport unless a transaction is open."""
        if self._depth or self.store.in_transaction:
            return
        if self._step_due is not None:
            number, self._step_due = self._step_due, None
            self._step = asyncio.get_running_loop().create_task(self._take_step(number), name=f"step-{number}")
        self.book.seals.wipe()
        packets, self._outgoing = self._outgoing, []
        for packet in packets:
            self._transport(packet)

    def publish_everything(self) -> None:
        """Publish every retained message: the broker may have lost them."""
        self.trust.publish()
        self.publisher.everything()
        self.publish_status()

    def sign(self, kind: MessageKind, body: object, *, now: int, round: int = 0) -> Message:
        """Sign a message as the coordinator."""
        return self._signer.sign(kind, body, now=now, round=round)

    # --- Messages -----------------------------------------------------------------------------------------------------

    @property
    def current(self) -> PlanInForce | None:
        """The plan of the last round that was opened."""
        return self.book.current

    def refuse(self, message: ev.Named, reason: RejectReason, detail: str = "", *, kind: Kind = Kind.GATEWAY) -> None:
        """Count a refused message and tell its sender."""
        self.rejected.add(reason)
        about = {"gateway": message.gateway, "reason": str(reason), "round": self.machine.last_round}
        _log.warning("%s: refused: %s %s", message.gateway, reason, detail, extra=about)
        self.confirm(kind, message, reason=reason, detail=detail[:2000])

    def confirm(self, kind: Kind, message: ev.Named, *, reason: RejectReason | None = None, detail: str = "") -> None:
        """Send a receipt that nobody need find again after a crash."""
        receipt = Receipt(message_id=message.message_id, head=message.head, reason=reason, detail=detail)
        signed = self.sign(MessageKind.RECEIPT, receipt, now=self.clock())
        self.down(kind, message.gateway, Verb.RECEIPT, signed.encode())

    def proposed(self, event: ev.ProposalVerified, message: bytes) -> None:
        """A verified proposal came in, as these bytes."""
        self._proposal = message
        self.handle(event)

    def revealed(self, event: ev.RevealVerified, revealed: Revealed) -> None:
        """A verified reveal came in, and what it brought; nothing where it failed."""
        self._revealed = revealed
        self.handle(event)
        self._revealed = None

    def fleet_changed(self) -> None:
        """Presence or a census changed."""
        number = self.machine.last_round
        self.tally.telling(number, self.fleet.progress(number))
        summary = self.fleet_summary()
        if summary != self.machine.fleet and self.machine.state is not State.OPENING:
            self.handle(summary)
        if self._status_due is None:
            self._status_due = self.clock() + _STATUS_EVERY
            self.wake()

    def fleet_summary(self) -> ev.FleetChanged:
        """What presence and censuses say now."""
        return replace(self.fleet.summary(), helper=self.helpers.ready)

    def resend_commit(self, record: ExchangeRecord) -> None:
        """Send a stored commit."""
        head = parse_head(record.commit)
        for frame in split(head.header.message_id, record.commit):
            self.down(Kind.GATEWAY, record.gateway, Verb.COMMIT, frame)

    def resend_receipt(self, record: ExchangeRecord) -> None:
        """Send the stored receipt of a reveal."""
        if record.receipt is not None:
            self.down(Kind.GATEWAY, record.gateway, Verb.RECEIPT, record.receipt)

    def down(self, kind: Kind, member: str, verb: Verb, payload: bytes) -> None:
        """Send something to one member."""
        self.send(Outgoing(topic=self.topics.down(kind, member, verb), payload=payload))

    # --- Instructions -------------------------------------------------------------------------------------------------

    def _perform(self, instruction: ev.Instruction, now: int) -> list[object]:
        match instruction:
            case ev.OpenRound():
                return [self._open_round(instruction, now)]
            case ev.PublishPlan() | ev.PublishEnd():
                self.publisher.plan()
            case ev.StoreCommit():
                return [self.book.commit(instruction, self._proposal, now)]
            case ev.SendCommit(gateway):
                self.resend_commit(self._exchange(gateway))
            case ev.StoreReveal(message):
                assert self._revealed is not None
                self.book.reveal(message, self._revealed, now)
                if self.current is not None and self.current.plan.mode is Mode.SPLIT:
                    self.tally.revealed(self._revealed.result)
            case ev.SendStoredReceipt(gateway):
                self.resend_receipt(self._exchange(gateway))
            case ev.Refuse():
                self.refuse(instruction.message, instruction.reason, instruction.detail)
            case ev.StartStep(number):
                # Not before the partials are durable: a version must never hold what a restart would not find.
                self._step_due = number
                self.tally.stepping(now)
            case ev.StoreAbort(number, reason):
                self._ended(self.book.abort(number, reason, now))
            case ev.PublishModel():
                self.publisher.model()
            case ev.StoreAwaited(number, awaited):
                self.store.update_round(replace(self.book.record(number), awaited=awaited))
            case ev.StoreRun():
                self.store.put_document(RUN, codec.encode(self.machine.run))
            case ev.PublishStatus():
                self._status_due = now
        return []

    def _open_round(self, instruction: ev.OpenRound, now: int) -> ev.RoundOpened | ev.OpenRefused:
        base = self._base()
        return self.book.open(
            instruction,
            base=base,
            card=self.cards.of(base),
            tiers=self.fleet.tiers,
            helper=lambda until, suite: self.helpers.fresh(now=now, until=until, suite=suite),
            now=now,
        )

    def check_settings(self, settings: RoundSettings) -> None:
        """Refuse settings that no round can be opened with.

        Raises:
            RemoteProtocolError: what is wrong.
        """
        base = self.newest()
        if base is not None:
            card = self.cards.of(base)
            self.book.check(settings, base=base, card=card, tiers=self.fleet.tiers, now=self.clock())

    def _ended(self, record: RoundRecord) -> None:
        self.reveals.clear()
        self.finished_rounds += 1
        # A problem that came up while the round was open is that its sum could not be applied.
        self.tally.ended(record, step=bool(self.machine.run.problem))
        self.history.append(report.history_row(record))

    # --- The step -----------------------------------------------------------------------------------------------------

    async def _take_step(self, number: int) -> None:
        try:
            await self._compute_and_store(number)
        except BaseException as error:
            if self.failed is not None and not self.failed.done() and isinstance(error, Exception):
                self.failed.set_exception(error)
                return
            raise

    async def _compute_and_store(self, number: int) -> None:
        assert self.current is not None
        plan = self.current.plan
        total, robust = self.book.total()
        base = self._base()
        card = self.cards.of(base)
        settings = StepConfig(
            optimizer=self.config.optimizer,
            clips=self.config.clips,
            patch=self.config.patch,
            privacy=self.book.step_privacy,
        )
        try:
            made = await asyncio.to_thread(
                version_of_round,
                total,
                plan=plan,
                base=base,
                card=card,
                since=since_full(self._recent),
                config=settings,
                full_every=self.config.storage.full_every,
                blobs=self.blobs,
                evaluator=self.evaluator,
                robust=robust,
                noise=self.book.noise(),
                policy=self.verifier.policy,
            )
        except StepError as error:
            self.handle(ev.StepFailed(str(error)))
            return
        with self.durably():
            accuracy = self._store_step(number, made.record, made.meta)
            self.book.privacy.keep(made.noise)
            self.handle(ev.StepStored(version=made.record.version, accuracy=accuracy))
        self.book.privacy.forget()
        if made.record.version % _COLLECT_EVERY == 0:
            self.store.forget_files(below=made.record.version + 1 - self.config.storage.keep_versions)
            self.blobs.collect(self.store.references())

    def _store_step(self, number: int, made: VersionRecord, meta: MetaSum) -> float | None:
        now = self.clock()
        exchanges = self.store.exchanges(number)
        members = [member for exchange in exchanges for member in exchange.contributors]
        before = self.book.record(number)
        metrics = made.metrics | report.privacy_metrics(before)
        record = replace(made, round=number, plan_hash=before.plan_hash, created=now, metrics=metrics)
        self.add_version(record)
        self.store.count_contributions(members, number)
        closed = report.committed_round(before, record, meta, exchanges=exchanges, members=members)
        end = RoundEnd(round=number, plan=before.plan_hash, outcome=Outcome.COMMITTED, version=record.version)
        self.book.end(closed, end)
        self._ended(closed)
        _log.info("round %d: version %d of %d devices: %s", number, record.version, meta.count, record.metrics)
        return closed.accuracy

    # --- Versions -----------------------------------------------------------------------------------------------------

    def add_version(self, record: VersionRecord) -> None:
        """Store a version with its signed manifest; whoever calls publishes it (`events.ModelStored`)."""
        with self.store.transaction():
            self.store.add_version(record)
            self._recent = [record, *self._recent[: _NEWEST - 1]]
            manifest = manifest_of(self._recent, available=self.blobs.has)
            signed = self.sign(MessageKind.MANIFEST, manifest, now=record.created)
            self.publisher.store_manifest(signed.encode())

    def _publish_first_model(self) -> None:
        if self.config.model is not None and self.store.newest_version() is None:
            source = read_model(self.config.model.file, self.config.model.card_file)
            metrics = {} if self.evaluator is None else self.evaluator.evaluate(source.file, source.card)
            clips, now = self.config.clips, self.clock()
            self.add_version(
                from_file(source, blobs=self.blobs, version=1, parent=0, clips=clips, metrics=metrics, now=now)
            )

    def newest(self) -> VersionRecord | None:
        """The current version."""
        return self._recent[0] if self._recent else None

    def _base(self) -> VersionRecord:
        assert self._recent
        return self._recent[0]

    # --- Restoring ----------------------------------------------------------------------------------------------------

    def _restore(self) -> CoordinatorMachine:
        stored = self.store.document(REVOCATIONS)
        if stored is not None:
            self.verifier.revoke(own_message(stored, Revocations)[0])
        last = last_round(self.store)
        run = restore_run(self.store, self.config.rounds)
        self.book.seals.destroy(but=0 if last is None or last.outcome else last.number)
        round_ = None if last is None or last.outcome else self._restore_round(last, run.settings)
        self.book.seals.wipe()
        return restore_machine(self.store, run=run, round_=round_)

    def _restore_round(self, record: RoundRecord, settings: RoundSettings) -> Round:
        base = self.store.version(record.base)
        if base is None:
            raise StorageError(f"round {record.number} starts from version {record.base}, which is not in the database")
        return self.book.restore(record, self.cards.of(base), settings)

    def _exchange(self, gateway: str) -> ExchangeRecord:
        assert self.current is not None
        record = self.store.exchange(self.current.plan.round, gateway)
        assert record is not None
        return record

    # --- Status -------------------------------------------------------------------------------------------------------

    def publish_status(self) -> None:
        """Publish what the coordinator is doing, retained."""
        self._status_due = None
        signed = self.sign(MessageKind.STATUS, self.status(), now=self.clock())
        self.send(Outgoing(topic=self.topics.broadcast(Broadcast.STATUS), payload=signed.encode(), retain=True))

    def problem(self) -> str:
        """Why no round is open, or does not end, where somebody can do something about it; empty for nothing."""
        machine, run = self.machine, self.machine.run
        asked = self.reveals.waiting_for_helper
        if asked:
            return f"the helper's masks for {', '.join(asked)}; see whether `fleetfed-helper run` runs"
        if machine.round is not None:
            return ""
        if machine.state is State.WAITING and run.settings.needs_helper and not self.helpers.ready:
            return NO_HELPER
        return run.problem

    def status(self) -> Status:
        """What the coordinator is doing."""
        progress = self.fleet.progress(self.machine.last_round)
        return report.status_of(
            self.machine, self.newest(), progress=progress, history=self.history, problem=self.problem()
        )
