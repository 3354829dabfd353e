"""The examples of a demo: scikit-learn's handwritten digits, MNIST, or wrist accelerometers."""

from __future__ import annotations

import gzip
import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.cloud_coordinator.demo import partition
from fleetfed.cloud_coordinator.demo.partition import Indices
from fleetfed.shared.errors import ConfigError

MINIMUM: Final = 16
"""Fewest examples of a device: one batch."""
_VALIDATION: Final = 0.2
_MNIST_PER_DEVICE: Final = 600
"""As many as FedKeeper's 100 clients had of 60,000."""
WINDOW: Final = 128
"""Samples of one accelerometer window: 4 s at 32 Hz."""
_STRIDE: Final = WINDOW // 2


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Examples with labels.

    Attributes:
        x: shape (n, ...).
        y: int32, shape (n,).
    """

    x: NDArray[Any]
    y: NDArray[np.int32]

    def __len__(self) -> int:
        return int(self.y.shape[0])

    def take(self, indices: Indices) -> Examples:
        """The chosen ones."""
        return Examples(self.x[indices], self.y[indices])

    def save(self, path: Path) -> None:
        """Write an ``.npz`` as devices and the coordinator read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=self.x, y=self.y)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Who holds what.

    Attributes:
        source: what the examples are.
        devices: one part per device.
        validation: what the coordinator evaluates on; no device has any of it.
        how: how the parts were dealt, in words.
        owners: one name per device, where the examples have owners.
    """

    source: str
    devices: tuple[Examples, ...]
    validation: Examples
    how: str
    owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """How to deal.

    Attributes:
        devices: how many.
        split: ``dirichlet``, ``shards`` or ``uniform``; without effect where the examples have owners.
        alpha: of the Dirichlet distribution.
        seed: of everything that is drawn.
        per_device: most examples of a device; 0 for the source's own limit.
    """

    devices: int
    split: str = "dirichlet"
    alpha: float = 0.5
    seed: int = 0
    per_device: int = 0


def load(source: str, deal: Deal) -> Split:
    """Read a source and deal its examples out.

    Args:
        source: ``digits``, or the path of an ``.npz`` in the form of ``mnist.npz`` or ``hmp.npz``; a bare name is
            also looked for in ``../shared/data``.
        deal: how.

    Raises:
        ConfigError: it is missing, in no known form, or too small for so many devices.
    """
    rng = np.random.default_rng(deal.seed)
    if source == "digits":
        examples = digits()
        order = rng.permutation(len(examples))
        held = int(len(order) * _VALIDATION)
        training, validation = examples.take(order[held:]), examples.take(order[:held])
        return _deal("digits", training, validation, deal, rng, most=deal.per_device)
    path = _found(source)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if {"x_train", "y_train", "x_test", "y_test"} <= names:
                training = Examples(arrays["x_train"], arrays["y_train"].astype(np.int32))
                validation = Examples(arrays["x_test"], arrays["y_test"].astype(np.int32))
                # A fifth of the test set says as much in a fifth of the time; it is drawn, not the first.
                validation = validation.take(np.sort(rng.permutation(len(validation))[:2000]))
                most = deal.per_device or _MNIST_PER_DEVICE
                return _deal(path.stem, training, validation, deal, rng, most=most)
            if {"samples", "lengths", "activity", "volunteer"} <= names:
                return _volunteers({name: arrays[name] for name in names}, deal, rng)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{source}: {error}; --data takes digits, or a path to mnist.npz or hmp.npz") from error
    raise ConfigError(
        f"{source}: neither x_train, y_train, x_test and y_test nor samples, lengths, activity and volunteer are in it"
    )


def _found(source: str) -> Path:
    path = Path(source)
    beside = Path("..") / "shared" / "data" / source
    return beside if path.name == source and not path.exists() and beside.exists() else path


def digits() -> Examples:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn brings along, scaled to 0..1.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the digits come with scikit-learn: pip install 'fleetfed[demo]'")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        # Reading the file takes a hundredth of the time that importing scikit-learn does.
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        x, y = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    return Examples((np.asarray(x, np.float32) / 16).reshape(-1, 8, 8, 1), np.asarray(y).astype(np.int32))


def _deal(
    source: str, training: Examples, validation: Examples, deal: Deal, rng: np.random.Generator, *, most: int
) -> Split:
    match deal.split:
        case "dirichlet":
            parts = partition.dirichlet(training.y, deal.devices, rng, alpha=deal.alpha, minimum=MINIMUM)
            how = f"split non-IID by Dirichlet({deal.alpha:g})"
        case "shards":
            parts = partition.shards(training.y, deal.devices, rng, minimum=MINIMUM)
            how = "two label shards per device"
        case "uniform":
            parts = partition.uniform(training.y, deal.devices, rng, minimum=MINIMUM)
            how = "the same mixture for all"
        case _:
            raise ConfigError(f"split {deal.split!r} is none of dirichlet, shards, uniform")
    if most:
        parts = partition.limit(parts, max(most, MINIMUM), rng)
    return Split(source, tuple(training.take(part) for part in parts), validation, how)


def _volunteers(arrays: dict[str, NDArray[Any]], deal: Deal, rng: np.random.Generator) -> Split:
    """One volunteer per device; of every volunteer's recordings a fifth is kept for validation, whole recordings."""
    ends = np.cumsum(arrays["lengths"])
    starts = ends - arrays["lengths"]
    names = [str(name) for name in arrays.get("volunteers", np.arange(int(arrays["volunteer"].max()) + 1))]
    training: dict[int, list[tuple[NDArray[np.float32], int]]] = {number: [] for number in range(len(names))}
    held: list[tuple[NDArray[np.float32], int]] = []
    for recording in rng.permutation(len(starts)):
        samples = arrays["samples"][starts[recording] : ends[recording]]
        windows = _windows(samples)
        if not len(windows):
            continue
        entry = (windows, int(arrays["activity"][recording]))
        if rng.random() < _VALIDATION:
            held.append(entry)
        else:
            training[int(arrays["volunteer"][recording])].append(entry)
    parts = {number: _join(entries) for number, entries in training.items() if entries}
    usable = sorted((number for number in parts if len(parts[number]) >= MINIMUM), key=lambda n: -len(parts[n]))
    if deal.devices > len(usable):
        raise ConfigError(
            f"{deal.devices} devices, but only {len(usable)} volunteers have enough recordings; use --devices "
            f"{len(usable)} or fewer"
        )
    chosen = sorted(usable[: deal.devices])
    devices = tuple(parts[number] for number in chosen)
    if deal.per_device:
        most = max(deal.per_device, MINIMUM)
        devices = tuple(part.take(np.sort(rng.permutation(len(part))[:most])) for part in devices)
    return Split("wrist", devices, _join(held), "one volunteer per device", tuple(names[number] for number in chosen))


def _windows(samples: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Half-overlapping windows of `WINDOW` samples, in g; shape (n, WINDOW, 3)."""
    count = 0 if len(samples) < WINDOW else 1 + (len(samples) - WINDOW) // _STRIDE
    # The sensor's 6-bit codes stand for -1.5 g to 1.5 g.
    g = (-1.5 + 3.0 * samples.astype(np.float32) / 63.0).astype(np.float32)
    starts = np.arange(count)[:, None] * _STRIDE + np.arange(WINDOW)
    return g[starts] if count else np.empty((0, WINDOW, samples.shape[1]), np.float32)


def _join(entries: list[tuple[NDArray[np.float32], int]]) -> Examples:
    x = np.concatenate([windows for windows, _ in entries])
    y = np.concatenate([np.full(len(windows), label, np.int32) for windows, label in entries])
    return Examples(x, y)
