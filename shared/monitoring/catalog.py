"""Every metric, once: exporters, documentation, dashboards, alerts and their tests read this table.

Names follow Prometheus: base units, ``_total`` on what only grows, ``_timestamp_seconds`` on points in time (0 for
"none", never for "now"). A series' value is what the process knows; nothing is estimated. Counters begin at zero with
the process, unless their help says otherwise.

Labels have bounded sets of values: reasons and states are enumerations of the wire, sites and devices are limited by
``[monitoring]``, and what is beyond is counted together as ``other``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Role(StrEnum):
    """Who exposes a metric."""

    COORDINATOR = "coordinator"
    GATEWAY = "gateway"
    HELPER = "helper"
    ENROLLER = "enroller"
    BROKER = "broker"


PORTS: Final = {
    Role.COORDINATOR: 9464,
    Role.GATEWAY: 9465,
    Role.HELPER: 9466,
    Role.ENROLLER: 9467,
    Role.BROKER: 9468,
}
"""Where each role's metrics are by convention; `[monitoring] listen` decides."""

OTHER: Final = "other"
"""The label of everything beyond a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One line of the table.

    Attributes:
        name: as exposed; a histogram also has ``_bucket``, ``_sum`` and ``_count``.
        kind: what it is.
        labels: names of its labels.
        roles: who exposes it.
        help: one sentence.
        topic: the heading that it stands under in the documentation.
        buckets: upper bounds of a histogram, without infinity.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    roles: tuple[Role, ...]
    help: str
    topic: str
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query can use."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


_C, _G = (Role.COORDINATOR,), (Role.GATEWAY,)
_B, _E, _H = (Role.BROKER,), (Role.ENROLLER,), (Role.HELPER,)
_ALL = tuple(Role)
_CLIENTS = (Role.COORDINATOR, Role.GATEWAY, Role.HELPER)
"""Roles with a connection to a broker."""
_TRUSTING = _CLIENTS
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

_Row = tuple[str, Kind, tuple[str, ...], tuple[Role, ...], str]
_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

_TOPICS: Final[dict[str, tuple[_Row, ...]]] = {
    "The program": (
        ("fleetfed_build_info", _GAUGE, ("role", "id", "fleet", "site", "version"), _ALL,
         "Always 1; says who is scraped and which software runs."),
        ("fleetfed_ready", _GAUGE, (), _ALL, "1 when the role is connected and able to work, as /readyz says."),
        ("process_cpu_seconds_total", _COUNTER, (), _ALL, "CPU time that the process used."),
        ("process_resident_memory_bytes", _GAUGE, (), _ALL, "Memory that the process holds."),
        ("process_virtual_memory_bytes", _GAUGE, (), _ALL, "Address space of the process."),
        ("process_start_time_seconds", _GAUGE, (), _ALL, "When the process started, unix time."),
        ("process_open_fds", _GAUGE, (), _ALL, "Open file descriptors."),
        ("process_max_fds", _GAUGE, (), _ALL, "File descriptors that may be open."),
        ("fleetfed_memory_peak_bytes", _GAUGE, (), _ALL, "Most memory that the process ever held."),
    ),
    "Failure modes": (
        ("fleetfed_failures_total", _COUNTER, ("failure",), _ALL,
         "What went wrong, by failure mode: dropout, divergence, poisoning, overload, privacy, corruption, "
         "communication, version_skew. Every mode is always there."),
        ("fleetfed_rejected_total", _COUNTER, ("reason", "failure"), (*_CLIENTS, Role.ENROLLER),
         "Messages refused by this process, by stable reason and its failure mode (none: nothing is wrong)."),
    ),
    "Connection": (
        ("fleetfed_connected", _GAUGE, ("side",), _CLIENTS,
         "1 with a connection: side is broker, or at a gateway site (below) and upstream (above)."),
        ("fleetfed_connects_total", _COUNTER, ("side",), _CLIENTS, "Connections made to the broker."),
        ("fleetfed_connect_failures_total", _COUNTER, ("side",), _CLIENTS, "Attempts to connect that failed."),
        ("fleetfed_network_bytes_total", _COUNTER, ("side", "direction"), _CLIENTS,
         "Bytes on the MQTT connections, TLS included: direction is sent or received. A gateway whose two sites share "
         "a session counts all of it on the side site."),
        ("fleetfed_messages_total", _COUNTER, ("side", "direction"), _CLIENTS,
         "MQTT messages that the broker confirmed (sent) or that were handled (received)."),
        ("fleetfed_messages_lost_total", _COUNTER, ("side", "cause"), _CLIENTS,
         "Publishes without success: lost (the connection ended first) or refused by the broker; dropped are received "
         "ones of QoS 0 that found the queue full."),
        ("fleetfed_queue_messages", _GAUGE, ("side",), _CLIENTS, "Received messages that wait to be handled."),
        ("fleetfed_queue_bytes", _GAUGE, ("side",), _CLIENTS, "Their bytes."),
    ),
    "Participation": (
        ("fleetfed_fleet_devices", _GAUGE, ("site", "life"), _C,
         "Devices in each direct gateway's subtree as its census says: ready, sleeping, lost, disconnected."),
        ("fleetfed_site_connected", _GAUGE, ("site",), _C, "1 while the site's gateway is ready."),
        ("fleetfed_site_devices", _GAUGE, ("life",), _G,
         "Own devices of the site: ready, sleeping, lost, disconnected."),
        ("fleetfed_site_rivals", _GAUGE, (), _G,
         "Other gateways that say live that they serve this site; a site has one."),
        ("fleetfed_round_number", _GAUGE, (), (*_C, *_G), "The open round, or the last one."),
        ("fleetfed_round_open", _GAUGE, (), (*_C, *_G), "1 while a round is open here."),
        ("fleetfed_round_expected_devices", _GAUGE, (), (*_C, *_G),
         "Devices from which the open or last round expects an answer."),
        ("fleetfed_round_answered_devices", _GAUGE, (), (*_C, *_G),
         "Of these, devices that sent an update or declined."),
        ("fleetfed_round_participants", _GAUGE, (), _C, "Devices in the newest version that a round made."),
        ("fleetfed_participation_ratio", _GAUGE, (), _C,
         "Part of the expected devices that the last finished round's version holds; absent before the first."),
        ("fleetfed_declined_total", _COUNTER, ("reason", "failure"), _C,
         "Devices that took no part in a finished round, by the reason that they gave."),
        ("fleetfed_dropouts_total", _COUNTER, (), (*_C, *_G),
         "Gateway: devices that were lost without a goodbye. Coordinator: devices that were expected in a finished "
         "round and did not answer."),
    ),
    "Rounds and aggregation": (
        ("fleetfed_coordinator_state", _GAUGE, ("state",), _C, "1 for the state that the coordinator is in."),
        ("fleetfed_rounds_total", _COUNTER, ("outcome",), _C, "Finished rounds: committed or aborted."),
        ("fleetfed_round_aborts_total", _COUNTER, ("cause", "failure"), _C,
         "Aborted rounds by cause: a reject reason, step (the sum could not be applied) or operator."),
        ("fleetfed_consecutive_aborts", _GAUGE, (), _C, "Rounds aborted since the last that made a version."),
        ("fleetfed_round_duration_seconds", _HISTOGRAM, (), _C, "From the plan to the version, committed rounds."),
        ("fleetfed_aggregation_duration_seconds", _HISTOGRAM, (), _C,
         "From the last partial to the stored version: adding up, the step, the evaluation, the patch."),
        ("fleetfed_gateway_round_duration_seconds", _HISTOGRAM, (), _G,
         "From the plan's opening to the end of this gateway's part."),
        ("fleetfed_round_deadline_timestamp_seconds", _GAUGE, (), _C, "When the open round expires; 0 without one."),
        ("fleetfed_round_closed_timestamp_seconds", _GAUGE, (), _C, "When the last round ended; 0 for none yet."),
        ("fleetfed_rounds_made", _GAUGE, (), _C, "Versions that the present run's rounds have made."),
        ("fleetfed_rounds_planned", _GAUGE, (), _C, "Versions that the present run is to make; 0 for no limit."),
        ("fleetfed_target_accuracy_ratio", _GAUGE, (), _C, "Where the present run stops; 0 for no target."),
        ("fleetfed_rounds_to_target", _GAUGE, (), _C,
         "Rounds that the present run took to its target; absent until it is reached."),
        ("fleetfed_problem", _GAUGE, (), _C, "1 while rounds wait for an operator: see `fleetfed round status`."),
    ),
    "Model and validation": (
        ("fleetfed_model_version", _GAUGE, (), (*_C, *_G), "The version that is published, or served."),
        ("fleetfed_model_created_timestamp_seconds", _GAUGE, (), (*_C, *_G), "When that version was made; 0 for none."),
        ("fleetfed_model_size_bytes", _GAUGE, (), (*_C, *_G), "Its file."),
        ("fleetfed_model_patch_bytes", _GAUGE, (), _C, "The patch that leads to it; 0 for none."),
        ("fleetfed_model_accuracy_ratio", _GAUGE, ("data",), _C,
         "Accuracy: validation (the coordinator's data, newest version) or holdout (the devices', version before)."),
        ("fleetfed_model_loss", _GAUGE, ("data",), _C,
         "Mean loss: validation, holdout, or training (the devices', last step)."),
        ("fleetfed_clipped_ratio", _GAUGE, (), _C,
         "Largest part of any tensor's coordinates that the last round clipped."),
        ("fleetfed_site_model_lag_versions", _GAUGE, ("site",), _C,
         "Versions that the site's gateway is behind, as its census says."),
    ),
    "Updates and bytes": (
        ("fleetfed_updates_accepted_total", _COUNTER, (), _G, "Updates of own devices that were journalled."),
        ("fleetfed_update_bytes_total", _COUNTER, (), (*_C, *_G),
         "Bytes of accepted updates as sent; at the coordinator those in versions (0 in private plain rounds, where "
         "sizes tell too much)."),
        ("fleetfed_contributions_total", _COUNTER, (), _C, "Updates in the versions that rounds made."),
        ("fleetfed_updates_rejected_total", _COUNTER, ("reason", "failure"), _C,
         "Updates refused anywhere in the fleet in finished rounds, as gateways tell. Every reason is always there."),
        ("fleetfed_updates_excluded_total", _COUNTER, ("reason", "failure"), _C,
         "Updates that gateways proposed and the coordinator left out."),
    ),
    "Secure aggregation": (
        ("fleetfed_masked_sums_total", _COUNTER, ("result",), _C,
         "Sums of masked updates: revealed, or failed."),
        ("fleetfed_masked_sum_failures_total", _COUNTER, ("reason", "failure"), _C, "Failed ones by reason."),
        ("fleetfed_masked_buckets_lost_total", _COUNTER, (), _C, "Buckets that were dropped from sums."),
        ("fleetfed_commits_refused_total", _COUNTER, ("reason", "failure"), _G,
         "Commits of masked rounds that this gateway refused, so that it revealed nothing. Every reason is always "
         "there."),
        ("fleetfed_helper_available", _GAUGE, (), _C, "1 while a helper with a valid key is there; needed only by "
         "rounds with two seed holders."),
        ("fleetfed_helper_keys", _GAUGE, (), _H, "Keys whose secrets the helper holds."),
        ("fleetfed_helper_key_expiry_timestamp_seconds", _GAUGE, (), _H, "End of the newest key; 0 for none."),
        ("fleetfed_helper_answers", _GAUGE, (), _H, "Sums of masks given with these keys."),
    ),
    "Privacy budget": (
        ("fleetfed_privacy_epsilon", _GAUGE, (), _C,
         "Epsilon that any device's data has cost at most; 0 before the first private round."),
        ("fleetfed_privacy_epsilon_limit", _GAUGE, (), _C,
         "The budget of the present run; 0 where its rounds promise none."),
        ("fleetfed_privacy_delta", _GAUGE, (), _C, "The delta of that epsilon."),
    ),
    "Anomalies": (
        ("fleetfed_quarantined_devices", _GAUGE, (), _C, "Devices set aside until an operator releases them."),
        ("fleetfed_outliers_total", _COUNTER, (), (*_C, *_G),
         "Updates left out by a plan's defence; at the coordinator those of finished rounds, fleet-wide."),
    ),
    "Disk": (
        ("fleetfed_disk_free_bytes", _GAUGE, (), _ALL, "Free on the disk of the state folder, for this user."),
        ("fleetfed_disk_size_bytes", _GAUGE, (), _ALL, "That disk in all."),
        ("fleetfed_storage_bytes", _GAUGE, ("store",), _ALL,
         "Files of the state folder: database (with its write-ahead log), blobs, relay, other."),
        ("fleetfed_journal_commits_total", _COUNTER, (), _G, "Transactions of the journal."),
        ("fleetfed_journal_bytes", _GAUGE, (), _G, "Bytes of updates that the open round, or the last one, put there."),
        ("fleetfed_journal_limit_bytes", _GAUGE, (), _G, "Bytes of updates that one round may put into the journal."),
    ),
    "Expiry": (
        ("fleetfed_certificate_expiry_timestamp_seconds", _GAUGE, ("certificate",), _ALL,
         "End of the identity's certificate (identity) and of the TLS certificate (tls)."),
        ("fleetfed_trust_expiry_timestamp_seconds", _GAUGE, ("metadata",), _TRUSTING,
         "End of each piece of trust metadata in force: root, targets, snapshot, timestamp, devices."),
        ("fleetfed_trust_version", _GAUGE, ("metadata",), _TRUSTING, "Its version."),
        ("fleetfed_trust_stale", _GAUGE, (), _TRUSTING,
         "1 where nothing says that the trust metadata is current: no round counts."),
        ("fleetfed_revocations_expiry_timestamp_seconds", _GAUGE, (), _E,
         "End of the revocation list that brokers read; 0 where this service writes none."),
    ),
    "Devices, as they tell their gateway": (
        ("fleetfed_device_connected", _GAUGE, ("device",), _G, "1 while the device's presence says ready."),
        ("fleetfed_device_told_timestamp_seconds", _GAUGE, ("device",), _G,
         "When the device's telemetry last came; it tells on change, and every hour."),
        ("fleetfed_device_start_time_seconds", _GAUGE, ("device",), _G, "When its program started, by its clock."),
        ("fleetfed_device_network_bytes_total", _COUNTER, ("device", "direction"), _G,
         "Bytes on its connection, since its state folder was made."),
        ("fleetfed_device_cpu_seconds_total", _COUNTER, ("device",), _G, "CPU time of its program."),
        ("fleetfed_device_resident_memory_bytes", _GAUGE, ("device",), _G, "Memory that its program holds."),
        ("fleetfed_device_memory_peak_bytes", _GAUGE, ("device",), _G, "Most that it ever held."),
        ("fleetfed_device_training_seconds_total", _COUNTER, ("device",), _G, "Time that it trained."),
        ("fleetfed_device_rounds_total", _COUNTER, ("device", "outcome"), _G,
         "Its rounds: accepted, refused, declined, unanswered, void, conflict."),
        ("fleetfed_device_reasons_total", _COUNTER, ("device", "reason", "failure"), _G,
         "Why rounds were refused or declined, and what the device itself refused."),
        ("fleetfed_device_model_version", _GAUGE, ("device",), _G, "The model version that it holds; 0 for none."),
        ("fleetfed_device_model_lag_versions", _GAUGE, ("device",), _G, "Versions behind what the gateway serves."),
        ("fleetfed_device_participations", _GAUGE, ("device",), _G, "Private rounds in its privacy ledger."),
        ("fleetfed_device_participations_left", _GAUGE, ("device",), _G,
         "Private rounds that it may still take part in; absent before the first."),
        ("fleetfed_devices_telling", _GAUGE, (), _G, "Devices whose telemetry is held."),
        ("fleetfed_devices_unlisted", _GAUGE, (), _G,
         "Of these, devices beyond [monitoring] devices: their counters are added up as other."),
    ),
    "Enrolment": (
        ("fleetfed_enrolments_total", _COUNTER, (), _E, "Certificates given, renewals among them."),
        ("fleetfed_http_connections", _GAUGE, (), _E, "Open connections."),
        ("fleetfed_http_connections_refused_total", _COUNTER, (), _E, "Connections that found no room."),
    ),
    "Embedded broker": (
        ("fleetfed_broker_clients", _GAUGE, (), _B, "Clients connected."),
        ("fleetfed_broker_sessions", _GAUGE, (), _B, "Sessions, connected or not."),
        ("fleetfed_broker_subscriptions", _GAUGE, (), _B, "Subscriptions."),
        ("fleetfed_broker_retained_messages", _GAUGE, (), _B, "Retained messages."),
        ("fleetfed_broker_retained_bytes", _GAUGE, (), _B, "Their bytes."),
        ("fleetfed_broker_queued_messages", _GAUGE, (), _B, "Messages that wait for a subscriber."),
        ("fleetfed_broker_queued_bytes", _GAUGE, ("session",), _B,
         "Their bytes: online for connected subscribers, offline for others."),
        ("fleetfed_broker_connections_total", _COUNTER, (), _B, "Connections accepted."),
        ("fleetfed_broker_network_bytes_total", _COUNTER, ("direction",), _B,
         "Bytes received from and sent to clients."),
        ("fleetfed_broker_messages_total", _COUNTER, ("direction",), _B, "Messages received from and sent to clients."),
        ("fleetfed_broker_events_total", _COUNTER, ("event", "failure"), _B,
         "What the broker refused, dropped or delayed, by its own counter's name."),
    ),
}  # fmt: skip

CATALOG: Final[dict[str, Metric]] = {
    name: Metric(
        name=name,
        kind=kind,
        labels=labels,
        roles=roles,
        help=text,
        topic=topic,
        buckets=_SECONDS if kind is Kind.HISTOGRAM else (),
    )
    for topic, rows in _TOPICS.items()
    for name, kind, labels, roles, text in rows
}
"""By name."""

SERIES: Final = frozenset(series for metric in CATALOG.values() for series in metric.series)
"""Every name that a query may use."""


def of_role(role: Role) -> dict[str, Metric]:
    """The metrics that a role exposes."""
    return {name: metric for name, metric in CATALOG.items() if role in metric.roles}
