"""What a run achieved and what it cost, from what the coordinator says and from what every process counted."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFacts:
    """One finished round.

    Attributes:
        round, version: numbers; version 0 for a round that made none.
        outcome: of `messages.Outcome`.
        accuracy: of the version, on the coordinator's validation set; None where nothing measured it.
        participants: devices in the version.
        update_bytes: of all their updates.
        patch_bytes: of the patch.
        opened, closed: unix milliseconds.
        wire_up, wire_down: bytes on all devices' connections since the start, as last reported when it closed.
    """

    round: int
    version: int
    outcome: str
    accuracy: float | None
    participants: int
    update_bytes: int
    patch_bytes: int
    opened: int
    closed: int
    wire_up: int = 0
    wire_down: int = 0

    @property
    def seconds(self) -> float:
        """From opening to close."""
        return (self.closed - self.opened) / 1000


def facts(entry: Mapping[str, Any], *, wire_up: int = 0, wire_down: int = 0) -> RoundFacts:
    """Read one entry of the coordinator's history."""
    return RoundFacts(
        round=int(entry["round"]),
        version=int(entry.get("version") or 0),
        outcome=str(entry.get("outcome", "")),
        accuracy=None if entry.get("accuracy") is None else float(entry["accuracy"]),
        participants=int(entry.get("contributors", 0)),
        update_bytes=int(entry.get("update_bytes_total", 0)),
        patch_bytes=int(entry.get("patch_bytes", 0)),
        opened=int(entry.get("opened", 0)),
        closed=int(entry.get("closed", 0)),
        wire_up=wire_up,
        wire_down=wire_down,
    )


