"""What a plan's privacy means for lanes, meta words and noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.aggregate.accumulator import (
    Accumulator,
    Partial,
    Ring,
    RingNoise,
    check_partial,
    check_range,
    decode_words,
    encode_words,
)
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.privacy.mechanism import (
    add_device_noise,
    add_gateway_noise,
    device_sigma,
    gaussian,
    key_for,
    ring_noise,
)
from fleetfed.shared.wire.defence import Defence, Rule
from fleetfed.shared.wire.masking import Split
from fleetfed.shared.wire.messages import Mode, Plan, Quantization, Quorum, Weighting
from fleetfed.shared.wire.privacy import Mechanism, Privacy

SIZES = (700, 300)
SECRET = b"k" * 32
SPLIT = Split(seal_key=bytes(32), minimum_cohort=10)


def privacy(mechanism: Mechanism = Mechanism.CENTRAL, **given: Any) -> Privacy:
    defaults: dict[str, Any] = {
        "clip": 300.0,
        "noise_multiplier": 1.0,
        "max_participations": 10,
        "epsilon": 40.0,
        "delta": 1e-6,
        "honest": 8 if mechanism is Mechanism.SKELLAM else 0,
    }
    return Privacy(mechanism=mechanism, **(defaults | given))


def plan_of(private: Privacy, *, cohort: int = 50, **given: Any) -> Plan:
    noise = ring_noise(private)
    assert noise is not None
    split = SPLIT if private.mechanism in (Mechanism.SKELLAM, Mechanism.SPLIT_CENTRAL) else None
    defaults: dict[str, Any] = {
        "quantization": Quantization(
            bits=8,
            lane_bits=choose_lane_bits(8, cohort, noise=noise.slack(cohort)),
            clips=(1.0, 1.0),
            weight_cap=1,
        ),
        "quorum": Quorum(cohort_cap=cohort),
        "mode": Mode.PLAIN if split is None else Mode.SPLIT,
        "split": split,
        "weighting": Weighting.UNIFORM,
        "privacy": private,
    }
    return Plan(
        round=1,
        model_version=1,
        model_sha256=bytes(32),
        dimension=sum(SIZES),
        opened=1,
        deadline=2,
        expires=3,
        nonce=bytes(16),
        **(defaults | given),
    )


def ring_of(private: Privacy, cohort: int = 50) -> Ring:
    return scheme_of(plan_of(private, cohort=cohort), SIZES).ring


@pytest.mark.parametrize("mechanism", list(Mechanism))
@pytest.mark.parametrize("cohort", [10, 50, 1000])
def test_lanes_have_room_for_the_cohort_and_its_noise(mechanism: Mechanism, cohort: int) -> None:
    ring = ring_of(privacy(mechanism, sums=4), cohort)
    assert ring.capacity >= cohort
    assert ring.limit(ring.capacity) <= ring.layout.lane_max < ring.limit(ring.capacity + 1)
    if mechanism in (Mechanism.CENTRAL, Mechanism.MATRIX):
        # The coordinator adds its noise to decoded integers: nothing that travels is wider.
        assert ring.limit(cohort) == cohort * 127
        assert ring.own_limit == 127
    else:
        assert ring.limit(cohort) > cohort * 127


def test_a_gateway_lets_no_device_use_the_room_for_its_own_noise() -> None:
    ring = ring_of(privacy(Mechanism.SPLIT_CENTRAL))
    assert ring.own_limit == 127 < ring.limit(1)


@given(seed=st.integers(0, 2**32), devices=st.integers(1, 20), sites=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_noised_sums_pass_every_check_and_hold_sum_plus_noise(seed: int, devices: int, sites: int) -> None:
    private = privacy(Mechanism.SPLIT_CENTRAL, sums=4, flag_noise=3.0)
    ring = ring_of(private, cohort=80)
    rng = np.random.default_rng(seed)
    top = Accumulator(ring, capacity=80)
    exact = np.zeros(1000, dtype=np.int64)
    for _ in range(sites):
        leaf = Accumulator(ring, capacity=80)
        for _ in range(devices):
            values = rng.integers(-127, 128, 1000)
            exact += values
            leaf.accumulate(values, ring.meta.encode_private(beyond=bool(rng.random() < 0.5)))
        noised = add_gateway_noise(leaf.report(), rng.bytes(32))
        top.merge(decode_words(encode_words(noised), ring, count=devices))
    total = top.report()
    meta = check_partial(total)
    assert meta.count == meta.weight == devices * sites
    assert meta.beyond is not None
    assert meta.training_loss is None
    difference = total.values() - exact
    sigma = 300.0 * math.sqrt(sites)
    assert difference.std() == pytest.approx(sigma, rel=0.2)
    assert np.abs(difference).max() < 8 * sigma


def test_noise_goes_into_masked_words_as_into_plain_ones() -> None:
    private = privacy(Mechanism.SPLIT_CENTRAL)
    ring = ring_of(private)
    mask = np.random.default_rng(1).integers(0, 2**64, ring.layout.n_words, dtype=np.uint64)
    words = ring.layout.pack(np.full(1000, 5, dtype=np.int64), ring.meta.encode_private(beyond=False))
    plain = add_gateway_noise(Partial(ring, words, 1), SECRET)
    masked = add_gateway_noise(Partial(ring, words + mask, 1), SECRET)
    for noised in (plain.words, masked.words - mask):
        assert ring.layout.unpack(noised)[0].std() == pytest.approx(300, rel=0.1)
    # Another sum, and other noise.
    assert not np.array_equal(masked.words - mask, plain.words)


def test_one_sum_has_one_noise_and_another_sum_or_secret_another() -> None:
    ring = ring_of(privacy(Mechanism.SPLIT_CENTRAL))
    words = ring.layout.pack(np.full(1000, 5, dtype=np.int64), ring.meta.encode_private(beyond=False))

    def noise_on(words: Any, count: int, secret: bytes) -> Any:
        noised = add_gateway_noise(Partial(ring, words, count), secret).words
        return ring.layout.unpack(noised)[0] - ring.layout.unpack(words)[0]

    first = noise_on(words, 1, SECRET)
    assert np.array_equal(first, noise_on(words.copy(), 1, SECRET))
    other = words.copy()
    other[0] += np.uint64(1)
    for changed in (noise_on(other, 1, SECRET), noise_on(words, 2, SECRET), noise_on(words, 1, b"t" * 32)):
        assert np.count_nonzero(first != changed) > 900
    with pytest.raises(LocalProtocolError, match="no secret"):
        noise_on(words, 1, b"")


@pytest.mark.parametrize("lane_bits", [8, 16, 64])
def test_what_a_gateway_lets_out_is_a_function_of_sum_plus_noise_and_of_nothing_else(lane_bits: int) -> None:
    """Also where the noise exceeds its lane: only so is the wrapped sum as private as the sum."""
    released = 300.0
    ring = Ring.of(SIZES, bits=6, lane_bits=lane_bits, weight_cap=1, noise=RingNoise(released=released))
    sums = np.random.default_rng(2).integers(-100, 100, sum(SIZES))
    meta = ring.meta.shift(7, 0)
    exact = Partial(ring, ring.layout.pack(sums, meta), 7)
    noised = add_gateway_noise(exact, SECRET)
    drawn = gaussian(sum(SIZES), released, key_for(SECRET, (7).to_bytes(8, "little"), exact.words.tobytes()))
    assert np.array_equal(noised.words, ring.layout.pack(sums + drawn, meta, wrap=True))
    # The same noised sum made of another sum and other noise has the same words.
    shift = np.random.default_rng(3).integers(-(2**20), 2**20, sum(SIZES))
    assert np.array_equal(
        ring.layout.pack(sums - shift, meta, wrap=True)
        + ring.layout.pack(drawn + shift, ring.meta.shift(0, 0), wrap=True),
        noised.words,
    )


def test_shares_that_exceed_their_lanes_add_up_in_the_ring() -> None:
    private = privacy(Mechanism.SKELLAM)
    ring = Ring.of(SIZES, bits=6, lane_bits=8, weight_cap=1, noise=ring_noise(private))
    words, total = ring.layout.zeros(), np.zeros(sum(SIZES), dtype=np.int64)
    for i in range(8):
        values, meta = add_device_noise(
            np.full(sum(SIZES), i, dtype=np.int16),
            ring.meta.encode_private(beyond=False),
            ring,
            private,
            bytes([i] * 32),
        )
        total += values
        words += ring.layout.pack(values, meta, wrap=True)
    assert np.abs(total).max() > ring.layout.lane_max
    assert np.array_equal(words, ring.layout.pack(total, ring.meta.shift(8, 0), wrap=True))


def test_shares_of_devices_add_up_to_the_noise() -> None:
    private = privacy(Mechanism.SKELLAM, flag_noise=5.0)
    assert device_sigma(private)[0] == pytest.approx(300 / math.sqrt(8))
    ring = ring_of(private)
    total = Accumulator(ring, capacity=50)
    said = []
    for i in range(8):
        values, meta = add_device_noise(
            np.zeros(1000, dtype=np.int16), ring.meta.encode_private(beyond=i < 4), ring, private, bytes([i] * 32)
        )
        check_range(values, ring.own_limit)
        words = ring.layout.pack(values, meta)
        total.merge(Partial(ring, words, 1))
        said.append(int(meta[1].astype(np.int64)))
    summed = total.report()
    assert summed.values().std() == pytest.approx(300, rel=0.1)
    beyond = check_partial(summed).beyond
    assert beyond == pytest.approx((sum(said) / 8 + 1) / 2)
    assert len(set(said)) > 2


def test_without_an_adapting_clip_devices_say_nothing_of_theirs() -> None:
    ring = ring_of(privacy())
    assert ring.meta.encode_private(beyond=True).tolist() == [1, 0]
    assert ring.meta.decode(ring.meta.encode_private(beyond=True), count=1).beyond is None
    with pytest.raises(RemoteProtocolError, match="beyond"):
        ring.meta.decode(ring.meta.shift(1, 1), count=1)
    with pytest.raises(RemoteProtocolError, match="count word"):
        ring.meta.decode(ring.meta.shift(2, 0), count=1)


def test_a_claim_beyond_what_the_noise_explains_is_refused() -> None:
    ring = ring_of(privacy(flag_noise=3.0))
    with pytest.raises(RemoteProtocolError, match="beyond"):
        ring.meta.decode(ring.meta.shift(5, 6), count=5)
    assert ring.meta.decode(ring.meta.shift(5, -5), count=5).beyond == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weighting": Weighting.EXAMPLES}, "uniform"),
        ({"defence": Defence(rule=Rule.MEDIAN)}, "what others say"),
        ({"defence": Defence(outlier_score=3.5)}, "what others say"),
        ({"privacy": privacy(clip=5.0)}, "rounding alone"),
        ({"privacy": privacy(noise_multiplier=0.01)}, "can be drawn"),
        ({"privacy": privacy(clip=1e12, noise_multiplier=1e4)}, "can be drawn"),
        ({"defence": Defence(norm_bound=299.0)}, "what they hold"),
        ({"privacy": privacy(epsilon=8.0)}, "does not earn"),
        ({"privacy": privacy(flag_noise=0.5)}, "flag_noise"),
        (
            {
                "privacy": privacy(Mechanism.SKELLAM, flag_noise=2.0, honest=9000, clip=1000.0),
                "mode": Mode.SPLIT,
                "split": replace(SPLIT, minimum_cohort=9000),
            },
            "9000 shares",
        ),
        ({"privacy": privacy(band=4, min_separation=4)}, "bands"),
        ({"privacy": privacy(Mechanism.MATRIX, band=4)}, "apart"),
        ({"privacy": privacy(Mechanism.MATRIX, flag_noise=5.0)}, "fixed clip"),
        ({"privacy": privacy(Mechanism.SKELLAM)}, "split mode only"),
        ({"privacy": privacy(Mechanism.SPLIT_CENTRAL)}, "split mode only"),
        ({"privacy": privacy(Mechanism.SKELLAM, honest=11), "mode": Mode.SPLIT, "split": SPLIT}, "honest"),
        ({"privacy": privacy(Mechanism.SKELLAM, honest=1), "mode": Mode.SPLIT, "split": SPLIT}, "honest"),
        (
            {"privacy": privacy(Mechanism.SPLIT_CENTRAL, clip=30_000.0), "mode": Mode.SPLIT, "split": SPLIT},
            "cohort",
        ),
    ],
)
def test_a_plan_that_cannot_keep_its_word_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says) as caught:
        scheme_of(plan_of(privacy(), **change), SIZES)
    assert caught.value.reason is RejectReason.WRONG_SHAPE


def test_error_feedback_does_not_go_with_it() -> None:
    plan = plan_of(privacy())
    with pytest.raises(RemoteProtocolError, match="error feedback"):
        scheme_of(replace(plan, quantization=replace(plan.quantization, error_feedback=True)), SIZES)
