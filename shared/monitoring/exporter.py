"""Renders a look at a process in Prometheus' text format, version 0.0.4. No library: a gateway carries none for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from fleetfed.shared.monitoring.samples import Histogram, Samples

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_HELP: Final = str.maketrans({"\\": r"\\", "\n": r"\n"})
_LABEL: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def render(samples: Samples) -> bytes:
    """The samples, in the catalog's order."""
    return "".join(_lines(samples)).encode()


def _lines(samples: Samples) -> Iterator[str]:
    for metric, values in samples.metrics():
        yield f"# HELP {metric.name} {metric.help.translate(_HELP)}\n# TYPE {metric.name} {metric.kind}\n"
        if isinstance(values, Histogram):
            buckets, total = values.snapshot()
            for bound, count in buckets:
                yield f'{metric.name}_bucket{{le="{_number(bound)}"}} {count}\n'
            yield f"{metric.name}_sum {_number(total)}\n{metric.name}_count {buckets[-1][1]}\n"
            continue
        for labels, value in values.items():
            named = ",".join(
                f'{name}="{label.translate(_LABEL)}"' for name, label in zip(metric.labels, labels, strict=True)
            )
            yield f"{metric.name}{{{named}}} {_number(value)}\n" if named else f"{metric.name} {_number(value)}\n"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
