"""From a masked reveal to plain sums: takes the own masks away, asks the helper for its own, judges what is left.

Nothing here is durable, and nothing need be. A gateway sends its reveal until it has a receipt, which it gets once the
unmasked sums are stored; so after a crash the same reveal comes again, and the helper gives the answer that it gave.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeVar

from fleetfed.cloud_coordinator.book import Revealed
from fleetfed.cloud_coordinator.events import Named, RevealVerified
from fleetfed.cloud_coordinator.proposals import PlanInForce
from fleetfed.cloud_coordinator.secure.unmask import (
    MaskedSum,
    Unmasked,
    judge,
    most_bytes,
    nonces_of,
    read_sums,
    read_words,
    sums_due,
    take_masks,
)
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord
from fleetfed.cloud_coordinator.storage.restore import own_message
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.masking import MaskRequest, MaskSums, SealKey, Split
from fleetfed.shared.wire.messages import Commit, Proposal, Reveal
from fleetfed.shared.wire.topics import Kind, Verb

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.service import Coordinator

_log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_FIRST: Final = 2_000
_RETRY_MOST: Final = 60_000
"""Milliseconds until the helper is asked again."""
_THREAD_FROM: Final = 1 << 20
"""Bytes of masks from which taking them away is worth a thread."""
_OVERHEAD: Final = 4096


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A reveal that is being worked on.

    Attributes:
        event: what it says.
        sums: from which masks are being taken.
        ask: the question to the helper; None while nobody is waited for.
        due: when to ask again.
        asked: how often the helper was asked.
    """

    event: RevealVerified
    sums: dict[tuple[str, int], MaskedSum] = field(default_factory=dict)
    ask: Message | None = None
    due: int = 0
    asked: int = 0


