"""Rounds, versions and the fleet as plain values: what the status, the control topics and ``--json`` show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.fleet import Progress
from fleetfed.cloud_coordinator.state import CoordinatorMachine, State
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord, RoundRecord, VersionRecord
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.messages import Mode, Outcome, Status

HISTORY: Final = 50
"""Rounds that the status carries: each subscriber gets all of them with every change."""

PRIVACY: Final = "privacy"
"""Where a round's report has what it promises (`accounting.statement`)."""

_LABELS: Final = 64
"""Different reasons of each kind that a round's record keeps."""


def tally(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, by reason."""
    return dict(sorted(Counter(reasons).items()))


def meta_metrics(meta: MetaSum) -> dict[str, float]:
    """What the devices measured, as metrics of the version that they made together.

    A device trains and measures *before* the version exists: its holdout metrics are of the model it trained.
    """
    metrics = {} if meta.training_loss is None else {"training_loss": meta.training_loss}
    if meta.holdout_accuracy is not None and meta.holdout_loss is not None:
        metrics |= {"holdout_accuracy": meta.holdout_accuracy, "holdout_loss": meta.holdout_loss}
    return metrics


def round_report(
    exchanges: Sequence[ExchangeRecord], meta: MetaSum | None, metrics: dict[str, float]
) -> dict[str, Any]:
    """What a round's record keeps beside its columns."""
    found: dict[str, Any] = {}
    for name in ("declined", "rejected", "excluded"):
        total: Counter[str] = Counter()
        for exchange in exchanges:
            total.update(getattr(exchange, name))
        if total:
            # The labels and counts are the gateways' own; what many of them claim must still fit.
            kept = total.most_common(_LABELS)
            found[name] = {label: min(count, limits.MAX_TALLY) for label, count in sorted(kept)}
    found |= _masked_report(exchanges)
    found |= metrics
    if meta is not None and meta.clipped:
        found |= {"examples": meta.examples, "clipped": max(meta.clipped)}
    if meta is not None and meta.beyond is not None:
        found["beyond_clip"] = meta.beyond
    return found


def sizes_tell(record: RoundRecord) -> bool:
    """Whether the sizes of a round's updates are part of what is private: compressed bodies, in plain mode."""
    return PRIVACY in record.report and record.report.get("mode") != Mode.SPLIT.value


def privacy_metrics(record: RoundRecord) -> dict[str, float]:
    """What all private rounds up to this one cost any device at most; empty for a round without privacy."""
    promise = record.report.get(PRIVACY)
    return {} if promise is None else {"epsilon": promise["epsilon"], "delta": promise["delta"]}


def _masked_report(exchanges: Sequence[ExchangeRecord]) -> dict[str, Any]:
    """What became of the commits: how many devices, failed reveals by reason, and buckets, where there are any."""
    found: dict[str, Any] = {"committed": sum(len(exchange.members) for exchange in exchanges)}
    results = [exchange.result for exchange in exchanges]
    failed = tally(result.failed for result in results if result.failed)
    if failed:
        found["failed_reveals"] = failed
    if any(result.buckets for result in results):
        found["buckets"] = sum(result.buckets for result in results)
        found["bucket_lost"] = sum(result.buckets_lost for result in results)
        found["devices_lost"] = sum(len(result.lost) for result in results)
    return found


def committed_round(
    before: RoundRecord,
    made: VersionRecord,
    meta: MetaSum,
    *,
    exchanges: Sequence[ExchangeRecord],
    members: Sequence[Member],
) -> RoundRecord:
    """The record of a round that made a version, from its record while it was open."""
    return replace(
        before,
        outcome=Outcome.COMMITTED.value,
        closed=made.created,
        version=made.version,
        participants=meta.count,
        weight=meta.weight,
        update_bytes=0 if sizes_tell(before) else sum(member.size for member in members),
        patch_bytes=0 if made.patch_ref is None else made.patch_ref.size,
        accuracy=made.metrics.get("accuracy", made.metrics.get("holdout_accuracy")),
        report=before.report | round_report(exchanges, meta, made.metrics),
    )


def status_of(
    machine: CoordinatorMachine,
    newest: VersionRecord | None,
    *,
    progress: Progress,
    history: Iterable[dict[str, Any]],
    problem: str,
) -> Status:
    """The status, as it is published."""
    return Status(
        state=machine.state.value,
        round=machine.last_round,
        version=0 if newest is None else newest.version,
        accepted=progress.accepted,
        expected=progress.expected,
        deadline=machine.round.expires if machine.round is not None else 0,
        history=tuple(history),
        waiting_for=(problem or who_is_missing(machine))[:2000],
    )


def who_is_missing(machine: CoordinatorMachine) -> str:
    """Who must come before a round opens; empty where none is wanted, or all are there."""
    if machine.state is not State.WAITING:
        return ""
    if not machine.fleet.gateways:
        return "a gateway: none is ready"
    ready, needed, wanted = machine.fleet.devices, machine.needed, machine.run.settings.start_when
    if ready >= needed:
        return ""
    why = f"start_when = {wanted}" if needed == wanted else f"start_when = {wanted}, less {wanted - needed} revoked"
    return f"devices: {ready} of {needed} are ready or asleep ({why})"


def history_row(record: RoundRecord) -> dict[str, Any]:
    """One finished round, as operators see it.

    ``update_bytes`` is the mean size of an update as sent, ``seconds`` from the plan to the version, ``clipped`` the
    largest fraction of clipped coordinates of any tensor.
    """
    row: dict[str, Any] = {
        "round": record.number,
        "outcome": record.outcome,
        "opened": record.opened,
        "closed": record.closed,
        "seconds": (record.closed - record.opened) / 1000,
        "version": record.version,
        "contributors": record.participants,
        "weight": record.weight,
        "update_bytes": round(record.update_bytes / record.participants) if record.participants else 0,
        "update_bytes_total": record.update_bytes,
        "patch_bytes": record.patch_bytes,
    }
    if record.reason:
        row["reason"] = record.reason
    # The whole promise is the same in every round but for its price.
    shown = {name: value for name, value in record.report.items() if name != PRIVACY}
    return row | shown | privacy_metrics(record)


def version_row(record: VersionRecord) -> dict[str, Any]:
    """One version, as operators see it."""
    return {
        "version": record.version,
        "parent": record.parent,
        "origin": record.origin.value,
        "source": record.source,
        "name": record.name,
        "sha256": record.sha256.hex(),
        "card": record.card_ref.digest.hex(),
        "bytes": record.size,
        "kept": record.file is not None,
        "round": record.round,
        "plan": "" if record.plan_hash is None else record.plan_hash.hex(),
        "contributors": record.contributors,
        "weight": record.weight,
        "patch_bytes": 0 if record.patch_ref is None else record.patch_ref.size,
        "full_bytes": 0 if record.full_ref is None else record.full_ref.size,
        "created": record.created,
        "metrics": record.metrics,
    }
