"""The coordinator's noise on a sum: one for each sum, and no word of the sum without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleetfed.cloud_coordinator.privacy.noising import Noise, add_coordinator_noise
from fleetfed.shared.aggregate.accumulator import Partial, Ring
from fleetfed.shared.errors import RemoteProtocolError
from fleetfed.shared.privacy.mechanism import ring_noise
from fleetfed.shared.wire.privacy import Mechanism, Privacy

COUNT = 10
NOISE = Noise(key=b"n" * 32, round=3, mechanism="name")


def privacy(mechanism: Mechanism = Mechanism.CENTRAL, **given: Any) -> Privacy:
    defaults: dict[str, Any] = {"clip": 300.0, "noise_multiplier": 1.0, "max_participations": 4}
    return Privacy(mechanism=mechanism, epsilon=8.0, delta=1e-6, **(defaults | given))


def total_of(private: Privacy, values: Any, said: int = 0) -> Partial:
    ring = Ring.of((len(values),), bits=8, lane_bits=16, weight_cap=1, noise=ring_noise(private), most=COUNT)
    return Partial(ring, ring.layout.pack(values, ring.meta.shift(COUNT, said)), COUNT)


@pytest.mark.parametrize(
    "private",
    [privacy(), privacy(Mechanism.MATRIX, band=4, min_separation=4), privacy(flag_noise=5.0)],
    ids=["central", "matrix", "adaptive"],
)
def test_one_sum_has_one_noise_and_another_sum_another(private: Privacy) -> None:
    """A coordinator whose state is put back, and that sums up other devices, must not give away their difference."""
    sums = np.arange(1000) - 500

    def noise_on(values: Any, said: int = 0) -> Any:
        return add_coordinator_noise(total_of(private, values, said), private, NOISE).values - values

    first = noise_on(sums)
    assert first.std() == pytest.approx(300, rel=0.1)
    assert np.array_equal(first, noise_on(sums.copy()))
    other = sums.copy()
    other[7] += 1
    assert np.count_nonzero(first != noise_on(other)) > 900
    if private.flag_noise:
        assert np.count_nonzero(first != noise_on(sums, said=2)) > 900


def test_an_impossible_sum_is_refused_without_a_word_of_what_it_holds() -> None:
    private = privacy(flag_noise=5.0)
    for values, said in ((np.full(10, 12_345), 0), (np.zeros(10, dtype=np.int64), 54_321)):
        with pytest.raises(RemoteProtocolError) as caught:
            add_coordinator_noise(total_of(private, values, said), private, NOISE)
        assert "beyond" in str(caught.value)
        assert not any(number in str(caught.value) for number in ("12345", "54321"))
