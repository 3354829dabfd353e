"""One round at one gateway: who is waited for, what is accepted, and the way to the reveal. No I/O.

Rules (docs/protocol.md, Gateway 2 to 7):

- ``open``: updates, declines and proposals from below are taken. It closes when every expected gateway has proposed and
  the quorum's fraction of the expected devices has answered, or at `close_time`.
- ``proposed``: the set is fixed; the proposal is sent again until the coordinator's commit.
- ``committed``: waits for the reveals of the gateways below that have members in the commit.
- ``revealed``: the reveal is sent again until its receipt. A commit that the mode's rules forbid to follow, here or at
  a gateway below, is answered by a reveal that says why and holds no sum: none leaves this gateway in this round.
- ``closed``: nothing more is owed; repeated messages get their stored answers until the round is over.

Whatever happens twice gets the stored first answer. There is one proposal, one commit and one reveal per round, ever:
after a crash they are read from the journal (`RoundRecord`), never made anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Final

from fleetfed.gateway import events as ev
from fleetfed.gateway.modes import check_scale, rules_of
from fleetfed.gateway.record import Accepted, Child, Place, RoundRecord, RoundState, Sent, close_time
from fleetfed.gateway.refusals import refuse_device, refuse_gateway
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.machine import Edge, Machine, TimerFired
from fleetfed.shared.wire.envelope import Digest, Head, MessageId
from fleetfed.shared.wire.messages import Life
from fleetfed.shared.wire.selection import check_taken, takes
from fleetfed.shared.wire.topics import Kind
from fleetfed.shared.wire.update import UpdateExtension

RETRY: Final = 5_000
"""Milliseconds until an unanswered message is sent again; doubled up to `RETRY_CAP`."""
RETRY_CAP: Final = 60_000
KEPT: Final = 24 * 3_600_000
"""Milliseconds after the plan's expiry until a round that still lacks its commit, or a sum from below, gives up bodies
and keys: the cloud has long closed it, but may be away and unable to say so."""
LONELY: Final = 2_000
"""Milliseconds for which a round stays open at a site where nobody is, so that members can still show up. Where there
are devices and the plan selects none of them, there is nobody to wait for."""

_S = RoundState
_PAST: Final = (_S.PROPOSED, _S.COMMITTED, _S.REVEALED, _S.CLOSED)


class RoundMachine(Machine[RoundState]):
    """See the module.

    Args:
        record: a fresh one, or what the journal holds; owned by the machine from now on.
        ring: the plan's arithmetic, which fits the plan.
        place: where the gateway stands.
        devices: the site's devices that are awaited now.
        gateways: the gateways below that are ready now.
        now: unix milliseconds.
        connected: whether there is a connection to the tier above.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`: the plan asks for what this program does not do.
    """

    NAME = "gateway round"

    def __init__(
        self,
        record: RoundRecord,
        ring: Ring,
        place: Place,
        *,
        devices: Iterable[str],
        gateways: Iterable[str],
        now: int,
        connected: bool = False,
    ) -> None:
        super().__init__(record.state())
        self.record = record
        self.ring = ring
        self.rules = rules_of(record.plan, ring)
        self.place = place
        self.rejected: Counter[str] = Counter()
        self._opened = now
        self._connected = connected
        self._retry_at: int | None = None
        self._wait = RETRY
        self._revoked: frozenset[int] = frozenset()
        self._bytes = sum(update.size for update in record.accepted.values())
        self._device_of = {update.message_id: device for device, update in record.accepted.items()}
        present = tuple(devices)
        self.expected = {device for device in present if self._selected(device)}
        self.expected |= record.accepted.keys() | record.declined.keys()
        self.expected_gateways = set(gateways) | record.children.keys()
        self._deserted = not present and not self.expected_gateways

    # --- Questions -----------------------------------------------------------------------------------------------

    @property
    def journalled(self) -> int:
        """Bytes of the round's updates on disk, as `Place.journal_limit` counts them."""
        return self._bytes

    @property
    def answered(self) -> int:
        """Devices that sent an update or declined."""
        return len(self.record.accepted) + sum(name not in self.record.accepted for name in self.record.declined)

    @property
    def contributors(self) -> int:
        """Updates held here and proposed from below."""
        return len(self.record.accepted) + sum(len(child.members) for child in self.record.children.values())

    def admit(self, head: Head, extension: UpdateExtension, device: str, *, now: int) -> bool:
        """Whether the update whose verified head this is may come in; changes nothing.

        Returns:
            False for the very update that was accepted already: its stored receipt is the answer.

        Raises:
            RemoteProtocolError: the first rule that it breaks, in the protocol's order.
        """
        plan, header = self.record.plan, head.header
        if header.round != plan.round:
            raise RemoteProtocolError(RejectReason.WRONG_ROUND, f"{header.round}, open is {plan.round}")
        check_scale(extension, self.ring)
        self.rules.check_update(header, extension)
        if extension.model_sha256 != plan.model_sha256:
            raise RemoteProtocolError(RejectReason.WRONG_MODEL)
        check_taken(self.record.hash, device, plan.eligibility)
        old = self.record.accepted.get(device)
        if old is not None and (old.message_id, old.head) == (header.message_id, head.hash):
            return False
        self._check_room(device, header.message_id, head.message_size, now)
        return True

    def _check_room(self, device: str, message_id: MessageId, size: int, now: int) -> None:
        if self.state is not RoundState.OPEN or now >= close_time(self.record.plan, self.place.level):
            raise RemoteProtocolError(RejectReason.LATE, f"the round is {self.state} here")
        if device in self.record.accepted:
            raise RemoteProtocolError(RejectReason.DUPLICATE, "another update of this device counts")
        # Message ids are their senders' to choose; journal and commit name updates by them alone.
        if message_id in self._device_of or any(message_id in c.members for c in self.record.children.values()):
            raise RemoteProtocolError(RejectReason.CONFLICT, "another device's update has this message id")
        if self.contributors >= self.record.plan.quorum.cohort_cap:
            raise RemoteProtocolError(RejectReason.COHORT_FULL, f"{self.contributors} contributors")
        if self._bytes + size > self.place.journal_limit:
            raise RemoteProtocolError(RejectReason.OVERLOADED, f"the journal holds {self._bytes} bytes")

    def _has_answered(self, device: str) -> bool:
        return device in self.record.accepted or device in self.record.declined

    def _selected(self, device: str) -> bool:
        return takes(self.record.hash, device, self.record.plan.eligibility)

    def _due(self) -> int:
        """When the open round closes, as things stand."""
        plan = self.record.plan
        latest = close_time(plan, self.place.level)
        if not self.expected_gateways <= self.record.children.keys():
            return latest
        if not self.expected:
            lonely = self._opened + LONELY if self._deserted else 0
            return min(latest, max(lonely, self.place.settled))
        # 1e-9: a fraction such as 0.7 of 10 must not become 8.
        needed = max(1, math.ceil(plan.quorum.fraction * len(self.expected) - 1e-9))
        return min(latest, self.place.settled) if self.answered >= needed else latest

    def next_deadline(self) -> int | None:
        """When to close, or to send again."""
        if self.state is RoundState.OPEN:
            return self._due()
        void = self._void_at()
        return void if self._retry_at is None else self._retry_at if void is None else min(void, self._retry_at)

    def _void_at(self) -> int | None:
        waits = self.state in (RoundState.PROPOSED, RoundState.COMMITTED)
        return self.record.plan.expires + KEPT if waits else None

    def validate(self) -> None:
        """Assert every invariant."""
        record = self.record
        ids = [update.message_id for update in record.accepted.values()]
        assert len(set(ids)) == len(ids)
        assert self._device_of == {update.message_id: device for device, update in record.accepted.items()}
        assert self._bytes == sum(update.size for update in record.accepted.values())
        assert self.contributors <= record.plan.quorum.cohort_cap
        assert self.state is not RoundState.OPEN or record.proposal is None
        if self.state in (RoundState.COMMITTED, RoundState.REVEALED):
            assert record.proposal is not None
            assert record.commit is not None
        if self.state is RoundState.REVEALED:
            assert record.reveal is not None
        if record.aborted:
            assert self.state in (RoundState.REVEALED, RoundState.CLOSED)
        for gateway, child in record.children.items():
            assert child.reveal is None or child.count == len(self.record.child_part(gateway))

    # --- Devices -------------------------------------------------------------------------------------------------

    def _take_update(self, event: ev.UpdateArrived, now: int) -> list[Any]:
        old = self.record.accepted.get(event.device)
        if old is not None and (old.message_id, old.head) == (event.message_id, event.head):
            return [
                ev.DiscardParcel(update=event),
                ev.SendStoredReceipt(kind=Kind.DEVICE, member=event.device, message_id=event.message_id),
            ]
        try:
            # Asked again: the round may have closed, or the device sent another update, while the body came in.
            self._check_room(event.device, event.message_id, event.size, now)
            if event.serial in self._revoked:
                raise RemoteProtocolError(RejectReason.REVOKED)
        except RemoteProtocolError as error:
            return [ev.DiscardParcel(update=event), *self._refuse(event, error)]
        self.record.accepted[event.device] = Accepted(
            event.message_id, event.head, event.serial, event.size, event.owner
        )
        self._device_of[event.message_id] = event.device
        self._bytes += event.size
        self.expected.add(event.device)
        return [
            ev.StoreUpdate(update=event),
            ev.SendStoredReceipt(kind=Kind.DEVICE, member=event.device, message_id=event.message_id),
            *self._close_if_due(now),
        ]

    def _refuse(self, event: ev.UpdateArrived | ev.DeclineArrived, error: RemoteProtocolError) -> list[Any]:
        self.rejected[error.reason] += 1
        return refuse_device(event, error)

    def _take_decline(self, event: ev.DeclineArrived, now: int) -> list[Any]:
        receipt = ev.SendReceipt(kind=Kind.DEVICE, member=event.device, message_id=event.message_id, head=event.head)
        if event.device in self.record.declined or self.state is not RoundState.OPEN:
            return [receipt]
        if not self._selected(event.device):
            return self._refuse(event, RemoteProtocolError(RejectReason.NOT_SELECTED))
        self.record.declined[event.device] = event.reason
        self.expected.add(event.device)
        return [ev.StoreDecline(device=event.device, reason=event.reason), receipt, *self._close_if_due(now)]

    def _member_changed(self, event: ev.MemberChanged, now: int) -> list[Any]:
        name = event.member
        if event.kind is Kind.GATEWAY:
            if event.life is Life.READY:
                # It takes the retained plan and gives receipts for it.
                self.expected_gateways.add(name)
            elif event.life in (None, Life.DISCONNECTED) and name not in self.record.children:
                self.expected_gateways.discard(name)
        elif event.life is Life.READY and self._selected(name):
            self.expected.add(name)
        elif event.life in (None, Life.DISCONNECTED) and not self._has_answered(name):
            self.expected.discard(name)
        return self._close_if_due(now)

    def _site_connected(self, event: ev.SiteConnected, now: int) -> list[Any]:
        self.place = replace(self.place, settled=event.settled)
        return self._close_if_due(now)

    def _revoked_now(self, event: ev.Revoked, now: int) -> list[Any]:
        self._revoked = event.serials
        return []

    # --- Gateways below ------------------------------------------------------------------------------------------

    def _take_proposal(self, event: ev.ChildProposed, now: int) -> list[Any]:
        old = self.record.children.get(event.gateway)
        stored = ev.SendStoredReceipt(kind=Kind.GATEWAY, member=event.gateway, message_id=event.message_id)
        if old is not None and old.proposal == event.message_id:
            if self.record.commit is not None and not self.record.aborted and old.members:
                return [ev.SendCommit(event.gateway)]
            return [stored]
        if old is not None:
            return refuse_gateway(event, RejectReason.CONFLICT, "another proposal counts")
        if self.state is not RoundState.OPEN:
            return refuse_gateway(event, RejectReason.LATE, f"the round is {self.state} here")
        members = frozenset(event.members)
        if members & self._device_of.keys() or any(members & child.members for child in self.record.children.values()):
            return refuse_gateway(event, RejectReason.CONFLICT, "somebody else proposed members of it")
        if self.contributors + len(members) > self.record.plan.quorum.cohort_cap:
            return refuse_gateway(event, RejectReason.COHORT_FULL, f"{self.contributors} + {len(members)}")
        self.record.children[event.gateway] = Child(event.message_id, members, event.declined, event.rejected)
        self.expected_gateways.add(event.gateway)
        return [ev.StoreChildProposal(proposal=event), stored, *self._close_if_due(now)]

    def _take_reveal(self, event: ev.ChildRevealed, now: int) -> list[Any]:
        child, commit = self.record.children.get(event.gateway), self.record.commit
        if child is None or commit is None or event.commit != commit.head:
            return refuse_gateway(event, RejectReason.NOT_PROPOSED, "it answers no commit of this round")
        stored = ev.SendStoredReceipt(kind=Kind.GATEWAY, member=event.gateway, message_id=event.message_id)
        if child.reveal == event.message_id:
            return [stored]
        if child.reveal is not None:
            return refuse_gateway(event, RejectReason.CONFLICT, "another reveal counts")
        if self.state is not RoundState.COMMITTED:
            return refuse_gateway(event, RejectReason.LATE, f"the round is {self.state} here")
        part = len(self.record.child_part(event.gateway))
        if event.reason is not None and part:
            # A sum over exactly the committed set is not possible without it.
            error = RemoteProtocolError(event.reason, f"{event.gateway}: {event.detail}")
            receipt = ev.SendReceipt(
                kind=Kind.GATEWAY, member=event.gateway, message_id=event.message_id, head=event.head
            )
            return [*self._abort(commit, error), receipt]
        if event.count != part or not part:
            return refuse_gateway(event, RejectReason.OUT_OF_RANGE, f"{event.count} of {part} members")
        self.record.children[event.gateway] = Child(
            child.proposal, child.members, child.declined, child.rejected, event.message_id, event.count
        )
        return [ev.StoreChildReveal(reveal=event), stored, *self._reveal_if_whole()]

    # --- Upwards -------------------------------------------------------------------------------------------------

    def _close_if_due(self, now: int) -> list[Any]:
        if self.state is not RoundState.OPEN or now < self._due():
            return []
        drop = self._void(
            {name for name, update in self.record.accepted.items() if update.serial in self._revoked},
            RejectReason.REVOKED,
        )
        self.state = RoundState.PROPOSED
        defended = self.record.plan.defence is not None and len(self.record.accepted) > 0
        return [*drop, ev.JudgeUpdates() if defended else self._propose({})]

    def _void(self, devices: set[str], reason: RejectReason) -> list[Any]:
        """Take accepted updates back."""
        void = [self.record.accepted.pop(name) for name in sorted(devices)]
        for update in void:
            del self._device_of[update.message_id]
            self._bytes -= update.size
            self.rejected[reason] += 1
        return [ev.DropUpdates(message_ids=tuple(each.message_id for each in void), forget=True)] if void else []

    def _judged(self, event: ev.UpdatesJudged, now: int) -> list[Any]:
        if self.record.proposal is not None:
            return []
        outliers = {self._device_of[each]: score for each, score in event.outliers.items() if each in self._device_of}
        drop = self._void(set(outliers), RejectReason.OUTLIER)
        # The proposal first: who restarts in between, with some outliers gone, would judge the rest anew.
        return [self._propose(outliers), *drop]

    def _propose(self, outliers: dict[str, float]) -> ev.MakeProposal:
        declined, rejected = self.record.tallies(self.rejected)
        return ev.MakeProposal(declined=declined, rejected=rejected, outliers=outliers)

    def _proposal_made(self, event: ev.ProposalMade, now: int) -> list[Any]:
        self.record.proposal = Sent(event.message_id, event.head)
        return [ev.StoreProposal(raw=event.raw), *self._send(ev.SendProposal(), now)]

    def _take_commit(self, event: ev.CommitArrived, now: int) -> list[Any]:
        proposal = self.record.proposal
        if event.plan != self.record.hash or proposal is None:
            return [ev.Refused(what="commit", reason=RejectReason.WRONG_PLAN)]
        if self.place.direct:
            if event.gateway != self.place.gateway or event.proposal != proposal.head:
                return [ev.Refused(what="commit", reason=RejectReason.NOT_PROPOSED, detail=f"for {event.gateway}")]
            proposed = set(self._device_of).union(*(child.members for child in self.record.children.values()))
            if not event.members <= proposed:
                detail = f"{len(event.members - proposed)} members that nobody here proposed"
                return [ev.Refused(what="commit", reason=RejectReason.NOT_PROPOSED, detail=detail, alarm=True)]
        self.record.commit = event
        part = [update for update in self.record.accepted.values() if update.message_id in event.members]
        try:
            if part:
                self.rules.check_part(part, proposed=len(self.record.accepted))
        except RemoteProtocolError as error:
            return self._abort(event, error, alarm=True)
        self.state = RoundState.COMMITTED
        self._retry_at = None
        left_out = tuple(sorted(self._device_of.keys() - event.members))
        return [
            ev.StoreCommit(raw=event.raw),
            *(ev.SendCommit(name) for name, child in sorted(self.record.children.items()) if child.members),
            *([ev.DropUpdates(message_ids=left_out)] if left_out else []),
            *self._reveal_if_whole(),
        ]

    def _abort(self, event: ev.CommitArrived, error: RemoteProtocolError, *, alarm: bool = False) -> list[Any]:
        """Follow a commit in nothing: not with a sum, and not with one over another set; and say so above."""
        self.record.aborted = str(error.reason)
        self.state = RoundState.CLOSED
        self._retry_at = None
        detail = f"{error.detail}; round {self.record.plan.round} is aborted at this gateway, which reveals nothing"
        return [
            ev.StoreAborted(raw=event.raw, reason=error.reason, detail=error.detail),
            ev.Refused(what="commit", reason=error.reason, detail=detail, alarm=alarm),
        ]

    def _refusal_made(self, event: ev.RefusalMade, now: int) -> list[Any]:
        commit = self.record.commit
        if not self.record.aborted or self.record.reveal is not None or commit is None:
            return []
        self.record.reveal = Sent(event.message_id, commit.head)
        self.state = RoundState.REVEALED
        self._wait = RETRY
        return self._send(ev.SendReveal(), now)

    def _commit_again(self, event: ev.CommitArrived, now: int) -> list[Any]:
        if self.record.commit is not None and event.head == self.record.commit.head:
            # The tier above missed our reveal, or the broker repeats: the timer answers the first, nothing the other.
            return self._send(ev.SendReveal(), now) if self.state is RoundState.REVEALED else []
        refused = ev.Refused(
            what="commit",
            reason=RejectReason.CONFLICT,
            detail="the coordinator signed two for one proposal; the first counts",
            alarm=self.record.commit is not None,
        )
        return [refused]

    def _reveal_if_whole(self) -> list[Any]:
        """Make the reveal once every part of the committed set is here."""
        commit = self.record.commit
        assert commit is not None
        parts = {name: len(self.record.child_part(name)) for name in self.record.children}
        count = len(self.record.own_part()) + sum(parts.values())
        if not count:
            self.state = RoundState.CLOSED
            return [ev.StoreAnswered()]
        if any(part and self.record.children[name].reveal is None for name, part in parts.items()):
            return []
        return [ev.MakeReveal(commit=commit.head, count=count)]

    def _reveal_made(self, event: ev.RevealMade, now: int) -> list[Any]:
        if self.record.commit is None or event.commit != self.record.commit.head:
            return []
        self.record.reveal = Sent(event.message_id, Digest(event.commit))
        self.state = RoundState.REVEALED
        self._wait = RETRY
        return [ev.StoreReveal(raw=event.raw), *self._send(ev.SendReveal(), now)]

    def _take_receipt(self, event: ev.ReceiptArrived, now: int) -> list[Any]:
        sent = self.record.proposal if self.state is RoundState.PROPOSED else self.record.reveal
        if sent is None or sent.message_id != event.message_id or event.reason is RejectReason.OVERLOADED:
            return []
        if self.state is RoundState.PROPOSED and event.reason is None and self.contributors:
            # It is safe there; what is still to come is the commit, which may take its time.
            self._wait = RETRY_CAP
            self._retry_at = now + self._wait
            return []
        self.state = RoundState.CLOSED
        self._retry_at = None
        refused = []
        if event.reason is not None:
            refused = [ev.Refused(what="own proposal or reveal", reason=event.reason, detail=event.detail)]
        return [*refused, ev.StoreAnswered()]

    def _send(self, message: ev.SendProposal | ev.SendReveal, now: int) -> list[Any]:
        if not self._connected:
            self._retry_at = None
            return []
        self._retry_at = now + self._wait
        self._wait = min(2 * self._wait, RETRY_CAP)
        return [message]

    def _send_again(self, now: int) -> list[Any]:
        if self.state is RoundState.PROPOSED and self.record.proposal is not None:
            return self._send(ev.SendProposal(), now)
        return self._send(ev.SendReveal(), now) if self.state is RoundState.REVEALED else []

    def _connect(self, event: ev.UpstreamConnected, now: int) -> list[Any]:
        self._connected = True
        self._wait = RETRY
        return self._send_again(now)

    def _disconnect(self, event: ev.UpstreamLost, now: int) -> list[Any]:
        self._connected = False
        self._retry_at = None
        return []

    def _timer(self, event: TimerFired, now: int) -> list[Any]:
        if self.state is RoundState.OPEN:
            return self._close_if_due(now)
        void = self._void_at()
        if void is not None and now >= void:
            self.state = RoundState.CLOSED
            self._retry_at = None
            return [ev.StoreAnswered()]
        if self._retry_at is not None and now >= self._retry_at:
            return self._send_again(now)
        return []

    def resume(self, now: int) -> list[Any]:
        """After a crash, once the sum was built again: what may have been decided but not done."""
        if self.state is not RoundState.COMMITTED:
            return []
        children = sorted(self.record.children.items())
        return [
            *(ev.SendCommit(name) for name, child in children if child.members and child.reveal is None),
            *self._reveal_if_whole(),
        ]

    def _ignore(self, event: object, now: int) -> list[Any]:
        return []

    TABLE: ClassVar[dict[tuple[Any, type], Edge]] = {
        (_S.OPEN, ev.UpdateArrived): Edge("_take_update", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, ev.DeclineArrived): Edge("_take_decline", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, ev.ChildProposed): Edge("_take_proposal", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, ev.MemberChanged): Edge("_member_changed", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, ev.SiteConnected): Edge("_site_connected", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, TimerFired): Edge("_timer", _S.OPEN, _S.PROPOSED),
        (_S.OPEN, ev.CommitArrived): Edge("_take_commit"),
        (_S.OPEN, ev.ChildRevealed): Edge("_take_reveal"),
        (_S.OPEN, ev.ReceiptArrived): Edge("_ignore"),
        (_S.PROPOSED, ev.ProposalMade): Edge("_proposal_made"),
        (_S.PROPOSED, ev.UpdatesJudged): Edge("_judged"),
        (_S.PROPOSED, ev.CommitArrived): Edge("_take_commit", _S.PROPOSED, _S.COMMITTED, _S.CLOSED),
        (_S.PROPOSED, ev.ReceiptArrived): Edge("_take_receipt", _S.PROPOSED, _S.CLOSED),
        (_S.COMMITTED, ev.ChildRevealed): Edge("_take_reveal", _S.COMMITTED, _S.CLOSED),
        (_S.COMMITTED, ev.CommitArrived): Edge("_commit_again"),
        (_S.COMMITTED, ev.RevealMade): Edge("_reveal_made", _S.COMMITTED, _S.REVEALED),
        (_S.COMMITTED, ev.ReceiptArrived): Edge("_ignore"),
        (_S.REVEALED, ev.CommitArrived): Edge("_commit_again"),
        (_S.REVEALED, ev.ReceiptArrived): Edge("_take_receipt", _S.REVEALED, _S.CLOSED),
        (_S.REVEALED, ev.RevealMade): Edge("_ignore"),
        (_S.CLOSED, ev.CommitArrived): Edge("_commit_again"),
        (_S.CLOSED, ev.RefusalMade): Edge("_refusal_made", _S.CLOSED, _S.REVEALED),
        (_S.CLOSED, ev.ReceiptArrived): Edge("_ignore"),
        **{(state, ev.UpdateArrived): Edge("_take_update") for state in _PAST},
        **{(state, ev.DeclineArrived): Edge("_take_decline") for state in _PAST},
        **{(state, ev.ChildProposed): Edge("_take_proposal") for state in _PAST},
        **{(state, ev.MemberChanged): Edge("_ignore") for state in _PAST},
        **{(state, ev.SiteConnected): Edge("_ignore") for state in _PAST},
        (_S.PROPOSED, TimerFired): Edge("_timer", _S.PROPOSED, _S.CLOSED),
        (_S.COMMITTED, TimerFired): Edge("_timer", _S.COMMITTED, _S.CLOSED),
        **{(state, TimerFired): Edge("_timer") for state in (_S.REVEALED, _S.CLOSED)},
        **{(state, ev.ChildRevealed): Edge("_take_reveal") for state in (_S.PROPOSED, _S.REVEALED, _S.CLOSED)},
        **{(state, ev.Revoked): Edge("_revoked_now") for state in (_S.OPEN, *_PAST)},
        **{(state, ev.UpstreamConnected): Edge("_connect") for state in (_S.OPEN, *_PAST)},
        **{(state, ev.UpstreamLost): Edge("_disconnect") for state in (_S.OPEN, *_PAST)},
    }
