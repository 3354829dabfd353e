"""What Prometheus sees of a helper."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import Role
from fleetfed.shared.monitoring.failures import Failure
from fleetfed.shared.monitoring.samples import Samples
from fleetfed.shared.trust.identity import TLS_DIRECTORY

if TYPE_CHECKING:
    from fleetfed.cloud_coordinator.helper.runtime import Helper


class HelperView:
    """`fleetfed.shared.monitoring.server.Watched`.

    Args:
        helper: to look at.
    """

    def __init__(self, helper: Helper) -> None:
        self._helper = helper

    def ready(self) -> str:
        """Why it cannot work now."""
        return self._helper.obstacle()

    def look(self) -> Samples:
        """Everything but the disk."""
        helper, samples = self._helper, Samples(Role.HELPER)
        status = helper.status()
        facts.who(samples, helper.certificate, ready=self.ready())
        facts.trust(samples, status.trust)
        modes: Counter[Failure] = facts.session(samples, "broker", *helper.connection())
        modes += facts.rejected(samples, status.rejected)
        facts.failures(samples, modes)
        samples.set("fleetfed_helper_keys", status.keys)
        samples.set("fleetfed_helper_key_expiry_timestamp_seconds", status.key_expires / 1000)
        samples.set("fleetfed_helper_answers", status.answered)
        return samples

    def look_slowly(self, samples: Samples) -> None:
        """The disk and the TLS certificate."""
        facts.disk(samples, self._helper.config.state)
        facts.tls_expiry(samples, self._helper.config.identity / TLS_DIRECTORY / "cert.pem")
