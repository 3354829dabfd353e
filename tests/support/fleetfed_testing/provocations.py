"""What each alert is for, as series that a role would show: `test_alerts.py` replays them to Prometheus's own tool.

A series is written as promtool has it: one sample per minute, ``0x30`` is 31 zeros, ``0+2x30`` grows by 2, and time
begins at 0, so that a timestamp of 600 is ten minutes in.
"""

from __future__ import annotations

from typing import Final

HOUR = 60
COORDINATOR = 'job="fleetfed",instance="cloud:9464"'
GATEWAY = 'job="fleetfed",instance="north:9465"'
_CLOUD = {f'fleetfed_build_info{{{COORDINATOR},role="coordinator"}}': "1x200"}

Series = dict[str, str]


def cloud(name: str, *labels: str) -> str:
    """A series of the coordinator."""
    return f"{name}{{{','.join((COORDINATOR, *labels))}}}"


def north(name: str, *labels: str) -> str:
    """A series of a gateway."""
    return f"{name}{{{','.join((GATEWAY, *labels))}}}"


def failing(mode: str, growth: str) -> Series:
    return {north("fleetfed_failures_total", f'failure="{mode}"'): growth}


REPLAYED_ONLY: Final = {
    "FleetfedRoundOverdue": "a coordinator ends its rounds in time unless it hangs for two minutes and yet answers",
    "FleetfedAggregationSlow": "a step of half a minute: a model and a disk that no test has",
    "FleetfedDeviceSilent": "a device that is connected and says nothing for two and a half hours",
    "FleetfedProcessor": "needs a whole processor for the process alone",
}
"""Why no real process is made to set an alert off: `tests/monitoring/test_real_alerts.py` does so for all others.

Their thresholds are seconds, not windows, or they need a machine of their own.
"""

HEALTHY: Final[Series] = _CLOUD | {
    cloud("up"): "1x200",
    north("up"): "1x200",
    cloud("fleetfed_ready"): "1x200",
    cloud("fleetfed_problem"): "0x200",
    cloud("fleetfed_consecutive_aborts"): "0x200",
    cloud("fleetfed_round_open"): "0x200",
    cloud("fleetfed_round_deadline_timestamp_seconds"): "0x200",
    north("fleetfed_round_open"): "1x200",
    cloud("fleetfed_aggregation_duration_seconds_bucket", 'le="1.0"'): "0+1x200",
    cloud("fleetfed_aggregation_duration_seconds_bucket", 'le="+Inf"'): "0+1x200",
    cloud("fleetfed_rounds_planned"): "20x200",
    cloud("fleetfed_rounds_made"): "20x200",
    cloud("fleetfed_target_accuracy_ratio"): "0.9x200",
    cloud("fleetfed_rounds_to_target"): "17x200",
    cloud("fleetfed_participation_ratio"): "0.95x200",
    cloud("fleetfed_site_connected", 'site="north"'): "1x200",
    cloud("fleetfed_fleet_devices", 'site="north"', 'life="ready"'): "95x200",
    cloud("fleetfed_fleet_devices", 'site="north"', 'life="lost"'): "5x200",
    cloud("fleetfed_fleet_devices", 'site="empty"', 'life="lost"'): "0x200",
    cloud("fleetfed_dropouts_total"): "0+1x200",
    north("fleetfed_dropouts_total"): "0+50x200",
    cloud("fleetfed_contributions_total"): "0+95x200",
    north("fleetfed_device_told_timestamp_seconds", 'device="d-1"'): "0+60x200",
    north("fleetfed_device_connected", 'device="d-1"'): "1x200",
    cloud("fleetfed_site_model_lag_versions", 'site="north"'): "1x200",
    cloud("fleetfed_model_loss", 'data="validation"'): "1-0.004x200",
    cloud("fleetfed_clipped_ratio"): "0.02x200",
    cloud("fleetfed_updates_rejected_total", 'reason="late"', 'failure="dropout"'): "0+1x200",
    cloud("fleetfed_updates_rejected_total", 'reason="duplicate"', 'failure="none"'): "0+100x200",
    cloud("fleetfed_quarantined_devices"): "0x200",
    north("fleetfed_failures_total", 'failure="poisoning"'): "1x200",
    cloud("fleetfed_masked_sums_total", 'result="revealed"'): "0+1x200",
    cloud("fleetfed_masked_sums_total", 'result="failed"'): "0x200",
    north("fleetfed_commits_refused_total", 'reason="below_minimum"'): "0x200",
    cloud("fleetfed_helper_available"): "0x200",
    cloud("fleetfed_privacy_epsilon"): "3x200",
    cloud("fleetfed_privacy_epsilon_limit"): "0x200",
    north("fleetfed_connects_total", 'side="site"'): "1x200",
    north("fleetfed_messages_lost_total", 'side="site"', 'cause="lost"'): "0+5x200",
    north("fleetfed_disk_free_bytes"): "50x200",
    north("fleetfed_disk_size_bytes"): "100x200",
    north("fleetfed_storage_bytes", 'store="database"'): "100x200",
    north("fleetfed_journal_bytes"): "10x200",
    north("fleetfed_journal_limit_bytes"): "100x200",
    north("process_cpu_seconds_total"): "0+20x200",
    north("process_open_fds"): "100x200",
    north("process_max_fds"): "1024x200",
    north("fleetfed_certificate_expiry_timestamp_seconds", 'certificate="identity"'): "2592000x200",
    north("fleetfed_trust_expiry_timestamp_seconds", 'metadata="root"'): "31536000x200",
    north("fleetfed_trust_expiry_timestamp_seconds", 'metadata="timestamp"'): "86400x200",
    north("fleetfed_trust_stale"): "0x200",
    cloud("fleetfed_revocations_expiry_timestamp_seconds"): "0x200",
    cloud("fleetfed_helper_key_expiry_timestamp_seconds"): "0x200",
}

