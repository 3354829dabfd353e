"""What Prometheus sees of the coordinator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fleetfed.cloud_coordinator.fleet import Progress
from fleetfed.cloud_coordinator.state import State
from fleetfed.cloud_coordinator.storage.records import RevealResult, RoundRecord, VersionRecord
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import OTHER, Role
from fleetfed.shared.monitoring.failures import Failure, of_abort, of_decline, of_rejection
from fleetfed.shared.monitoring.samples import Histogram, Samples
from fleetfed.shared.trust.identity import TLS_DIRECTORY
from fleetfed.shared.wire.messages import Life, Outcome

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.runtime import Runtime
    from fleetfed.cloud_coordinator.service import Coordinator

_METRICS: Final = {
    "accuracy": ("fleetfed_model_accuracy_ratio", "validation"),
    "holdout_accuracy": ("fleetfed_model_accuracy_ratio", "holdout"),
    "loss": ("fleetfed_model_loss", "validation"),
    "holdout_loss": ("fleetfed_model_loss", "holdout"),
    "training_loss": ("fleetfed_model_loss", "training"),
}
"""A version's metrics: name to series and label."""


class CoordinatorTally:
    """What is counted for monitoring alone, since the process started; a round counts when it is over."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.aborts: Counter[tuple[str, Failure]] = Counter()
        self.declined: Counter[tuple[str, Failure]] = Counter()
        self.rejected: Counter[tuple[str, Failure]] = Counter()
        self.excluded: Counter[tuple[str, Failure]] = Counter()
        self.failed_sums: Counter[tuple[str, Failure]] = Counter()
        self.sums = 0
        self.buckets_lost = 0
        self.dropouts = 0
        self.contributions = 0
        self.update_bytes = 0
        self.participation: float | None = None
        self.progress = Progress(accepted=0, expected=0)
        self._number = 0
        self.rounds = Histogram("fleetfed_round_duration_seconds")
        self.steps = Histogram("fleetfed_aggregation_duration_seconds")
        self._stepping: int | None = None

    def telling(self, number: int, progress: Progress) -> None:
        """Gateways told how far the devices of a round are; those that are done with it tell nothing of it any more."""
        before = self.progress if number == self._number else Progress(accepted=0, expected=0)
        self._number = number
        self.progress = Progress(
            accepted=max(before.accepted, progress.accepted), expected=max(before.expected, progress.expected)
        )

    def stepping(self, now: int) -> None:
        """The last partial is here."""
        self._stepping = now

    def revealed(self, result: RevealResult) -> None:
        """A sum of masked updates was revealed, or failed."""
        if result.failed:
            self.failed_sums[of_rejection(result.failed)] += 1
        else:
            self.sums += 1
        self.buckets_lost += result.buckets_lost

    def ended(self, record: RoundRecord, *, step: bool) -> None:
        """A round is over.

        Args:
            record: of the round.
            step: whether its sum could not be applied.
        """
        self.outcomes[record.outcome] += 1
        for found, name, label in (
            (self.declined, "declined", of_decline),
            (self.rejected, "rejected", of_rejection),
            (self.excluded, "excluded", of_rejection),
        ):
            for reason, count in record.report.get(name, {}).items():
                found[label(reason)] += count
        # What gateways tell of their progress is seldom the last word; what they propose is.
        answered = record.report.get("committed", 0)
        answered += sum(record.report.get("excluded", {}).values()) + sum(record.report.get("declined", {}).values())
        self.telling(record.number, Progress(accepted=answered, expected=answered))
        progress = self.progress
        self.dropouts += max(0, progress.expected - progress.accepted)
        if progress.expected:
            self.participation = min(1.0, record.participants / progress.expected)
        if record.outcome == Outcome.COMMITTED.value:
            self.contributions += record.participants
            self.update_bytes += record.update_bytes
            self.rounds.observe((record.closed - record.opened) / 1000)
            if self._stepping is not None:
                self.steps.observe((record.closed - self._stepping) / 1000)
        else:
            self.aborts[of_abort(record.reason, step=step)] += 1
        self._stepping = None

    def modes(self) -> Counter[Failure]:
        """All of it by failure mode, but for what a process below has counted already."""
        modes: Counter[Failure] = Counter({Failure.DROPOUT: self.dropouts})
        for counts in (self.aborts, self.declined):
            for (_, mode), count in counts.items():
                modes[mode] += count
        return modes


class CoordinatorView:
    """`fleetfed.shared.monitoring.server.Watched`.

    Args:
        runtime: to look at.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._promised: tuple[int, int, dict[str, Any]] = (-1, -1, {})

    def ready(self) -> str:
        """Why it cannot work now."""
        return self._runtime.obstacle()

    def look(self) -> Samples:
        """Everything but the disk."""
        runtime, samples = self._runtime, Samples(Role.COORDINATOR)
        coordinator = runtime.coordinator
        facts.who(samples, runtime.identity.certificate, ready=self.ready())
        facts.trust(samples, coordinator.trust.status())
        modes = coordinator.tally.modes()
        modes += facts.session(samples, "broker", *runtime.connection())
        modes += facts.rejected(samples, coordinator.rejected.snapshot())
        facts.failures(samples, modes)
        _fleet(samples, coordinator, most=runtime.config.monitoring.sites)
        _rounds(samples, coordinator)
        _tally(samples, coordinator.tally)
        _model(samples, coordinator.newest())
        self._privacy(samples, coordinator)
        samples.set("fleetfed_helper_available", coordinator.helpers.ready)
        samples.set("fleetfed_quarantined_devices", len(coordinator.book.asides.load().aside))
        return samples

    def look_slowly(self, samples: Samples) -> None:
        """The disk and the TLS certificate."""
        facts.disk(samples, self._runtime.config.state)
        facts.tls_expiry(samples, self._runtime.config.identity / TLS_DIRECTORY / "cert.pem")

    def _privacy(self, samples: Samples, coordinator: Coordinator) -> None:
        # Only a round that opens or ends changes what was spent.
        at = coordinator.machine.last_round, coordinator.finished_rounds
        if self._promised[:2] != at:
            self._promised = (*at, coordinator.book.promise())
        promise, settings = self._promised[2], coordinator.machine.run.settings.privacy
        samples.set("fleetfed_privacy_epsilon", promise.get("epsilon", 0))
        samples.set("fleetfed_privacy_epsilon_limit", 0 if settings is None else settings.epsilon)
        samples.set("fleetfed_privacy_delta", promise.get("delta", 0 if settings is None else settings.delta))


