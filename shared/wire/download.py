"""Fetches one object chunk by chunk from retained topics.

Decides what to subscribe to, when to subscribe again, and when to ask the site's node to publish a chunk anew. No I/O;
whoever owns the connection performs the actions.

Only exact topics are subscribed: brokers cut off or refuse wildcards over retained messages. A window of a few
chunks bounds what a slow receiver makes the broker hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fleetfed.shared.wire.blobs import Fetch
from fleetfed.shared.wire.messages import BlobRef

WINDOW: Final = 8
PATIENCE: Final = 5_000
"""Milliseconds without a chunk until its subscription is made again."""
_ASK_AFTER: Final = 2
"""Unanswered subscriptions until the site's node is asked to publish again."""
_MAX_PATIENCE: Final = 60_000
_MAX_ASK: Final = 64


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to chunk ``index``; a subscription that stands already must be made anew."""

    index: int


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Chunk ``index`` is here, or is not wanted any more."""

    index: int


@dataclass(frozen=True, slots=True)
class Store:
    """Write ``data`` at ``offset`` of the object's partial file and remember that chunk ``index`` is there."""

    index: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """Publish `messages.Need` for these chunks."""

    missing: tuple[int, ...]


Action = Subscribe | Unsubscribe | Store | Ask


class Download:
    """One object on its way in.

    Args:
        ref: reference from a verified manifest.
        have: chunks that an earlier attempt stored.
        window: chunks subscribed to at a time.
        patience: milliseconds to wait for a chunk; doubled after every wait in vain, up to a minute.
    """

    def __init__(
        self, ref: BlobRef, *, have: Iterable[int] = (), window: int = WINDOW, patience: int = PATIENCE
    ) -> None:
        self._fetch = Fetch(ref, have)
        self._window = window
        self._base_patience = patience
        self._patience = patience
        self._open: set[int] = set()
        self._vain = 0
        self._deadline: int | None = None

    @property
    def ref(self) -> BlobRef:
        """The object."""
        return self._fetch.ref

    @property
    def complete(self) -> bool:
        """Whether every chunk was handed out in a `Store`."""
        return self._fetch.complete

    @property
    def missing(self) -> int:
        """How many chunks are not here yet."""
        return len(self._fetch.missing)

    def next_deadline(self) -> int | None:
        """When to call `timer`, in unix milliseconds; None when complete or not begun."""
        return None if self.complete else self._deadline

    def begin(self, now: int) -> list[Action]:
        """Subscribe to the first window; also after a reconnect, when subscriptions may be gone."""
        self._deadline = now + self._patience
        self._open = set(self._fetch.wanted(self._window))
        return [Subscribe(index) for index in sorted(self._open)]

    def chunk(self, index: int, data: bytes, now: int) -> list[Action]:
        """Take a chunk that came in.

        Raises:
            RemoteProtocolError: `BODY_MISMATCH`; the chunk stays wanted.
        """
        if not self._fetch.accept(index, data):
            return []
        self._patience = self._base_patience
        self._vain = 0
        self._deadline = now + self._patience
        actions: list[Action] = [Store(index, index * self.ref.chunk, data)]
        if index in self._open:
            self._open.discard(index)
            actions.append(Unsubscribe(index))
        for wanted in self._fetch.wanted(self._window):
            if wanted not in self._open and len(self._open) < self._window:
                self._open.add(wanted)
                actions.append(Subscribe(wanted))
        return actions

    def timer(self, now: int) -> list[Action]:
        """Nothing came for too long: subscribe again, and ask for the chunks after the second time in vain."""
        if self.complete or self._deadline is None or now < self._deadline:
            return []
        self._vain += 1
        self._patience = min(2 * self._patience, _MAX_PATIENCE)
        actions: list[Action] = []
        if self._vain >= _ASK_AFTER:
            actions.append(Ask(tuple(self._fetch.wanted(_MAX_ASK))))
        return [*actions, *self.begin(now)]

    def cancel(self) -> list[Action]:
        """Give up; the subscriptions that are to be ended."""
        still, self._open, self._deadline = sorted(self._open), set(), None
        return [Unsubscribe(index) for index in still]
