from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.aggregate.body import (
    decode_body,
    encode_body,
    max_body,
    pack_symbols,
    packed_size,
    unpack_symbols,
)
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.compression import compress

PEAKS = [0, 1, 2, 3, 7, 8, 31, 127, 128, 255, 256, 32767, 32768, 70_000, 2**23, 2**31, 2**40]


def vector(peak: int, dimension: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(-peak, peak + 1, dimension)
    values[dimension // 2] = peak
    values[-1] = -peak
    return values


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 16, 1001])
def test_round_trip_at_every_width(peak: int, dimension: int) -> None:
    values = vector(peak, dimension)
    meta = np.array([1, 2**63, 5], dtype=np.uint64)
    body = encode_body(values, meta, limit=peak)
    assert len(body) <= max_body(dimension, peak, 3)
    back, back_meta = decode_body(body, dimension=dimension, limit=peak, meta_words=3)
    assert np.array_equal(back, values)
    assert np.array_equal(back_meta, meta)
    assert encode_body(back, back_meta, limit=peak) == body
    assert np.iinfo(back.dtype).max >= peak


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=60), st.sampled_from([np.int8, np.int16, np.int64]))
def test_round_trip_of_any_four_bit_symbols(values: list[int], kind: type) -> None:
    array = np.array(values, dtype=kind)
    back, meta = decode_body(encode_body(array, limit=7), dimension=array.size, limit=7)
    assert back.dtype == np.int8
    assert back.tolist() == values
    assert meta.size == 0


@given(st.binary(max_size=80), st.integers(1, 40), st.integers(0, 300), st.integers(0, 2))
def test_any_bytes_decode_within_the_limit_or_give_a_documented_error(
    body: bytes, dimension: int, limit: int, meta_words: int
) -> None:
    try:
        values, meta = decode_body(body, dimension=dimension, limit=limit, meta_words=meta_words)
    except RemoteProtocolError as error:
        refusal = error.reason
    else:
        refusal = None
        assert values.shape == (dimension,)
        assert meta.shape == (meta_words,)
        assert int(np.abs(values.astype(np.int64)).max()) <= limit
    assert refusal in {
        None,
        RejectReason.TRUNCATED,
        RejectReason.TOO_LARGE,
        RejectReason.DECOMPRESSION,
        RejectReason.MALFORMED,
        RejectReason.OUT_OF_RANGE,
    }


@given(st.sampled_from([1, 2, 3, 7, 90, 127, 300, 32767, 40_000, 2**31 + 5]), st.integers(1, 40), st.data())
def test_any_packed_bytes_unpack_within_the_peak_or_are_refused(peak: int, dimension: int, data: st.DataObject) -> None:
    size = packed_size(dimension, peak)
    packed = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    try:
        values = unpack_symbols(packed, peak, dimension)
    except RemoteProtocolError as error:
        refusal = error.reason
    else:
        refusal = None
        assert int(np.abs(values.astype(np.int64)).max()) <= peak
        # Canonical: no two byte strings mean the same values.
        assert np.array_equal(pack_symbols(values, peak), packed)
    assert refusal in {None, RejectReason.OUT_OF_RANGE, RejectReason.MALFORMED}


def reason(body: bytes, *, dimension: int = 9, limit: int = 7, meta_words: int = 0) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as error:
        decode_body(body, dimension=dimension, limit=limit, meta_words=meta_words)
    return error.value.reason


def body_of(peak: int, packed: bytes) -> bytes:
    return peak.to_bytes(8, "little") + compress(packed, level=1)


def test_each_attack_has_its_reason() -> None:
    good = encode_body(vector(7, 9), limit=7)
    assert reason(good[:5]) is RejectReason.TRUNCATED
    assert reason(good[:-1]) is RejectReason.TRUNCATED
    assert reason(good + b"\0") is RejectReason.MALFORMED
    assert reason(good, dimension=12) is RejectReason.DECOMPRESSION
    assert reason(good, dimension=8) is RejectReason.DECOMPRESSION
    assert reason(good, meta_words=1) is RejectReason.DECOMPRESSION
    assert reason(good, limit=6) is RejectReason.OUT_OF_RANGE
    assert reason(b"\xff" * 8 + good[8:], limit=2**70) is RejectReason.OUT_OF_RANGE
    assert reason(good + bytes(1000)) is RejectReason.TOO_LARGE
    assert reason(body_of(7, bytes([225, 0, 0, 0, 0]))) is RejectReason.OUT_OF_RANGE
    assert reason(body_of(7, bytes([0, 0, 0, 0, 15]))) is RejectReason.MALFORMED
    assert reason(body_of(7, bytes(10_000))) is RejectReason.DECOMPRESSION
    # Peak 200 in two planes: zigzag 401 is -201.
    assert reason(body_of(200, bytes([145, *bytes(8), 1, *bytes(8)])), limit=200) is RejectReason.OUT_OF_RANGE


def test_encoding_refuses_what_the_receiver_would() -> None:
    with pytest.raises(ValueError, match="magnitude 8"):
        encode_body(np.array([1, -8]), limit=7)


def test_sparse_four_bit_symbols_come_close_to_their_entropy() -> None:
    rng = np.random.default_rng(3)
    values = np.clip(np.rint(rng.normal(0, 0.8, 500_000)), -7, 7).astype(np.int8)
    _, counts = np.unique(values, return_counts=True)
    share = counts / values.size
    entropy = float(-(share * np.log2(share)).sum()) * values.size / 8
    assert len(encode_body(values, limit=7)) < 1.03 * entropy
