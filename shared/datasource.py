"""Where examples come from, as settings say it. Without numpy: whoever only reads settings should not wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The ``[data]`` table.

    Attributes:
        path: an ``.npz``, ``.csv`` or IDX file.
        labels: the IDX file of the labels, beside an IDX ``path``.
        function: a sensor as ``module:name``, instead of ``path``.
        x, y: names of the arrays in an ``.npz``.
        label: name of the label column in a ``.csv``; all other columns are numbers.
        holdout: part of the examples that is never trained on, to measure with.
        seed: makes the split; the same seed always holds the same examples out.
        scale: factor for the values of ``x``; 0 chooses 1/255 for bytes and 1 for everything else.
        processing: ``module:name`` of a function ``(x, y) -> (x, y)``, applied once after reading.
        max_examples: refuse more.
        max_mib: refuse data that would take more memory than so many MiB.
    """

    path: Path | None = None
    labels: Path | None = None
    function: Annotated[str, Length(0, 200)] = ""
    x: Annotated[str, Length(1, 100)] = "x"
    y: Annotated[str, Length(1, 100)] = "y"
    label: Annotated[str, Length(1, 100)] = "label"
    holdout: Annotated[float, Range(0.0, 0.9)] = 0.2
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    scale: Annotated[float, Range(0.0, 1e9)] = 0.0
    processing: Annotated[str, Length(0, 200)] = ""
    max_examples: Annotated[int, Range(1, 1 << 30)] = 10_000_000
    max_mib: Annotated[int, Range(1, 1 << 20)] = 512

    def __post_init__(self) -> None:
        if self.path is not None and self.function:
            raise ConfigError("path and function are both set; remove one")
        if self.labels is not None and self.path is None:
            raise ConfigError("labels needs path: the IDX file of the examples")
