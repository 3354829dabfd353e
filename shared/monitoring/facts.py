"""What every role says of itself in the same way: who it is, its connections, its refusals, its trust, its disk."""

from __future__ import annotations

import os
import shutil
import ssl
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fleetfed.shared.monitoring.failures import MODES, REJECTED, Failure, of_rejection
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.mqtt.session import SessionStatistics
from fleetfed.shared.telemetry import peak_mb
from fleetfed.shared.trust.certificates import Certificate
from fleetfed.shared.version import VERSION

_DATABASES: Final = (".db", ".sqlite", "-wal", "-shm", "-journal")
_MOST_FILES: Final = 100_000


def who(samples: Samples, certificate: Certificate, *, ready: str) -> None:
    """Who it is, whether it is ready (``ready`` says why not), and until when its certificate is valid."""
    program(samples, certificate.id, certificate.fleet, certificate.site, ready=ready)
    samples.set("fleetfed_certificate_expiry_timestamp_seconds", certificate.not_after / 1000, "identity")


def program(samples: Samples, id: str = "", fleet: str = "", site: str = "", *, ready: str) -> None:
    """The same of somebody without a certificate of the fleet."""
    samples.set("fleetfed_build_info", 1, samples.role, id, fleet, site, VERSION)
    samples.set("fleetfed_ready", not ready)
    samples.set("fleetfed_memory_peak_bytes", peak_mb() * 1e6)


def session(samples: Samples, side: str, statistics: SessionStatistics, wire: ByteCount) -> Counter[Failure]:
    """One MQTT connection; returns what went wrong with it."""
    samples.set("fleetfed_connected", statistics.connected, side)
    samples.set("fleetfed_connects_total", statistics.connects, side)
    samples.set("fleetfed_connect_failures_total", statistics.failed_connects, side)
    for direction, count, size in (
        ("sent", statistics.published, wire.sent),
        ("received", statistics.received, wire.received),
    ):
        samples.set("fleetfed_messages_total", count, side, direction)
        samples.set("fleetfed_network_bytes_total", size, side, direction)
    for cause in ("lost", "refused"):
        samples.set("fleetfed_messages_lost_total", getattr(statistics, cause), side, cause)
    samples.set("fleetfed_messages_lost_total", statistics.dropped_qos0, side, "dropped")
    samples.set("fleetfed_queue_messages", statistics.queue_messages, side)
    samples.set("fleetfed_queue_bytes", statistics.queue_bytes, side)
    lost = statistics.connects - statistics.connected
    return Counter(
        {Failure.COMMUNICATION: lost + statistics.failed_connects, Failure.OVERLOAD: statistics.dropped_qos0}
    )


def rejected(samples: Samples, counts: Mapping[str, int]) -> Counter[Failure]:
    """Refused messages by reason; returns them by failure mode."""
    return by_reason(samples, "fleetfed_rejected_total", counts)


def by_reason(samples: Samples, name: str, counts: Mapping[str, int], *, always: bool = False) -> Counter[Failure]:
    """A counter with the labels ``reason`` and ``failure``; returns it by failure mode.

    Args:
        samples: to add to.
        name: of the counter.
        counts: by reason.
        always: show the reasons that never happened too: an increase from no series to one is none to Prometheus, so
            that an alert would miss the first time.
    """
    modes: Counter[Failure] = Counter()
    if always:
        for known, mode in REJECTED.items():
            samples.add(name, 0, known, mode)
    for reason, count in counts.items():
        label, mode = of_rejection(reason)
        samples.add(name, count, label, mode)
        modes[mode] += count
    return modes


def failures(samples: Samples, counts: Mapping[Failure, int]) -> None:
    """The counter of failure modes; those that never happened are there too, as an alert needs them."""
    for mode in MODES:
        samples.set("fleetfed_failures_total", counts.get(mode, 0), mode)


def trust(samples: Samples, status: Mapping[str, Any]) -> None:
    """What `TrustKeeper.status` says; nothing for a fleet without trust metadata."""
    if not status:
        return
    for name, at in status["expiries"].items():
        samples.set("fleetfed_trust_expiry_timestamp_seconds", at / 1000, name)
    for name, version in status["versions"].items():
        samples.set("fleetfed_trust_version", version, name)
    samples.set("fleetfed_trust_stale", bool(status["stale"]))


def tls_expiry(samples: Samples, certificate: Path) -> None:
    """Until when a TLS certificate is valid; nothing where it cannot be read. Reads a file."""
    with suppress(OSError, ValueError, KeyError, ssl.SSLError):
        # The one parser of certificates in the standard library; a gateway has no `cryptography`.
        decoded = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
        samples.set(
            "fleetfed_certificate_expiry_timestamp_seconds", ssl.cert_time_to_seconds(decoded["notAfter"]), "tls"
        )


def disk(samples: Samples, state: Path) -> None:
    """The disk of the state folder, and what the folder holds. Reads the file system: not for an event loop."""
    with suppress(OSError):
        usage = shutil.disk_usage(state)
        samples.set("fleetfed_disk_free_bytes", usage.free)
        samples.set("fleetfed_disk_size_bytes", usage.total)
    sizes = {"database": 0, "other": 0}
    seen = 0
    for folder, _, files in os.walk(state):
        top = Path(folder).relative_to(state).parts
        for name in files:
            seen += 1
            if seen > _MOST_FILES:
                break
            store = top[0] if top and top[0] in ("blobs", "relay") else "other"
            if store == "other" and name.endswith(_DATABASES):
                store = "database"
            with suppress(OSError):
                sizes[store] = sizes.get(store, 0) + (Path(folder) / name).lstat().st_size
    for store, size in sizes.items():
        samples.set("fleetfed_storage_bytes", size, store)
