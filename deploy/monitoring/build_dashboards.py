"""Write the Grafana dashboards: `python deploy/monitoring/build_dashboards.py`.

What a panel shows stands here in a line or two; the JSON files, which Grafana reads, follow from it and are never
edited by hand. Grafana 10 and later.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent / "dashboards"
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA: Final = 39
_ROW_WIDTH: Final = 24


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: of at most a few words.
        queries: PromQL by legend.
        unit: Grafana's name of it.
        text: what it means, shown at the panel's corner.
        kind: ``timeseries``, ``stat``, ``bargauge`` or ``table``.
        width: of 24.
        bad: value from which it is red; with ``good`` below it, from which it is green.
        good: see there; without either there are no colours.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    text: str = ""
    kind: str = "timeseries"
    width: int = 8
    good: float | None = None
    bad: float | None = None


def _stat(title: str, query: str, unit: str = "short", text: str = "", *, width: int = 4, **colours: float) -> Panel:
    return Panel(title, {"": query}, unit, text, "stat", width, **colours)


def _quantile(part: float, histogram: str, *by: str) -> str:
    return f"histogram_quantile({part}, sum by ({', '.join((*by, 'le'))}) (rate({histogram}_bucket[$window])))"


_FAILED = 'sum(increase(fleetfed_updates_rejected_total{failure!="none"}[$window])) or vector(0)'
_MADE = "sum(increase(fleetfed_contributions_total[$window]))"
_COORDINATOR = 'and on (instance) fleetfed_build_info{role="coordinator"}'

EXECUTIVE: Final = {
    "Is it working?": [
        _stat("Participation", "fleetfed_participation_ratio", "percentunit",
              "Part of the expected devices that the last version holds.", bad=0.7, good=0.9),
        _stat("Accuracy", 'fleetfed_model_accuracy_ratio{data="validation"}', "percentunit",
              "Of the newest version, on the coordinator's data."),
        _stat("Validation loss", 'fleetfed_model_loss{data="validation"}', text="Mean loss on the coordinator's data."),
        _stat("Devices ready", 'sum(fleetfed_fleet_devices{life="ready"})', text="In all sites, as gateways count."),
        _stat("Model version", "fleetfed_model_version and on (instance) fleetfed_rounds_made",
              text="The version that is published."),
        _stat("Rounds to target", "fleetfed_rounds_to_target or fleetfed_rounds_made", "none",
              "Rounds that the run took to its target; rounds made so far until it is reached."),
    ],
    "Learning": [
        Panel("Accuracy and loss", {
            "accuracy, {{data}}": "fleetfed_model_accuracy_ratio",
            "loss, {{data}}": "fleetfed_model_loss",
        }, text="Validation is the coordinator's data, holdout and training are the devices' own.", width=12),
        Panel("Rounds of this run", {
            "made": "fleetfed_rounds_made",
            "planned (0: no limit)": "fleetfed_rounds_planned",
        }, "none", "Versions that the present run has made.", width=12),
    ],
    "Rounds": [
        Panel("Aggregation latency", {
            "median": _quantile(0.5, "fleetfed_aggregation_duration_seconds"),
            "95 %": _quantile(0.95, "fleetfed_aggregation_duration_seconds"),
        }, "s", "From the last partial sum to the stored version."),
        Panel("Duration of rounds", {
            "median": _quantile(0.5, "fleetfed_round_duration_seconds"),
            "95 %": _quantile(0.95, "fleetfed_round_duration_seconds"),
        }, "s", "From the plan to the version."),
        Panel("Participation", {
            "in the version": "fleetfed_participation_ratio",
        }, "percentunit", "Part of the expected devices in each version."),
        Panel("Failed updates", {
            "refused": f"({_FAILED}) / (({_FAILED}) + {_MADE})",
        }, "percentunit", "Part of the updates that gateways refused.", bad=0.1, good=0.02),
        Panel("Bytes of an update", {
            "mean": f"sum(increase(fleetfed_update_bytes_total[$window]) {_COORDINATOR}) / {_MADE}",
        }, "bytes", "As sent, signature included. Private plain rounds tell no sizes."),
        Panel("Staleness", {
            "{{site}}": "fleetfed_site_model_lag_versions",
        }, "none", "Versions that a site is behind.", bad=3, good=1),
    ],
    "Safety and cost": [
        Panel("Privacy budget", {
            "epsilon spent": "fleetfed_privacy_epsilon",
            "budget (0: none promised)": "fleetfed_privacy_epsilon_limit",
        }, text="What any device's data have cost at most; `fleetfed privacy explain` says for whom.", width=8),
        Panel("Anomalies", {
            "set aside": "fleetfed_quarantined_devices",
            "outliers": "sum(increase(fleetfed_outliers_total[$window]))",
            "wrong keys, names or values": 'sum(increase(fleetfed_failures_total{failure="poisoning"}[$window]))',
        }, "none", "Devices set aside, and messages that say what they may not say."),
        Panel("Processor", {
            "{{role}}": "sum by (role) (rate(process_cpu_seconds_total[$window])"
            " * on (instance) group_left (role) fleetfed_build_info)",
        }, "percentunit", "Processor time of each role; 100 % is one core."),
    ],
}  # fmt: skip

ONCALL: Final = {
    "Now": [
        _stat("Waits for an operator", "fleetfed_problem", "none",
              "`fleetfed round status` says for what.", bad=1, good=0),
        _stat("Aborts in a row", "fleetfed_consecutive_aborts", "none", bad=3, good=1),
        _stat("Sites away", "count(fleetfed_site_connected == 0) or vector(0)", "none", bad=1, good=0),
        _stat("Roles not ready", "count(fleetfed_ready == 0) or vector(0)", "none", "See /readyz.", bad=1, good=0),
        _stat("Devices lost", 'sum(fleetfed_fleet_devices{life="lost"}) or vector(0)', "none", bad=10, good=1),
        _stat("Trust is stale", "sum(fleetfed_trust_stale)", "none", "No round counts there.", bad=1, good=0),
    ],
    "Failure modes": [
        Panel("Failures by mode", {
            "{{failure}}": "sum by (failure) (increase(fleetfed_failures_total[$window]))",
        }, "none", "Each mode has its runbooks.", width=12),
        Panel("Refused messages by reason", {
            "{{reason}}": "sum by (reason) (increase(fleetfed_rejected_total[$window])) or vector(0)",
        }, "none", "By stable reason, all roles.", width=12),
        Panel("Declined by reason", {
            "{{reason}}": "sum by (reason) (increase(fleetfed_declined_total[$window])) or vector(0)",
        }, "none", "Devices that took no part, and what they said."),
        Panel("Aborted rounds by cause", {
            "{{cause}}": "sum by (cause) (increase(fleetfed_round_aborts_total[$window])) or vector(0)",
        }, "none"),
        Panel("Dropouts", {
            "{{instance}}": "sum by (instance) (increase(fleetfed_dropouts_total[$window]))",
        }, "none", "Expected and silent (coordinator), lost without a goodbye (gateways)."),
    ],
    "Fleet": [
        Panel("Devices", {"{{life}}": 'sum by (life) (fleetfed_fleet_devices{site=~"$site"})'}, "none"),
        Panel("Sites", {"{{site}}": 'fleetfed_site_connected{site=~"$site"}'}, "none", "1 while the gateway is ready."),
        Panel("The open round", {
            "expected": f"fleetfed_round_expected_devices {_COORDINATOR}",
            "answered": f"fleetfed_round_answered_devices {_COORDINATOR}",
        }, "none"),
    ],
    "Secure aggregation": [
        Panel("Masked sums", {
            "revealed": 'sum(increase(fleetfed_masked_sums_total{result="revealed"}[$window]))',
            "failed": 'sum(increase(fleetfed_masked_sums_total{result="failed"}[$window]))',
        }, "none", "Success rate is revealed of both."),
        Panel("Commits refused", {
            "{{reason}}": "sum by (reason) (increase(fleetfed_commits_refused_total[$window])) or vector(0)",
        }, "none", "What gateways would not reveal."),
        Panel("Privacy budget spent", {
            "spent": "fleetfed_privacy_epsilon / (fleetfed_privacy_epsilon_limit > 0) or vector(0)",
        }, "percentunit", bad=0.9, good=0.5),
    ],
    "Connections and disks": [
        Panel("Connects", {
            "{{instance}} {{side}}": "sum by (instance, side) (increase(fleetfed_connects_total[$window]))",
        }, "none"),
        Panel("Free disk", {
            "{{instance}}": "fleetfed_disk_free_bytes / fleetfed_disk_size_bytes",
        }, "percentunit", "A role that cannot write stops.", bad=0.1, good=0.2),
        Panel("Days until something ends", {
            "{{instance}} {{certificate}}": "(fleetfed_certificate_expiry_timestamp_seconds - time()) / 86400",
            "{{instance}} {{metadata}}": "((fleetfed_trust_expiry_timestamp_seconds > 0) - time()) / 86400",
        }, "none", "Certificates and trust metadata.", bad=7, good=14),
    ],
}  # fmt: skip

DEBUG: Final = {
    "Processes": [
        Panel("Processor", {"{{instance}}": "rate(process_cpu_seconds_total[$window])"}, "percentunit"),
        Panel("Memory", {"{{instance}}": "process_resident_memory_bytes"}, "bytes"),
        Panel("Open files", {"{{instance}}": "process_open_fds"}, "none"),
        Panel("Versions of the software", {
            "{{role}} {{id}} {{version}}": "fleetfed_build_info",
        }, "none", kind="table", width=24),
    ],
    "Traffic": [
        Panel("Network", {
            "{{instance}} {{side}} {{direction}}": "rate(fleetfed_network_bytes_total[$window])",
        }, "Bps", "On MQTT connections, TLS included.", width=12),
        Panel("Messages", {
            "{{instance}} {{side}} {{direction}}": "rate(fleetfed_messages_total[$window])",
        }, "ops", width=12),
        Panel("Queues", {"{{instance}} {{side}}": "fleetfed_queue_bytes"}, "bytes", "Received and not yet handled."),
        Panel("Lost messages", {
            "{{instance}} {{cause}}": "sum by (instance, cause) (increase(fleetfed_messages_lost_total[$window]))",
        }, "none"),
        Panel("Bytes of a site", {
            "{{site}} {{direction}}": "sum by (site, direction) (fleetfed_network_bytes_total"
            ' * on (instance) group_left (site) fleetfed_build_info{role="gateway"})',
        }, "bytes", "The gateway's ledger, since it was started."),
    ],
    "Gateways": [
        Panel("Updates accepted", {"{{instance}}": "rate(fleetfed_updates_accepted_total[$window])"}, "ops"),
        Panel("Journal", {"{{instance}}": "rate(fleetfed_journal_commits_total[$window])"}, "ops",
              "Transactions; one may hold many updates."),
        Panel("Duration of a gateway's part", {
            "{{instance}}": _quantile(0.95, "fleetfed_gateway_round_duration_seconds", "instance"),
        }, "s"),
    ],
    "Devices": [
        Panel("Bytes of a device", {
            "{{device}} {{direction}}": "topk(20, sum by (device, direction) (fleetfed_device_network_bytes_total))",
        }, "bytes", "The ledger of each device, since its state folder was made; the twenty largest.", width=12),
        Panel("Rounds of a device", {
            "{{device}} {{outcome}}": "topk(20, sum by (device, outcome) (fleetfed_device_rounds_total))",
        }, "none", width=12),
        Panel("Processor of a device", {
            "{{device}}": "topk(20, sum by (device) (rate(fleetfed_device_cpu_seconds_total[$window])))",
        }, "percentunit"),
        Panel("Memory of a device", {
            "{{device}}": "topk(20, max by (device) (fleetfed_device_resident_memory_bytes))",
        }, "bytes"),
        Panel("Training", {
            "{{device}}": "topk(20, sum by (device) (fleetfed_device_training_seconds_total))",
        }, "s", "Time that it trained, since its program started."),
        Panel("Versions behind", {
            "{{device}}": "topk(20, max by (device) (fleetfed_device_model_lag_versions))",
        }, "none"),
        Panel("Telling", {
            "devices": "sum(fleetfed_devices_telling)",
            "without series of their own": "sum(fleetfed_devices_unlisted)",
        }, "none", "Devices whose telemetry gateways hold."),
        Panel("Age of the oldest telemetry", {
            "{{instance}}": "time() - min by (instance) (fleetfed_device_told_timestamp_seconds)",
        }, "s"),
    ],
    "Broker": [
        Panel("Clients", {"clients": "fleetfed_broker_clients", "sessions": "fleetfed_broker_sessions"}, "none",
              "Of an embedded broker; Mosquitto has an exporter of its own."),
        Panel("Queued", {"{{session}}": "fleetfed_broker_queued_bytes"}, "bytes"),
        Panel("Retained", {"bytes": "fleetfed_broker_retained_bytes"}, "bytes"),
        Panel("Messages of the broker", {"{{direction}}": "rate(fleetfed_broker_messages_total[$window])"}, "ops"),
        Panel("Events", {
            "{{event}}": "sum by (event) (increase(fleetfed_broker_events_total[$window])) or vector(0)",
        }, "none", "What it refused, dropped or delayed."),
    ],
    "Model": [
        Panel("Bytes of the model", {
            "file": "fleetfed_model_size_bytes and on (instance) fleetfed_model_patch_bytes",
            "patch": "fleetfed_model_patch_bytes",
        }, "bytes"),
        Panel("Clipped", {"largest tensor": "fleetfed_clipped_ratio"}, "percentunit"),
        Panel("Storage", {"{{instance}} {{store}}": "fleetfed_storage_bytes"}, "bytes"),
    ],
}  # fmt: skip

DASHBOARDS: Final = {
    "executive": ("FleetFed: the fleet at a glance", "The ten figures that say whether learning goes well.", EXECUTIVE),
    "oncall": ("FleetFed: on call", "What is wrong, where, and which runbook to open.", ONCALL),
    "debug": ("FleetFed: debug", "Every process, device and byte.", DEBUG),
}


def build(name: str) -> dict[str, Any]:
    """A dashboard as Grafana has it."""
    title, text, rows = DASHBOARDS[name]
    panels: list[dict[str, Any]] = []
    y = 0
    if name == "oncall":
        panels.append(_alerts(len(panels) + 1, y))
        y += 8
    for heading, row in rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": _ROW_WIDTH, "h": 1},
            }
        )
        y += 1
        x = height = 0
        for panel in row:
            if x + panel.width > _ROW_WIDTH:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            panels.append(_panel(panel, len(panels) + 1, {"x": x, "y": y, "w": panel.width, "h": height}))
            x += panel.width
        y += height
    return {
        "uid": f"fleetfed-{name}",
        "title": title,
        "description": text,
        "tags": ["fleetfed"],
        "timezone": "browser",
        "schemaVersion": _SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "tags": ["fleetfed"], "title": "FleetFed", "asDropdown": True, "keepTime": True}
        ],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    sites = "label_values(fleetfed_site_connected, site)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
        {
            "name": "window",
            "label": "Window",
            "type": "interval",
            "query": "1m,5m,15m,1h,6h,1d",
            "current": {"text": "15m", "value": "15m"},
        },
        {
            "name": "site",
            "label": "Site",
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": sites, "refId": "sites"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _alerts(id: int, y: int) -> dict[str, Any]:
    return {
        "id": id,
        "type": "alertlist",
        "title": "Alerts",
        "description": "What fires; each alert links its runbook.",
        "datasource": _SOURCE,
        "gridPos": {"x": 0, "y": y, "w": _ROW_WIDTH, "h": 8},
        "options": {
            "viewMode": "list",
            "groupMode": "default",
            "maxItems": 50,
            "sortOrder": 3,
            "alertName": "Fleetfed",
            "stateFilter": {"firing": True, "pending": True, "noData": False, "normal": False, "error": True},
        },
    }


def _panel(panel: Panel, id: int, place: dict[str, int]) -> dict[str, Any]:
    table = panel.kind == "table"
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.unit != "short":
        defaults["min"] = 0
    if panel.good is not None and panel.bad is not None:
        defaults["thresholds"] = {"mode": "absolute", "steps": _steps(panel.good, panel.bad)}
        defaults["color"] = {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"}
    return {
        "id": id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": query,
                "legendFormat": legend,
                "range": not table and panel.kind != "stat",
                "instant": table or panel.kind == "stat",
                **({"format": "table"} if table else {}),
            }
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
    },
    "table": {"showHeader": True},
}


def _steps(good: float, bad: float) -> list[dict[str, Any]]:
    """Colours from the lowest value up; which end is red is in the order of the two."""
    if bad > good:
        return [
            {"color": "green", "value": None},
            *([{"color": "yellow", "value": good}] if good > 0 else []),
            {"color": "red", "value": bad},
        ]
    return [{"color": "red", "value": None}, {"color": "yellow", "value": bad}, {"color": "green", "value": good}]


def main() -> int:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(json.dumps(build(name), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
