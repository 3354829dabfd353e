"""The demo's examples: shapes, ranges, and that validation and devices share nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetfed.cloud_coordinator.demo import sources
from fleetfed.cloud_coordinator.demo.sources import Deal
from fleetfed.shared.dataset import load as load_dataset
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
SHARED = Path(__file__).parents[4] / "shared" / "data"


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    ours = sources.digits()
    assert np.array_equal(ours.x.reshape(len(ours), -1) * 16, x)
    assert np.array_equal(ours.y, y)


def test_validation_and_devices_share_nothing() -> None:
    split = sources.load("digits", Deal(devices=10, seed=3))
    total = sum(len(part) for part in split.devices) + len(split.validation)
    assert total == 1797
    seen = [example.tobytes() for part in (*split.devices, split.validation) for example in part.x]
    everything = [example.tobytes() for example in sources.digits().x]
    assert sorted(seen) == sorted(everything)


def test_what_is_saved_is_what_a_device_reads(tmp_path: Path) -> None:
    part = sources.load("digits", Deal(devices=4)).devices[0]
    part.save(tmp_path / "d" / "data.npz")
    read = load_dataset(DataConfig(path=tmp_path / "d" / "data.npz"))
    x, y = read.batch(np.arange(len(read)))
    assert np.array_equal(x, part.x)
    assert np.array_equal(y, part.y)


def test_an_archive_like_mnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (400, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 400, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (50, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 50, dtype=np.uint8),
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    split = sources.load(str(tmp_path / "mnist.npz"), Deal(devices=5, split="shards", per_device=30))
    assert [len(part) for part in split.devices] == [30] * 5
    assert len(split.validation) == 50


def test_an_archive_like_hmp_gives_one_volunteer_to_each_device(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 2000, 60)
    volunteer = np.repeat(np.arange(6), 10).astype(np.uint8)
    # The first axis names the volunteer, so that a window tells whose it is.
    samples = rng.integers(0, 64, (int(lengths.sum()), 3), dtype=np.uint8)
    samples[:, 0] = np.repeat(volunteer, lengths) * 10
    np.savez(
        tmp_path / "hmp.npz",
        samples=samples,
        lengths=lengths,
        activity=rng.integers(0, 14, 60, dtype=np.uint8),
        volunteer=volunteer,
        volunteers=np.array(list("abcdef")),
    )
    split = sources.load(str(tmp_path / "hmp.npz"), Deal(devices=4))
    assert len(split.owners) == 4
    for owner, part in zip(split.owners, split.devices, strict=True):
        code = "abcdef".index(owner) * 10
        assert part.x.shape[1:] == (sources.WINDOW, 3)
        assert np.allclose(part.x[..., 0], -1.5 + 3 * code / 63)
    assert float(np.abs(split.validation.x).max()) <= 1.5
    with pytest.raises(ConfigError, match="only 6 volunteers"):
        sources.load(str(tmp_path / "hmp.npz"), Deal(devices=7))


@pytest.mark.parametrize("name", ["mnist.npz", "hmp.npz"])
def test_the_real_archives(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    split = sources.load(str(path), Deal(devices=8))
    assert min(len(part) for part in split.devices) >= sources.MINIMUM
    assert split.validation.y.max() == split.devices[0].y.max() or name == "mnist.npz"


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for text in ("", "no archive"):
        (tmp_path / "x.npz").write_text(text)
        with pytest.raises(ConfigError, match="digits, or a path"):
            sources.load(str(tmp_path / "x.npz"), Deal(devices=2))
    with pytest.raises(ConfigError):
        sources.load(str(tmp_path / "missing.npz"), Deal(devices=2))
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    with pytest.raises(ConfigError, match="x_train"):
        sources.load(str(tmp_path / "y.npz"), Deal(devices=2))
    with pytest.raises(ConfigError, match="none of dirichlet"):
        sources.load("digits", Deal(devices=2, split="alphabet"))
