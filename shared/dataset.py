"""Examples from files or from a sensor: read within bounds, checked against the model, split by a seed. numpy only.

One of three sources:

- ``path``: an ``.npz`` with named arrays (``x`` and ``y``), a ``.csv`` with a header and a label column, or an IDX file
  (plain or gzip) whose labels are in ``labels``;
- ``function = "module:name"``: a sensor. The function is called without arguments and returns ``(x, y)``, or an
  iterable of such batches.

Examples stay in the type that they were stored in (one byte per pixel, say) and become float32 batch by batch, times
`Dataset.scale`; so a device holds its data once, and small::

    dataset = load(DataConfig(path=Path("digits.npz")))
    dataset = check(dataset, input_shape=card.input_shape, classes=card.classes)
    training, holdout = split(dataset, holdout=0.2, seed=7)
    x, y = training.batch(rng.permutation(len(training))[:16])
"""

from __future__ import annotations

import array
import csv
import gzip
import importlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError

_MIB: Final = 1 << 20
_IDX_TYPES: Final[dict[int, np.dtype[Any]]] = {
    0x08: np.dtype(np.uint8),
    0x09: np.dtype(np.int8),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_BYTE_SCALE: Final = 1.0 / 255.0

Indices = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]
Labels = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Examples and their labels.

    Attributes:
        x: numbers of any type, shape (n, ...).
        y: int32, shape (n,).
        scale: what values of ``x`` are multiplied with on their way into a model.
    """

    x: NDArray[Any]
    y: Labels
    scale: float = 1.0

    def __len__(self) -> int:
        return int(self.y.shape[0])

    def batch(self, indices: Indices) -> tuple[Floats, Labels]:
        """Copies of the chosen examples: scaled float32 of shape (k, ...), and int32 labels of shape (k,)."""
        x = self.x[indices].astype(np.float32)
        if self.scale != 1.0:
            x *= np.float32(self.scale)
        return x, self.y[indices]

    def take(self, indices: Indices) -> Dataset:
        """Another data set of the chosen examples."""
        return Dataset(self.x[indices], self.y[indices], self.scale)


def load(config: DataConfig) -> Dataset:
    """Read the configured source.

    Raises:
        ConfigError: no source, or one that is missing, damaged, too large, or not numbers with one label each; the
            message names the file and says what was expected.
    """
    limit = config.max_mib * _MIB
    if config.function:
        where = config.function
        x, y = _from_function(config.function, limit, config.max_examples)
    elif config.path is None:
        raise ConfigError("no data: set path to a file or function to a sensor's module:name")
    else:
        where = str(config.path)
        x, y = _from_file(config, config.path, limit)
    if config.processing:
        where = f"{where} after {config.processing}"
        x, y = _pair(_call(config.processing, x, y), where)
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "biuf":
        raise ConfigError(f"{where}: x holds {x.dtype}, expected numbers")
    if x.ndim < 2:
        raise ConfigError(f"{where}: x has the shape {x.shape}, expected examples along the first axis")
    if x.shape[0] != y.shape[0]:
        raise ConfigError(f"{where}: {x.shape[0]} examples, but {y.shape[0]} labels")
    if not x.shape[0]:
        raise ConfigError(f"{where}: no examples")
    if x.shape[0] > config.max_examples or x.nbytes > limit:
        raise _too_large(where, f"{x.shape[0]} examples of {x.nbytes} bytes")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ConfigError(f"{where}: x holds NaN or infinity")
    scale = config.scale or (_BYTE_SCALE if x.dtype == np.uint8 else 1.0)
    return Dataset(x, _labels(y, where), scale)


def check(dataset: Dataset, *, input_shape: tuple[int, ...], classes: int, where: str = "data") -> Dataset:
    """Fit the data to a model; examples with the right number of values in another shape are reshaped.

    Args:
        dataset: as loaded.
        input_shape: of one example, from the model card.
        classes: labels must lie in 0..classes-1.
        where: what to call the data in a message.

    Raises:
        ConfigError: the shape or a label does not fit.
    """
    size = math.prod(input_shape)
    if math.prod(dataset.x.shape[1:]) != size:
        raise ConfigError(
            f"{where}: examples have the shape {tuple(dataset.x.shape[1:])}, the model takes {tuple(input_shape)}; "
            "set a processing function that makes them fit"
        )
    low, high = int(dataset.y.min()), int(dataset.y.max())
    if low < 0 or high >= classes:
        wrong = high if high >= classes else low
        raise ConfigError(f"{where}: label {wrong} is not one of the model's classes 0 to {classes - 1}")
    return Dataset(dataset.x.reshape((len(dataset), *input_shape)), dataset.y, dataset.scale)


def split(dataset: Dataset, *, holdout: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into training and holdout examples; the same seed and data always give the same split.

    Every label gives its share where it has at least two examples, so that a small holdout set still sees the labels
    that the device has. Training never ends up empty.

    Args:
        dataset: at least one example.
        holdout: part to hold out, 0..0.9.
        seed: of the split.

    Returns:
        Training and holdout data; the latter is empty for ``holdout = 0`` or a single example.
    """
    held = _held_out(dataset.y, holdout, seed)
    if not held.any():
        return dataset, dataset.take(np.empty(0, dtype=np.intp))
    return dataset.take(np.flatnonzero(~held)), dataset.take(np.flatnonzero(held))