class Reveals:
    """See the module; one per coordinator, all calls on its thread.

    Args:
        coordinator: whose round it is.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._pending: dict[str, _Pending] = {}

    def clear(self) -> None:
        """The round is over."""
        self._pending.clear()

    @property
    def waiting_for_helper(self) -> list[str]:
        """Gateways whose reveal waits for the helper."""
        return sorted(gateway for gateway, pending in self._pending.items() if pending.ask is not None)

    # --- The gateway's reveal -----------------------------------------------------------------------------------------

    def most_words(self, gateway: str, current: PlanInForce, plan: Split) -> int:
        """Bytes that a gateway's reveal may have.

        Raises:
            RemoteProtocolError: `NOT_PROPOSED`: none is due.
        """
        record = self._coordinator.store.exchange(current.plan.round, gateway)
        if record is None or not record.members:
            raise RemoteProtocolError(RejectReason.NOT_PROPOSED, "nothing was committed")
        return most_bytes(current.ring, sums_due(record.members, plan.bucket)) + _OVERHEAD

    async def take(self, event: RevealVerified, reveal: Reveal, current: PlanInForce, plan: Split) -> None:
        """Take a reveal that answers its commit.

        Raises:
            RemoteProtocolError: it is refused, and nothing has changed.
        """
        gateway = event.message.gateway
        begun = self._pending.get(gateway)
        if begun is not None:
            if begun.event.message.head != event.message.head:
                raise RemoteProtocolError(RejectReason.CONFLICT, "another reveal of this round came before")
            return
        record = self._coordinator.store.exchange(current.plan.round, gateway)
        if record is None or current.secret is None:
            raise RemoteProtocolError(RejectReason.LATE, "the round is over")
        pending = self._pending[gateway] = _Pending(event=event)
        size = 8 * current.ring.layout.n_words * len(record.members)
        try:
            pending.sums = await _work(size, _opened, reveal, record, current, plan, current.secret)
        except RemoteProtocolError:
            self._pending.pop(gateway, None)
            raise
        self._still(pending)
        if plan.helper:
            self._ask_for(pending, record, current, plan, reveal)
        else:
            await self._finish(pending, current, plan)

    def refused(self, event: RevealVerified, reveal: Reveal, current: PlanInForce) -> None:
        """Take a gateway's word that it follows its commit in nothing; nobody waits for its sum any longer.

        Raises:
            RemoteProtocolError: it is refused, and nothing has changed.
        """
        gateway = event.message.gateway
        if gateway in self._pending:
            raise RemoteProtocolError(RejectReason.CONFLICT, "a sum of this round came before")
        if reveal.reason is None or current.plan.split is None or reveal.count or reveal.words or reveal.buckets:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, "a refusal with a sum, or in a plain round")
        number, reason, detail = current.plan.round, reveal.reason, reveal.detail
        _log.error(
            "round %d: %s: ALARM: it refuses its commit and gives no sum: %s: %s", number, gateway, reason, detail
        )
        self._coordinator.revealed(event, Revealed.none(reason))

    def _still(self, pending: _Pending) -> None:
        if self._pending.get(pending.event.message.gateway) is not pending:
            raise RemoteProtocolError(RejectReason.LATE, "the round ended meanwhile")

    async def _finish(self, pending: _Pending, current: PlanInForce, plan: Split) -> None:
        event, coordinator = pending.event, self._coordinator
        gateway, number = event.message.gateway, current.plan.round
        size = 8 * current.ring.layout.n_words * len(pending.sums)
        try:
            unmasked = await _work(size, _judged, pending.sums, current, plan.bucket)
        except RemoteProtocolError as error:
            self._still(pending)
            del self._pending[gateway]
            # Who made it wrong, a device or a gateway or the helper, cannot be told from a sum.
            _log.error("round %d: %s: ALARM: its sum is impossible and counts nothing: %s", number, gateway, error)
            coordinator.revealed(replace(event, failed=error.reason), Revealed.masked(None, error.reason))
            return
        self._still(pending)
        del self._pending[gateway]
        if unmasked.buckets_lost:
            lost = (number, gateway, unmasked.buckets_lost, unmasked.buckets, len(unmasked.lost))
            _log.error("round %d: %s: ALARM: %d of %d buckets are impossible and dropped with %d devices", *lost)
        coordinator.revealed(replace(event, lost=len(unmasked.lost)), Revealed.masked(unmasked, None))

    # --- The helper ---------------------------------------------------------------------------------------------------

    def _ask_for(
        self, pending: _Pending, record: ExchangeRecord, current: PlanInForce, plan: Split, reveal: Reveal
    ) -> None:
        coordinator = self._coordinator
        stored = coordinator.store.round(current.plan.round)
        assert stored is not None
        request = MaskRequest(
            plan=stored.plan,
            proposal=record.proposal,
            commit=record.commit,
            nonces=nonces_of(reveal) if plan.bucket else {},
        )
        number, now = current.plan.round, coordinator.clock()
        pending.ask = coordinator.sign(MessageKind.MASK_REQUEST, request, now=now, round=number)
        self._ask(pending, now)
        coordinator.wake()

    def _ask(self, pending: _Pending, now: int) -> None:
        coordinator = self._coordinator
        assert pending.ask is not None
        assert coordinator.current is not None
        assert coordinator.current.plan.split is not None
        helper = helper_of(coordinator.current.plan.split)
        for frame in split(pending.ask.id, pending.ask.encode()):
            coordinator.down(Kind.HELPER, helper, Verb.ASK, frame)
        pending.due = now + min(_RETRY_FIRST << min(pending.asked, 10), _RETRY_MOST)
        pending.asked += 1
        if pending.asked > 1:
            _log.warning("%s has not answered for %s, asked again", helper, pending.event.message.gateway)

    def helper_is_back(self, now: int) -> None:
        """Ask at once what the helper may not have heard."""
        for pending in self._pending.values():
            if pending.ask is not None:
                pending.asked = 0
                self._ask(pending, now)

    def next_deadline(self) -> int | None:
        """When to call `timer`."""
        return min((pending.due for pending in self._pending.values() if pending.ask is not None), default=None)

    def timer(self, now: int) -> None:
        """Ask again what was not answered."""
        for pending in self._pending.values():
            # If the clock was put back, the time that was meant would come much too late.
            if pending.ask is not None and (now >= pending.due or pending.due - now > _RETRY_MOST):
                self._ask(pending, now)

    def most_masks(self, helper: str, current: PlanInForce) -> int:
        """Bytes that a helper's answer may have.

        Raises:
            RemoteProtocolError: `WRONG_SENDER`: the plan has no helper, or another one; or `NOT_PROPOSED`.
        """
        plan = current.plan.split
        if plan is None or not plan.helper or helper_of(plan) != helper:
            raise RemoteProtocolError(RejectReason.WRONG_SENDER, f"{helper} is not the round's helper")
        members = [exchange.members for exchange in self._coordinator.store.exchanges(current.plan.round)]
        if not members:
            raise RemoteProtocolError(RejectReason.NOT_PROPOSED, "nothing was committed")
        return most_bytes(current.ring, max(sums_due(each, plan.bucket) for each in members)) + _OVERHEAD

    async def masks(self, message: Named, answer: MaskSums, current: PlanInForce) -> None:
        """Take the helper's answer, and give it a receipt once what follows from it is durable.

        Raises:
            RemoteProtocolError: it is refused, and nothing has changed.
        """
        plan = current.plan.split
        assert plan is not None
        if answer.plan != current.hash:
            raise RemoteProtocolError(RejectReason.WRONG_PLAN)
        record = self._coordinator.store.exchange(current.plan.round, answer.gateway)
        if record is None or record.commit_head != answer.commit:
            raise RemoteProtocolError(RejectReason.NOT_PROPOSED, f"no such commit of {answer.gateway}")
        if record.reveal_head is None:
            pending = self._pending.get(answer.gateway)
            if pending is None or pending.ask is None:
                # After a restart the gateway must first send its reveal again; then the helper is asked again.
                return
            if answer.reason is None:
                await self._subtract(pending, answer, current, plan)
            else:
                self._give_up(pending, message.gateway, answer)
        self._coordinator.confirm(Kind.HELPER, message)

    def _give_up(self, pending: _Pending, helper: str, answer: MaskSums) -> None:
        """The helper gives no masks for this set, and never will: without them its sum is noise."""
        reason, gateway, coordinator = answer.reason, answer.gateway, self._coordinator
        del self._pending[gateway]
        _log.error("%s gives no masks for %s, whose sum counts nothing: %s: %s", helper, gateway, reason, answer.detail)
        coordinator.revealed(replace(pending.event, failed=reason), Revealed.masked(None, reason, answer.bad))

    async def _subtract(self, pending: _Pending, answer: MaskSums, current: PlanInForce, plan: Split) -> None:
        if len(answer.sums) != len(pending.sums):
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{len(answer.sums)} sums, {len(pending.sums)} are due")
        masks = [read_words(words, current.ring) for words in answer.sums]
        pending.ask = None
        for each, mask in zip(pending.sums.values(), masks, strict=True):
            each.words[:] -= mask
        await self._finish(pending, current, plan)


def helper_of(plan: Split) -> str:
    """The id of the helper whose key a plan names."""
    return own_message(plan.helper, SealKey)[0].helper


def _opened(
    reveal: Reveal, record: ExchangeRecord, current: PlanInForce, plan: Split, secret: SealSecret
) -> dict[tuple[str, int], MaskedSum]:
    proposal = own_message(record.proposal, Proposal)[0]
    nonce = own_message(record.commit, Commit)[0].nonce
    sums = read_sums(reveal, record.members, proposal=proposal, plan=plan, nonce=nonce, ring=current.ring)
    take_masks(sums.values(), proposal.heads, secret)
    return sums


def _judged(sums: dict[tuple[str, int], MaskedSum], current: PlanInForce, bucket: int) -> Unmasked:
    return judge(sums, current.ring, bucket=bucket)


async def _work(size: int, function: Callable[..., T], *arguments: object) -> T:
    """Call a function, in a thread if so many bytes are to be worked on."""
    if size < _THREAD_FROM:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
