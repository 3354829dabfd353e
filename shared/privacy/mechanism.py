"""Who adds how much noise to what, from nothing but the signed plan.

===============  ======================  ==========================  ======================================
mechanism        a device                a leaf gateway, per sum     the coordinator, to the sum of all
===============  ======================  ==========================  ======================================
central          -                       -                           discrete Gaussian
split_central    -                       discrete Gaussian           discrete Gaussian
matrix           -                       -                           Gaussian, correlated over rounds
skellam          a share, Skellam        -                           -
===============  ======================  ==========================  ======================================

All of it is in levels, whole numbers, drawn from a key (`noise`). Devices take a fresh key for their one update of a
round, which they store before it leaves. Gateways and the coordinator derive theirs from a stored secret of the round
and from the sum itself (`key_for`).
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np

from fleetfed.shared.aggregate.accumulator import Partial, Ring, RingNoise
from fleetfed.shared.aggregate.lanes import Values, Words
from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.privacy import noise
from fleetfed.shared.privacy.clipping import unrounded_norm
from fleetfed.shared.privacy.cost import MOST_CORRELATED, check_promise
from fleetfed.shared.privacy.noise import Integers
from fleetfed.shared.secure.kdf import KEY_SIZE, Label, derive
from fleetfed.shared.wire.defence import Rule
from fleetfed.shared.wire.messages import Mode, Plan, Weighting
from fleetfed.shared.wire.privacy import Mechanism, Privacy

LEAST_SIGMA: Final = 4.0
"""In levels: below it a discrete Gaussian, or a Skellam share, is not close enough to what the accounting assumes."""


def flag_sigma(privacy: Privacy) -> float:
    """Deviation of the noise on the sum of what devices say of their clips: +-1, so twice that on a count."""
    return 2 * privacy.flag_noise


def device_sigma(privacy: Privacy) -> tuple[float, float]:
    """Deviations of a device's share of the noise, on values and on what it says of its clip; zeros for none."""
    if privacy.mechanism is not Mechanism.SKELLAM:
        return 0.0, 0.0
    share = 1 / math.sqrt(privacy.honest)
    return privacy.noise_multiplier * privacy.clip * share, flag_sigma(privacy) * share


def gateway_sigma(privacy: Privacy) -> tuple[float, float]:
    """Deviations of what a leaf gateway adds to each sum that it reveals; zeros for none."""
    if privacy.mechanism is not Mechanism.SPLIT_CENTRAL:
        return 0.0, 0.0
    return privacy.noise_multiplier * privacy.clip, flag_sigma(privacy)


def coordinator_sigma(privacy: Privacy) -> tuple[float, float]:
    """Deviations of what the coordinator adds to the sum of all; zeros where devices add everything.

    For `Mechanism.MATRIX` it is that of the noise before it is correlated.
    """
    if privacy.mechanism is Mechanism.SKELLAM:
        return 0.0, 0.0
    return privacy.noise_multiplier * privacy.clip, flag_sigma(privacy)


def ring_noise(privacy: Privacy | None) -> RingNoise | None:
    """What noise a plan's lanes and meta words have room for; None without differential privacy."""
    if privacy is None:
        return None
    each, each_flag = device_sigma(privacy)
    released, released_flag = gateway_sigma(privacy)
    return RingNoise(
        each=each,
        released=released,
        sums=privacy.sums,
        adaptive=privacy.flag_noise > 0,
        each_flag=each_flag,
        released_flag=released_flag,
    )


