"""What rounds cost: epsilon for a delta, with `dp_accounting` 0.6.0.

The unit is one device. Two fleets are neighbours if they differ in the content of one device, which in one of them is
replaced by zero (`REPLACE_SPECIAL`): *that* a device takes part is not protected, gateways and coordinator see it. For
the same reason nothing is amplified by sampling: whom a plan selects is public.

What bounds the cost is that each device stops after ``max_participations`` and keeps ``min_separation``, by its own
ledger. Rounds with the same parameters are one `Segment`; segments add up. Gaussian mechanisms compose exactly
(one Gaussian of the summed precision), and with Skellam noise by Renyi divergences at whole orders.

A discrete Gaussian costs what a continuous one of deviation ``sqrt(sigma**2 - r**2)`` costs, ``r = 2.5``: rounding the
continuous one's output at random with deviation ``r`` gives the discrete one up to a factor ``1 +- 2**-170`` (Poisson
summation: ``2 exp(-2 pi**2 r**2)``), and what is computed from a private output is as private. That is one
party's noise; where several add theirs, each is accounted as if the others added nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

import numpy as np

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.privacy.cost import FLAG_SENSITIVITY, ORDERS, gaussian_precision, skellam_bounds
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.codec import Length
from fleetfed.shared.wire.envelope import digest
from fleetfed.shared.wire.fields import Count, Positive
from fleetfed.shared.wire.privacy import Mechanism, Privacy

UNIT: Final = "one device"
RELATION: Final = "zero-out (REPLACE_SPECIAL): one device's content replaced by zero, its participation public"
_DIGITS: Final = 4
_HOPELESS: Final = 100.0

TRUSTED: Final = {
    Mechanism.CENTRAL: "the coordinator; in plain mode the device's gateway and the brokers on the way too",
    Mechanism.SPLIT_CENTRAL: "the device's gateway or the coordinator: either one, against the other and the public",
    Mechanism.MATRIX: (
        "the coordinator, and whoever can read its noise state; in plain mode the device's gateway and the brokers on "
        "the way too"
    ),
    Mechanism.SKELLAM: "gateway and coordinator not to work together, and the promised number of devices to add noise",
}
"""Who must be honest for the guarantee to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rounds under one set of parameters.

    Attributes:
        mechanism, clip, noise_multiplier, max_participations, min_separation, honest, band, flag_noise: as in
            `wire.privacy.Privacy`.
        dimension: coordinates of a contribution.
        rounds: opened so far.
        first, last: numbers of the first and the last of them that ``signer`` planned; others may lie in between.
        signer: key of the coordinator that planned them.
        before: most rounds that one device can have been in under keys before that one.
    """

    mechanism: Mechanism
    clip: float
    noise_multiplier: float
    max_participations: Positive
    min_separation: Positive
    honest: Count
    band: Positive
    flag_noise: float
    dimension: Positive
    rounds: Count = 0
    first: Count = 0
    last: Count = 0
    signer: Annotated[bytes, Length(0, 32)] = b""
    before: Count = 0

    @classmethod
    def of(cls, privacy: Privacy, dimension: int, *, signer: bytes = b"") -> Segment:
        """The segment that a plan's rounds belong to, if a coordinator with this key signs them."""
        return cls(
            mechanism=privacy.mechanism,
            clip=privacy.clip,
            noise_multiplier=privacy.noise_multiplier,
            max_participations=privacy.max_participations,
            min_separation=privacy.min_separation,
            honest=privacy.honest,
            band=privacy.band,
            flag_noise=privacy.flag_noise,
            dimension=dimension,
            signer=signer,
        )

    @property
    def participations(self) -> int:
        """Most rounds of it that one device can have been in."""
        span = self.last - self.first + 1
        return min(self.max_participations, self.rounds, self.before + -(-span // self.min_separation))

    @property
    def name(self) -> str:
        """Names the parameters: the same for all rounds of one mechanism, another for any other."""
        return digest(codec.encode(replace(self, rounds=0, first=0, last=0, signer=b"", before=0))).hex()

    def full(self) -> Segment:
        """The same after as many rounds as let a device take part as often as it may."""
        return self.over(self.max_participations * self.min_separation)

    def over(self, rounds: int) -> Segment:
        """The same after so many rounds in a row."""
        return replace(self, rounds=rounds, first=1, last=rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All rounds that a fleet's coordinator ever opened under differential privacy; durable.

    Attributes:
        segments: oldest first.
    """

    segments: Annotated[tuple[Segment, ...], Length(0, 10_000)] = ()

    def after(self, segment: Segment, number: int) -> Account:
        """The account with one more round, of this number.

        Devices forget when they last took part once they believe that coordinator's key no more (`device.ledger`): what
        separates rounds of one key does not separate them from the next one's.
        """
        if self.segments and self.segments[-1].name == segment.name:
            last = self.segments[-1]
            if last.signer != segment.signer:
                last = replace(last, before=last.participations, first=number, signer=segment.signer)
            grown = replace(last, rounds=last.rounds + 1, last=number)
            return Account(segments=(*self.segments[:-1], grown))
        return Account(segments=(*self.segments, replace(segment, rounds=1, first=number, last=number)))

    def epsilon(self, delta: float) -> float:
        """What the rounds have cost any one device, at most."""
        return epsilon(self.segments, delta)


def epsilon(segments: tuple[Segment, ...], delta: float) -> float:
    """The least epsilon for which the segments together are (epsilon, delta)-private, as far as the theorems tell.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    precision = math.fsum(_precision(segment) for segment in segments)
    shared = [segment for segment in segments if segment.mechanism is Mechanism.SKELLAM and segment.participations]
    if not shared:
        return _gaussian(math.sqrt(precision), delta)
    # Two bounds of the same thing: whichever is smaller holds.
    return min(_renyi(shared, precision, which, delta) for which in (0, 1))


def calibrate(segment: Segment, budget: float, delta: float) -> float:
    """The least noise multiplier, to four digits, with which the segment stays within a budget.

    Args:
        segment: its noise multiplier does not matter.
        budget: epsilon.
        delta: as ever.

    Raises:
        ConfigError: no noise is enough (the flag's noise alone costs more), or dp-accounting is not installed.
    """

    def cost(multiplier: float) -> float:
        return epsilon((replace(segment, noise_multiplier=multiplier),), delta)

    low, high = 1e-3, 1e-3
    while cost(high) > budget:
        low, high = high, high * 2
        if high > 1e6:
            raise ConfigError(
                f"no noise on the updates keeps epsilon {budget:g}: raise epsilon or flag_noise, or allow fewer "
                "participations"
            )
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    places = _DIGITS - 1 - math.floor(math.log10(high))
    scale: float = 10.0**places
    return math.ceil(high * scale) / scale


def statement(privacy: Privacy, account: Account, *, number: int = 0) -> dict[str, Any]:
    """What may be claimed, in one place: everything that a number for epsilon means nothing without.

    Args:
        privacy: of the last plan.
        account: with its round.
        number: of its round. Rounds are counted from 1; those that are not in the account had no noise, and no number
            for epsilon says anything of them.
    """
    *before, last = account.segments
    noisy = sum(segment.rounds for segment in account.segments)
    return {
        "epsilon": account.epsilon(privacy.delta),
        "delta": privacy.delta,
        "unit": UNIT,
        "relation": RELATION,
        "mechanism": privacy.mechanism.value,
        "noise_multiplier": privacy.noise_multiplier,
        "max_participations": privacy.max_participations,
        "min_separation": privacy.min_separation,
        "epsilon_at_most": epsilon((*before, last.full()), privacy.delta),
        "rounds": noisy,
        "rounds_without_privacy": max(number - noisy, 0),
        "honest": TRUSTED[privacy.mechanism],
    }


def _gaussian(ratio: float, delta: float) -> float:
    """Epsilon of a Gaussian of such a ratio of sensitivity to deviation: exact (Balle and Wang 2018, theorem 8)."""
    if ratio > _HOPELESS:
        # The library's root finding leaves the floats; nobody wants this epsilon, a bound of it will do.
        return ratio * ratio / 2 + ratio * math.sqrt(2 * math.log(1 / delta))
    if not ratio:
        return 0.0
    # Far out the library takes the logarithm of zero, and means minus infinity by it.
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(_library().get_epsilon_gaussian(1 / ratio, delta))


def _precision(segment: Segment) -> float:
    """Summed squares of sensitivity over noise of all that is Gaussian in a segment."""
    return segment.participations * gaussian_precision(segment, segment.dimension)


def _renyi(segments: list[Segment], precision: float, which: int, delta: float) -> float:
    dpa = _library()
    accountant = _rdp().RdpAccountant(ORDERS, dpa.NeighboringRelation.REPLACE_SPECIAL)
    events = [dpa.GaussianDpEvent(1 / math.sqrt(precision))] if precision else []
    for segment in segments:
        variance = (segment.noise_multiplier * segment.clip) ** 2
        once = [_skellam(segment.clip, segment.dimension, variance)[which]]
        if segment.flag_noise:
            once.append(_skellam(FLAG_SENSITIVITY, 1, (2 * segment.flag_noise) ** 2)[which])
        events += [dpa.SelfComposedDpEvent(event, segment.participations) for event in once]
    for event in events:
        if not accountant.supports(event):
            raise ConfigError(f"dp-accounting cannot account for {event}; install the version that FleetFed names")
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _skellam(l2: float, dimension: int, variance: float) -> tuple[Any, Any]:
    """The two bounds of one Skellam release; each is linear in the order, which is what a `ZCDpEvent` says."""
    dpa = _library()
    first, second = (dpa.ZCDpEvent(rho=rho, xi=xi) for rho, xi in skellam_bounds(l2, dimension, variance))
    return first, second


def load() -> None:
    """Import what the rest needs: seconds, so not on an event loop. What is missing is said when it is used."""
    with contextlib.suppress(ConfigError):
        _library()
        _rdp()


def _library() -> Any:
    return _import("dp_accounting")


def _rdp() -> Any:
    return _import("dp_accounting.rdp")


def _import(name: str) -> Any:
    # Not at import: it brings SciPy along, which takes seconds, and a fleet without differential privacy needs neither.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "differential privacy needs the package dp-accounting: pip install 'fleetfed[privacy]'"
        ) from error
