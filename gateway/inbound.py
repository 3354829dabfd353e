"""Bytes from the brokers into verified events: who may say what, in which order it is checked, and what is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from fleetfed.gateway import events as ev
from fleetfed.gateway.intake import Complete, Intake, Refusal, Repeated
from fleetfed.gateway.journal import commit_event
from fleetfed.gateway.perform import SMALL, Parcel, Performer
from fleetfed.gateway.relay import Relay
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.worker import Worker
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.uplinks import Uplinks, parse_link
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import (
    Census,
    Commit,
    Decline,
    Life,
    Manifest,
    Need,
    Plan,
    Presence,
    Proposal,
    Receipt,
    Revocations,
    RoundEnd,
    max_proposal,
)
from fleetfed.shared.wire.topics import (
    CLOUD_SITE,
    BlobTopic,
    Broadcast,
    BroadcastTopic,
    Kind,
    MemberTopic,
    SiteTopics,
    Verb,
    parse,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SMALL_MESSAGE: Final = 1 << 17
_NEVER_TAKEN: Final = frozenset(
    {
        RejectReason.REVOKED,
        RejectReason.EXPIRED_CERTIFICATE,
        RejectReason.BAD_CERTIFICATE,
        RejectReason.WRONG_ROLE,
        RejectReason.WRONG_SITE,
    }
)
"""Faults of the sender and not of the message: nothing that such a member sends can be taken."""


_CALLED: Final = {Kind.DEVICE: "device", Kind.GATEWAY: "gateway"}
"""What a log line calls whose message it was."""


class Inbound:
    """See the module.

    Args:
        verifier: decides whom to believe.
        machine: asked whether an update may come in.
        performer: sends receipts and counts refusals.
        relay: takes manifests, chunks and needs.
        worker: decodes what is large.
        site, upstream: topics of the own site and of the one above.
        gateway: own id.
        counters: refusals by reason.
        budget: bytes of half messages from members.
        fed: hands an event to the machine.
        revoked: takes the bytes of a revocation list that is news and in force.
        reborn: called when the node above says that it started anew.
        linked: called with whether the own broker's bridge to the tier above is up.
        trusted: takes a bundle of trust metadata.
        told: takes a device's id and what it tells of itself.
        neighbour: takes what a node of the own site says of its presence, and whether it was said just now.
        clock: unix milliseconds.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        machine: GatewayMachine,
        performer: Performer,
        relay: Relay,
        worker: Worker,
        site: SiteTopics,
        upstream: SiteTopics,
        gateway: str,
        counters: Counters,
        budget: int,
        fed: Callable[[object], None],
        revoked: Callable[[bytes], None],
        reborn: Callable[[], None],
        clock: Callable[[], int],
        trusted: Callable[[bytes], None] = lambda _: None,
        linked: Callable[[bool], None] = lambda _: None,
        told: Callable[[str, bytes], None] = lambda _device, _payload: None,
        neighbour: Callable[[Presence, bool], None] = lambda _presence, _live: None,
    ) -> None:
        self._told = told
        self._neighbour = neighbour
        self._linked = linked
        self._uplinks = Uplinks()
        self._trusted = trusted
        self._stale = b""
        self._verifier = verifier
        self._machine = machine
        self._performer = performer
        self._relay = relay
        self._worker = worker
        self._site, self._upstream = site, upstream
        self._gateway = gateway
        self._counters = counters
        self._fed = fed
        self._revoked = revoked
        self._reborn = reborn
        self._clock = clock
        self._upstream_birth: tuple[int, int] | None = None
        self._updates = Intake(MessageKind.UPDATE, verifier, site=site.site, admit=self._admit_update, budget=budget)
        self._proposals = Intake(MessageKind.PROPOSE, verifier, site=None, admit=self._admit_child, budget=budget)
        self._reveals = Intake(MessageKind.REVEAL, verifier, site=None, admit=self._admit_child, budget=budget)
        self._commits = Intake(
            MessageKind.COMMIT, verifier, site=None, admit=_any, budget=2 * limits.MAX_PROPOSAL, named=False
        )

    def receive(self, topic: str, payload: bytes, *, live: bool = False) -> None:
        """Take one message; nothing that a peer sends raises.

        Args:
            topic: where.
            payload: what.
            live: it was said just now, and is no copy that the broker had kept.
        """
        about: dict[str, str] = {}
        try:
            where = parse(topic)
            about = _about(where)
            if where.fleet != self._site.fleet:
                raise RemoteProtocolError(RejectReason.WRONG_FLEET, topic[:200])
            if where.site == self._site.site:
                self._from_below(where, payload, live=live)
            elif where.site == self._upstream.site:
                self._from_above(where, payload, live=live)
            else:
                raise RemoteProtocolError(RejectReason.WRONG_SITE, topic[:200])
        except RemoteProtocolError as error:
            self._performer.count(topic[:200], error.reason, error.detail, about=about)

    def round_over(self) -> None:
        """Half messages of the round that is over are void."""
        for intake in (self._updates, self._proposals, self._reveals):
            intake.clear()

    def load_revocations(self, path: Path) -> bytes:
        """Put the list in force that an earlier run kept; return its bytes, empty for none."""
        if not path.exists():
            return b""
        raw = path.read_bytes()
        try:
            self._verifier.restore(raw, now=self._clock())
        except RemoteProtocolError as error:
            _log.warning("%s is of no use: %s", path, error)
            return b""
        return raw

    # --- Below ---------------------------------------------------------------------------------------------------

    def _from_below(self, where: Any, payload: bytes, *, live: bool) -> None:
        if isinstance(where, BroadcastTopic) and where.what is Broadcast.NODE and payload:
            self._neighbour(codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE), live)
        if not isinstance(where, MemberTopic):
            return
        kind, member = where.kind, where.member
        match where.verb:
            case Verb.STATE:
                presence = codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE) if payload else None
                if presence is not None and presence.outlived(self._clock()):
                    presence = None
                if kind is Kind.GATEWAY:
                    presence = self._uplinks.presence(member, presence)
                self._fed_in_order(ev.PresenceArrived(kind=kind, member=member, presence=presence))
            case Verb.LINK:
                presence = self._uplinks.link(member, parse_link(payload))
                if presence is not None:
                    self._fed_in_order(ev.PresenceArrived(kind=kind, member=member, presence=presence))
            case Verb.UPDATE:
                self._chunk(self._updates, Kind.DEVICE, member, payload, self._update_complete)
            case Verb.PROPOSE:
                self._chunk(self._proposals, Kind.GATEWAY, member, payload, self._proposal_complete)
            case Verb.REVEAL:
                self._chunk(self._reveals, Kind.GATEWAY, member, payload, self._reveal_complete)
            case Verb.DECLINE:
                self._decline(member, payload)
            case Verb.TELEMETRY:
                self._told(member, payload)
            case Verb.CENSUS if payload:
                census, _, certificate = self._open(payload, Census, MessageKind.CENSUS, member)
                if census.site != certificate.site:
                    raise RemoteProtocolError(RejectReason.WRONG_SITE, f"{member} counts {census.site}")
                self._fed(ev.CensusArrived(gateway=member, census=census))
            case Verb.NEED:
                self._relay.need(codec.decode(Need, payload, limit=limits.MAX_SMALL_MESSAGE))

    def _fed_in_order(self, event: object) -> None:
        """After what came before it and is being opened: who leaves has sent its update first."""
        if self._worker.idle:
            self._fed(event)
        else:
            self._worker.do(lambda: event, self._fed, small=True)

    def _open(
        self, payload: bytes, cls: type[T], kind: MessageKind, sender: str | None = None
    ) -> tuple[T, Head, Certificate]:
        return self._verifier.open(payload, cls, kind=kind, now=self._clock(), sender=sender)

    def _admit_update(self, head: Head, certificate: Certificate, now: int) -> bool:
        return self._machine.admit(head, certificate.id, now=now)

    def _admit_child(self, head: Head, certificate: Certificate, now: int) -> bool:
        header, rnd = head.header, self._machine.round
        if rnd is None or header.round != rnd.record.plan.round:
            late = header.round == self._machine.previous.round
            raise RemoteProtocolError(RejectReason.LATE if late else RejectReason.WRONG_ROUND, str(header.round))
        if header.kind is MessageKind.REVEAL:
            child = rnd.record.children.get(certificate.id)
            limit = rnd.rules.reveal_limit(len(child.members) if child else 0)
        else:
            limit = max_proposal(rnd.record.plan.quorum.cohort_cap)
        if max(header.body_size, header.raw_size) > limit:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{header.raw_size} bytes, limit {limit}")
        return True

    def _chunk(
        self, intake: Intake, kind: Kind, member: str, payload: bytes, complete: Callable[[str, Complete], None]
    ) -> None:
        result = intake.feed(member, payload, self._clock())
        match result:
            case None:
                pass
            case Complete():
                complete(member, result)
            case Repeated(head):
                self._performer.send_stored_receipt(kind, member, head.header.message_id)
            case Refusal(reason, detail, head):
                self._refuse(kind, member, head, RemoteProtocolError(reason, detail))

    def _refuse(self, kind: Kind, member: str, head: Head | None, error: RemoteProtocolError) -> None:
        about = {_CALLED[kind]: member}
        self._performer.count(f"message of {member}", error.reason, error.detail, about=about)
        if head is not None:
            self._performer.send_receipt(kind, member, head.header.message_id, head.hash, error.reason)
        if error.reason in _NEVER_TAKEN:
            # To wait for it would hold this round, and every one to come, until the deadline.
            self._fed(ev.PresenceArrived(kind=kind, member=member, presence=None))

    def _update_complete(self, device: str, message: Complete) -> None:
        rnd, head, total = self._machine.round, message.head, self._performer.total
        assert rnd is not None, "admitted without a round"
        plan = rnd.record.hash
        if total is None:
            # The sum was handed over while the last bytes came in.
            self._updates.done(device)
            self._refuse(Kind.DEVICE, device, head, RemoteProtocolError(RejectReason.LATE))
            return

        def decoded(result: Any) -> None:
            self._updates.done(device)
            if isinstance(result, RemoteProtocolError):
                self._refuse(Kind.DEVICE, device, head, result)
                return
            self._fed(
                ev.UpdateArrived(
                    device=device,
                    serial=message.certificate.serial,
                    plan=plan,
                    message_id=head.header.message_id,
                    head=head.hash,
                    size=head.message_size,
                    owner=message.certificate.owner,
                    parcel=Parcel(head.encode(), message.body, result),
                )
            )

        small = rnd.ring.layout.dimension <= SMALL
        size = head.message_size + rnd.ring.layout.dimension
        self._worker.do(lambda: total.open(head, message.body), decoded, small=small, size=size)

    def _decline(self, device: str, payload: bytes) -> None:
        head = parse_head(payload)
        certificate = self._verifier.head(head, kind=MessageKind.DECLINE, now=self._clock(), sender=device)
        try:
            if certificate.site != self._site.site:
                raise RemoteProtocolError(RejectReason.WRONG_SITE, f"{device} belongs to {certificate.site}")
            raw = open_body(head.header, memoryview(payload)[head.size :])
            decline = codec.decode(Decline, raw, limit=len(raw))
        except RemoteProtocolError as error:
            self._refuse(Kind.DEVICE, device, head, error)
            return
        self._fed(
            ev.DeclineArrived(
                device=device,
                plan=decline.plan,
                message_id=head.header.message_id,
                head=head.hash,
                reason=str(decline.reason),
            )
        )

    def _proposal_complete(self, gateway: str, message: Complete) -> None:
        head = message.head
        raw = head.encode() + bytes(message.body)

        def decode() -> ev.ChildProposed:
            body = open_body(head.header, message.body)
            proposal = codec.decode(Proposal, body, limit=len(body))
            return ev.ChildProposed(
                gateway=gateway,
                plan=proposal.plan,
                message_id=head.header.message_id,
                head=head.hash,
                members=tuple(parse_head(each).header.message_id for each in proposal.heads),
                declined=proposal.declined,
                rejected=proposal.rejected,
                raw=raw,
            )

        self._worker.do(decode, self._child_done(self._proposals, gateway, head), small=len(raw) < _SMALL_MESSAGE)

    def _reveal_complete(self, gateway: str, message: Complete) -> None:
        rnd, head = self._machine.round, message.head
        assert rnd is not None, "admitted without a round"
        rules, own, raw = rnd.rules, self._site.site, head.encode() + bytes(message.body)

        def decode() -> ev.ChildRevealed:
            reveal, partial = rules.open_reveal(head, message.body)
            if any(bucket.site == own for bucket in reveal.buckets):
                raise RemoteProtocolError(RejectReason.WRONG_SITE, f"{gateway} reveals buckets of {own}")
            return ev.ChildRevealed(
                gateway=gateway,
                plan=reveal.plan,
                commit=reveal.commit,
                message_id=head.header.message_id,
                head=head.hash,
                count=reveal.count,
                raw=raw,
                parcel=partial,
                reason=reveal.reason,
                detail=reveal.detail,
            )

        small = max(rnd.ring.layout.dimension, len(raw) // 8) <= SMALL
        self._worker.do(decode, self._child_done(self._reveals, gateway, head), small=small)

    def _child_done(self, intake: Intake, gateway: str, head: Head) -> Callable[[Any], None]:
        def done(result: Any) -> None:
            intake.done(gateway)
            if isinstance(result, RemoteProtocolError):
                self._refuse(Kind.GATEWAY, gateway, head, result)
            else:
                self._fed(result)

        return done

    # --- Above ---------------------------------------------------------------------------------------------------

    def _from_above(self, where: Any, payload: bytes, *, live: bool) -> None:
        match where:
            case BlobTopic():
                self._relay.chunk(where, payload)
            case BroadcastTopic(what=Broadcast.PLAN) if payload:
                self._plan(payload)
            case BroadcastTopic(what=Broadcast.MODEL) if payload:
                manifest, _, _ = self._open(payload, Manifest, MessageKind.MANIFEST)
                self._verifier.check_manifest(manifest)
                self._relay.offer(manifest, payload)
            case BroadcastTopic(what=Broadcast.REVOKED) if payload:
                revocations, _, by = self._open(payload, Revocations, MessageKind.REVOCATIONS)
                if self._verifier.revoke(revocations, by=by):
                    self._revoked(payload)
            case BroadcastTopic(what=Broadcast.TRUST) if payload:
                self._trusted(payload)
            case BroadcastTopic(what=Broadcast.NODE) if payload:
                self._node(codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE), live=live)
            case MemberTopic(member=self._gateway, verb=Verb.LINK):
                up = parse_link(payload)
                if up is not None:
                    self._linked(up)
            case MemberTopic(member=self._gateway, verb=Verb.RECEIPT):
                self._receipt(payload)
            case MemberTopic(member=self._gateway, verb=Verb.COMMIT):
                self._commit(payload)

    def _plan(self, payload: bytes) -> None:
        if parse_head(payload).header.kind is MessageKind.ROUND_END:
            end, head, _ = self._open(payload, RoundEnd, MessageKind.ROUND_END)
            self._fed(ev.RoundEndArrived(round=end.round, plan=end.plan, raw=payload, signer=head.header.sender))
            return
        plan, head, _ = self._open(payload, Plan, MessageKind.PLAN)
        # Before anybody below sees it: what the fleet's owners forbid is neither passed on nor answered.
        try:
            self._verifier.check_plan(plan, now=self._clock())
        except RemoteProtocolError as error:
            self._stale = payload if error.reason is RejectReason.STALE_TRUST else b""
            raise
        self._fed(ev.PlanArrived(plan=plan, hash=head.hash, raw=payload, signer=head.header.sender))

    def judge_again(self) -> None:
        """Trust is current again: a plan that was refused because it was not gets another chance."""
        stale, self._stale = self._stale, b""
        if stale:
            self.receive(self._upstream.broadcast(Broadcast.PLAN), stale)

    def _node(self, presence: Presence, *, live: bool) -> None:
        # A new birth: the node above, or its connection, is not the one that heard us; its broker may have lost what
        # waited for it. A first one that is live came after we spoke, and some brokers hand out what they keep only to
        # who asks for that very topic.
        before, self._upstream_birth = self._upstream_birth, (presence.session, presence.since)
        known = before is not None or live
        if known and before != self._upstream_birth and presence.life is Life.READY:
            self._reborn()

    def _receipt(self, payload: bytes) -> None:
        receipt, _, certificate = self._open(payload, Receipt, MessageKind.RECEIPT)
        role = Role.COORDINATOR if self._upstream.site == CLOUD_SITE else Role.GATEWAY
        if (certificate.role, certificate.site) != (role, self._upstream.site):
            raise RemoteProtocolError(RejectReason.WRONG_SENDER, f"a receipt of {certificate.id}")
        self._fed(ev.ReceiptArrived(message_id=receipt.message_id, reason=receipt.reason, detail=receipt.detail))

    def _commit(self, payload: bytes) -> None:
        result = self._commits.feed(CLOUD_SITE, payload, self._clock())
        if isinstance(result, Refusal):
            raise RemoteProtocolError(result.reason, result.detail)
        if isinstance(result, Complete):
            self._commits.done(CLOUD_SITE)
            raw = result.head.encode() + bytes(result.body)
            commit, _, _ = self._open(raw, Commit, MessageKind.COMMIT)
            self._fed(commit_event(raw, commit))


def _any(head: Head, certificate: Certificate, now: int) -> bool:
    return True


def _about(where: Any) -> dict[str, str]:
    """Whose message it was, for a log line."""
    return {_CALLED[where.kind]: where.member} if isinstance(where, MemberTopic) and where.kind in _CALLED else {}