def check_privacy(plan: Plan) -> None:
    """Refuse a plan whose privacy cannot be what it says.

    Raises:
        ValueError: which rule it breaks.
    """
    privacy = plan.privacy
    if privacy is None:
        return
    if plan.weighting is not Weighting.UNIFORM or plan.quantization.weight_cap != 1:
        raise ValueError("differential privacy needs uniform weights: a weight says how much data a device has")
    if plan.quantization.error_feedback:
        raise ValueError("differential privacy without error feedback: what a clip cut off would come back")
    if plan.defence is not None and (plan.defence.rule is not Rule.SUM or plan.defence.outlier_score):
        raise ValueError("a defence leaves devices out because of what others say, which no noise covers")
    if plan.defence is not None and 0 < plan.defence.norm_bound < privacy.clip:
        raise ValueError(
            "a norm bound below the clip leaves devices out because of what they hold; no noise covers that"
        )
    unrounded_norm(privacy.clip, plan.dimension)
    split = plan.split if plan.mode is Mode.SPLIT else None
    if privacy.mechanism in (Mechanism.SKELLAM, Mechanism.SPLIT_CENTRAL) and split is None:
        # In plain mode gateway and brokers read each update, and its compressed size depends on the data.
        raise ValueError(f"the mechanism {privacy.mechanism} keeps its word in split mode only")
    if privacy.mechanism is Mechanism.SKELLAM and split is not None and not 2 <= privacy.honest <= split.minimum_cohort:
        raise ValueError(f"{privacy.honest} honest devices in sums of {split.minimum_cohort} and more")
    if privacy.mechanism is Mechanism.MATRIX:
        if privacy.band > privacy.min_separation:
            raise ValueError(f"{privacy.band} bands for devices that keep {privacy.min_separation} rounds apart")
        if privacy.flag_noise:
            raise ValueError("the matrix mechanism needs a fixed clip: its noise cancels between equal scales only")
    elif privacy.band != 1:
        raise ValueError(f"{privacy.band} bands for the mechanism {privacy.mechanism}")
    least = device_sigma(privacy)[0] or coordinator_sigma(privacy)[0]
    most = {Mechanism.SKELLAM: noise.MOST_SKELLAM, Mechanism.MATRIX: MOST_CORRELATED}.get(
        privacy.mechanism, noise.MOST_SIGMA
    )
    if not LEAST_SIGMA <= least <= most:
        raise ValueError(f"noise of {least:g} levels; {LEAST_SIGMA:g} to {most:g} can be drawn")
    if 0 < flag_sigma(privacy) < LEAST_SIGMA:
        raise ValueError(f"flag_noise {privacy.flag_noise:g}; from {LEAST_SIGMA / 2:g} on it can be accounted for")
    if 0 < device_sigma(privacy)[1] < noise.LEAST_SIGMA:
        raise ValueError(f"flag_noise {privacy.flag_noise:g} in {privacy.honest} shares is too little for each")
    check_promise(privacy, plan.dimension)


def key_for(secret: bytes, *content: bytes | memoryview) -> bytes:
    """Return the key of the noise on one sum: 32 bytes.

    The same sum always gets the same noise, whatever died, was restored or asked again in between: two copies of it
    with two noises would average out. Another sum gets unrelated noise: two with one noise would give their difference.

    Args:
        secret: of the round, stored, known to the noise's party alone and destroyed at the round's end.
        content: what the noise is added to, every byte that matters.
    """
    hashed = hashlib.sha256()
    for part in content:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return derive(secret, Label.NOISE, b"sum" + hashed.digest())


def add_gateway_noise(partial: Partial, secret: bytes) -> Partial:
    """Return a sum with a leaf gateway's noise in it, masked or not; the same where the mechanism adds none here.

    Args:
        partial: not to be shown to anybody without the noise; its ring says how much.
        secret: of the round (`key_for`).

    Raises:
        LocalProtocolError: noise is due and there is no secret.
    """
    ring = partial.ring
    if ring.noise is None or not ring.noise.released:
        return partial
    if len(secret) < KEY_SIZE:
        raise LocalProtocolError("a sum that is to be noised, and no secret to draw the noise from")
    key = key_for(secret, partial.count.to_bytes(8, "little"), partial.words.data.cast("B"))
    values = gaussian(ring.layout.dimension, ring.noise.released, key)
    # As drawn: cut to its lane by itself it would lose the carry into the next one, and what leaves would be a function
    # of sum and noise, no longer of their sum alone.
    words = ring.layout.pack(values, ring.meta.shift(0, gaussian_flag(ring.noise.released_flag, key)), wrap=True)
    words += partial.words
    return Partial(ring, words, partial.count)


def add_device_noise(values: Values, meta: Words, ring: Ring, privacy: Privacy, key: bytes) -> tuple[Integers, Words]:
    """Return a contribution with the device's share of the noise in it; the same where it adds none.

    With noise it is packed as it is (``wrap=True``): a value that exceeds its lane costs accuracy, never privacy.

    Args:
        values: clipped and rounded, shape (dimension,).
        meta: of `MetaLayout.encode_private`.
        ring: of the plan.
        privacy: of the plan.
        key: 32 unpredictable bytes, used once and then forgotten.
    """
    sigma, said = device_sigma(privacy)
    total = values.astype(np.int64)
    if not sigma:
        return total, meta
    total += noise.skellam(total.size, sigma, derive(key, Label.NOISE, b"values"))
    if said:
        shift = int(noise.skellam(1, said, derive(key, Label.NOISE, b"flag"))[0])
        meta = meta + ring.meta.shift(0, shift)
    return total, meta


def gaussian(count: int, sigma: float, key: bytes) -> Integers:
    """The discrete Gaussian noise of a vector's values, from a party's key."""
    return noise.discrete_gaussian(count, sigma, derive(key, Label.NOISE, b"values"))


def gaussian_flag(sigma: float, key: bytes) -> int:
    """The noise on the sum of what devices say of their clips; 0 for sigma 0."""
    return int(noise.discrete_gaussian(1, sigma, derive(key, Label.NOISE, b"flag"))[0]) if sigma else 0
