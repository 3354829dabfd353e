from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared import config, dataset
from fleetfed.shared.dataset import Dataset, check, load, split
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def _idx(path: Path, array: np.ndarray, code: int = 0x08, *, compress: bool = False) -> Path:
    raw = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


X = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
Y = np.array([0, 1, 2, 0, 1, 2])


def test_npz_keeps_its_bytes_and_scales_them_by_batch(tmp_path: Path) -> None:
    data = load(DataConfig(path=_npz(tmp_path / "d.npz", x=X, y=Y)))
    x, y = data.batch(np.array([5, 0]))
    assert data.x.dtype == np.uint8
    assert x.dtype == np.float32
    assert y.dtype == np.int32
    np.testing.assert_allclose(x, X[[5, 0]] / 255.0, rtol=1e-6)
    assert y.tolist() == [2, 0]


def test_named_arrays_and_an_own_scale(tmp_path: Path) -> None:
    path = _npz(tmp_path / "d.npz", images=X, digits=Y, x=np.zeros((1, 1)))
    data = load(DataConfig(path=path, x="images", y="digits", scale=0.5))
    np.testing.assert_array_equal(data.batch(np.arange(6))[0], X * np.float32(0.5))


def test_csv_with_the_label_column_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,label,b\n1.5,2,-1\n\n0,1,4e2\n")
    data = load(DataConfig(path=path))
    assert data.x.tolist() == [[1.5, -1.0], [0.0, 400.0]]
    assert data.y.tolist() == [2, 1]
    assert data.scale == 1.0


@pytest.mark.parametrize("compress", [False, True])
def test_idx_pair(tmp_path: Path, compress: bool) -> None:
    images = _idx(tmp_path / "images", X, compress=compress)
    labels = _idx(tmp_path / "labels", Y.astype(np.uint8), compress=compress)
    data = load(DataConfig(path=images, labels=labels))
    np.testing.assert_array_equal(data.x, X)
    assert data.y.tolist() == Y.tolist()


def test_idx_of_big_endian_floats(tmp_path: Path) -> None:
    images = _idx(tmp_path / "images", X.astype(">f4"), 0x0D)
    labels = _idx(tmp_path / "labels", Y.astype(np.uint8))
    data = load(DataConfig(path=images, labels=labels))
    np.testing.assert_array_equal(data.x, X.astype(np.float32))
    assert data.x.dtype.isnative


def one_pair() -> Any:
    return X, Y


def batches() -> Iterator[Any]:
    yield X[:4], Y[:4]
    yield X[4:], Y[4:]


def endless() -> Iterator[Any]:
    while True:
        yield np.zeros((1000, 1000)), np.zeros(1000)


def broken() -> Any:
    raise RuntimeError("no sensor")


def nonsense() -> Any:
    return 7


def double(x: Any, y: Any) -> Any:
    return x.astype(np.float32) * 2, y


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """pytest imports this module by path; settings name it like any other."""
    import sys

    monkeypatch.setitem(sys.modules, "sensor_of_this_test", request.module)


@pytest.mark.parametrize("name", ["one_pair", "batches"])
def test_a_sensor(name: str) -> None:
    data = load(DataConfig(function=f"sensor_of_this_test:{name}"))
    np.testing.assert_array_equal(data.x, X)
    assert data.y.tolist() == Y.tolist()


