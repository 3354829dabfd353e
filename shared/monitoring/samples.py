"""One look at a process: values by metric and labels, taken on its loop's thread, rendered on another. No library.

>>> samples = Samples(Role.GATEWAY)
>>> samples.set("fleetfed_round_number", 7)
>>> samples.add("fleetfed_failures_total", 2, "dropout")
>>> samples.value("fleetfed_failures_total", "dropout")
2.0
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from fleetfed.shared.monitoring.catalog import CATALOG, Kind, Metric, Role

_U64: Final = float(2**64)


class Histogram:
    """Observations in buckets; safe from any thread.

    Args:
        name: of a histogram in the catalog.
    """

    def __init__(self, name: str) -> None:
        self.metric = CATALOG[name]
        assert self.metric.kind is Kind.HISTOGRAM, name
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.metric.buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation; one below zero, of a clock that was put back, counts as zero."""
        value = max(value, 0.0)
        with self._lock:
            self._counts[bisect_left(self.metric.buckets, value)] += 1
            self._sum += value

    def snapshot(self) -> tuple[tuple[tuple[float, int], ...], float]:
        """Cumulative counts by upper bound, infinity last; and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds, seen, cumulative = (*self.metric.buckets, float("inf")), 0, []
        for bound, count in zip(bounds, counts, strict=True):
            seen += count
            cumulative.append((bound, seen))
        return tuple(cumulative), total


class Samples:
    """See the module. What is not in the catalog for this role, or has other labels, is an `AssertionError`.

    Args:
        role: who is looked at.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._later: list[Callable[[], None]] = []

    def defer(self, work: Callable[[], None]) -> None:
        """Have what needs the loop's thread no more done by whoever calls `complete`."""
        self._later.append(work)

    def complete(self) -> Samples:
        """Do what was deferred; any thread."""
        later, self._later = self._later, []
        for work in later:
            work()
        return self

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set one series; None leaves it out."""
        if value is not None:
            self._series(name, labels)[labels] = min(float(value), _U64)

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add to one series, which begins at zero."""
        series = self._series(name, labels)
        series[labels] = min(series.get(labels, 0.0) + value, _U64)

    def update(self, other: Samples) -> None:
        """Take the series of another look at the same process."""
        for name, series in other._values.items():
            self._values.setdefault(name, {}).update(series)

    def histogram(self, histogram: Histogram) -> None:
        """Show a histogram."""
        assert self.role in histogram.metric.roles, histogram.metric.name
        self._histograms[histogram.metric.name] = histogram

    def value(self, name: str, *labels: str) -> float | None:
        """One series' value; None where there is none."""
        return self._values.get(name, {}).get(labels)

    def metrics(self) -> Iterator[tuple[Metric, Mapping[tuple[str, ...], float] | Histogram]]:
        """Every metric that has a value, in the catalog's order."""
        for name, metric in CATALOG.items():
            found = self._histograms.get(name) or self._values.get(name)
            if found:
                yield metric, found

    def _series(self, name: str, labels: tuple[str, ...]) -> dict[tuple[str, ...], float]:
        metric = CATALOG[name]
        assert self.role in metric.roles, f"{name} is not {self.role}'s"
        assert len(labels) == len(metric.labels), f"{name}{labels}"
        return self._values.setdefault(name, {})