def _fleet(samples: Samples, coordinator: Coordinator, *, most: int) -> None:
    fleet, newest = coordinator.fleet, coordinator.newest()
    version = 0 if newest is None else newest.version
    for index, (gateway, census) in enumerate(fleet.censuses.items()):
        listed = index < most
        site = census.site if listed else OTHER
        counts = {Life.READY: census.ready, Life.SLEEPING: census.sleeping, Life.LOST: census.lost}
        counts[Life.DISCONNECTED] = max(0, census.devices - sum(counts.values()))
        for life, count in counts.items():
            samples.add("fleetfed_fleet_devices", count, site, life)
        if listed:
            # A site may change its gateway: the one that is there counts.
            before = samples.value("fleetfed_site_connected", site)
            connected = fleet.life(gateway) is Life.READY
            if connected or not before:
                samples.set("fleetfed_site_connected", connected, site)
                samples.set("fleetfed_site_model_lag_versions", max(0, version - census.model_version), site)


def _rounds(samples: Samples, coordinator: Coordinator) -> None:
    machine, history = coordinator.machine, coordinator.history
    settings = machine.run.settings
    for state in State:
        samples.set("fleetfed_coordinator_state", machine.state is state, state)
    is_open = machine.round is not None
    progress = coordinator.tally.progress
    samples.set("fleetfed_round_number", machine.last_round)
    samples.set("fleetfed_round_open", is_open)
    samples.set("fleetfed_round_expected_devices", progress.expected)
    samples.set("fleetfed_round_answered_devices", progress.accepted)
    samples.set("fleetfed_round_deadline_timestamp_seconds", machine.round.expires / 1000 if machine.round else 0)
    samples.set("fleetfed_rounds_made", machine.made)
    samples.set("fleetfed_rounds_planned", settings.rounds)
    samples.set("fleetfed_target_accuracy_ratio", settings.target_accuracy)
    if machine.reached:
        samples.set("fleetfed_rounds_to_target", machine.last_round - machine.run.first_round + 1)
    samples.set("fleetfed_problem", bool(coordinator.problem()))
    rows: list[Mapping[str, Any]] = list(reversed(history))
    samples.set("fleetfed_round_closed_timestamp_seconds", rows[0]["closed"] / 1000 if rows else 0)
    made = next((index for index, row in enumerate(rows) if row["version"]), len(rows))
    samples.set("fleetfed_consecutive_aborts", made)
    last = rows[made] if made < len(rows) else {}
    samples.set("fleetfed_round_participants", last.get("contributors", 0))
    samples.set("fleetfed_clipped_ratio", last.get("clipped", 0))


def _tally(samples: Samples, tally: CoordinatorTally) -> None:
    for outcome in Outcome:
        samples.set("fleetfed_rounds_total", tally.outcomes[outcome.value], outcome)
    # An alert looks at its increase, which begins with a zero that was there before.
    facts.by_reason(samples, "fleetfed_updates_rejected_total", {}, always=True)
    for name, counts in (
        ("fleetfed_round_aborts_total", tally.aborts),
        ("fleetfed_declined_total", tally.declined),
        ("fleetfed_updates_rejected_total", tally.rejected),
        ("fleetfed_updates_excluded_total", tally.excluded),
        ("fleetfed_masked_sum_failures_total", tally.failed_sums),
    ):
        for labels, count in counts.items():
            samples.set(name, count, *labels)
    samples.set("fleetfed_masked_sums_total", tally.sums, "revealed")
    samples.set("fleetfed_masked_sums_total", tally.failed_sums.total(), "failed")
    samples.set("fleetfed_masked_buckets_lost_total", tally.buckets_lost)
    samples.set("fleetfed_outliers_total", tally.rejected[of_rejection(RejectReason.OUTLIER)])
    samples.set("fleetfed_dropouts_total", tally.dropouts)
    samples.set("fleetfed_participation_ratio", tally.participation)
    samples.set("fleetfed_contributions_total", tally.contributions)
    samples.set("fleetfed_update_bytes_total", tally.update_bytes)
    samples.histogram(tally.rounds)
    samples.histogram(tally.steps)


def _model(samples: Samples, newest: VersionRecord | None) -> None:
    samples.set("fleetfed_model_version", 0 if newest is None else newest.version)
    samples.set("fleetfed_model_created_timestamp_seconds", 0 if newest is None else newest.created / 1000)
    samples.set("fleetfed_model_size_bytes", 0 if newest is None else newest.size)
    patch = None if newest is None else newest.patch_ref
    samples.set("fleetfed_model_patch_bytes", 0 if patch is None else patch.size)
    for name, (series, data) in _METRICS.items():
        samples.set(series, None if newest is None else newest.metrics.get(name), data)
