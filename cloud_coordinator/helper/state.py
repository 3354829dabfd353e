"""Decides for a helper: which key counts, and whether masks may be given. No I/O.

1. A key is made every period and valid for two, so that a round which begins with the last one has a period to end. Its
   secret is destroyed once no round that names it can be open.
2. One plan per round, one answer per round and gateway, one sum per device and round, ever. Two sums of a round that
   differ in one device would be that device's mask.
3. The same request again gets the stored bytes, whatever was revoked or rotated since; another is `conflict`.
4. What was answered is forgotten only together with the key: without it nothing of that round can be answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, ClassVar, Final

from fleetfed.cloud_coordinator.helper import events as ev
from fleetfed.cloud_coordinator.helper.events import Claim, Key
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import Edge, Machine, TimerFired
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import KEY_SIZES, SEALED_BOX

SKEW: Final = 5 * 60 * 1000
"""Milliseconds by which clocks may differ before what has expired is void."""


class HelperState(StrEnum):
    """Whether there is a key to seal to."""

    STARTING = "starting"
    SERVING = "serving"


class HelperMachine(Machine[HelperState]):
    """See the module.

    Args:
        period: milliseconds from one key to the next.
        suite: that new keys are of.
        keys: those on the disk.
        claims: of the answers on the disk.
    """

    NAME = "helper"
    TABLE: ClassVar[dict[tuple[Any, type], Edge]] = {
        (HelperState.STARTING, ev.Started): Edge("_keys_due", HelperState.STARTING, HelperState.SERVING),
        (HelperState.STARTING, ev.KeyStored): Edge("_key_stored", HelperState.SERVING),
        (HelperState.SERVING, ev.KeyStored): Edge("_key_stored"),
        (HelperState.SERVING, ev.Connected): Edge("_connected"),
        (HelperState.SERVING, ev.Asked): Edge("_asked"),
        (HelperState.SERVING, ev.Verified): Edge("_verified"),
        (HelperState.SERVING, ev.AnswerStored): Edge("_answer_stored"),
        (HelperState.SERVING, TimerFired): Edge("_keys_due"),
    }

    def __init__(
        self, *, period: int, suite: int = SEALED_BOX, keys: Iterable[Key] = (), claims: Iterable[Claim] = ()
    ) -> None:
        super().__init__(HelperState.STARTING)
        self.period = period
        self._key_size = KEY_SIZES[suite]
        self.keys = sorted(keys, key=lambda key: key.issued)
        self._answers: dict[tuple[int, str], Claim] = {}
        self._questions: dict[Digest, Claim] = {}
        self._plans: dict[int, Digest] = {}
        self._devices: dict[int, dict[str, str]] = {}
        self._making = False
        for claim in claims:
            self._remember(claim)

    @property
    def current(self) -> Key | None:
        """The key that new plans are to name."""
        return self.keys[-1] if self.keys else None

    def key(self, message: bytes) -> Key | None:
        """The key of this signed message, None where it is not, or no longer, ours."""
        return next((key for key in self.keys if key.message == message), None)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What was answered with the keys that are left."""
        return tuple(self._answers.values())

    def answered(self, round: int) -> frozenset[str]:
        """Gateways that got their masks for a round."""
        return frozenset(gateway for number, gateway in self._answers if number == round)

    def next_deadline(self) -> int | None:
        """When a key is due, or a secret to be destroyed."""
        if self.current is None or self._making:
            return None
        return min(self.current.issued + self.period, *(key.expires + SKEW + 1 for key in self.keys))

    def validate(self) -> None:
        """Assert that no device is in two sums, and that everything remembered belongs to a key."""
        assert len(self._questions) == len(self._answers)
        live = {key.public for key in self.keys}
        members: dict[int, int] = {}
        for claim in self._answers.values():
            assert claim.key in live
            assert self._plans[claim.round] == claim.plan
            members[claim.round] = members.get(claim.round, 0) + len(claim.devices)
        assert {number: len(devices) for number, devices in self._devices.items()} == members

    # --- Keys ----------------------------------------------------------------------------------------------------

    def _keys_due(self, event: object, now: int) -> list[Any]:
        out: list[Any] = []
        void = tuple(key for key in self.keys if key.expires + SKEW < now)
        if void:
            self.keys = [key for key in self.keys if key not in void]
            self._forget({key.public for key in void})
            out.append(ev.DestroyKeys(tuple(key.public for key in void)))
        current = self.current
        # A clock that was ahead when the key was made must not keep it for longer.
        fresh = current is not None and current.issued - SKEW <= now < current.issued + self.period
        # The newest may be of another suite, since the settings changed.
        if current is None or not fresh or len(current.public) != self._key_size:
            if not self._making:
                self._making = True
                out.append(ev.MakeKey(issued=now, expires=now + 2 * self.period))
        elif self.state is HelperState.STARTING:
            self.state = HelperState.SERVING
        return out

    def _key_stored(self, event: ev.KeyStored, now: int) -> list[Any]:
        self._making = False
        self.keys.append(event.key)
        self.state = HelperState.SERVING
        return [ev.PublishKey(event.key.message)]

    def _connected(self, event: ev.Connected, now: int) -> list[Any]:
        return [ev.PublishKey(self.current.message)] if self.current else []

    # --- Requests ------------------------------------------------------------------------------------------------

    def _asked(self, event: ev.Asked, now: int) -> list[Any]:
        known = self._questions.get(event.question)
        return [ev.Send(known.round, known.gateway) if known else ev.Verify(event.question)]

    def _verified(self, event: ev.Verified, now: int) -> list[Any]:
        claim = event.claim

        def refuse(reason: RejectReason, detail: str) -> list[Any]:
            return [ev.Refuse(claim.question, reason, detail)]

        if self._plans.get(claim.round, claim.plan) != claim.plan:
            return refuse(RejectReason.CONFLICT, f"another plan of round {claim.round} was answered")
        if (claim.round, claim.gateway) in self._answers:
            return refuse(RejectReason.CONFLICT, f"{claim.gateway} got other masks in round {claim.round}")
        taken = self._devices.get(claim.round, {})
        for device in sorted(claim.devices & taken.keys()):
            return refuse(RejectReason.CONFLICT, f"{device} is in the sum of {taken[device]} already")
        if not any(key.public == claim.key for key in self.keys):
            return refuse(RejectReason.EXPIRED, "the key that the plan names was destroyed")
        return [ev.Answer(claim)]

    def _answer_stored(self, event: ev.AnswerStored, now: int) -> list[Any]:
        self._remember(event.claim)
        return [ev.Send(event.claim.round, event.claim.gateway)]

    def _remember(self, claim: Claim) -> None:
        self._answers[claim.round, claim.gateway] = claim
        self._questions[claim.question] = claim
        self._plans[claim.round] = claim.plan
        self._devices.setdefault(claim.round, {}).update(dict.fromkeys(claim.devices, claim.gateway))

    def _forget(self, keys: set[bytes]) -> None:
        kept = [claim for claim in self._answers.values() if claim.key not in keys]
        for memory in (self._answers, self._questions, self._plans, self._devices):
            memory.clear()
        for claim in kept:
            self._remember(claim)
