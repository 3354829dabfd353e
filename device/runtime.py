"""Performs what the device's machine decides: one loop in one thread over one bounded queue.

Into the queue come what the broker says (from the session's thread), how training ended (from the training thread) and
the wish to stop; timers are the time that the loop waits. Everything that touches the store, the machine or the session
happens in the loop.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from fleetfed.device import events, update
from fleetfed.device.answers import answer_of, told
from fleetfed.device.config import DeviceConfig, StopAs
from fleetfed.device.events import Answer, AnswerKind
from fleetfed.device.inbound import Inbound
from fleetfed.device.ledger import Account
from fleetfed.device.mqtt import Connected, DeviceSession, Disconnected, PublishDone, Received
from fleetfed.device.renewal import Renewal, RenewalThread, Renewed
from fleetfed.device.sender import Sender
from fleetfed.device.state import DeviceMachine, DeviceState
from fleetfed.device.status import StatusFile
from fleetfed.device.store import Store
from fleetfed.device.telemetry import Teller
from fleetfed.device.trainer import Trainer
from fleetfed.device.worker import Finished, Job, Worker
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.model.step import bound_of
from fleetfed.shared.mqtt.config import Will
from fleetfed.shared.systemd import Notifier
from fleetfed.shared.telemetry import peak_mb, resident_bytes
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageKind, digest
from fleetfed.shared.wire.messages import Decline, Life, Need, Plan, Presence
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

_log = logging.getLogger(__name__)

_INBOX: Final = 256
_SHORTEST_WAIT: Final = 0.001
_LARGE_STEP: Final = (
    "the new version is too far from the one held, which stays in use: if the coordinator is to be trusted in this, "
    "have the policy's owners name the version's file (`fleetfed keys policy set --model`) or raise largest_step"
)
_GOODBYE: Final = {StopAs.SLEEPING: Life.SLEEPING, StopAs.DISCONNECTED: Life.DISCONNECTED}


@dataclass(frozen=True, slots=True)
class _Wake:
    """Ends the wait of a loop that is to stop."""


class DeviceRuntime:
    """One device, from `run` to its end.

    Args:
        settings: from ``device.toml``.
        identity: this device's.
        store: open; `run` closes it.
        trainer: trains.
        software: name and version for presence and status.
        clock: unix milliseconds.

    Raises:
        ConfigError: the TLS files do not work.
    """

    def __init__(
        self,
        settings: DeviceConfig,
        identity: Identity,
        store: Store,
        trainer: Trainer,
        *,
        software: str,
        clock: Callable[[], int] = unix_ms,
    ) -> None:
        self._settings = settings
        self._store = store
        verifier = identity.verifier()
        self._trust = TrustKeeper(store.directory / "trust.bin", identity, verifier)
        self._clock = self._trust.clock(clock)
        self._verifier = verifier
        self._certificate = identity.certificate
        self._id = identity.certificate.id
        self._software = software
        self._topics = SiteTopics(fleet=identity.certificate.fleet, site=identity.certificate.site)
        self._session_number = int.from_bytes(os.urandom(7), "little")
        self._sequence = SequenceFile(store.directory / "sequence")
        self._signer = identity.signer(sequence=self._sequence, randomness=os.urandom)
        self._inbound = Inbound(
            verifier,
            identity.certificate,
            keep_revocations=store.save_revocations,
            take_trust=self._take_trust,
        )
        if self._trust.trust is not None:
            # A process before us may have died between the news and this.
            store.forget(verifier.is_coordinator)
        self._spent = identity.spent
        self._machine = self._make_machine()
        self._inbox: queue.Queue[Any] = queue.Queue(_INBOX)
        self._session = DeviceSession(
            settings.broker.connection(client_id=self._id, identity=settings.identity),
            inbox=self._inbox,
            will=Will(topic=self._up(Verb.STATE), payload=self._presence(Life.LOST)),
            subscriptions=[
                *(self._topics.broadcast(what) for what in _HEARD),
                self._topics.all_down(Kind.DEVICE, self._id),
            ],
        )
        self._sender = Sender(self._session)
        self._worker = Worker(trainer, self._inbox.put)
        renewal = Renewal(settings.identity, clock=clock, done=self._inbox.put)
        self._renewal = RenewalThread(settings.identity, renewal)
        self._finished: Finished | None = None
        self._systemd = Notifier()
        self._status = StatusFile(store.directory / "status.json", device=self._id, software=software)
        self._teller = Teller(started=self._clock(), enabled=settings.run.telemetry)
        self._stopping = False
        self._stopped = False

    def _make_machine(self) -> DeviceMachine:
        """A machine that goes on from what is durable."""
        account = self._store.account(self._certificate.fleet)
        return DeviceMachine(
            device=self._id,
            labels=self._settings.labels,
            facts=dataclasses.replace(self._store.facts(), account=_begun(account, self._spent)),
            largest=self._settings.run.max_model_mib << 20,
        )

    def request_stop(self) -> None:
        """Say goodbye and end `run`. Any thread, as often as it likes."""
        self._stopping = True
        # A full inbox keeps the loop awake, which then sees the flag.
        try:
            self._inbox.put_nowait(_Wake())
        except queue.Full:
            return

    def run(self) -> None:
        """Run until `request_stop`.

        Raises:
            StorageError: durable state is damaged.
            OSError: durable state cannot be written.
        """
        try:
            self._load_revocations()
            self._write_status()
            self._session.start()
            self._renewal.start()
            _log.info("%s of site %s, %s", self._id, self._topics.site, self._describe())
            while not self._stopped:
                self._turn()
        finally:
            self._renewal.stop()
            self._worker.cancel()
            # Also after a crash of ours: the broker's will then says that we are lost.
            self._session.close(self._farewell() if self._stopped else None)
            self._sender.disconnected()
            self._worker.join(timeout=10.0)
            self._write_status()
            self._store.close()

    # --- The loop -----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for one thing and deal with it."""
        item = self._next()
        self._systemd.alive()
        if self._stopping:
            self._systemd.stopping()
            self._handle(events.StopRequested())
            return
        if isinstance(item, Received):
            self._receive(item)
        elif isinstance(item, PublishDone):
            self._sender.done(item)
        elif isinstance(item, Connected):
            self._sender.connected()
            self._handle(events.Connected())
            self._systemd.ready("connected")
            self._status.touch()
            self._teller.changed()
        elif isinstance(item, Disconnected):
            _log.info("connection lost: %s", item.reason)
            self._sender.disconnected()
            self._systemd.status("not connected")
            self._handle(events.Disconnected())
            self._status.touch()
        elif isinstance(item, Finished):
            self._finished = item
            # What a training leaves is large: once it is stored, nobody is to hold it.
            del item
            self._trained()
        elif isinstance(item, Renewed):
            # What is signed already keeps the certificate that it was signed with, and is sent as it is.
            self._signer = item.identity.signer(sequence=self._sequence, randomness=os.urandom)
            # What its gateway knows it by: a later revocation no more names the certificate that has run out.
            self._sender.once(self._up(Verb.STATE), self._presence(Life.READY), retain=True)
        deadline = self._machine.next_deadline()
        if deadline is not None and deadline <= self._clock():
            self._handle(TimerFired())

    def _next(self) -> Any:
        """The next item, or None when it is time for a timer."""
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            # Nothing waits for us: a good time for what nobody waits for.
            resting = self._tell_and_note()
        deadline = self._machine.next_deadline()
        until = resting if deadline is None else min(deadline, resting)
        wait = max((until - self._clock()) / 1000, _SHORTEST_WAIT)
        watched = self._systemd.interval
        if watched is not None:
            wait = min(wait, watched)
        try:
            return self._inbox.get(timeout=wait)
        except queue.Empty:
            return None

    def _handle(self, event: Any) -> None:
        """Let the machine decide, perform, and hand it what comes of that, before anything else."""
        pending = deque([event])
        while pending:
            # What comes of stopping is of no interest to a machine that stopped.
            if self._machine.state is DeviceState.STOPPED:
                return
            instructions = self._machine.handle(pending.popleft(), self._clock())
            for instruction in instructions:
                pending.extend(self._perform(instruction))

    def _receive(self, message: Received) -> None:
        try:
            event = self._inbound.event(message.topic, message.payload, self._clock(), retained=message.retained)
        except RemoteProtocolError as error:
            self._reject(error.reason, f"{message.topic}: {error.detail}")
            event = None
        if isinstance(event, events.NodeBorn) and not event.retained:
            self._teller.again()
        if event is not None:
            self._handle(event)
        self._session.ack(message)

    def _trained(self) -> None:
        assert self._finished is not None
        self._teller.trained(self._clock())
        plan_hash, made = self._finished.plan_hash, self._finished.prepared is not None
        reason, detail = self._finished.reason, self._finished.detail
        plan = self._machine.plan
        # Without a plan: it became void while this was in the queue.
        if made and plan is not None:
            self._handle(events.TrainingDone(plan_hash, self._inbound.judge(plan, self._clock())))
        elif reason is not None:
            _log.warning("no update: %s: %s", reason, detail, extra={"reason": str(reason)} | _round(plan))
            self._handle(events.TrainingDeclined(plan_hash, reason, detail))
        self._finished = None

    # --- Instructions -------------------------------------------------------------------------------------------------

    def _perform(self, instruction: Any) -> Iterator[Any]:
        """Do one thing; yield what comes of it."""
        match instruction:
            case events.SubscribeChunk(digest, index):
                self._session.subscribe(self._topics.blob(digest, index))
            case events.UnsubscribeChunk(digest, index):
                self._session.unsubscribe(self._topics.blob(digest, index))
            case events.AskChunks(digest, missing):
                self._sender.once(self._up(Verb.NEED), codec.encode(Need(digest=digest, missing=missing[:64])))
            case events.Announce():
                self._sender.once(self._up(Verb.STATE), self._presence(Life.READY), retain=True)
            case events.SendAnswer(answer):
                self._send(answer)
            case events.AbandonSending(message_id):
                self._sender.abandon(message_id)
            case events.Train():
                self._train(instruction)
            case events.CancelTraining():
                self._worker.cancel()
            case events.CountRejection(reason, detail):
                self._reject(reason, detail)
            case events.RecordRound(round_, outcome, detail):
                _log.info("round %d: %s", round_, f"{outcome}: {detail}" if detail else outcome)
                self._status.outcome(round_, outcome, detail)
                self._teller.outcome(outcome)
            case events.Stop():
                self._stopped = True
            case _:
                yield from self._keep(instruction)

    def _keep(self, instruction: Any) -> Iterator[Any]:
        """Do one thing with the store; yield what comes of it."""
        store = self._store
        match instruction:
            case events.RaiseFloor(version):
                store.raise_floor(version, self._inbound.manifest_signer)
            case events.FindParts(ref):
                yield events.PartsFound(ref.digest, store.find_parts(ref))
            case events.StoreChunk(ref, offset, data):
                store.store_chunk(ref, offset, data)
            case events.DropParts(keep):
                store.drop_parts(keep)
            case events.InstallCard() | events.InstallFull() | events.InstallPatches():
                yield self._install(instruction)
            case events.Debit(account):
                store.debit(self._certificate.fleet, account)
            case events.StoreUpdate():
                yield events.AnswerStored(self._store_update(instruction))
            case events.StoreDecline(plan, plan_hash, reason, detail):
                now = self._clock()
                message = self._signer.sign(
                    MessageKind.DECLINE,
                    Decline(plan=plan_hash, reason=reason, detail=told(plan, reason, detail)),
                    now=now,
                    round=plan.round,
                    lifetime=max(plan.expires - now, 1),
                )
                signer = self._inbound.signer(plan_hash)
                answer = answer_of(message, AnswerKind.DECLINE, plan, plan_hash, signer=signer, reason=str(reason))
                store.store_answer(answer, message.head.encode(), message.body)
                yield events.AnswerStored(answer)
            case events.SettleAnswer(answer):
                store.settle(answer)
            case _:
                raise AssertionError(f"no way to perform {instruction!r}")

    def _install(self, instruction: events.InstallCard | events.InstallFull | events.InstallPatches) -> Any:
        store = self._store
        try:
            match instruction:
                case events.InstallCard(ref):
                    store.install_card(ref)
                    return events.CardInstalled(ref.digest)
                case events.InstallFull(patches, manifest):
                    model = store.install_full(patches, manifest, bound_of(self._verifier.policy))
                    size = manifest.full.size + sum(patch.blob.size for patch in patches)
                case events.InstallPatches(base, patches, manifest):
                    model = store.install_patches(base, patches, manifest, bound_of(self._verifier.policy))
                    size = sum(patch.blob.size for patch in patches)
        except RemoteProtocolError as error:
            if error.reason is RejectReason.LARGE_STEP:
                _log.error("%s", _LARGE_STEP)
            return events.InstallFailed(error.reason, error.detail)
        _log.info("model version %d, %s, from %d bytes", model.version, model.sha256.hex()[:12], size)
        self._status.touch()
        self._teller.changed()
        return events.ModelInstalled(model)

    def _store_update(self, order: events.StoreUpdate) -> Answer:
        plan, plan_hash = order.plan, order.plan_hash
        finished = self._finished
        assert finished is not None
        assert finished.prepared is not None
        assert finished.plan_hash == plan_hash
        prepared = finished.prepared
        message = update.sign(
            prepared, plan, plan_hash, signer=self._signer, now=self._clock(), seals=self._seals(order)
        )
        answer = answer_of(message, AnswerKind.UPDATE, plan, plan_hash, signer=self._inbound.signer(plan_hash))
        model = self._machine.sync.holds(plan.model_version, plan.model_sha256)
        assert model is not None
        layout = self._store.card(model).layout
        self._store.store_answer(answer, message.head.encode(), message.body, residual=prepared.residual, layout=layout)
        summary = finished.summary
        assert summary is not None
        self._status.trained(plan.round, self._clock(), summary, update_bytes=answer.size)
        _log.info(
            "round %d: update of %d bytes, %d steps, loss %.4f",
            plan.round,
            answer.size,
            summary.steps,
            summary.loss,
        )
        self._finished = None
        return answer

    def _seals(self, order: events.StoreUpdate) -> update.Seals | None:
        if order.plan.split is None:
            return None
        return update.Seals(
            gateway=order.gateway_key,
            coordinator=order.plan.split.seal_key,
            helper=order.helper_key,
            hedge=self._store.hedge(),
        )

    def _train(self, order: events.Train) -> None:
        self._status.training(order.plan.round, self._clock())
        self._teller.training(self._clock())
        card = self._store.card(order.model)
        seed = self._settings.run.seed
        own = int.from_bytes(digest(self._certificate.id.encode())[:8], "little")
        self._worker.start(
            Job(
                plan=order.plan,
                plan_hash=order.plan_hash,
                card=card,
                model=self._store.model_path(order.model),
                residual=lambda: self._store.residual(card.layout),
                # The device's own id keeps two devices with one seed from making the same noise.
                seed=[seed, order.plan.round, own] if seed else None,
            )
        )

    def _send(self, answer: Answer) -> None:
        message = self._store.message(answer)
        if answer.kind is AnswerKind.DECLINE:
            self._sender.once(self._up(Verb.DECLINE), message)
        else:
            self._sender.message(self._up(Verb.UPDATE), answer.message_id, message)

    # --- Small things -------------------------------------------------------------------------------------------------

    def _up(self, verb: Verb) -> str:
        return self._topics.up(Kind.DEVICE, self._id, verb)

    def _presence(self, life: Life) -> bytes:
        since = 0 if life is Life.LOST else self._clock()
        return codec.encode(
            Presence(
                life=life,
                session=self._session_number,
                since=since,
                software=self._software[:100],
                labels=self._settings.labels,
                serial=self._signer.certificate.serial,
                until=self._signer.certificate.not_after,
            )
        )

    def _farewell(self) -> bytes:
        return self._presence(_GOODBYE[self._settings.run.stop_as])

    def _reject(self, reason: Any, detail: str) -> None:
        about = {"reason": str(reason)} | _round(self._machine.plan)
        _log.warning("refused: %s: %s", reason, detail[:300], extra=about)
        self._status.reject(str(reason))
        self._teller.refused(str(reason))

    def _take_trust(self, data: bytes) -> None:
        try:
            if self._trust.take(data, now=self._clock()):
                self._status.touch()
        finally:
            # Also where only the root was news: it may have taken a coordinator away.
            if self._trust.trust is not None and self._store.forget(self._verifier.is_coordinator):
                self._begin_anew()

    def _begin_anew(self) -> None:
        """A coordinator's word became void: go on as after a restart, from what is still durable."""
        _log.warning("a coordinator that the owners list no more had spoken: what it said is void")
        self._worker.cancel()
        # Ends the subscriptions to its objects.
        self._handle(events.Disconnected())
        if self._machine.answer is not None:
            self._sender.abandon(self._machine.answer.message_id)
        self._machine = self._make_machine()
        if self._sender.online:
            self._handle(events.Connected())
        # So that the broker sends again what it retains.
        self._session.subscribe(*map(self._topics.broadcast, (Broadcast.MODEL, Broadcast.COSIGN, Broadcast.PLAN)))

    def _load_revocations(self) -> None:
        kept = self._store.revocations()
        if kept is None:
            return
        try:
            self._inbound.restore_revocations(kept, self._clock())
        except RemoteProtocolError as error:
            _log.warning("the revocation list on disk is not used: %s", error)

    def _describe(self) -> str:
        models = self._machine.sync.models
        return f"model version {models[0].version}" if models else "no model yet"

    def _tell_and_note(self) -> int:
        """Say and write down what is due; returns when something is due again."""
        now = self._clock()
        told = self._teller.next_deadline(now) if self._sender.online else None
        if told is not None and told <= now:
            self._tell(now)
            told = self._teller.next_deadline(now)
        if self._status.dirty:
            self._write_status()
        touched = self._status.alive(now)
        return touched if told is None else min(told, touched)

    def _tell(self, now: int) -> None:
        models = self._machine.sync.models
        telemetry = self._teller.tell(
            now,
            wire=self._status.total(self._session.meter.snapshot()),
            model_version=models[0].version if models else 0,
            account=self._machine.account,
            cpu=round(time.process_time() * 1000),
            memory=resident_bytes(),
            peak=round(peak_mb() * 1e6),
        )
        self._sender.once(self._up(Verb.TELEMETRY), codec.encode(telemetry), qos=0)

    def _obstacle(self) -> str:
        """Why the device cannot take part now; empty when it can."""
        if not self._sender.online:
            return "not connected to the broker"
        if self._trust.status(self._clock()).get("stale"):
            return "the trust metadata has expired: no update is made"
        return ""

    def _write_status(self) -> None:
        models = self._machine.sync.models
        self._status.write(
            self._clock(),
            state=str(self._machine.state),
            obstacle=self._obstacle(),
            model=models[0] if models else None,
            wire=self._session.meter.snapshot(),
            refused_by_broker=self._sender.refused,
            account=self._machine.account,
            trust=self._trust.status(self._clock()),
        )


_HEARD: Final = (Broadcast.REVOKED, Broadcast.TRUST, Broadcast.NODE, Broadcast.MODEL, Broadcast.COSIGN, Broadcast.PLAN)
"""What the device listens to; in this order, so that a plan meets its model's manifest and its cosignature."""


def _begun(account: Account, spent: int) -> Account:
    """The ledger's account, which begins with what the enrolment service says is spent (docs/enrolment.md)."""
    return dataclasses.replace(account, participations=max(account.participations, spent))


def _round(plan: Plan | None) -> dict[str, Any]:
    """Of a log line."""
    return {} if plan is None else {"round": plan.round}
