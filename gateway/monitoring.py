"""What Prometheus sees of a gateway."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from fleetfed.gateway.state import Previous
from fleetfed.gateway.telemetry import Told
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import OTHER, Role
from fleetfed.shared.monitoring.failures import OUTCOMES, Failure, of_decline, of_rejection
from fleetfed.shared.monitoring.samples import Histogram, Samples
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.identity import TLS_DIRECTORY
from fleetfed.shared.wire.messages import Life
from fleetfed.shared.wire.topics import Kind

if TYPE_CHECKING:
    from fleetfed.gateway.runtime import Gateway

_MIB: Final = 1 << 20


class GatewayTally:
    """What is counted for monitoring alone."""

    def __init__(self) -> None:
        self.dropouts = 0
        self.commits_refused = Counters()
        self.rounds = Histogram("fleetfed_gateway_round_duration_seconds")

    def presence(self, before: Life | None, after: Life | None) -> None:
        """A device's life went from one to the other."""
        if after is Life.LOST and before in (Life.READY, Life.SLEEPING):
            self.dropouts += 1

    def round_over(self, previous: Previous, now: int) -> None:
        """This gateway's part of a round is over."""
        if previous.opened:
            self.rounds.observe((now - previous.opened) / 1000)
        if previous.aborted:
            self.commits_refused.add(previous.aborted)


class GatewayView:
    """`fleetfed.shared.monitoring.server.Watched`.

    Args:
        gateway: to look at.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def ready(self) -> str:
        """Why it cannot work now."""
        return self._gateway.obstacle()

    def look(self) -> Samples:
        """Everything but the disk."""
        gateway, samples = self._gateway, Samples(Role.GATEWAY)
        status, tally = gateway.status(), gateway.tally
        facts.who(samples, gateway.certificate, ready=self.ready())
        facts.trust(samples, status.trust)
        modes: Counter[Failure] = Counter({Failure.DROPOUT: tally.dropouts})
        for side, statistics, wire in gateway.connections():
            modes += facts.session(samples, side, statistics, wire)
        modes += facts.rejected(samples, status.rejected)
        facts.by_reason(samples, "fleetfed_commits_refused_total", tally.commits_refused.snapshot(), always=True)
        facts.failures(samples, modes)

        samples.set("fleetfed_dropouts_total", tally.dropouts)
        samples.set("fleetfed_outliers_total", status.rejected.get(RejectReason.OUTLIER, 0))
        samples.set("fleetfed_updates_accepted_total", status.accepted)
        samples.set("fleetfed_update_bytes_total", gateway.performer.accepted_bytes)
        samples.set("fleetfed_journal_commits_total", status.journal_commits)
        samples.set("fleetfed_site_rivals", len(gateway.rivals.serials))
        samples.histogram(tally.rounds)

        samples.set("fleetfed_round_number", status.round)
        samples.set("fleetfed_round_open", gateway.machine.round is not None)
        previous, is_open = gateway.machine.previous, gateway.machine.round is not None
        samples.set("fleetfed_round_expected_devices", status.expected if is_open else previous.expected)
        samples.set("fleetfed_round_answered_devices", status.answered if is_open else previous.answered)
        open_or_last = gateway.machine.round or previous
        samples.set("fleetfed_journal_bytes", open_or_last.journalled)
        samples.set("fleetfed_journal_limit_bytes", gateway.config.limits.journal_mib * _MIB)

        manifest = gateway.relay.manifest
        samples.set("fleetfed_model_version", status.model_version)
        samples.set("fleetfed_model_created_timestamp_seconds", manifest.created / 1000 if manifest else 0)
        samples.set("fleetfed_model_size_bytes", manifest.size if manifest else 0)
        self._devices(samples, status.model_version)
        return samples

    def look_slowly(self, samples: Samples) -> None:
        """The disk and the TLS certificate."""
        facts.disk(samples, self._gateway.config.state)
        facts.tls_expiry(samples, self._gateway.config.identity / TLS_DIRECTORY / "cert.pem")

    def _devices(self, samples: Samples, version: int) -> None:
        gateway = self._gateway
        most = gateway.config.monitoring.devices
        # Copies; 5000 devices would hold up the loop for half a second.
        lives = list(gateway.machine.members.lives(Kind.DEVICE))
        tales = list(gateway.tales.items())
        samples.defer(lambda: _devices(samples, lives, tales, version=version, most=most))


def _devices(
    samples: Samples, lives: list[tuple[str, Life]], tales: list[tuple[str, Told]], *, version: int, most: int
) -> None:
    for device, life in lives[:most]:
        samples.set("fleetfed_device_connected", life is Life.READY, device)
    counts = Counter(life for _, life in lives)
    for life in Life:
        samples.set("fleetfed_site_devices", counts[life], life)
    for index, (device, told) in enumerate(tales):
        _counters(samples, device if index < most else OTHER, told)
        if index < most:
            _gauges(samples, device, told, version)
    samples.set("fleetfed_devices_telling", len(tales))
    samples.set("fleetfed_devices_unlisted", max(0, len(tales) - most))


def _counters(samples: Samples, device: str, told: Told) -> None:
    """What can be added up for many devices."""
    telemetry = told.telemetry
    samples.add("fleetfed_device_network_bytes_total", telemetry.sent, device, "sent")
    samples.add("fleetfed_device_network_bytes_total", telemetry.received, device, "received")
    samples.add("fleetfed_device_cpu_seconds_total", telemetry.cpu / 1000, device)
    samples.add("fleetfed_device_training_seconds_total", telemetry.trained / 1000, device)
    for outcome, count in telemetry.rounds.items():
        # What a device makes up is not to become a label.
        samples.add("fleetfed_device_rounds_total", count, device, outcome if outcome in OUTCOMES else OTHER)
    for reason, count in telemetry.reasons.items():
        label, mode = of_decline(reason)
        if label == OTHER:
            label, mode = of_rejection(reason)
        samples.add("fleetfed_device_reasons_total", count, device, label, mode)
    for reason, count in telemetry.refused.items():
        samples.add("fleetfed_device_reasons_total", count, device, *of_rejection(reason))


def _gauges(samples: Samples, device: str, told: Told, version: int) -> None:
    """What one device alone has."""
    telemetry = told.telemetry
    samples.set("fleetfed_device_told_timestamp_seconds", told.at / 1000, device)
    samples.set("fleetfed_device_start_time_seconds", telemetry.started / 1000, device)
    samples.set("fleetfed_device_resident_memory_bytes", telemetry.memory, device)
    samples.set("fleetfed_device_memory_peak_bytes", telemetry.memory_peak, device)
    samples.set("fleetfed_device_model_version", telemetry.model_version, device)
    samples.set("fleetfed_device_model_lag_versions", max(0, version - telemetry.model_version), device)
    samples.set("fleetfed_device_participations", telemetry.participations, device)
    if telemetry.most:
        left = max(0, telemetry.most - telemetry.participations)
        samples.set("fleetfed_device_participations_left", left, device)
