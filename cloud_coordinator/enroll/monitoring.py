"""What Prometheus sees of the enrolment service."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fleetfed.cloud_coordinator.enroll.brokerfiles import CURRENT
from fleetfed.cloud_coordinator.keys.pki import next_update
from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import Role
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.trust.identity import TLS_DIRECTORY

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.enroll.service import EnrolService


class EnrolView:
    """`fleetfed.shared.monitoring.server.Watched`.

    Args:
        service: to look at.
    """

    def __init__(self, service: EnrolService) -> None:
        self._service = service

    def ready(self) -> str:
        """Why it cannot work now; a service that listens can."""
        return ""

    def look(self) -> Samples:
        """Everything but the disk."""
        service, samples = self._service, Samples(Role.ENROLLER)
        enroller = service.enroller
        facts.who(samples, enroller.identity.certificate, ready=self.ready())
        refused = {str(reason): count for reason, count in enroller.refused.items()}
        facts.failures(samples, facts.rejected(samples, refused))
        samples.set("fleetfed_enrolments_total", enroller.issued)
        samples.set("fleetfed_http_connections", service.http.busy)
        samples.set("fleetfed_http_connections_refused_total", service.http.refused)
        return samples

    def look_slowly(self, samples: Samples) -> None:
        """The disk, the TLS certificate and what brokers read."""
        settings = self._service.enroller.settings
        facts.disk(samples, settings.state)
        facts.tls_expiry(samples, settings.identity / TLS_DIRECTORY / "cert.pem")
        name = "fleetfed_revocations_expiry_timestamp_seconds"
        if settings.broker is None:
            samples.set(name, 0)
            return
        # Left out where it cannot be read: brokers cannot read it either.
        with contextlib.suppress(OSError, ValueError):
            end = next_update((settings.broker.out / CURRENT / "crl.pem").read_bytes())
            samples.set(name, 0 if end is None else end.timestamp())
