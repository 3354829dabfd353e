"""What Prometheus sees of the embedded broker: the numbers of ``$SYS``, and why it refused, dropped or delayed."""

from __future__ import annotations

from collections import Counter
from typing import Final

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.shared.monitoring import facts
from fleetfed.shared.monitoring.catalog import Role
from fleetfed.shared.monitoring.failures import BROKER, Failure
from fleetfed.shared.monitoring.samples import Samples

_PLAIN: Final = {
    "clients_connected": "fleetfed_broker_clients",
    "sessions": "fleetfed_broker_sessions",
    "subscriptions": "fleetfed_broker_subscriptions",
    "retained_messages": "fleetfed_broker_retained_messages",
    "retained_bytes": "fleetfed_broker_retained_bytes",
    "queued_messages": "fleetfed_broker_queued_messages",
    "connections": "fleetfed_broker_connections_total",
}
"""The broker's statistics that are shown as they are."""


class BrokerView:
    """`fleetfed.shared.monitoring.server.Watched`.

    Args:
        broker: that runs.
        config: its settings.
    """

    def __init__(self, broker: EmbeddedBroker, config: BrokerConfig) -> None:
        self._broker = broker
        self._config = config

    def ready(self) -> str:
        """Why it cannot work now."""
        return "" if self._broker.failure is None else f"durable state: {self._broker.failure}"

    def look(self) -> Samples:
        """Everything but the disk."""
        samples, values = Samples(Role.BROKER), self._broker.statistics()
        facts.program(samples, ready=self.ready())
        for name, metric in _PLAIN.items():
            samples.set(metric, values[name])
        samples.set("fleetfed_broker_queued_bytes", values["queued_bytes"], "online")
        samples.set("fleetfed_broker_queued_bytes", values["offline_bytes"], "offline")
        for direction in ("received", "sent"):
            samples.set("fleetfed_broker_network_bytes_total", values[f"bytes_{direction}"], direction)
            samples.set("fleetfed_broker_messages_total", values[f"messages_{direction}"], direction)
        modes: Counter[Failure] = Counter()
        for event, mode in BROKER.items():
            samples.set("fleetfed_broker_events_total", values[event], event, mode)
            modes[mode] += values[event]
        facts.failures(samples, modes)
        return samples

    def look_slowly(self, samples: Samples) -> None:
        """The disk and the TLS certificate."""
        if self._config.persistence_dir is not None:
            facts.disk(samples, self._config.persistence_dir)
        if self._config.tls is not None:
            facts.tls_expiry(samples, self._config.tls.cert)
