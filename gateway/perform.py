"""Performs the machine's instructions: disk, sum, signatures, messages."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fleetfed.gateway import events as ev
from fleetfed.gateway import journal as rows
from fleetfed.gateway.journal import Journal, Stored, decode_stored
from fleetfed.gateway.pipeline import Pipeline
from fleetfed.gateway.record import RoundState
from fleetfed.gateway.round import RoundMachine
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.summation import Summation
from fleetfed.gateway.worker import Worker
from fleetfed.shared.errors import RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import Digest, MessageId, MessageKind, digest, parse_head
from fleetfed.shared.wire.masking import Cosign, NonceHash
from fleetfed.shared.wire.messages import Proposal, Receipt, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

_log = logging.getLogger(__name__)

SMALL: Final = 1 << 18
"""Values in a model up to which decoding and adding one update is done on the event loop: a few milliseconds."""
_DETAIL: Final = 500
"""Characters of why a commit was refused that go up, however many tiers have added to them."""
_WINDOW: Final = 16
"""Chunks of one message on their way to the broker."""


class Publisher(Protocol):
    """What is asked of a connection."""

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None: ...  # noqa: D102


@dataclass(slots=True)
class Parcel:
    """An update between its opening and its place in journal and sum; ``opened`` is for the sum alone."""

    head: bytes
    body: memoryview
    opened: Any


class Performer:
    """See the module.

    Args:
        gateway: own id.
        machine: whose instructions these are; it is fed what comes of them.
        journal, pipeline, worker: disk and thread.
        signer: signs in the gateway's name.
        below, above: connections to the own site and upstream.
        site, upstream: their topics.
        counters: refusals by reason.
        randomness: returns so many unpredictable bytes.
        clock: unix milliseconds.
        round_over: called when a round is over, with its number.
    """

    def __init__(
        self,
        *,
        gateway: str,
        machine: GatewayMachine,
        journal: Journal,
        pipeline: Pipeline,
        worker: Worker,
        signer: Signer,
        below: Publisher,
        above: Publisher,
        site: SiteTopics,
        upstream: SiteTopics,
        counters: Counters,
        randomness: Callable[[int], bytes],
        clock: Callable[[], int],
        round_over: Callable[[int], None],
    ) -> None:
        self._gateway = gateway
        self._machine = machine
        self._journal = journal
        self._pipeline = pipeline
        self._worker = worker
        self._signer = signer
        self._below, self._above = below, above
        self._site, self._upstream = site, upstream
        self._counters = counters
        self._randomness = randomness
        self._clock = clock
        self._round_over = round_over
        self._sum: Summation | None = None
        # Heads that are queued for the disk: a proposal may be made before they are there.
        self._fresh: dict[MessageId, bytes] = {}
        self._fresh_proposals: dict[str, bytes] = {}
        # Receipts on their way through the pipeline: to read each of them back would cost as much as to sign it.
        self._receipts: dict[MessageId, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._plan = b""
        self._cosign = b""
        self.census = b""
        self.accepted = 0
        self.accepted_bytes = 0

    def feed(self, event: object) -> None:
        """Hand an event to the machine and do what it wants."""
        self.perform(self._machine.handle(event, self._clock()))

    def perform(self, instructions: list[Any]) -> None:
        """Do what the machine wants, in order."""
        for instruction in instructions:
            self._perform(instruction)

    @property
    def total(self) -> Summation | None:
        """The sum of the open round, until it is handed over."""
        return self._sum

    def restore(self, rnd: RoundMachine, stored: Stored) -> None:
        """Build the sum of a round that the journal holds.

        Raises:
            StorageError: a stored update does not open, or what opens it is missing.
        """
        self._plan, self._cosign = stored.plan, stored.cosign
        if rnd.state in (RoundState.REVEALED, RoundState.CLOSED):
            return
        self._sum = rnd.rules.summation(stored.secrets, site=self._site.site)
        try:
            self._sum.rebuild(self._journal.updates(rnd.record.own_part()), self._journal.reveals())
        except RemoteProtocolError as error:
            raise StorageError(f"the journal holds an update that does not decode: {error}") from error

    def retained(self) -> tuple[tuple[Broadcast, bytes], ...]:
        """What the site's broker keeps for us of the round, and may have lost; empty for nothing."""
        return ((Broadcast.PLAN, self._plan), (Broadcast.COSIGN, self._cosign))

    async def drain(self) -> None:
        """Wait until what was to be sent has been sent or given up."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(
        self, what: str, reason: RejectReason, detail: str, *, alarm: bool = False, about: dict[str, str] | None = None
    ) -> None:
        """Count and log a refusal, and whose message it was; an alarm is for a person to see."""
        self._counters.add(str(reason))
        level = logging.ERROR if alarm else logging.INFO
        rnd = self._machine.round
        extra = {"reason": str(reason), **(about or {}), **({"round": rnd.record.plan.round} if rnd else {})}
        _log.log(level, "refused %s: %s%s", what, reason, f" ({detail})" if detail else "", extra=extra)

    def send_receipt(
        self, kind: Kind, member: str, message_id: MessageId, head: Digest, reason: RejectReason | None
    ) -> None:
        """Sign a receipt and send it once everything decided before is durable."""
        receipt = self._receipt(message_id, head, reason)
        topic = self._site.down(kind, member, Verb.RECEIPT)
        self._pipeline.send(lambda: self.publish(self._below, topic, receipt))

    def send_stored_receipt(self, kind: Kind, member: str, message_id: MessageId) -> None:
        """Send the receipt that was stored with a message, byte for byte."""
        self._pipeline.send(lambda: self._send_stored(kind, member, message_id))

    def publish(self, side: Publisher, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish in the background; what a lost connection loses is sent again by whoever waits for it."""
        self._spawn(self._publish(side, topic, [payload], retain=retain))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, side: Publisher, topic: str, frames: list[bytes], *, retain: bool = False) -> None:
        try:
            for start in range(0, len(frames), _WINDOW):
                window = frames[start : start + _WINDOW]
                if len(window) == 1:
                    await side.publish(topic, window[0], retain=retain)
                    continue
                results = await asyncio.gather(
                    *(side.publish(topic, frame, retain=retain) for frame in window), return_exceptions=True
                )
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
        except SessionLostError:
            _log.debug("not sent, no connection: %s", topic)
        except PublishRefusedError as error:
            _log.warning("the broker refuses: %s", error)

    def _send_stored(self, kind: Kind, member: str, message_id: MessageId) -> None:
        receipt = self._receipts.pop(message_id, None) or self._journal.receipt(message_id)
        # None: the round was over in the meantime, and its journal with it.
        if receipt is not None:
            self.publish(self._below, self._site.down(kind, member, Verb.RECEIPT), receipt)

    def _send_up(self, verb: Verb, fact: str) -> None:
        raw = self._journal.fact(fact)
        # None: the round was over in the meantime, and its journal with it.
        if raw is None:
            return
        head = parse_head(raw).header
        topic = self._upstream.up(Kind.GATEWAY, self._gateway, verb)
        self._spawn(self._publish(self._above, topic, split(head.message_id, raw)))

    def _send_commit(self, gateway: str) -> None:
        raw = self._journal.fact("commit")
        if raw is None:
            return
        topic = self._site.down(Kind.GATEWAY, gateway, Verb.COMMIT)
        self._spawn(self._publish(self._below, topic, split(parse_head(raw).header.message_id, raw)))

    def _receipt(self, message_id: MessageId, head: Digest, reason: RejectReason | None) -> bytes:
        receipt = Receipt(message_id=message_id, head=head, reason=reason)
        return self._sign(MessageKind.RECEIPT, receipt).encode()

    def _sign(self, kind: MessageKind, body: object) -> Message:
        rnd = self._machine.round
        return self._signer.sign(kind, body, now=self._clock(), round=rnd.record.plan.round if rnd else 0)

    def _small(self) -> bool:
        return self._machine.round is None or self._machine.round.ring.layout.dimension <= SMALL

    # --- Instructions --------------------------------------------------------------------------------------------

    def _perform(self, instruction: Any) -> None:
        match instruction:
            case ev.StoreUpdate(update=update):
                self._store_update(update)
            case ev.SendStoredReceipt(kind=kind, member=member, message_id=message_id):
                self.send_stored_receipt(kind, member, message_id)
            case ev.SendReceipt(kind=kind, member=member, message_id=message_id, head=head, reason=reason):
                self.send_receipt(kind, member, message_id, head, reason)
            case ev.Refused(what=what, reason=reason, detail=detail, alarm=alarm):
                self.count(what, reason, detail, alarm=alarm)
            case ev.DiscardParcel(update=update):
                update.parcel.opened = None
            case ev.PublishPlan(raw):
                self._plan = raw
                topic = self._site.broadcast(Broadcast.PLAN)
                self._pipeline.send(lambda: self.publish(self._below, topic, raw, retain=True))
            case ev.PublishCosign():
                cosign, where = self._cosign, self._site.broadcast(Broadcast.COSIGN)
                self._pipeline.send(lambda: self.publish(self._below, where, cosign, retain=True))
            case ev.PublishCensus(census):
                self.census = self._sign(MessageKind.CENSUS, census).encode()
                topic = self._upstream.up(Kind.GATEWAY, self._gateway, Verb.CENSUS)
                self.publish(self._above, topic, self.census, retain=True)
            case ev.RoundOver(round):
                self._round_over(round)
            case _:
                self._perform_round(instruction)

    def _perform_round(self, instruction: Any) -> None:
        pipeline = self._pipeline
        match instruction:
            case ev.StoreRound():
                self._store_round(instruction)
            case ev.StoreDecline():
                pipeline.store(rows.decline_rows(instruction))
            case ev.JudgeUpdates():
                # Once they are on disk: that is where they are looked at.
                pipeline.send(self._judge)
            case ev.MakeProposal():
                self._make_proposal(instruction)
            case ev.StoreProposal(raw=raw):
                pipeline.store(rows.fact_rows("proposal", raw))
            case ev.SendProposal():
                pipeline.send(lambda: self._send_up(Verb.PROPOSE, "proposal"))
            case ev.StoreChildProposal(proposal=proposal):
                receipt = self._receipt(proposal.message_id, proposal.head, None)
                self._fresh_proposals[proposal.gateway] = proposal.raw
                durable = functools.partial(self._fresh_proposals.pop, proposal.gateway, None)
                pipeline.store(rows.child_proposal_rows(proposal, receipt), durable)
            case ev.StoreCommit(raw=raw):
                pipeline.store(rows.fact_rows("commit", raw))
            case ev.SendCommit(gateway):
                pipeline.send(lambda: self._send_commit(gateway))
            case ev.DropUpdates(message_ids=ids, forget=forget):
                # Only when they are on disk: the sum needs their bodies.
                pipeline.send(lambda: self._drop(ids, forget))
            case ev.StoreChildReveal(reveal=reveal):
                self._store_child_reveal(reveal)
            case ev.MakeReveal(commit=commit, count=count):
                pipeline.send(lambda: self._make_reveal(commit, count))
            case ev.StoreReveal(raw=raw):
                pipeline.store(rows.reveal_rows(raw))
            case ev.SendReveal():
                pipeline.send(lambda: self._send_up(Verb.REVEAL, "reveal"))
            case ev.StoreAnswered():
                self._sum = None
                pipeline.store(rows.answered_rows())
            case ev.StoreAborted():
                self._abort(instruction)
            case ev.ForgetRound():
                self._sum, self._cosign = None, b""
                self._receipts.clear()
                pipeline.store(rows.forget_rows(instruction))
            case ev.LowerRound():
                pipeline.store(rows.lower_rows(instruction))
            case _:
                raise AssertionError(f"nobody performs {instruction}")

    def _store_round(self, event: ev.StoreRound) -> None:
        rnd = self._machine.round
        assert rnd is not None
        plan, secrets = rnd.record.plan, rnd.rules.new_secrets(self._randomness)
        self._sum = rnd.rules.summation(secrets, site=self._site.site)
        self._cosign = b""
        if secrets is not None:
            body, now = Cosign(plan=event.hash, seal_key=secrets.seal.public), self._clock()
            lifetime = plan.expires - now
            self._cosign = self._signer.sign(
                MessageKind.COSIGN, body, now=now, round=plan.round, lifetime=lifetime
            ).encode()
        self._pipeline.store(
            rows.round_rows(event, secrets=b"" if secrets is None else secrets.encode(), cosign=self._cosign)
        )
        _log.info("round %d opens, %s mode, model version %d", plan.round, plan.mode, plan.model_version)

    def _store_update(self, update: ev.UpdateArrived) -> None:
        parcel, total = update.parcel, self._sum
        assert total is not None
        opened = parcel.opened
        receipt = self._receipt(update.message_id, update.head, None)
        self.accepted += 1
        self.accepted_bytes += update.size
        self._fresh[update.message_id] = parcel.head
        self._receipts[update.message_id] = receipt
        self._pipeline.store(
            rows.update_rows(update, head=parcel.head, body=parcel.body, receipt=receipt),
            functools.partial(self._fresh.pop, update.message_id, None),
        )
        # Opened, it is of one byte for a value at least, and waits here.
        size = total.ring.layout.dimension
        self._worker.do(lambda: total.add(opened), _must_work, small=self._small(), size=size)
        parcel.opened = None

    def _judge(self) -> None:
        rnd, total = self._machine.round, self._sum
        if rnd is None or total is None:
            return
        plan, own = rnd.record.hash, rnd.record.own_part()

        def judge() -> dict[MessageId, float]:
            try:
                return total.leave_out(own, self._journal)
            except StorageError:
                # The round was over in the meantime, and its journal with it.
                if self._sum is total:
                    raise
                return {}

        def judged(outliers: Any) -> None:
            _must_work(outliers)
            for each, score in outliers.items():
                _log.warning("round %d: update %s is an outlier, score %.1f", rnd.record.plan.round, each.hex(), score)
            self.feed(ev.UpdatesJudged(plan=plan, outliers=outliers))

        self._worker.do(judge, judged, small=len(own) * rnd.ring.layout.dimension <= SMALL)

    def _make_proposal(self, order: ev.MakeProposal) -> None:
        rnd = self._machine.round
        assert rnd is not None
        stored = self._journal.heads() | self._fresh
        own = sorted(update.message_id for update in rnd.record.accepted.values())
        children = self._journal.child_proposals() | self._fresh_proposals
        below = [decode_stored(Proposal, raw) for _, raw in sorted(children.items())]
        # Nobody below speaks of our own devices.
        told = {name: score for each in below for name, score in each.outliers.items()}
        outliers = {name: s for name, s in told.items() if name not in rnd.record.accepted} | order.outliers
        # One commitment per site: whoever is below cannot make one in our name.
        nonces = {each.site: each for proposal in below for each in proposal.nonces} | self._own_nonces(bool(own))
        proposal = Proposal(
            plan=rnd.record.hash,
            heads=(*(stored[message_id] for message_id in own), *(head for each in below for head in each.heads)),
            declined=order.declined,
            rejected=order.rejected,
            outliers=outliers,
            nonces=tuple(nonces.values()),
        )
        message = self._sign(MessageKind.PROPOSE, proposal)
        self.feed(ev.ProposalMade(message_id=message.id, head=message.head.hash, raw=message.encode()))

    def _own_nonces(self, updates: bool) -> dict[str, NonceHash]:
        return {each.site: each for each in self._sum.nonces()} if updates and self._sum is not None else {}

    def _store_child_reveal(self, reveal: ev.ChildRevealed) -> None:
        total, partial = self._sum, reveal.parcel
        assert total is not None
        receipt = self._receipt(reveal.message_id, reveal.head, None)
        self._pipeline.store(rows.child_reveal_rows(reveal, receipt))
        self._worker.do(lambda: total.merge(partial), _must_work, small=self._small())

    def _drop(self, ids: tuple[MessageId, ...], forget: bool) -> None:
        total = self._sum
        if total is None:
            return

        def drop() -> None:
            try:
                total.drop(self._journal.updates(ids))
            except StorageError:
                # The round was over in the meantime, and its journal with it: nobody wants this sum.
                if self._sum is total:
                    raise

        def dropped(result: Any) -> None:
            _must_work(result)
            if forget:
                self._pipeline.store(rows.drop_rows(ids))

        self._worker.do(drop, dropped, small=self._small())

    def _abort(self, order: ev.StoreAborted) -> None:
        rnd = self._machine.round
        assert rnd is not None
        assert rnd.record.commit is not None
        plan, commit = rnd.record.hash, rnd.record.commit.head
        refusal = Reveal(
            plan=plan, commit=commit, count=0, words=b"", reason=order.reason, detail=order.detail[:_DETAIL]
        )
        message = self._sign(MessageKind.REVEAL, refusal)
        self._sum = None
        self._pipeline.store(rows.aborted_rows(order, message.encode()))
        self.feed(ev.RefusalMade(plan=plan, message_id=message.id))

    def _make_reveal(self, commit: Digest, count: int) -> None:
        rnd, total = self._machine.round, self._sum
        if rnd is None or total is None or rnd.record.commit is None or rnd.record.commit.head != commit:
            return
        plan, number, final, own = rnd.record.hash, rnd.record.plan.round, rnd.record.commit, rnd.record.own_owners()
        small = rnd.rules.reveal_work(len(own)) <= SMALL

        def make() -> tuple[bytes, Digest] | None:
            try:
                reveal = total.reveal(final, own, self._journal)
            except StorageError:
                # The round was over in the meantime, and its journal with it.
                if self._sum is total:
                    raise
                return None
            assert reveal.count == count, f"{reveal.count} contributors in a sum of {count}"
            body = codec.encode(reveal)
            return body, digest(body)

        def made(result: Any) -> None:
            _must_work(result)
            if self._sum is not total or result is None:
                return
            self._sum = None
            body, body_hash = result
            message = self._signer.sign_raw(
                MessageKind.REVEAL,
                body,
                raw_size=len(body),
                compressed=False,
                now=self._clock(),
                round=number,
                body_hash=body_hash,
            )
            self._worker.do(message.encode, functools.partial(signed, message.id), small=small)

        def signed(message_id: MessageId, raw: bytes) -> None:
            self.feed(ev.RevealMade(plan=plan, commit=commit, message_id=message_id, raw=raw))

        self._worker.do(make, made, small=small)


def _must_work(result: Any) -> None:
    """What was checked before it was accepted cannot fail to be added."""
    if isinstance(result, RemoteProtocolError):
        raise StorageError(f"an accepted contribution does not add up: {result}")