PROVOKED: Final[dict[str, Series]] = {
    "FleetfedRoundsWait": {cloud("fleetfed_problem"): "1x200"},
    "FleetfedRoundsAbort": {cloud("fleetfed_consecutive_aborts"): "3x200"},
    "FleetfedRoundOverdue": {
        cloud("fleetfed_round_open"): "1x200",
        cloud("fleetfed_round_deadline_timestamp_seconds"): "600x200",
    },
    "FleetfedAggregationSlow": {
        cloud("fleetfed_aggregation_duration_seconds_bucket", 'le="30.0"'): "0x200",
        cloud("fleetfed_aggregation_duration_seconds_bucket", 'le="60.0"'): "0+1x200",
        cloud("fleetfed_aggregation_duration_seconds_bucket", 'le="+Inf"'): "0+1x200",
    },
    "FleetfedTargetMissed": {
        cloud("fleetfed_rounds_planned"): "20x200",
        cloud("fleetfed_rounds_made"): "20x200",
        cloud("fleetfed_target_accuracy_ratio"): "0.9x200",
    },
    "FleetfedParticipationLow": {cloud("fleetfed_participation_ratio"): "0.5x200"},
    "FleetfedSiteDown": {cloud("fleetfed_site_connected", 'site="north"'): "0x200"},
    "FleetfedDevicesLost": {
        cloud("fleetfed_fleet_devices", 'site="north"', 'life="ready"'): "70x200",
        cloud("fleetfed_fleet_devices", 'site="north"', 'life="lost"'): "30x200",
    },
    "FleetfedDropouts": _CLOUD
    | {cloud("fleetfed_dropouts_total"): "0+5x200", cloud("fleetfed_contributions_total"): "0+5x200"},
    "FleetfedDeviceSilent": {
        north("fleetfed_device_told_timestamp_seconds", 'device="d-1"'): "60x200",
        north("fleetfed_device_connected", 'device="d-1"'): "1x200",
    },
    "FleetfedStale": {cloud("fleetfed_site_model_lag_versions", 'site="north"'): "5x200"},
    "FleetfedDivergence": {cloud("fleetfed_model_loss", 'data="validation"'): "0.4x60 0.9x139"},
    "FleetfedUpdatesDiverge": failing("divergence", "0+1x200"),
    "FleetfedClipping": {cloud("fleetfed_clipped_ratio"): "0.4x200"},
    "FleetfedFailedUpdates": {
        cloud("fleetfed_updates_rejected_total", 'reason="truncated"', 'failure="corruption"'): "0+1x200",
        cloud("fleetfed_contributions_total"): "0+4x200",
    },
    "FleetfedPoisoning": failing("poisoning", "0+1x200"),
    "FleetfedQuarantine": {cloud("fleetfed_quarantined_devices"): "1x200"},
    "FleetfedCorruption": failing("corruption", "0+1x200"),
    "FleetfedOverload": failing("overload", "0+1x200"),
    "FleetfedVersionSkew": failing("version_skew", "0+1x200"),
    "FleetfedMaskedSumsFail": {
        cloud("fleetfed_masked_sums_total", 'result="revealed"'): "0+1x200",
        cloud("fleetfed_masked_sums_total", 'result="failed"'): "0+1x200",
    },
    "FleetfedCommitsRefused": {north("fleetfed_commits_refused_total", 'reason="below_minimum"'): "0x170 1x29"},
    "FleetfedHelperMissing": {cloud("fleetfed_helper_available"): "1x60 0x139"},
    "FleetfedPrivacyBudget": {
        cloud("fleetfed_privacy_epsilon"): "7.5x200",
        cloud("fleetfed_privacy_epsilon_limit"): "8x200",
    },
    "FleetfedPrivacyRefusals": failing("privacy", "0+1x200"),
    "FleetfedTargetDown": {north("up"): "0x200"},
    "FleetfedNotReady": {north("fleetfed_ready"): "0x200"},
    "FleetfedReconnects": {north("fleetfed_connects_total", 'side="upstream"'): "0+1x200"},
    "FleetfedMessagesLost": {north("fleetfed_messages_lost_total", 'side="site"', 'cause="refused"'): "0+1x200"},
    "FleetfedBrokerQueues": {cloud("fleetfed_broker_queued_bytes", 'session="offline"'): "200000000x200"},
    "FleetfedDiskFull": {north("fleetfed_disk_free_bytes"): "5x200", north("fleetfed_disk_size_bytes"): "100x200"},
    "FleetfedJournalFull": {
        north("fleetfed_journal_bytes"): "95x200",
        north("fleetfed_journal_limit_bytes"): "100x200",
    },
    "FleetfedProcessor": {north("process_cpu_seconds_total"): "0+60x200"},
    "FleetfedDescriptors": {north("process_open_fds"): "1000x200", north("process_max_fds"): "1024x200"},
    "FleetfedCertificateExpires": {
        north("fleetfed_certificate_expiry_timestamp_seconds", 'certificate="tls"'): "86400x200",
    },
    "FleetfedTrustExpires": {north("fleetfed_trust_expiry_timestamp_seconds", 'metadata="targets"'): "86400x200"},
    "FleetfedTrustStale": {north("fleetfed_trust_stale"): "1x200"},
    "FleetfedRevocationsExpire": {cloud("fleetfed_revocations_expiry_timestamp_seconds"): "86400x200"},
    "FleetfedHelperKeyExpires": {cloud("fleetfed_helper_key_expiry_timestamp_seconds"): "12600x200"},
}
