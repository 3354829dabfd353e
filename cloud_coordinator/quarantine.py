"""Devices whose updates were outliers again and again, set aside until an operator lifts it. Pure.

Gateways report the outliers that they left out with their proposals. A device that is one in ``strikes`` of its last
``window`` rounds is quarantined: later plans name it, so that it does not train, its gateway does not wait for it, and
nothing that it sends counts. Nobody comes back by waiting: a person looks at the device and releases it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.fields import Count, Id, Millis, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineConfig:
    """When a device is set aside.

    Attributes:
        strikes: outliers that it takes; one spoilt seal is enough; 0 never sets a device aside by itself.
        window: rounds within which they count.
    """

    strikes: Annotated[int, Range(0, 1000)] = 3
    window: Annotated[int, Range(1, 100_000)] = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One round in which a device was an outlier."""

    round: Count
    score: float
    gateway: Id


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """A quarantined device.

    Attributes:
        reason: what an operator should know.
        since: unix milliseconds.
        round: the round after which it was set aside.
        by: the operator, or empty for the rule.
    """

    reason: Text
    since: Millis
    round: Count
    by: Annotated[str, Length(0, limits.MAX_ID)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Everything known about outliers; durable with the round that told.

    Attributes:
        strikes: device to its last ones, oldest first.
        aside: quarantined devices.
    """

    strikes: Annotated[dict[Id, tuple[Strike, ...]], Length(0, limits.MAX_COHORT)] = field(default_factory=dict)
    aside: Annotated[dict[Id, Aside], Length(0, limits.MAX_QUARANTINED)] = field(default_factory=dict)

    def note(
        self, outliers: Mapping[str, tuple[float, str]], *, round: int, now: int, config: QuarantineConfig
    ) -> Quarantine:
        """Return what is known after a round.

        Args:
            outliers: device to its score and the gateway that reported it.
            round: the round's number.
            now: unix milliseconds.
            config: when to set aside.
        """
        oldest = round - config.window
        strikes = {
            device: kept
            for device, each in self.strikes.items()
            if (kept := tuple(s for s in each if s.round > oldest))
        }
        aside = dict(self.aside)
        for device, (score, gateway) in sorted(outliers.items()):
            strikes[device] = (*strikes.get(device, ()), Strike(round=round, score=score, gateway=gateway))
            count = len(strikes[device])
            if not 0 < config.strikes <= count or device in aside or len(aside) >= limits.MAX_QUARANTINED:
                continue
            scores = ", ".join(f"{strike.score:.1f}" for strike in strikes[device][-5:])
            reason = f"an outlier in {count} of the last {config.window} rounds (scores {scores})"
            aside[device] = Aside(reason=reason, since=now, round=round)
        return replace(self, strikes=strikes, aside=aside)

    def put_aside(self, device: str, aside: Aside) -> Quarantine:
        """An operator sets a device aside.

        Raises:
            ValueError: there is no room for more.
        """
        if device not in self.aside and len(self.aside) >= limits.MAX_QUARANTINED:
            raise ValueError(f"{limits.MAX_QUARANTINED} devices are quarantined already; revoke some instead")
        return replace(self, aside={**self.aside, device: aside})

    def release(self, device: str) -> Quarantine:
        """An operator lifts a quarantine; the strikes before it are forgotten.

        Raises:
            KeyError: it is not quarantined.
        """
        if device not in self.aside:
            raise KeyError(device)
        return replace(
            self,
            strikes={name: each for name, each in self.strikes.items() if name != device},
            aside={name: each for name, each in self.aside.items() if name != device},
        )

    def encode(self) -> bytes:
        """Bytes for the database."""
        return codec.encode(self)

    def rows(self) -> list[dict[str, Any]]:
        """The quarantined devices as operators see them."""
        return [
            {"device": device, "reason": aside.reason, "since": aside.since, "round": aside.round, "by": aside.by}
            for device, aside in sorted(self.aside.items())
        ]
