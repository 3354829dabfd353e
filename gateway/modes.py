"""What a round's mode changes for a gateway, asked in one place: what comes in, what a commit must keep to, what adds.

`RoundMachine` asks the rules, which know no secret; `Summation` does the sums with the secrets of the round, if the
mode has any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fleetfed.gateway.masked import MaskedRules
from fleetfed.gateway.plain import PlainRules
from fleetfed.gateway.record import Accepted, RoundSecrets
from fleetfed.gateway.summation import Summation
from fleetfed.shared.aggregate.accumulator import Partial, Ring
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.envelope import Head, Header
from fleetfed.shared.wire.messages import Plan, Reveal
from fleetfed.shared.wire.update import UpdateExtension


class Rules(Protocol):
    """One mode's answers for one plan."""

    @property
    def cosigned(self) -> bool:
        """Whether devices wait for this gateway's word on the plan before they answer."""

    def new_secrets(self, randomness: Callable[[int], bytes]) -> RoundSecrets | None:
        """What the gateway alone may know in this round, from so many unpredictable bytes; None for nothing."""

    def summation(self, secrets: RoundSecrets | None, *, site: str) -> Summation:
        """An empty sum.

        Args:
            secrets: what `new_secrets` made, perhaps before a restart.
            site: that the gateway serves.

        Raises:
            StorageError: the mode needs secrets, and there are none.
        """

    def check_update(self, header: Header, extension: UpdateExtension) -> None:
        """Compare what a verified head says of its body and boxes with the plan.

        Raises:
            RemoteProtocolError: `WRONG_SHAPE` or `TOO_LARGE`.
        """

    def check_part(self, part: Sequence[Accepted], *, proposed: int) -> None:
        """Judge which of the own updates a commit takes.

        Args:
            part: those, at least one.
            proposed: how many were proposed.

        Raises:
            RemoteProtocolError: no sum over that set may leave the gateway.
        """

    def reveal_limit(self, members: int) -> int:
        """Most bytes of a reveal from below over at most so many members."""

    def open_reveal(self, head: Head, body: bytes | memoryview) -> tuple[Reveal, Partial | None]:
        """Check and decode a reveal from below; with what it adds to the sum, if it is not just passed on.

        Raises:
            RemoteProtocolError: the message, its sizes, or whatever can be seen of the sum is wrong.
        """

    def reveal_work(self, own: int) -> int:
        """Values to be gone through when the reveal over so many own updates is made."""


def rules_of(plan: Plan, ring: Ring) -> Rules:
    """The rules of a plan's mode.

    Args:
        plan: as signed.
        ring: its arithmetic, as `scheme_of` says.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`: the plan asks for what this program does not do.
    """
    return PlainRules(plan, ring) if plan.split is None else MaskedRules(plan, plan.split, ring)


def check_scale(extension: UpdateExtension, ring: Ring) -> None:
    """Compare the numbers that an update says it has with those that its plan, whatever the mode, asks for.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`.
    """
    layout = ring.layout
    wanted = (
        ("bits", extension.bits, ring.bits),
        ("lane_bits", extension.lane_bits, layout.lane_bits),
        ("dimension", extension.dimension, layout.dimension),
        ("meta_words", extension.meta_words, layout.meta_words),
    )
    for name, said, planned in wanted:
        if said != planned:
            raise RemoteProtocolError(RejectReason.WRONG_SHAPE, f"{name} is {said}, the plan has {planned}")
