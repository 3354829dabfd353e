import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.model.table import TensorSlot, WeightTable, read_weights, split_weights, write_weights
from fleetfed.shared.wire import limits


def slot(name: str, shape: tuple[int, ...], offset: int, dtype: str = "float32") -> TensorSlot:
    return TensorSlot(name=name, shape=shape, dtype=dtype, offset=offset)


TABLE = WeightTable(tensors=(slot("b/kernel", (2, 3), 40), slot("a/bias", (4,), 8)))


@st.composite
def tables(draw: st.DrawFn) -> tuple[WeightTable, int]:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(shapes))))
    offsets = {}
    end = 0
    for index in order:
        offsets[index] = end + 4 * draw(st.integers(0, 3))
        end = offsets[index] + 4 * int(np.prod(shapes[index]))
    slots = tuple(slot(f"t{i}", tuple(shape), offsets[i]) for i, shape in enumerate(shapes))
    return WeightTable(tensors=slots), end + draw(st.integers(0, 9))


@given(tables(), st.integers(0, 2**32 - 1))
def test_written_weights_are_read_back_and_nothing_else_changes(table_and_size, seed):
    table, size = table_and_size
    rng = np.random.default_rng(seed)
    before = rng.bytes(size)
    data = bytearray(before)
    flat = rng.normal(size=table.parameters).astype(np.float32)
    write_weights(data, table, flat)
    assert read_weights(bytes(data), table).tobytes() == flat.tobytes()
    untouched = np.ones(size, dtype=bool)
    for first, end in table.ranges():
        untouched[first:end] = False
    assert np.array_equal(np.frombuffer(bytes(data), np.uint8)[untouched], np.frombuffer(before, np.uint8)[untouched])


def test_the_flat_vector_is_in_table_order_not_in_file_order():
    data = bytearray(64)
    write_weights(data, TABLE, np.arange(10, dtype=np.float32))
    assert np.frombuffer(data, "<f4", 4, 8).tolist() == [6, 7, 8, 9]
    assert np.frombuffer(data, "<f4", 6, 40).tolist() == [0, 1, 2, 3, 4, 5]
    kernel, bias = split_weights(read_weights(data, TABLE), TABLE)
    assert kernel.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bias.shape == (4,)


def test_every_float_survives_bit_for_bit():
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], dtype=np.uint32).view(np.float32)
    table = WeightTable(tensors=(slot("x", (4,), 0),))
    data = bytearray(16)
    write_weights(data, table, odd)
    assert read_weights(data, table).tobytes() == odd.tobytes()


@pytest.mark.parametrize(
    ("tensors", "size", "reason"),
    [
        ((), 100, RejectReason.TOO_LARGE),
        ((slot("x", (4,), 0),), 15, RejectReason.MALFORMED),
        ((slot("x", (4,), 2),), 100, RejectReason.MALFORMED),
        ((slot("x", (4,), -4),), 100, RejectReason.MALFORMED),
        ((slot("x", (4,), 0, "float64"),), 100, RejectReason.MALFORMED),
        ((slot("x", (), 0),), 100, RejectReason.MALFORMED),
        ((slot("x", (0,), 0),), 100, RejectReason.MALFORMED),
        ((slot("x", (4,), 0), slot("y", (4,), 12)), 100, RejectReason.MALFORMED),
        ((slot("x", (4,), 0), slot("x", (4,), 16)), 100, RejectReason.MALFORMED),
        ((slot("x", (limits.MAX_PARAMETERS + 1,), 0),), 100, RejectReason.TOO_LARGE),
        ((slot("x", (4,), 0),), limits.MAX_BLOB + 1, RejectReason.TOO_LARGE),
    ],
)
def test_a_table_that_does_not_fit_its_file_is_refused(tensors, size, reason):
    with pytest.raises(RemoteProtocolError) as caught:
        WeightTable(tensors=tensors).validate(size)
    assert caught.value.reason is reason


def test_a_refused_write_changes_nothing():
    data = bytearray(60)
    with pytest.raises(RemoteProtocolError):
        write_weights(data, TABLE, np.ones(10, dtype=np.float32))
    with pytest.raises(ConfigError, match="float32 weights of shape"):
        write_weights(bytearray(64), TABLE, np.ones(9, dtype=np.float32))
    with pytest.raises(ConfigError, match="float64"):
        write_weights(bytearray(64), TABLE, np.ones(10))
    assert data == bytes(60)


def test_the_layout_hash_tells_every_field_apart():
    first = TABLE.tensors[0]
    hashes = {TABLE.layout_hash()}
    for change in ({"name": "c"}, {"shape": (3, 2)}, {"shape": (6,)}, {"dtype": "float16"}, {"offset": 44}):
        hashes.add(WeightTable(tensors=(dataclasses.replace(first, **change), TABLE.tensors[1])).layout_hash())
    hashes.add(WeightTable(tensors=TABLE.tensors[::-1]).layout_hash())
    assert len(hashes) == 7
    # Pinned: a new hash for an old table would make every device refuse its model.
    assert TABLE.layout_hash().hex() == "73b1ba26628d21c3e255e472ffafccdd41f1f60c3406726a2b112d32114dc99c"
