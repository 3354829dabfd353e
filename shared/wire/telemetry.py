"""What a device tells of itself for people to look at (`Verb.TELEMETRY`): unsigned, at QoS 0, not retained.

Nothing decides on it: whoever controls a device's connection can say here what it likes. It says nothing about the
device's data: what would (how long it trained, what its program used) is 0 once the device has a privacy ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from fleetfed.shared.wire.codec import Length
from fleetfed.shared.wire.fields import Count, Label, Millis, Tally

MAX_TELEMETRY: Final = 4096
"""Bytes of one message; a usual one has 300."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a device tells of itself: counts since its program started, but for the bytes on its connection.

    Attributes:
        started: when the program did, by its clock.
        sent, received: bytes on its connection, since its state folder was made.
        cpu: milliseconds of CPU time; 0 with a privacy ledger.
        memory, memory_peak: bytes; 0 with a privacy ledger.
        trained: milliseconds of training; 0 with a privacy ledger.
        model_version: that it holds; 0 for none.
        rounds: finished rounds by outcome.
        reasons: why rounds were declined or refused.
        refused: what the device itself refused, by reason.
        participations, most: of its privacy ledger, and what that allows; 0 before the first private round.
    """

    started: Millis = 0
    sent: Count = 0
    received: Count = 0
    cpu: Count = 0
    memory: Count = 0
    memory_peak: Count = 0
    trained: Count = 0
    model_version: Count = 0
    rounds: Annotated[dict[Label, Tally], Length(0, 16)] = field(default_factory=dict)
    reasons: Annotated[dict[Label, Tally], Length(0, 64)] = field(default_factory=dict)
    refused: Annotated[dict[Label, Tally], Length(0, 64)] = field(default_factory=dict)
    participations: Count = 0
    most: Count = 0
