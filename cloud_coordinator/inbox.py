"""What comes in from gateways: bytes become verified events, or a counted refusal with its reason.

Nothing here raises for what a peer sent. A message that was answered before is answered again with the stored bytes,
before anything else is looked at (`docs/protocol.md`, "Rules for all", 3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from fleetfed.cloud_coordinator.book import Revealed
from fleetfed.cloud_coordinator.events import Named, ProposalVerified, RevealVerified
from fleetfed.cloud_coordinator.fleet import MAX_GATEWAYS
from fleetfed.cloud_coordinator.proposals import THREAD_FROM, PlanInForce, verify_proposal
from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.shared.aggregate.accumulator import decode_words, max_words_body
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.uplinks import Uplinks, parse_link
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.chunks import Assembler, parse_chunk
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.masking import MaskSums
from fleetfed.shared.wire.messages import Census, Life, Need, Presence, Proposal, Reveal, max_proposal
from fleetfed.shared.wire.topics import CLOUD_SITE, Direction, Kind, MemberTopic, Verb, parse

_log = logging.getLogger(__name__)

T = TypeVar("T")

_KINDS: Final = {
    Verb.PROPOSE: MessageKind.PROPOSE,
    Verb.REVEAL: MessageKind.REVEAL,
    Verb.MASKS: MessageKind.MASK_SUMS,
}
_THREAD_FROM_BYTES: Final = 256 * limits.KIB
"""Bytes of a body from which decoding is worth a thread."""
_MAX_ASSEMBLERS: Final = 10_000
_REVEAL_OVERHEAD: Final = 1024


class Inbox:
    """Takes packets, one at a time.

    Args:
        coordinator: what events go to.
        control: answers a request: operator id and the message.
    """

    def __init__(self, coordinator: Coordinator, control: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._coordinator = coordinator
        self._control = control
        self._assemblers: dict[tuple[str, Verb], Assembler] = {}
        self._uplinks = Uplinks(limit=MAX_GATEWAYS)

    @property
    def subscriptions(self) -> list[str]:
        """The filters that the coordinator listens to."""
        topics = self._coordinator.topics
        verbs = (Verb.LINK, Verb.STATE, Verb.CENSUS, Verb.PROPOSE, Verb.REVEAL, Verb.NEED)
        return [
            topics.all_up(Kind.OPERATOR, Verb.REQUEST),
            *(topics.all_up(Kind.HELPER, verb) for verb in (Verb.STATE, Verb.KEY, Verb.MASKS)),
            *(topics.all_up(Kind.GATEWAY, verb) for verb in verbs),
        ]

    async def message(self, topic: str, payload: bytes) -> None:
        """Take one packet; returns when all that follows from it is durable."""
        try:
            parsed = parse(topic)
            ours = isinstance(parsed, MemberTopic) and parsed.direction is Direction.UP
            if not ours or parsed.site != CLOUD_SITE or parsed.fleet != self._coordinator.topics.fleet:
                raise RemoteProtocolError(RejectReason.MALFORMED, f"topic {topic}")
            assert isinstance(parsed, MemberTopic)
            await self._route(parsed, payload)
        except RemoteProtocolError as error:
            self._coordinator.rejected.add(error.reason)
            _log.warning("%s: refused: %s", topic, error, extra={"reason": str(error.reason)})

    async def _route(self, topic: MemberTopic, payload: bytes) -> None:
        member, coordinator = topic.member, self._coordinator
        match topic.kind, topic.verb:
            case Kind.GATEWAY, Verb.STATE:
                presence = codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE) if payload else None
                if presence is not None and presence.outlived(coordinator.clock()):
                    presence = None
                if coordinator.fleet.presence(member, self._uplinks.presence(member, presence)):
                    coordinator.fleet_changed()
            case Kind.GATEWAY, Verb.LINK:
                self._link(member, parse_link(payload))
            case Kind.GATEWAY, Verb.CENSUS:
                self._census(member, payload)
            case Kind.GATEWAY, Verb.NEED:
                need = codec.decode(Need, payload, limit=limits.MAX_SMALL_MESSAGE)
                count = coordinator.publisher.need(need, coordinator.clock())
                _log.info("%s: asked for %d chunks, %d published again", member, len(need.missing), count)
            case Kind.GATEWAY, (Verb.PROPOSE | Verb.REVEAL):
                await self._chunk(member, topic.verb, payload)
            case Kind.HELPER, Verb.STATE:
                self._helper(member, payload)
            case Kind.HELPER, Verb.KEY:
                if coordinator.helpers.key(member, payload, now=coordinator.clock()):
                    coordinator.fleet_changed()
            case Kind.HELPER, Verb.MASKS:
                await self._chunk(member, topic.verb, payload)
            case Kind.OPERATOR, Verb.REQUEST:
                await self._control(member, payload)
            case _:
                raise RemoteProtocolError(RejectReason.MALFORMED, f"{topic.kind.name} says {topic.verb.name}")

    def _link(self, gateway: str, up: bool | None) -> None:
        presence = self._uplinks.link(gateway, up)
        if presence is not None and self._coordinator.fleet.presence(gateway, presence):
            _log.info("%s: its bridge is %s", gateway, "down" if up is False else "up")
            self._coordinator.fleet_changed()

    def _helper(self, helper: str, payload: bytes) -> None:
        coordinator = self._coordinator
        presence = codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE) if payload else None
        if not coordinator.helpers.presence(helper, presence):
            return
        if presence is not None and presence.life is Life.READY:
            coordinator.reveals.helper_is_back(coordinator.clock())
        coordinator.fleet_changed()

    def _census(self, gateway: str, payload: bytes) -> None:
        if not payload:
            return
        coordinator = self._coordinator
        try:
            census, _, certificate = coordinator.verifier.open(
                payload, Census, kind=MessageKind.CENSUS, now=coordinator.clock(), sender=gateway
            )
        except RemoteProtocolError as error:
            # What it retained before it was revoked, at every start of ours.
            if error.reason is RejectReason.REVOKED and coordinator.fleet.expel(gateway):
                coordinator.fleet_changed()
            raise
        if census.site != certificate.site:
            raise RemoteProtocolError(RejectReason.WRONG_SITE, f"{gateway} counts {census.site}")
        if coordinator.fleet.census(gateway, census, certificate.serial):
            coordinator.fleet_changed()

    async def _chunk(self, gateway: str, verb: Verb, frame: bytes) -> None:
        chunk = parse_chunk(frame)
        head = parse_head(chunk.data) if chunk.index == 0 else None
        if head is not None and self._answered(gateway, verb, head):
            return
        try:
            complete = self._assembler(gateway, verb).feed(frame)
            if complete is None:
                return
            head, body = complete
            match verb:
                case Verb.PROPOSE:
                    await self._propose(gateway, head, body)
                case Verb.REVEAL:
                    await self._reveal(gateway, head, body)
                case _:
                    await self._masks(gateway, head, body)
        except RemoteProtocolError as error:
            if head is None:
                raise
            kind = Kind.HELPER if verb is Verb.MASKS else Kind.GATEWAY
            self._coordinator.refuse(_named(gateway, head), error.reason, error.detail, kind=kind)

    def _answered(self, gateway: str, verb: Verb, head: Head) -> bool:
        """Answer a message that was answered before; return whether it was."""
        coordinator = self._coordinator
        # Not verified yet: the database has no column for every number that a header may hold.
        if head.header.round > coordinator.machine.last_round:
            return False
        stored = coordinator.store.exchange(head.header.round, gateway)
        if stored is None:
            return False
        if verb is Verb.PROPOSE and stored.proposal_head == head.hash:
            coordinator.resend_commit(stored)
            return True
        if verb is Verb.REVEAL and stored.reveal_head == head.hash:
            coordinator.resend_receipt(stored)
            return True
        return False

    def _assembler(self, gateway: str, verb: Verb) -> Assembler:
        key = gateway, verb
        if key not in self._assemblers:
            if len(self._assemblers) >= _MAX_ASSEMBLERS:
                raise RemoteProtocolError(RejectReason.OVERLOADED, f"{len(self._assemblers)} gateways")
            self._assemblers[key] = Assembler(lambda head: self._admit(gateway, verb, head))
        return self._assemblers[key]

    def _admit(self, gateway: str, verb: Verb, head: Head) -> None:
        """Refuse a message by its head, before memory is reserved for its body."""
        coordinator = self._coordinator
        coordinator.verifier.head(head, kind=_KINDS[verb], now=coordinator.clock(), sender=gateway)
        current = self._open(head)
        most = self._most(gateway, verb, current)
        size = max(head.header.body_size, head.header.raw_size)
        if size > most:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{size} bytes, at most {most}")

    def _most(self, sender: str, verb: Verb, current: PlanInForce) -> int:
        """Bytes that a message's body may have, as sent and once decompressed."""
        cap, reveals = current.plan.quorum.cohort_cap, self._coordinator.reveals
        match verb:
            case Verb.PROPOSE:
                return max_proposal(cap)
            case Verb.MASKS:
                return reveals.most_masks(sender, current)
            case _ if current.plan.split is not None:
                return reveals.most_words(sender, current, current.plan.split)
            case _:
                return max_words_body(current.ring, cap) + _REVEAL_OVERHEAD

    def _open(self, head: Head) -> PlanInForce:
        """The plan of the open round, which the message must belong to."""
        coordinator = self._coordinator
        current, round_ = coordinator.current, coordinator.machine.round
        number = coordinator.machine.last_round
        if current is None or round_ is None or head.header.round < number:
            raise RemoteProtocolError(RejectReason.LATE, f"round {head.header.round}; round {number} was the last")
        if head.header.round != round_.number:
            raise RemoteProtocolError(RejectReason.WRONG_ROUND, f"round {head.header.round}, round {number} is open")
        return current

    async def _propose(self, gateway: str, head: Head, body: memoryview) -> None:
        coordinator = self._coordinator
        current = self._open(head)
        proposal = await _decode(Proposal, head, body)
        if proposal.plan != current.hash:
            raise RemoteProtocolError(RejectReason.WRONG_PLAN)
        now = coordinator.clock()

        def verify() -> ProposalVerified:
            found = verify_proposal(proposal, current=current, verifier=coordinator.verifier, now=now)
            return ProposalVerified(
                message=_named(gateway, head),
                plan=current.hash,
                members=found.members,
                excluded=found.excluded,
                sites=found.sites,
                declined=proposal.declined,
                rejected=proposal.rejected,
            )

        event = verify() if len(proposal.heads) < THREAD_FROM else await asyncio.to_thread(verify)
        coordinator.proposed(event, head.encode() + body)

    async def _reveal(self, gateway: str, head: Head, body: memoryview) -> None:
        coordinator = self._coordinator
        current = self._open(head)
        reveal = await _decode(Reveal, head, body)
        event = RevealVerified(
            message=_named(gateway, head),
            plan=Digest(reveal.plan),
            commit=Digest(reveal.commit),
            count=reveal.count,
            failed=reveal.reason,
        )
        round_ = coordinator.machine.round
        assert round_ is not None
        reason = round_.judge_reveal(event)
        if reason is not None:
            raise RemoteProtocolError(reason, "the reveal does not answer the commit")
        if reveal.reason is not None:
            coordinator.reveals.refused(event, reveal, current)
            return
        if current.plan.split is not None:
            await coordinator.reveals.take(event, reveal, current, current.plan.split)
            return
        if len(reveal.words) < _THREAD_FROM_BYTES:
            partial = decode_words(reveal.words, current.ring, count=reveal.count)
        else:
            partial = await asyncio.to_thread(decode_words, reveal.words, current.ring, count=reveal.count)
        coordinator.revealed(event, Revealed(stored=reveal.words, parts=(partial,)))

    async def _masks(self, helper: str, head: Head, body: memoryview) -> None:
        current = self._open(head)
        answer = await _decode(MaskSums, head, body)
        await self._coordinator.reveals.masks(_named(helper, head), answer, current)


def _named(gateway: str, head: Head) -> Named:
    return Named(gateway=gateway, message_id=head.header.message_id, head=head.hash)


async def _decode(cls: type[T], head: Head, body: memoryview) -> T:
    def work() -> T:
        raw = open_body(head.header, body)
        return codec.decode(cls, raw, limit=len(raw))

    return work() if head.header.raw_size < _THREAD_FROM_BYTES else await asyncio.to_thread(work)