def union(intervals: Iterable[tuple[int, int]], *, within: tuple[int, int]) -> int:
    """Length of the union of intervals, cut to ``within``.

    >>> union([(0, 4), (2, 6), (8, 9)], within=(1, 100))
    6
    """
    low, high = within
    covered, end = 0, low
    for start, stop in sorted(intervals):
        start, stop = max(start, end), min(stop, high)
        if stop > start:
            covered += stop - start
            end = stop
    return covered


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """``report.json``; times in seconds, sizes in bytes.

    Attributes:
        final_accuracy: of the last version.
        accuracy_by_round: one value per round that made a version.
        rounds: that made a version.
        parameters: trainable values of the model.
        model_bytes: of the .tflite.
        update_bytes_mean, patch_bytes_mean: per update and per patch, as sent.
        wire_bytes_up, wire_bytes_down: on the devices' MQTT connections, TLS and everything else included.
        gateway_bytes_up, gateway_bytes_down: the same on the gateways' connections to the tier above and below.
        float32_bytes_up, float32_bytes_down: what uncompressed float32 updates and models would have taken.
        seconds_per_round_median: from a round's opening to its close.
        overhead_seconds_per_round_median: of these, when no device was training.
        device_rss_mb_max: largest resident memory of any device process.
        model_sha256: of the coordinator's last version.
        device_model_sha256: device to the hash of what it holds at the end.
        seconds: the whole run, set-up and stop included.
        setup_seconds: until the first round opened.
        privacy: of `privacy.Level`.
        who_learned_what: in words.
    """

    final_accuracy: float | None
    accuracy_by_round: list[float]
    rounds: int
    devices: int
    gateways: int
    tiers: int
    parameters: int
    model: str
    data: str
    model_bytes: int
    update_bytes_mean: float
    patch_bytes_mean: float
    wire_bytes_up: int
    wire_bytes_down: int
    gateway_bytes_up: int
    gateway_bytes_down: int
    float32_bytes_up: int
    float32_bytes_down: int
    seconds_per_round_median: float
    overhead_seconds_per_round_median: float
    device_rss_mb_max: float
    broker: str
    tls: bool
    auth: str
    model_sha256: str
    device_model_sha256: dict[str, str]
    rejected: dict[str, int]
    seconds: float
    setup_seconds: float
    privacy: str = "plain"
    who_learned_what: str = ""
    wire_by_round: list[dict[str, Any]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether every device holds the coordinator's exact file."""
        return all(digest == self.model_sha256 for digest in self.device_model_sha256.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def overhead(rounds: Sequence[RoundFacts], trained: Iterable[tuple[int, int]]) -> list[float]:
    """Seconds of each round in which no device was training."""
    intervals = list(trained)
    return [
        each.seconds - union(intervals, within=(each.opened, each.closed)) / 1000 for each in rounds if each.version
    ]


def build(
    *,
    rounds: Sequence[RoundFacts],
    devices: Mapping[str, Mapping[str, Any]],
    gateways: Mapping[str, Mapping[str, Any]],
    coordinator: Mapping[str, Any],
    facts: Mapping[str, Any],
    parameters: int,
) -> Report:
    """Put a report together.

    Args:
        rounds: in order.
        devices, gateways: id to last ``status.json``.
        coordinator: its last ``status.json``.
        facts: the attributes that the run itself knows.
        parameters: of the model.
    """
    made = [each for each in rounds if each.version]
    participations = sum(each.participants for each in made)
    trained = [
        (int(row["train_started"]), int(row["train_ended"]))
        for status in devices.values()
        for row in status.get("rounds", [])
        if row.get("train_started") and row.get("train_ended")
    ]
    accuracies = [each.accuracy for each in made if each.accuracy is not None]
    rejected: dict[str, int] = {}
    for status in (*devices.values(), *gateways.values(), coordinator):
        for reason, count in status.get("rejected", {}).items():
            rejected[reason] = rejected.get(reason, 0) + count
    upstream = [status.get("wire_upstream", status.get("wire", {})) for status in gateways.values()]
    return Report(
        final_accuracy=accuracies[-1] if accuracies else None,
        accuracy_by_round=accuracies,
        rounds=len(made),
        devices=len(devices),
        gateways=len(gateways),
        parameters=parameters,
        update_bytes_mean=sum(each.update_bytes for each in made) / max(1, participations),
        patch_bytes_mean=statistics.fmean(each.patch_bytes for each in made) if made else 0.0,
        wire_bytes_up=_sum(devices, "sent"),
        wire_bytes_down=_sum(devices, "received"),
        gateway_bytes_up=sum(int(wire.get("sent", 0)) for wire in upstream),
        gateway_bytes_down=sum(int(wire.get("received", 0)) for wire in upstream),
        float32_bytes_up=_FLOAT32 * parameters * participations,
        # Every device would need the whole model before each round.
        float32_bytes_down=_FLOAT32 * parameters * len(devices) * len(made),
        seconds_per_round_median=statistics.median(each.seconds for each in made) if made else 0.0,
        overhead_seconds_per_round_median=statistics.median(overhead(made, trained)) if made else 0.0,
        device_rss_mb_max=max((float(status.get("rss_mb_max", 0)) for status in devices.values()), default=0.0),
        model_sha256=str(coordinator.get("model_sha256", "")),
        device_model_sha256={name: str(status.get("model_sha256", "")) for name, status in devices.items()},
        rejected=rejected,
        wire_by_round=[
            {"round": each.round, "accuracy": each.accuracy, "up": each.wire_up, "down": each.wire_down}
            for each in made
        ],
        **facts,
    )


def _sum(statuses: Mapping[str, Mapping[str, Any]], direction: str) -> int:
    return sum(int(status.get("wire", {}).get(direction, 0)) for status in statuses.values())


def plot(report: Report, path: Path) -> None:
    """Draw accuracy against bytes on the devices' connections, beside uncompressed float32 in the same rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    rows = [row for row in report.wire_by_round if row["accuracy"] is not None]
    accuracy = [row["accuracy"] for row in rows]
    ours = [(row["up"] + row["down"]) / 1e6 for row in rows]
    per_round = (report.float32_bytes_up + report.float32_bytes_down) / 1e6 / max(1, report.rounds)
    theirs = [per_round * (number + 1) for number in range(len(rows))]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(ours, accuracy, marker="o", markersize=3, color="#1f6f5c", label="FleetFed, counted on the sockets")
    axes.plot(theirs, accuracy, marker=".", color="#b0b0b0", label="the same rounds as float32 (computed)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axes.set_xlabel("megabytes, all devices, both directions")
    axes.set_ylabel("accuracy on the validation set")
    axes.set_title(f"{report.model}: {report.devices} devices, {report.gateways} gateways, {report.rounds} rounds")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
