from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.model.patch import (
    Patched,
    apply_patch,
    make_patch,
    max_patch,
    read_info,
)
from fleetfed.shared.model.table import TensorSlot, WeightTable, read_weights, write_weights


def table_of(*places: tuple[int, int]) -> WeightTable:
    """A table of (offset, size)."""
    return WeightTable(
        tensors=tuple(
            TensorSlot(name=f"t{i}", shape=(size,), dtype="float32", offset=offset)
            for i, (offset, size) in enumerate(places)
        )
    )


#: Out of order in the file, with bytes between and around them that are not weights.
PLACES = ((4016, 500), (16, 1000), (6024, 3))
TABLE = table_of(*PLACES)
SIZE = 6100
DIMENSION = 1503


def file_of(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    file = bytearray(rng.integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    write_weights(file, TABLE, rng.standard_normal(DIMENSION).astype(np.float32))
    return bytes(file)


def step_of(seed: int, scale: float = 0.01) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(DIMENSION) * scale


def patched(**settings: object) -> tuple[bytes, Patched]:
    base = file_of()
    return base, make_patch(base, step_of(1), TABLE, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
def test_a_device_gets_the_coordinators_exact_file(bits: int) -> None:
    base, made = patched(bits=bits)
    assert len(made.patch) <= max_patch(DIMENSION, len(TABLE.tensors), bits)
    new = apply_patch(memoryview(base), TABLE, made.patch)
    assert bytes(new) == made.file
    assert hashlib.sha256(new).digest() == made.target_sha256
    assert base == file_of()
    info = read_info(made.patch)
    assert (info.bits, info.tensors, info.dimension, info.size) == (bits, 3, DIMENSION, SIZE)
    assert info.base_sha256 == hashlib.sha256(base).digest()
    assert info.target_sha256 == made.target_sha256


def test_nothing_but_the_weights_changes() -> None:
    base, made = patched()
    weights = np.zeros(SIZE, dtype=bool)
    for slot in TABLE.tensors:
        weights[slot.offset : slot.offset + 4 * slot.size] = True
    before, after = np.frombuffer(base, dtype=np.uint8), np.frombuffer(made.file, dtype=np.uint8)
    assert np.array_equal(before[~weights], after[~weights])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_step_is_met_within_half_a_level_and_the_rest_is_carried(bits: int) -> None:
    base, made = patched(bits=bits, clip=8.0)
    step, old, new = step_of(1), read_weights(base, TABLE), read_weights(made.file, TABLE)
    moved = new.astype(np.float64) - old
    rounding = np.abs(old).max() * 2.0**-23
    assert np.abs(moved + made.residual - step).max() < 1e-8
    at = 0
    for slot in TABLE.tensors:
        part = slice(at, at + slot.size)
        level = 8.0 * np.sqrt(np.mean(step[part] ** 2)) / (2 ** (bits - 1) - 1)  # nothing lies beyond 8 rms here
        assert np.abs(made.residual[part]).max() <= level / 2 * (1 + 1e-6) + rounding
        at += slot.size


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.09), (3, 0.03), (4, 0.015), (8, 0.001)])
def test_error_feedback_keeps_a_long_run_on_course(bits: int, bound: float) -> None:
    """The error after thirty patches is about one level, not the sum of thirty, also where a level exceeds the step."""
    file, residual, wanted = file_of(), None, read_weights(file_of(), TABLE).astype(np.float64)
    for i in range(30):
        step = step_of(i)
        made = make_patch(file, step, TABLE, residual=residual, bits=bits)
        assert bytes(apply_patch(file, TABLE, made.patch)) == made.file
        file, residual, wanted = made.file, made.residual, wanted + step
    got = read_weights(file, TABLE)
    assert np.abs(got + residual.astype(np.float64) - wanted).max() < 1e-6
    assert np.abs(got - wanted).max() < bound


def test_an_outlier_does_not_take_the_resolution_of_the_others() -> None:
    step = step_of(2)
    step[0] = 10.0
    made = make_patch(file_of(), step, TABLE, bits=8, clip=4.0)
    at_most = 4.0 * np.sqrt(np.mean(step[:500] ** 2))
    assert np.abs(made.residual[1:500]).max() <= at_most / 127 / 2 * 1.001 + 1e-6
    assert made.residual[0] == pytest.approx(10.0 - at_most, rel=1e-3)


def test_a_tensor_that_does_not_move_stays_to_the_bit() -> None:
    step = step_of(3)
    step[:500] = 0
    step[1500:] = 1e-44  # below the smallest normal float32: kept for later
    base = file_of()
    made = make_patch(base, step, TABLE)
    before, after = read_weights(base, TABLE), read_weights(made.file, TABLE)
    assert before[:500].tobytes() == after[:500].tobytes()
    assert before[1500:].tobytes() == after[1500:].tobytes()
    assert not np.array_equal(before[500:1500], after[500:1500])


def test_a_model_that_does_not_move_at_all_has_a_tiny_patch() -> None:
    base = file_of()
    made = make_patch(base, np.zeros(DIMENSION), TABLE)
    assert made.file == base
    assert len(made.patch) < 130
    assert bytes(apply_patch(base, TABLE, made.patch)) == base


@given(st.integers(0, 2**32), st.sampled_from([2, 4, 8, 16]), st.floats(1e-6, 1e3), st.floats(0.5, 20))
def test_any_step_patches_exactly(seed: int, bits: int, scale: float, clip: float) -> None:
    base = file_of()
    made = make_patch(base, step_of(seed, scale), TABLE, bits=bits, clip=clip)
    assert bytes(apply_patch(base, TABLE, made.patch)) == made.file


