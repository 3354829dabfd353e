"""Chunks from members become whole, verified messages, in bounded memory.

The head, which stands whole in the first chunk, is verified and admitted before a byte is reserved for the rest. Each
member has one message on its way; all of them together reserve at most a budget, beyond which new ones are refused as
`OVERLOADED`, which a device takes as "later".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.envelope import Head, MessageKind

STALE: Final = 60_000
"""Milliseconds without a chunk after which a half message may be dropped to make room."""

Admit = Callable[[Head, Certificate, int], bool]
"""Head, certificate, now. False: the very message was accepted before. Raises `RemoteProtocolError` to refuse."""


@dataclass(frozen=True, slots=True)
class Complete:
    """A whole message whose head was admitted; the body's hash is not yet checked."""

    head: Head
    body: memoryview
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Repeated:
    """The first chunk of a message that was accepted before."""

    head: Head


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message refused; with the head only if its sender was authenticated, and then a receipt is due."""

    reason: RejectReason
    detail: str
    head: Head | None


class _RepeatedError(RemoteProtocolError):
    def __init__(self, head: Head) -> None:
        self.head = head
        super().__init__(RejectReason.DUPLICATE)


class _Slot:
    """One member's message on its way."""

    __slots__ = ("assembler", "certificate", "refused", "touched")

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler
        self.certificate: Certificate | None = None
        self.refused: Head | None = None
        self.touched = 0


class Intake:
    """Puts together the messages of one kind.

    Args:
        kind: of the messages.
        verifier: decides whom to believe.
        site: where the senders must belong; None for gateways, whose certificates name the site that they serve.
        named: whether the sender's id is what `feed` calls the member; not so for what the coordinator says, whose
            role says enough.
        admit: decides about a verified head.
        budget: bytes that all half messages may reserve together.
    """

    def __init__(
        self, kind: MessageKind, verifier: Verifier, *, site: str | None, admit: Admit, budget: int, named: bool = True
    ) -> None:
        self._kind = kind
        self._verifier = verifier
        self._site = site
        self._admit = admit
        self._budget = budget
        self._named = named
        self._slots: dict[str, _Slot] = {}
        self._busy: set[str] = set()
        self._now = 0

    @property
    def reserved(self) -> int:
        """Bytes that half messages hold now."""
        return sum(slot.assembler.reserved for slot in self._slots.values())

    def clear(self) -> None:
        """Forget all half messages: their round is over."""
        self._slots.clear()

    def done(self, member: str) -> None:
        """The member's complete message was dealt with; the next may come."""
        self._busy.discard(member)

    def feed(self, member: str, frame: bytes, now: int) -> Complete | Repeated | Refusal | None:
        """Take one chunk from the member whom the topic names; after `Complete` call `done`."""
        if member in self._busy:
            return None
        self._now = now
        slot = self._slots.get(member)
        if slot is None:
            slot = self._slots[member] = self._slot(member)
        slot.touched = now
        slot.refused = None
        try:
            complete = slot.assembler.feed(frame)
        except _RepeatedError as error:
            del self._slots[member]
            return Repeated(error.head)
        except RemoteProtocolError as error:
            del self._slots[member]
            return Refusal(error.reason, error.detail, slot.refused)
        if complete is None:
            if not slot.assembler.reserved:
                del self._slots[member]
            return None
        del self._slots[member]
        self._busy.add(member)
        assert slot.certificate is not None
        return Complete(complete[0], complete[1], slot.certificate)

    def _slot(self, member: str) -> _Slot:
        def admit(head: Head) -> None:
            sender = member if self._named else None
            try:
                certificate = self._verifier.head(head, kind=self._kind, now=self._now, sender=sender)
            except RemoteProtocolError as error:
                # Expiry is the one check that comes after the signature: its sender is known.
                slot.refused = head if error.reason is RejectReason.EXPIRED else None
                raise
            slot.refused = head
            if self._site is not None and certificate.site != self._site:
                raise RemoteProtocolError(RejectReason.WRONG_SITE, f"{member} belongs to {certificate.site}")
            if not self._admit(head, certificate, self._now):
                raise _RepeatedError(head)
            self._make_room(head.message_size)
            slot.certificate = certificate
            slot.refused = None

        slot = _Slot(Assembler(admit))
        return slot

    def _make_room(self, size: int) -> None:
        if self.reserved + size <= self._budget:
            return
        for member, slot in list(self._slots.items()):
            if self._now - slot.touched > STALE:
                del self._slots[member]
        if self.reserved + size > self._budget:
            raise RemoteProtocolError(RejectReason.OVERLOADED, f"{self.reserved} of {self._budget} bytes are taken")
