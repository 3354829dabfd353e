"""The coordinator's own noise: between the sum of a round and everything that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fleetfed.cloud_coordinator.privacy import matrix
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState, Vector
from fleetfed.shared.aggregate.accumulator import Partial, check_partial
from fleetfed.shared.aggregate.lanes import Values
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.privacy import mechanism
from fleetfed.shared.privacy.mechanism import coordinator_sigma
from fleetfed.shared.secure.kdf import Label, derive
from fleetfed.shared.wire.privacy import Mechanism, Privacy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """What one round's noise is drawn from. Nothing in here is ever logged or published.

    Attributes:
        key: 32 unpredictable bytes, stored with the round before it opens and destroyed when it is over. With the sum
            it makes the noise (`mechanism.key_for`): a step that is computed again after a crash adds the same.
        round: its number.
        state: with `Mechanism.MATRIX`, what the rounds before left.
        mechanism: name of the mechanism's parameters and of the plans' signer; a state of another one is not used.
    """

    key: bytes = field(repr=False)
    round: int
    state: MatrixState | None = field(default=None, repr=False)
    mechanism: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noised:
    """A round's sum that may be shown.

    Attributes:
        values: the lanes' sums with all noise.
        meta: what the devices reported, with all noise.
        state: for the next round, as secret as the data; None but for `Mechanism.MATRIX`.
    """

    values: Values
    meta: MetaSum
    state: MatrixState | None = None


def add_coordinator_noise(total: Partial, privacy: Privacy, noise: Noise) -> Noised:
    """Return a round's sum with the coordinator's noise, where the mechanism has any.

    Args:
        total: the sum over all contributors, as gateways and devices left it.
        privacy: of the plan.
        noise: of the round.

    Raises:
        RemoteProtocolError: the sum is impossible.
    """
    meta, values = check_partial(total), total.values()
    sigma, said = coordinator_sigma(privacy)
    # Decoded, as a restart finds it again, and with what devices said of their clips.
    beyond = total.words[total.ring.layout.value_words :]
    noise = replace(noise, key=mechanism.key_for(noise.key, beyond.tobytes(), values.data.cast("B")))
    if meta.beyond is not None:
        # Each says +1 or -1: a shift of the sum by two is one device.
        shift = mechanism.gaussian_flag(said, noise.key)
        meta = replace(meta, beyond=meta.beyond + shift / (2 * meta.count))
    if privacy.mechanism is Mechanism.MATRIX:
        correlated, state = _correlated(values.size, sigma, privacy.band, noise)
        return Noised(values=matrix.add_noise(values.astype(np.int64), correlated, sigma=sigma), meta=meta, state=state)
    if sigma:
        values = values + mechanism.gaussian(values.size, sigma, noise.key)
    return Noised(values=values, meta=meta)


def _correlated(dimension: int, sigma: float, band: int, noise: Noise) -> tuple[Vector, MatrixState]:
    """The round's noise and the state after it.

    Devices count rounds by their numbers, so each number is a row of the matrix, also of a round that came to nothing:
    its noise is drawn and shown to nobody. After a gap as long as the band nothing is left to be taken back; and a
    matrix that begins anew costs no device more than one that goes on.
    """
    state = noise.state
    history: tuple[Vector, ...] = ()
    if state is not None and state.mechanism == noise.mechanism and 0 < noise.round - state.round < band:
        history = state.history
        for missed in range(state.round + 1, noise.round):
            key = derive(noise.key, Label.NOISE, b"missed" + missed.to_bytes(8, "little"))
            row = matrix.next_noise(history, dimension=dimension, sigma=sigma, band=band, key=key)
            history = (row, *history)[: band - 1]
    drawn = matrix.next_noise(history, dimension=dimension, sigma=sigma, band=band, key=noise.key)
    after = MatrixState(mechanism=noise.mechanism, round=noise.round, history=(drawn, *history)[: band - 1])
    return drawn, after
