"""What a plan says about differential privacy; `fleetfed.shared.privacy` computes with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Range
from fleetfed.shared.wire.fields import Count


class Mechanism(StrEnum):
    """Who adds the noise, and so whom it protects against."""

    CENTRAL = "central"
    """The coordinator, to the decoded sum: protects against whoever sees models."""
    SPLIT_CENTRAL = "split_central"
    """Every leaf gateway to its sum, and the coordinator again: protects against either of them."""
    MATRIX = "matrix"
    """The coordinator, correlated over rounds by a banded matrix; needs devices that keep their separation."""
    SKELLAM = "skellam"
    """Every device a part of it, so that no single party can leave it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """The guarantee that a round is part of, in terms that devices can enforce.

    The unit is one device; two fleets are neighbours if one device's content is replaced by zero
    (`dp_accounting.NeighboringRelation.REPLACE_SPECIAL`). Nothing is amplified by sampling.

    Attributes:
        mechanism: who adds noise.
        clip: L2 bound of one contribution, in levels: of the integers that it sends (`privacy.clipping` says how long
            a delta may be before it is rounded to them).
        noise_multiplier: standard deviation of the noise in the sum over ``clip``.
        max_participations: rounds that one device may take part in, ever, under this guarantee.
        min_separation: fewest rounds from one to the next; 1 allows every round.
        sums: for `SPLIT_CENTRAL`, most sums (of sites, or of their buckets) that gateways add noise to in one round; it
            sizes the lanes, and has no part in the guarantee.
        honest: for `SKELLAM`, devices whose noise is certain to be in the sum; the noise of each is
            ``noise_multiplier * clip / sqrt(honest)``.
        band: for `MATRIX`, bands of the matrix, at most ``min_separation``; 1 elsewhere.
        flag_noise: standard deviation of the noise on the count of clipped contributions, which steers the clip
            (Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping"); 0 where the clip is fixed.
        epsilon, delta: the guarantee over ``max_participations`` rounds, as the coordinator's accountant says.
    """

    mechanism: Mechanism
    clip: Annotated[float, Range(1.0, 1e12)]
    noise_multiplier: Annotated[float, Range(1e-3, 1e6)]
    max_participations: Annotated[int, Range(1, 1_000_000)]
    min_separation: Annotated[int, Range(1, 1_000_000)] = 1
    sums: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    honest: Count = 0
    band: Annotated[int, Range(1, 100_000)] = 1
    flag_noise: Annotated[float, Range(0.0, 1e6)] = 0.0
    epsilon: Annotated[float, Range(0.0, 1e9)]
    delta: Annotated[float, Range(0.0, 1.0)]
