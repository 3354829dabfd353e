"""What a plan says about updates that do not look like the others; plain mode only, where a gateway can look."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fleetfed.shared.wire.codec import Range


class Rule(StrEnum):
    """How a leaf gateway adds up what is left after its scores."""

    SUM = "sum"
    """All of it."""
    KRUM = "krum"
    """The updates that lie closest together (Multi-Krum, Blanchard et al. 2017)."""
    TRIMMED_MEAN = "trimmed_mean"
    """Per coordinate, without the largest and smallest (Yin et al. 2018, "Byzantine-Robust Distributed Learning")."""
    MEDIAN = "median"
    """Per coordinate, the median (the same paper)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """How leaf gateways meet hostile or broken devices.

    Attributes:
        rule: how the rest is added up.
        norm_bound: largest L2 norm of an update, in levels; refused beyond it on arrival. 0 for none.
        outlier_score: robust score (Iglewicz and Hoaglin 1993: 0.6745 times the distance from the median over the
            median absolute deviation) beyond which an update's norm, or its direction away from the others', is an
            outlier and left out. 3.5 is usual; 0 for none.
        hostile: part of a site's devices that may be hostile, below one half; `KRUM` and `TRIMMED_MEAN` need it.
        minimum: fewest updates at a site for scores and rules to mean anything; with fewer all are added up.
    """

    rule: Rule = Rule.SUM
    norm_bound: Annotated[float, Range(0.0, 1e12)] = 0.0
    outlier_score: Annotated[float, Range(0.0, 1e6)] = 0.0
    hostile: Annotated[float, Range(0.0, 0.49)] = 0.2
    minimum: Annotated[int, Range(3, 100_000)] = 5
