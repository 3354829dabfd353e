"""Records to the columns of their tables, and back."""

from __future__ import annotations

from typing import Any, Final

import msgpack

from fleetfed.cloud_coordinator.events import Member
from fleetfed.cloud_coordinator.storage.records import (
    ExchangeRecord,
    Origin,
    RevealResult,
    RoundRecord,
    VersionRecord,
)
from fleetfed.cloud_coordinator.training.clips import ClipState
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest, MessageId
from fleetfed.shared.wire.messages import BlobRef

GOOD: Final = RevealResult()
"""Of a partial that is one sum and counts; not stored."""


def pack(value: Any) -> bytes:
    """Small structures for a column."""
    packed = msgpack.packb(value, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def unpack(data: bytes) -> Any:
    """What `pack` packed.

    Raises:
        StorageError: it is damaged.
    """
    try:
        return codec.unpack(bytes(data), limit=len(data))
    except RemoteProtocolError as error:
        raise StorageError(f"database: {error}") from error


def read_ref(data: bytes | None) -> BlobRef:
    """A published object, from its column.

    Raises:
        StorageError: it is damaged.
    """
    assert data is not None
    try:
        return codec.decode(BlobRef, bytes(data), limit=len(data))
    except RemoteProtocolError as error:
        raise StorageError(f"database: {error}") from error


def read_bytes(value: Any) -> bytes | None:
    """Bytes, whatever the driver gives."""
    return None if value is None else bytes(value)


def version_row(r: VersionRecord) -> dict[str, Any]:
    """The columns of a version."""
    return {
        "version": r.version,
        "parent": r.parent,
        "origin": r.origin.value,
        "source": r.source,
        "name": r.name,
        "sha256": r.sha256,
        "size": r.size,
        "file": r.file,
        "card": r.card,
        "card_ref": codec.encode(r.card_ref),
        "full_ref": None if r.full_ref is None else codec.encode(r.full_ref),
        "patch_ref": None if r.patch_ref is None else codec.encode(r.patch_ref),
        "round": r.round,
        "plan_hash": r.plan_hash,
        "contributors": r.contributors,
        "weight": r.weight,
        "metrics": pack(r.metrics),
        "created": r.created,
        "state": r.state,
        "clips": pack(r.clips.to_dict()),
    }


def read_version(row: Any) -> VersionRecord:
    """A version from its columns."""
    return VersionRecord(
        version=row["version"],
        parent=row["parent"],
        origin=Origin(row["origin"]),
        source=row["source"],
        name=row["name"],
        sha256=bytes(row["sha256"]),
        size=row["size"],
        file=read_bytes(row["file"]),
        card=bytes(row["card"]),
        card_ref=read_ref(row["card_ref"]),
        full_ref=None if row["full_ref"] is None else read_ref(row["full_ref"]),
        patch_ref=None if row["patch_ref"] is None else read_ref(row["patch_ref"]),
        round=row["round"],
        plan_hash=read_bytes(row["plan_hash"]),
        contributors=row["contributors"],
        weight=row["weight"],
        metrics=unpack(row["metrics"]),
        created=row["created"],
        state=read_bytes(row["state"]),
        clips=ClipState.from_dict(unpack(row["clips"])),
    )


def round_row(r: RoundRecord) -> dict[str, Any]:
    """The columns of a round."""
    return {
        "number": r.number,
        "plan_hash": r.plan_hash,
        "plan": r.plan,
        "base": r.base,
        "awaited": pack(sorted(r.awaited)),
        "opened": r.opened,
        "expires": r.expires,
        "outcome": r.outcome,
        "reason": r.reason[:2000],
        "closed": r.closed,
        "version": r.version,
        "participants": r.participants,
        "weight": r.weight,
        "update_bytes": r.update_bytes,
        "patch_bytes": r.patch_bytes,
        "accuracy": r.accuracy,
        "report": pack(r.report),
    }


def read_round(row: Any) -> RoundRecord:
    """A round from its columns."""
    values = dict(row)
    values |= {
        "plan_hash": bytes(row["plan_hash"]),
        "plan": bytes(row["plan"]),
        "awaited": frozenset(unpack(row["awaited"])),
        "report": unpack(row["report"]),
    }
    return RoundRecord(**values)


def exchange_row(r: ExchangeRecord) -> dict[str, Any]:
    """The columns of an exchange."""
    return {
        "round": r.round,
        "gateway": r.gateway,
        "proposal_head": r.proposal_head,
        "proposal": r.proposal,
        "commit_head": r.commit_head,
        "commit": r.commit,
        "members": pack([[m.device, m.site, m.message_id, m.head, m.size, m.owner] for m in r.members]),
        "count": len(r.members),
        "update_bytes": sum(m.size for m in r.members),
        "counts": pack([r.declined, r.rejected, r.excluded]),
        "reveal_head": r.reveal_head,
        "receipt": r.receipt,
        "result": result_column(r.result),
    }


def result_column(r: RevealResult) -> bytes | None:
    """What a reveal came to, as a column; NULL for the usual."""
    return None if r == GOOD else pack([r.failed, r.buckets, r.buckets_lost, b"".join(r.lost)])


def read_result(column: Any) -> RevealResult:
    """What a reveal came to, from its column."""
    if column is None:
        return GOOD
    failed, buckets, buckets_lost, lost = unpack(column)
    return RevealResult(
        failed=failed,
        buckets=buckets,
        buckets_lost=buckets_lost,
        lost=tuple(lost[i : i + 16] for i in range(0, len(lost), 16)),
    )


def read_exchange(row: Any) -> ExchangeRecord:
    """An exchange from its columns."""
    members = tuple(
        Member(
            device=device,
            site=site,
            owner=owner[0] if owner else "",
            message_id=MessageId(message_id),
            head=Digest(head),
            size=size,
        )
        for device, site, message_id, head, size, *owner in unpack(row["members"])
    )
    declined, rejected, excluded = unpack(row["counts"])
    return ExchangeRecord(
        round=row["round"],
        gateway=row["gateway"],
        proposal_head=bytes(row["proposal_head"]),
        proposal=bytes(row["proposal"]),
        commit_head=bytes(row["commit_head"]),
        commit=bytes(row["commit"]),
        members=members,
        declined=declined,
        rejected=rejected,
        excluded=excluded,
        reveal_head=read_bytes(row["reveal_head"]),
        receipt=read_bytes(row["receipt"]),
        result=read_result(row["result"]),
    )
