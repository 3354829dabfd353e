"""Makes versions of the model: from a file, from an older version, from a round's step; and the manifest of the newest.

Everything here is called in a worker thread or is quick; objects are in the blob store before a record names them.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fleetfed.cloud_coordinator.control.report import meta_metrics
from fleetfed.cloud_coordinator.privacy.noising import Noise
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.records import Origin, VersionRecord
from fleetfed.cloud_coordinator.training.clips import ClipConfig, first_clips
from fleetfed.cloud_coordinator.training.evaluate import Evaluator
from fleetfed.cloud_coordinator.training.robust import RobustRule
from fleetfed.cloud_coordinator.training.step import ServerState, Step, StepConfig, StepError, take_step
from fleetfed.shared.aggregate.accumulator import Partial
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.errors import ConfigError, LocalProtocolError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.step import bound_of, step_rms
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.messages import Manifest, PatchRef, Plan

_log = logging.getLogger(__name__)

_FILE_LEVEL: Final = 3
"""Weights hardly compress; a higher level only costs time."""
_NO_FLOOR: Final = Policy()
_PATCH_LEVEL: Final = 1
"""A patch is compressed already."""


class Cards:
    """The model cards of versions, read once as long as the architecture stays."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._last: tuple[bytes, ModelCard] | None = None

    def of(self, version: VersionRecord) -> ModelCard:
        """A version's model card.

        Raises:
            StorageError: it is damaged.
        """
        if self._last is None or self._last[0] != version.card:
            try:
                self._last = (version.card, ModelCard.decode(self._blobs.get(version.card)))
            except RemoteProtocolError as error:
                raise StorageError(f"the stored model card is damaged: {error}") from error
        return self._last[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A model file with its card, as read and checked."""

    file: bytes
    card: ModelCard
    encoded_card: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SinceFull:
    """What lies between the last whole file on the broker and the newest version.

    Attributes:
        patches: how many.
        bytes: of them, as published.
        full: bytes of the whole file, as published.
    """

    patches: int
    bytes: int
    full: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a round came to.

    Attributes:
        record: of the version, less what the round has to say.
        meta: what the devices reported.
        noise: the object that holds what the next round's noise is correlated with; None where it is not.
    """

    record: VersionRecord
    meta: MetaSum
    noise: bytes | None = None


def read_model(file: Path, card: Path) -> SourceModel:
    """Read a model file and its card.

    Raises:
        ConfigError: one is missing, too large, or does not fit the other.
    """
    content = _read(file, limits.MAX_BLOB, "the .tflite that `fleetfed model build` made")
    encoded = _read(card, limits.MAX_MANIFEST, "the card that `fleetfed model build` made")
    try:
        parsed = ModelCard.decode(encoded)
        parsed.check_file(content, len(content))
        read_weights(content, parsed.table)
    except RemoteProtocolError as error:
        raise ConfigError(f"{card}: {error}; build the model again") from error
    return SourceModel(file=content, card=parsed, encoded_card=encoded)


def _read(path: Path, limit: int, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give {what}") from error
    if not 0 < len(data) <= limit:
        raise ConfigError(f"{path}: 1 to {limit} bytes are allowed; give {what}")
    return data


def from_file(
    source: SourceModel,
    *,
    blobs: BlobStore,
    version: int,
    parent: int,
    clips: ClipConfig,
    metrics: dict[str, float],
    now: int,
) -> VersionRecord:
    """Store a model's objects; return the record of the version that it becomes.

    Raises:
        ConfigError: the weights are not finite, or the file is too large to publish.
    """
    sizes = [slot.size for slot in source.card.tensors]
    try:
        state = first_clips(read_weights(source.file, source.card.table), sizes, clips)
        full = publishable(source.file, level=_FILE_LEVEL)
        card = publishable(source.encoded_card)
    except (ValueError, LocalProtocolError) as error:
        raise ConfigError(f"model {source.card.name}: {error}") from error
    file, card_name, *_ = blobs.put(source.file, source.encoded_card, full.data, card.data)
    return VersionRecord(
        version=version,
        parent=parent,
        origin=Origin.PUBLISHED,
        name=source.card.name,
        sha256=hashlib.sha256(source.file).digest(),
        size=len(source.file),
        file=file,
        card=card_name,
        card_ref=card.ref,
        full_ref=full.ref,
        metrics=metrics,
        created=now,
        clips=state,
    )


def from_version(source: VersionRecord, *, blobs: BlobStore, version: int, parent: int, now: int) -> VersionRecord:
    """Return the record of a rollback: the old file, and the server's state of that time, as a new version.

    Raises:
        ConfigError: the old file is no longer kept.
    """
    if source.file is None:
        raise ConfigError(f"the file of version {source.version} is no longer kept; see storage.keep_versions")
    full = publishable(blobs.get(source.file), level=_FILE_LEVEL)
    # The card as it was published is gone if another architecture came in between.
    card = publishable(blobs.get(source.card))
    blobs.put(full.data, card.data)
    return replace(
        source,
        version=version,
        parent=parent,
        origin=Origin.ROLLBACK,
        source=source.version,
        card_ref=card.ref,
        full_ref=full.ref,
        patch_ref=None,
        round=0,
        plan_hash=None,
        contributors=0,
        weight=0,
        created=now,
    )


def from_step(
    step: Step, *, base: VersionRecord, blobs: BlobStore, since: SinceFull, full_every: int, metrics: dict[str, float]
) -> VersionRecord:
    """Store a step's objects; return the record, less what the round has to say.

    Args:
        step: as computed.
        base: the version that it started from.
        blobs: where objects go.
        since: of ``base``.
        full_every: patches after which a version is published whole.
        metrics: what evaluations said.
    """
    patch = publishable(step.patched.patch, level=_PATCH_LEVEL)
    objects: list[bytes] = [step.patched.file, step.state.encode(), patch.data]
    full: Publishable | None = None
    if since.patches + 1 > full_every or since.bytes + patch.ref.size > since.full:
        full = publishable(step.patched.file, level=_FILE_LEVEL)
        objects.append(full.data)
    file, state, *_ = blobs.put(*objects)
    return VersionRecord(
        version=base.version + 1,
        parent=base.version,
        origin=Origin.ROUND,
        name=base.name,
        sha256=step.patched.target_sha256,
        size=base.size,
        file=file,
        card=base.card,
        card_ref=base.card_ref,
        full_ref=None if full is None else full.ref,
        patch_ref=patch.ref,
        contributors=step.meta.count,
        weight=step.meta.weight,
        metrics=metrics,
        created=0,
        state=state,
        clips=step.clips,
    )


def version_of_round(
    total: Partial,
    *,
    plan: Plan,
    base: VersionRecord,
    card: ModelCard,
    since: SinceFull,
    config: StepConfig,
    full_every: int,
    blobs: BlobStore,
    evaluator: Evaluator | None,
    robust: RobustRule,
    noise: Noise | None = None,
    policy: Policy = _NO_FLOOR,
) -> Made:
    """Step, evaluate, store the objects: all of a round's computation, in whatever thread.

    Raises:
        StepError: no version can be made of the sum, or devices would refuse it for the policy's ``largest_step``.
        StorageError: an object is missing or damaged, or cannot be written.
    """
    assert base.file is not None
    file = blobs.get(base.file)
    step = take_step(
        total,
        plan=plan,
        base=file,
        card=card,
        state=ServerState() if base.state is None else ServerState.decode(blobs.get(base.state)),
        clips=base.clips,
        config=config,
        robust=robust,
        noise=noise,
    )
    moved = step_rms(file, step.patched.file, card.table)
    try:
        bound_of(policy).check(moved, versions=1, what=f"version {base.version + 1}")
    except RemoteProtocolError as error:
        raise StepError(
            f"{error}: no device would take it. Lower the learning rate, or have the policy's owners raise largest_step"
        ) from error
    metrics: dict[str, float] = {}
    if evaluator is not None:
        try:
            metrics = evaluator.evaluate(step.patched.file, card)
        except ConfigError as error:
            # The fleet's work is not to be lost because of the validation set.
            _log.error("this version was not evaluated: %s", error)
    metrics |= meta_metrics(step.meta)
    if math.isfinite(moved):
        metrics["step"] = moved
    record = from_step(step, base=base, blobs=blobs, since=since, full_every=full_every, metrics=metrics)
    kept = None if step.noise is None else blobs.put(step.noise.encode())[0]
    return Made(record=record, meta=step.meta, noise=kept)


def check_reach(record: VersionRecord, *, newest: VersionRecord | None, blobs: BlobStore, policy: Policy) -> None:
    """Refuse a version that no round made, where devices would refuse it for the policy's ``largest_step``.

    Args:
        record: the version to be.
        newest: the one before it; None for the first, which nothing binds.
        blobs: with the files of both.
        policy: in force.

    Raises:
        RemoteProtocolError: `LARGE_STEP`.
        StorageError: a file or card is missing or damaged.
    """
    bound = bound_of(policy)
    if not bound.largest or newest is None or newest.file is None or record.file is None:
        return
    if record.sha256 == newest.sha256 or record.sha256 in bound.models:
        return
    what = f"version {record.version}"
    old, new = Cards(blobs).of(newest), Cards(blobs).of(record)
    if old.layout != new.layout:
        raise RemoteProtocolError(RejectReason.LARGE_STEP, f"{what}: its tensors are not those of the model before")
    moved = step_rms(blobs.get(newest.file), blobs.get(record.file), new.table)
    bound.check(moved, versions=record.version - newest.version, what=what)


def since_full(newest_first: Sequence[VersionRecord]) -> SinceFull:
    """What lies between the last whole file and the newest version.

    Args:
        newest_first: the newest versions, at least as far as the last whole one.
    """
    size = 0
    for patches, record in enumerate(newest_first):
        if record.full_ref is not None:
            return SinceFull(patches=patches, bytes=size, full=record.full_ref.size)
        assert record.patch_ref is not None
        size += record.patch_ref.size
    raise AssertionError("no version was ever published whole")


def manifest_of(newest_first: Sequence[VersionRecord], *, available: Callable[[bytes], bool]) -> Manifest:
    """The manifest of the newest version.

    Its patches reach back to the last whole file, and further while they cost less than that file: so a device that
    missed a few rounds need not fetch all of it.

    Args:
        newest_first: the newest versions, at least as far as the last whole one.
        available: whether an object, by its digest, is still kept.
    """
    newest = newest_first[0]
    full: VersionRecord | None = None
    patches: list[PatchRef] = []
    size = 0
    for record, base in zip(newest_first, [*newest_first[1:], None], strict=True):
        if full is None and record.full_ref is not None:
            full = record
        if record.patch_ref is None or base is None or len(patches) >= limits.MAX_PATCH_CHAIN:
            break
        size += record.patch_ref.size
        enough = full is not None and full.full_ref is not None and size >= full.full_ref.size
        if enough or not available(record.patch_ref.digest):
            break
        patches.append(
            PatchRef(
                base_version=base.version,
                base_sha256=base.sha256,
                target_version=record.version,
                target_sha256=record.sha256,
                blob=record.patch_ref,
            )
        )
    assert full is not None
    assert full.full_ref is not None
    return Manifest(
        version=newest.version,
        parent=newest.parent,
        name=newest.name,
        sha256=newest.sha256,
        size=newest.size,
        card=newest.card_ref,
        full=full.full_ref,
        full_version=full.version,
        full_sha256=full.sha256,
        patches=tuple(reversed(patches)),
        created=newest.created,
        metrics=newest.metrics,
    )