def test_processing(tmp_path: Path) -> None:
    data = load(DataConfig(path=_npz(tmp_path / "d.npz", x=X, y=Y), processing="sensor_of_this_test:double"))
    np.testing.assert_array_equal(data.batch(np.arange(6))[0], X * np.float32(2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"function": "sensor_of_this_test:endless", "max_mib": 20}, "exceed the limit"),
        ({"function": "sensor_of_this_test:broken"}, "RuntimeError: no sensor"),
        ({"function": "sensor_of_this_test:nonsense"}, "expected \\(x, y\\) or an iterable"),
        ({"function": "sensor_of_this_test:nothing"}, "no function 'nothing'"),
        ({"function": "no.such.module:f"}, "No module named 'no'"),
        ({"function": "nocolon"}, "expected module:function"),
        ({}, "no data"),
        ({"path": Path("/nowhere/d.npz")}, "No such file"),
        ({"path": Path("/nowhere/d.bin")}, "expected .npz or .csv"),
    ],
)
def test_sources_that_fail_say_why(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(DataConfig(**changes))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": X}, "no array 'y'; it has: x"),
        ({"x": X, "y": Y[:3]}, "6 examples, but 3 labels"),
        ({"x": X[:0], "y": Y[:0]}, "no examples"),
        ({"x": X.astype(str), "y": Y}, "expected numbers"),
        ({"x": Y, "y": Y}, "expected examples along the first axis"),
        ({"x": X, "y": Y + 0.5}, "whole class numbers"),
        ({"x": X, "y": Y * np.nan}, "whole class numbers"),
        ({"x": X, "y": Y + 2**40}, "whole class numbers"),
        ({"x": np.full((6, 2), np.nan), "y": Y}, "NaN or infinity"),
        ({"x": np.array([{}] * 6), "y": Y}, "not a readable"),
    ],
)
def test_npz_that_is_wrong(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(DataConfig(path=_npz(tmp_path / "d.npz", **arrays)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column 'label'"),
        ("a,b\n1,2\n", "no column 'label' in the header; it has: a, b"),
        ("label\n1\n", "no columns beside"),
        ("a,label\n1,2,3\n", "line 2: 3 fields, the header has 2"),
        ("a,label\nx,2\n", "line 2: could not convert"),
        ("a,label\n1,nine\n", "line 2: invalid literal"),
        ("a,label\n1," + "9" * 30 + "\n", "line 2"),
        ("a,label\n", "no examples"),
        ("a,label\n" + "1,2\n" * 9, "exceed the limit"),
    ],
)
def test_csv_that_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "d.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(DataConfig(path=path, max_examples=8))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not an IDX"),
        (b"\0\0\x08\x03\0\0", "within its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "promises 5 bytes of values, it has 3"),
        (b"\0\0\x08\x01\0\0\0\x01abc", "promises 1 bytes of values, it has more"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "exceed the limit"),
        (b"\0\0\x07\x01\0\0\0\0", "not an IDX"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde", mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_idx_that_is_wrong(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=says):
        load(DataConfig(path=path, labels=path))


def test_a_bomb_of_zeros_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.zeros((4 << 20, 1), np.uint8), y=np.zeros(1))
    assert path.stat().st_size < 100_000
    with pytest.raises(ConfigError, match="exceed the limit"):
        load(DataConfig(path=path, max_mib=2))


def test_check_reshapes_what_fits_and_refuses_the_rest() -> None:
    data = Dataset(X.reshape(6, 4), Y.astype(np.int32))
    assert check(data, input_shape=(2, 2, 1), classes=3).x.shape == (6, 2, 2, 1)
    with pytest.raises(ConfigError, match="model takes \\(5,\\)"):
        check(data, input_shape=(5,), classes=3)
    with pytest.raises(ConfigError, match="label 2 is not one of the model's classes 0 to 1"):
        check(data, input_shape=(4,), classes=2)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    holdout=st.floats(0, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_is_a_partition_that_only_the_seed_decides(labels: list[int], holdout: float, seed: int) -> None:
    y = np.array(labels, dtype=np.int32)
    data = Dataset(np.arange(len(y), dtype=np.int64)[:, None], y)
    training, held = split(data, holdout=holdout, seed=seed)
    again = split(data, holdout=holdout, seed=seed)
    assert sorted([*training.x[:, 0], *held.x[:, 0]]) == list(range(len(y)))
    assert len(training) >= 1
    np.testing.assert_array_equal(training.x, again[0].x)
    np.testing.assert_array_equal(held.x, again[1].x)
    assert abs(len(held) - holdout * len(y)) <= 5


def test_a_split_gives_every_label_its_share() -> None:
    y = np.repeat(np.arange(4, dtype=np.int32), [50, 30, 15, 5])
    data = Dataset(np.zeros((100, 1)), y)
    training, held = split(data, holdout=0.2, seed=3)
    assert np.bincount(held.y).tolist() == [10, 6, 3, 1]
    assert np.bincount(training.y).tolist() == [40, 24, 12, 4]


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove one"):
        config.build(DataConfig, {"path": "a.npz", "function": "m:f"}, where="device.toml")
    with pytest.raises(ConfigError, match="labels needs path"):
        config.build(DataConfig, {"labels": "a"}, where="device.toml")
    built = config.build(DataConfig, {"path": "a.npz"}, where="device.toml", base=tmp_path)
    assert built.path == tmp_path / "a.npz"


def test_the_real_digits_when_they_are_here() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "mnist.npz"
    if not path.exists():
        pytest.skip("no ../shared/data/mnist.npz")
    data = load(DataConfig(path=path, x="x_test", y="y_test"))
    checked = check(data, input_shape=(28, 28, 1), classes=10)
    assert len(dataset.split(checked, holdout=0.1, seed=1)[1]) == 1000