def _held_out(y: Labels, holdout: float, seed: int) -> NDArray[np.bool_]:
    held = np.zeros(y.shape[0], dtype=np.bool_)
    wanted = min(round(holdout * y.shape[0]), y.shape[0] - 1)
    if wanted < 1:
        return held
    rng = np.random.default_rng(seed)
    order = rng.permutation(y.shape[0])
    # Largest remainders: each label's share is rounded down, and the labels that lost most by it give one more.
    groups = [order[y[order] == label] for label in np.unique(y)]
    shares = [min(holdout * group.size, group.size - 1) for group in groups]
    counts = [int(share) for share in shares]
    missing = wanted - sum(counts)
    for index in sorted(range(len(groups)), key=lambda i: (counts[i] - shares[i], i))[: max(missing, 0)]:
        if counts[index] + 1 < groups[index].size:
            counts[index] += 1
    for group, count in zip(groups, counts, strict=True):
        held[group[:count]] = True
    # Labels with one example each give nothing above; then the split is drawn without regard to labels.
    if not held.any():
        held[order[:wanted]] = True
    return held


def named(reference: str) -> Callable[..., Any]:
    """The function that ``module:name`` names.

    Raises:
        ConfigError: the module cannot be imported or has no such function.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{reference!r}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{reference}: {error}; install it, or add its folder to PYTHONPATH") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{reference}: the module has no function {name!r}")
    return cast("Callable[..., Any]", function)


def _call(reference: str, *arguments: Any) -> Any:
    function = named(reference)
    try:
        return function(*arguments)
    # The function is the user's own; whatever it raises, the person who named it in the settings must hear of it.
    except Exception as error:
        raise ConfigError(f"{reference} failed: {type(error).__name__}: {error}") from error


def _pair(value: Any, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"{where}: expected a pair (x, y), got {type(value).__name__}")
    x, y = np.asarray(value[0]), np.asarray(value[1])
    if not x.ndim or not y.ndim:
        raise ConfigError(f"{where}: expected arrays (x, y), got shapes {x.shape} and {y.shape}")
    return x, y


def _from_function(reference: str, limit: int, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    value = _call(reference)
    if isinstance(value, tuple):
        return _pair(value, reference)
    if not isinstance(value, Iterable):
        raise ConfigError(f"{reference}: returned {type(value).__name__}, expected (x, y) or an iterable of such")
    xs: list[NDArray[Any]] = []
    ys: list[NDArray[Any]] = []
    examples, size = 0, 0
    batches = iter(value)
    while True:
        try:
            item = next(batches, None)
        except Exception as error:
            raise ConfigError(f"{reference} failed: {type(error).__name__}: {error}") from error
        if item is None:
            break
        x, y = _pair(item, reference)
        xs.append(x)
        ys.append(y)
        examples += x.shape[0]
        size += x.nbytes
        # Checked while reading: a sensor's generator may well have no end.
        if size > limit or examples > most:
            raise _too_large(reference, f"{examples} examples of {size} bytes, and more to come,")
    if not xs:
        raise ConfigError(f"{reference}: no batches")
    if len({x.shape[1:] for x in xs}) > 1:
        raise ConfigError(f"{reference}: batches of different shapes")
    return np.concatenate(xs), np.concatenate(ys)


def _from_file(config: DataConfig, path: Path, limit: int) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        if path.suffix == ".npz":
            return _read_npz(path, config.x, config.y, limit)
        if path.suffix == ".csv":
            return _read_csv(path, config.label, limit, config.max_examples)
        if config.labels is None:
            raise ConfigError(f"{path}: expected .npz or .csv, or an IDX file together with labels")
        return _read_idx(path, limit), _read_idx(config.labels, limit)
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error


def _read_npz(path: Path, x: str, y: str, limit: int) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        for name in (x, y):
            if name not in sizes:
                raise ConfigError(f"{path}: no array {name!r}; it has: {', '.join(sorted(sizes)) or 'none'}")
        if sizes[x] + sizes[y] > limit:
            raise _too_large(str(path), f"{sizes[x] + sizes[y]} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[x], arrays[y]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, struct.error) as error:
        raise ConfigError(f"{path}: not a readable .npz of plain arrays: {error}") from error


def _read_csv(path: Path, label: str, limit: int, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    values = array.array("f")
    labels = array.array("q")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        try:
            header = [name.strip() for name in next(rows, [])]
            if label not in header:
                raise ConfigError(f"{path}: no column {label!r} in the header; it has: {', '.join(header)}")
            at = header.index(label)
            if len(header) < 2:
                raise ConfigError(f"{path}: no columns beside {label!r}")
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ConfigError(f"{path}: line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
                try:
                    labels.append(int(row.pop(at)))
                    values.extend(map(float, row))
                except (ValueError, OverflowError) as error:
                    raise ConfigError(f"{path}: line {rows.line_num}: {error}") from error
                if len(labels) > most or values.itemsize * len(values) > limit:
                    raise _too_large(str(path), f"more than {len(labels) - 1} examples")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: line {rows.line_num}: {error}") from error
    x = np.frombuffer(values, dtype=np.float32).reshape(-1, len(header) - 1)
    return x, np.frombuffer(labels, dtype=np.int64)


def _read_idx(path: Path, limit: int) -> NDArray[Any]:
    """IDX (Y. LeCun's format): two zero bytes, type, dimensions, then their sizes and the values, big-endian."""
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        try:
            magic = file.read(4)
            if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not 1 <= magic[3] <= 8:
                raise ConfigError(f"{path}: not an IDX file")
            sizes = file.read(4 * magic[3])
            if len(sizes) != 4 * magic[3]:
                raise ConfigError(f"{path}: ends within its header")
            shape = struct.unpack(f">{magic[3]}I", sizes)
            dtype = _IDX_TYPES[magic[2]]
            size = math.prod(shape) * dtype.itemsize
            if size > limit:
                raise _too_large(str(path), f"{size} bytes")
            data = file.read(size + 1)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ConfigError(f"{path}: damaged gzip: {error}") from error
    if len(data) != size:
        found = "more" if len(data) > size else len(data)
        raise ConfigError(f"{path}: its header promises {size} bytes of values, it has {found}")
    return np.frombuffer(data, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _labels(y: NDArray[Any], where: str) -> Labels:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ConfigError(f"{where}: labels have the shape {y.shape}, expected one class number per example")
    if y.dtype.kind not in "biuf":
        raise ConfigError(f"{where}: labels are {y.dtype}, expected class numbers")
    # A comparison also catches NaN and what no int32 holds.
    with np.errstate(invalid="ignore"):
        whole = y.astype(np.int32)
    if not (whole == y).all():
        raise ConfigError(f"{where}: labels must be whole class numbers")
    return whole


def _too_large(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: {what} exceed the limit; raise max_mib or max_examples, or give less data")