def test_the_arithmetic_is_two_roundings_not_one() -> None:
    """Values where a fused multiply-add gives another float32, so that the definition cannot drift."""
    rng = np.random.default_rng(5)
    weights = rng.standard_normal(20_000).astype(np.float32)
    table = table_of((0, 20_000))
    base = weights.tobytes()
    made = make_patch(base, rng.standard_normal(20_000) * 0.3, table, bits=8)
    got = read_weights(made.file, table)
    q = np.rint((got.astype(np.float64) - weights) / (s := scale_of(made.patch))).astype(np.int64)
    product = (q.astype(np.float32) * s).astype(np.float32)
    two = weights + product
    fused = (weights.astype(np.float64) + q * np.float64(s)).astype(np.float32)
    assert got.tobytes() == two.tobytes()
    assert not np.array_equal(two, fused)


def scale_of(patch: bytes) -> np.float32:
    import zstandard

    return np.frombuffer(zstandard.decompress(patch[92:]), dtype="<f4", count=1)[0]


def refused(call: Callable[[], object]) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as error:
        call()
    return error.value.reason


def changed(patch: bytes, at: int, value: bytes) -> bytes:
    return patch[:at] + value + patch[at + len(value) :]


def test_each_bad_patch_has_its_reason_and_gives_no_file() -> None:
    base, made = patched()
    patch = made.patch

    def apply(data: bytes, table: WeightTable = TABLE, start: bytes = base) -> RejectReason:
        return refused(lambda: apply_patch(start, table, data))

    assert apply(patch[:50]) is RejectReason.TRUNCATED
    assert apply(patch[:-1]) is RejectReason.TRUNCATED
    assert apply(patch + b"\0") is RejectReason.MALFORMED
    assert apply(patch, start=file_of(9)) is RejectReason.WRONG_MODEL
    assert apply(patch, start=base[:-1]) is RejectReason.WRONG_MODEL
    assert apply(patch, start=made.file) is RejectReason.WRONG_MODEL
    assert apply(changed(patch, 0, b"FFP2")) is RejectReason.UNKNOWN_VERSION
    assert apply(changed(patch, 4, b"\x01")) is RejectReason.MALFORMED
    assert apply(changed(patch, 4, b"\x09")) is RejectReason.MALFORMED
    assert apply(changed(patch, 5, b"\x01")) is RejectReason.MALFORMED
    assert apply(changed(patch, 6, b"\0\0")) is RejectReason.TOO_LARGE
    assert apply(changed(patch, 6, b"\xff\xff")) is RejectReason.TOO_LARGE
    assert apply(changed(patch, 6, b"\x04\0")) is RejectReason.WRONG_SHAPE
    assert apply(changed(patch, 8, b"\xff\xff\xff\xff")) is RejectReason.TOO_LARGE
    assert apply(changed(patch, 8, (1000).to_bytes(4, "little"))) is RejectReason.WRONG_SHAPE
    assert apply(changed(patch, 12, b"\xff" * 8)) is RejectReason.TOO_LARGE
    assert apply(changed(patch, 52, bytes(32))) is RejectReason.BODY_MISMATCH
    assert apply(changed(patch, 92, b"\xff")) is RejectReason.DECOMPRESSION
    assert apply(patch, table=table_of(*PLACES[:2], (6024, 4))) is RejectReason.WRONG_SHAPE
    assert apply(patch, table=table_of(*PLACES[:2], (6092, 3))) is RejectReason.MALFORMED
    assert apply(patch, table=table_of(*PLACES[:2], (4000, 3))) is RejectReason.MALFORMED
    assert apply(patch, table=table_of(*PLACES[:2], (4016, 3))) is RejectReason.MALFORMED
    assert base == file_of()


def test_a_peak_beyond_the_bits_is_out_of_range() -> None:
    base, made = patched(clip=2.0)
    at = 4 + 1 + 1 + 2 + 4 + 8 + 32 + 32
    assert made.patch[at : at + 8] == (7).to_bytes(8, "little")
    bad = changed(made.patch, at, (8).to_bytes(8, "little"))
    assert refused(lambda: apply_patch(base, TABLE, bad)) is RejectReason.OUT_OF_RANGE


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_scale_is_refused(scale: float) -> None:
    import zstandard

    base, made = patched()
    at = 92
    content = bytearray(zstandard.decompress(made.patch[at:]))
    content[:4] = np.array([scale], dtype="<f4").tobytes()
    bad = made.patch[:at] + zstandard.compress(bytes(content))
    assert refused(lambda: apply_patch(base, TABLE, bad)) is RejectReason.OUT_OF_RANGE


@given(st.integers(0, 3000), st.integers(1, 255))
def test_a_flipped_byte_never_gives_another_file(at: int, flip: int) -> None:
    base, made = patched()
    bad = bytearray(made.patch)
    bad[at % len(bad)] ^= flip
    with contextlib.suppress(RemoteProtocolError):
        assert bytes(apply_patch(base, TABLE, bytes(bad))) == made.file


def test_wrong_arguments_are_refused() -> None:
    base = file_of()
    with pytest.raises(ValueError, match="step"):
        make_patch(base, np.zeros(3), TABLE)
    with pytest.raises(ValueError, match="NaN"):
        make_patch(base, np.full(DIMENSION, np.nan), TABLE)
    with pytest.raises(ValueError, match="bits"):
        make_patch(base, np.zeros(DIMENSION), TABLE, bits=12)
    with pytest.raises(ValueError, match="clip"):
        make_patch(base, np.zeros(DIMENSION), TABLE, clip=0)
