"""Everything of a device that must outlive its process, each step whole or not done.

::

    state/
      lock           held by the running process
      record         floors, models held, fates of the newest answers; replaced whole, with a digest
      ledger         see `fleetfed.device.ledger`; the record knows how much it must hold at least
      hedge          32 random bytes that go into every mask's seed; made once
      sequence       see `fleetfed.shared.trust.sequence`
      revoked        the authority's newest revocation list, as signed
      models/HASH.tflite      cards/DIGEST.card      parts/DIGEST
      answers/ROUND-PLAN.bin  one signed answer, with the error feedback that it leaves behind
      status.json    for people and programs; not relied upon

Two things are commits: the record's rename makes a model current, and an answer file's rename makes an answer. Whatever
neither names is left over from a crash and is removed at the next start. Partial downloads need no commit: their
chunks are checked against the manifest's hashes again whenever they are taken up.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.device.disk import Disk
from fleetfed.device.events import Answer, AnswerKind, Fate, HeldModel
from fleetfed.device.ledger import Account, Ledger
from fleetfed.device.state import Facts
from fleetfed.shared.errors import (
    ConfigError,
    LocalProtocolError,
    RejectReason,
    RemoteProtocolError,
    StorageError,
)
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.patch import apply_patch
from fleetfed.shared.model.step import StepBound, Walk
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.blobs import part_count, part_size, unwrap
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.envelope import KeyId, digest
from fleetfed.shared.wire.fields import Bytes32, Count
from fleetfed.shared.wire.messages import BlobRef, Manifest, PatchRef

_log = logging.getLogger(__name__)

_DIGEST: Final = 32
_HEDGE: Final = 32
_PART_DIGEST: Final = 16
_ANSWER: Final = struct.Struct("<4sI")
_MAGIC: Final = b"FFDA"
_MAX_HEADER: Final = 4096
_KEPT_FATES: Final = 8
_KEPT_RESIDUALS: Final = 2
_MOST_FLOORS: Final = 16
"""Coordinators' keys of which the device remembers how far they pushed the floor."""
_FORMAT: Final = 1
_NO_BOUND: Final = StepBound()

Residual = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    format: Annotated[int, Range(_FORMAT, _FORMAT)] = _FORMAT
    floor: Count = 0
    models: Annotated[tuple[HeldModel, ...], Length(0, 2)] = ()
    fates: Annotated[tuple[Answer, ...], Length(0, _KEPT_FATES)] = ()
    spent: Count = 0
    floors: Annotated[dict[str, Count], Length(0, _MOST_FLOORS)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AnswerHeader:
    answer: Answer
    layout: Annotated[bytes, Length(0, _DIGEST)] = b""
    residual_values: Annotated[int, Range(0, limits.MAX_PARAMETERS)] = 0
    residual_digest: Bytes32 = field(default=bytes(_DIGEST))


class Store:
    """The open state folder of one device; one process at a time.

    Args:
        directory: made where it is missing.
        disk: how to write; tests put one here that fails.

    Raises:
        ConfigError: another process uses the folder.
        StorageError: the record, the ledger or an answer is damaged.
    """

    def __init__(self, directory: Path, *, disk: Disk | None = None) -> None:
        self.directory = directory
        self._disk = disk or Disk()
        # The training thread reads the residual while the main thread may tidy.
        self._guard = threading.RLock()
        self._models, self._cards = directory / "models", directory / "cards"
        self._parts, self._answers = directory / "parts", directory / "answers"
        for folder in (self._models, self._cards, self._parts, self._answers):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"{directory}: another process uses this state folder") from error
            self._record = self._read_record()
            self._ledger = Ledger(directory / "ledger", disk=self._disk, spent=self._record.spent)
            self._files = self._read_answers()
            self._check_models()
            self._tidy()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def facts(self) -> Facts:
        """What the device's machine starts from."""
        return Facts(
            models=self._record.models,
            cards=frozenset(bytes.fromhex(path.stem) for path in self._cards.glob("*.card")),
            floor=self._record.floor,
            answer=max(self._all_answers(), key=lambda a: a.round, default=None),
        )

    # --- Models -------------------------------------------------------------------------------------------------------

    def raise_floor(self, version: int, signer: bytes = b"") -> None:
        """Make durable that nothing below ``version`` is taken any more.

        Args:
            version: of a manifest.
            signer: key of the coordinator that signed it; what it says counts only as long as `forget` believes it.
        """
        if version > self._record.floor:
            kept = sorted(self._record.floors.items(), key=lambda each: each[1])[1 - _MOST_FLOORS :]
            floors = {**dict(kept), signer.hex(): version} if signer else dict(kept)
            self._write_record(replace(self._record, floor=version, floors=floors))

    def forget(self, believed: Callable[[KeyId], bool]) -> bool:
        """Make void what coordinators said that are believed no more; return whether anything was.

        Whoever stole a coordinator's key may have pushed versions and rounds as far as numbers go.
        """
        rounds = self._ledger.forget(believed)
        record = self._record
        floors = {key: version for key, version in record.floors.items() if believed(KeyId(bytes.fromhex(key)))}
        void = [each for each in self._all_answers() if each.signer and not believed(KeyId(each.signer))]
        if len(floors) == len(record.floors) and not void:
            return rounds
        highest = max(record.floors.values(), default=0)
        # What is above all that is remembered was raised before keys were remembered, and stays.
        floor = record.floor if record.floor > highest else max(floors.values(), default=0)
        plans = {each.plan for each in void}
        fates = tuple(each for each in record.fates if each.plan not in plans)
        # Fates first: an answer's file that is left after a crash is void again at the next start.
        self._write_record(replace(record, floor=floor, floors=floors, fates=fates))
        with self._guard:
            for plan in plans & self._files.keys():
                _, path = self._files.pop(plan)
                self._disk.remove(path)
        return True

    def find_parts(self, ref: BlobRef) -> tuple[int, ...]:
        """Chunks of the object that are on disk, whole and right."""
        try:
            with self._part_path(ref).open("rb") as file:
                return tuple(i for i in range(part_count(ref)) if _part_is_good(ref, i, file.read(part_size(ref, i))))
        except FileNotFoundError:
            return ()

    def store_chunk(self, ref: BlobRef, offset: int, data: bytes) -> None:
        """Write one checked chunk."""
        self._disk.write_at(self._part_path(ref), offset, data)

    def drop_parts(self, keep: tuple[bytes, ...] = ()) -> None:
        """Delete partial files."""
        names = {each.hex() for each in keep}
        for path in self._parts.iterdir():
            if path.name not in names:
                self._disk.remove(path)

    def install_card(self, ref: BlobRef) -> ModelCard:
        """Check and keep a card that was fetched.

        Raises:
            RemoteProtocolError: it is not what was named, or no valid card.
        """
        raw = self._object(ref)
        card = ModelCard.decode(raw)
        path = self._card_path(ref.digest)
        temporary = path.with_suffix(".new")
        self._disk.write(temporary, raw)
        self._disk.replace(temporary, path)
        self._disk.sync(self._cards)
        return card

    def card(self, model: HeldModel) -> ModelCard:
        """The card of a model held.

        Raises:
            StorageError: it is missing or damaged.
        """
        return self._card(model.card)

    def _card(self, card: bytes) -> ModelCard:
        path = self._card_path(card)
        try:
            return ModelCard.decode(path.read_bytes())
        except (OSError, RemoteProtocolError) as error:
            raise StorageError(f"{path}: {error}; delete {self._models} to fetch it again") from error

    def model_path(self, model: HeldModel) -> Path:
        """The file of a model held; never changed in place."""
        return self._models / f"{model.sha256.hex()}.tflite"

    def install_full(
        self, patches: tuple[PatchRef, ...], manifest: Manifest, bound: StepBound = _NO_BOUND
    ) -> HeldModel:
        """Make what the patches turn the fetched full file into the current model.

        Raises:
            RemoteProtocolError: as `install_patches`; or the full file is not what the manifest names.
        """
        data = self._object(manifest.full)
        if hashlib.sha256(data).digest() != manifest.full_sha256:
            raise RemoteProtocolError(RejectReason.BODY_MISMATCH, f"full file {manifest.full_version}: another SHA-256")
        walk = self._walk(bound, manifest.full_sha256)
        return self._install(self._patched(data, manifest.card.digest, patches, walk), manifest, walk)

    def install_patches(
        self, base: HeldModel, patches: tuple[PatchRef, ...], manifest: Manifest, bound: StepBound = _NO_BOUND
    ) -> HeldModel:
        """Make what the patches turn ``base`` into the current model; without patches, ``base`` itself.

        Raises:
            RemoteProtocolError: as `shared.model.patch.apply_patch`; `LARGE_STEP` where ``bound`` is exceeded; or the
                result is not the manifest's file.
        """
        if not patches:
            return self._commit_model(manifest)
        walk = self._walk(bound, base.sha256)
        data = self._patched(self.model_path(base).read_bytes(), base.card, patches, walk)
        return self._install(data, manifest, walk)

    def _walk(self, bound: StepBound, start: bytes) -> Walk:
        models = self._record.models
        held = models[0].version if models else None
        return Walk(bound, held=held, files=frozenset(model.sha256 for model in models), start=start)

    def _patched(
        self, data: bytes | bytearray, card: bytes, patches: tuple[PatchRef, ...], walk: Walk
    ) -> bytes | bytearray:
        for patch in patches:
            table = self._card(card).table
            after = apply_patch(data, table, self._object(patch.blob))
            base, target = patch.base_version, patch.target_version
            walk.step(data, after, table, base=base, target=target, sha256=patch.target_sha256)
            data = after
        return data

    def _install(self, data: bytes | bytearray, manifest: Manifest, walk: Walk) -> HeldModel:
        if hashlib.sha256(data).digest() != manifest.sha256:
            raise RemoteProtocolError(RejectReason.BODY_MISMATCH, f"version {manifest.version}: another SHA-256")
        model = HeldModel(version=manifest.version, sha256=manifest.sha256, card=manifest.card.digest)
        try:
            self.card(model).check_file(bytes(data[:8]), len(data))
        except ConfigError as error:
            raise RemoteProtocolError(RejectReason.WRONG_MODEL, str(error)) from error
        if walk.needs_whole(manifest.version, manifest.sha256):
            held = self._record.models[0]
            # Mapped, since the new file and the whole that it was made from are in memory already.
            before = np.memmap(self.model_path(held), dtype=np.uint8, mode="r").data
            layout = self.card(held).table.layout_hash()
            walk.whole(before, layout, data, self.card(model).table, version=manifest.version)
        # Nothing refers to this name before the record does, so it needs no rename.
        self._disk.write(self.model_path(model), data)
        self._disk.sync(self._models)
        return self._commit_model(manifest)

    def _commit_model(self, manifest: Manifest) -> HeldModel:
        model = HeldModel(version=manifest.version, sha256=manifest.sha256, card=manifest.card.digest)
        floor = max(self._record.floor, model.version)
        self._write_record(replace(self._record, floor=floor, models=(model, *self._record.models)[:2]))
        self._tidy_models()
        return model

    # --- Answers ------------------------------------------------------------------------------------------------------

    def store_answer(
        self, answer: Answer, head: bytes, body: bytes, *, residual: Residual | None = None, layout: bytes = b""
    ) -> None:
        """Make the one answer to a plan durable, together with the error feedback that it leaves.

        Args:
            answer: what is stored; pending.
            head, body: the signed message.
            residual: float32, shape (parameters,); None for a decline or without error feedback.
            layout: the layout hash of the card that the residual belongs to.

        Raises:
            LocalProtocolError: this plan, or a later round, was answered already.
        """
        assert answer.fate is Fate.PENDING
        assert answer.size == len(head) + len(body)
        newest = max((a.round for a in self._all_answers()), default=0)
        if answer.round <= newest:
            raise LocalProtocolError(f"round {answer.round} after an answer to round {newest}")
        raw = b"" if residual is None else residual.data.cast("B")
        header = codec.encode(
            _AnswerHeader(
                answer=answer,
                layout=layout if residual is not None else b"",
                residual_values=0 if residual is None else residual.size,
                residual_digest=digest(raw),
            )
        )
        prefix = _ANSWER.pack(_MAGIC, len(header)) + header
        path = self._answers / f"{answer.round:016d}-{answer.plan[:8].hex()}.bin"
        temporary = path.with_suffix(".new")
        self._disk.write(temporary, prefix, digest(prefix), head, body, raw)
        self._disk.replace(temporary, path)
        self._disk.sync(self._answers)
        self._files[answer.plan] = (answer, path)
        self._tidy_answers()

    def message(self, answer: Answer) -> bytes:
        """The signed message, as it was stored.

        Raises:
            StorageError: it is gone or damaged.
        """
        _, path = self._files[answer.plan]
        with path.open("rb") as file:
            _, _, start = _read_header(file.read(_ANSWER.size + _MAX_HEADER + _DIGEST), path)
            file.seek(start)
            message = file.read(answer.size)
        if len(message) != answer.size:
            raise StorageError(f"{path}: {len(message)} of {answer.size} bytes")
        return message

    def settle(self, answer: Answer) -> None:
        """Make durable what became of an answer."""
        others = tuple(a for a in self._record.fates if a.plan != answer.plan)
        fates = tuple(sorted((*others, answer), key=lambda a: a.round))[-_KEPT_FATES:]
        self._write_record(replace(self._record, fates=fates))
        self._tidy_answers()

    def residual(self, layout: bytes) -> Residual | None:
        """The error feedback in force: what the newest accepted update left, if it is of this layout.

        Raises:
            StorageError: it is damaged.
        """
        with self._guard:
            accepted = self._accepted()
            if not accepted:
                return None
            path = accepted[0][1]
            with path.open("rb") as file:
                header, answer, start = _read_header(file.read(_ANSWER.size + _MAX_HEADER + _DIGEST), path)
                if header.layout != layout or not header.residual_values:
                    return None
                file.seek(start + answer.size)
                residual = np.fromfile(file, dtype="<f4", count=header.residual_values)
            if digest(residual.data.cast("B")) != header.residual_digest:
                raise StorageError(f"{path}: the residual is damaged; delete this file")
            return residual

    # --- Privacy ------------------------------------------------------------------------------------------------------

    def account(self, fleet: str) -> Account:
        """What is spent of the device's privacy in a fleet."""
        return self._ledger.account(fleet)

    def debit(self, fleet: str, account: Account) -> None:
        """Make durable what is spent: first in the ledger, then that the ledger holds it."""
        self._ledger.keep(fleet, account)
        if self._ledger.spent != self._record.spent:
            self._write_record(replace(self._record, spent=self._ledger.spent))

    def hedge(self) -> bytes:
        """The device's own secret of 32 bytes; made when it is first asked for.

        Raises:
            StorageError: it is damaged.
        """
        path = self.directory / "hedge"
        try:
            secret = path.read_bytes()
        except FileNotFoundError:
            secret = os.urandom(_HEDGE)
            self._replace(path, secret)
        if len(secret) != _HEDGE:
            raise StorageError(f"{path}: damaged; delete it, and a new one is made")
        return secret

    # --- Revocations --------------------------------------------------------------------------------------------------

    def save_revocations(self, message: bytes) -> None:
        """Keep a verified revocation list, as signed."""
        self._replace(self.directory / "revoked", message)

    def revocations(self) -> bytes | None:
        """The list that was kept last."""
        try:
            return (self.directory / "revoked").read_bytes()
        except FileNotFoundError:
            return None

    # --- Inside -------------------------------------------------------------------------------------------------------

    def _object(self, ref: BlobRef) -> bytes:
        try:
            data = self._part_path(ref).read_bytes()
        except FileNotFoundError:
            data = b""
        return unwrap(ref, data)

    def _part_path(self, ref: BlobRef) -> Path:
        return self._parts / ref.digest.hex()

    def _card_path(self, card: bytes) -> Path:
        return self._cards / f"{card.hex()}.card"

    def _all_answers(self) -> list[Answer]:
        files = [answer for answer, _ in self._files.values()]
        fates = {a.plan: a for a in self._record.fates}
        return [*fates.values(), *(a for a in files if a.plan not in fates)]

    def _accepted(self) -> list[tuple[Answer, Path]]:
        """Files of accepted updates, newest first."""
        accepted = {a.plan for a in self._record.fates if a.fate is Fate.ACCEPTED and a.kind is AnswerKind.UPDATE}
        files = [(answer, path) for plan, (answer, path) in self._files.items() if plan in accepted]
        return sorted(files, key=lambda each: each[0].round, reverse=True)

    def _read_record(self) -> _Record:
        path = self.directory / "record"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return _Record()
        try:
            if digest(raw[:-_DIGEST]) != raw[-_DIGEST:]:
                raise StorageError(f"{path}: damaged; restore it, or enrol the device anew in an empty folder")
            return codec.decode(_Record, raw[:-_DIGEST], limit=limits.MAX_SMALL_MESSAGE)
        except RemoteProtocolError as error:
            raise StorageError(f"{path}: {error}; a newer program may have written it") from error

    def _write_record(self, record: _Record) -> None:
        raw = codec.encode(record)
        self._replace(self.directory / "record", raw + digest(raw))
        self._record = record

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.new")
        self._disk.write(temporary, data)
        self._disk.replace(temporary, path)
        self._disk.sync(path.parent)

    def _read_answers(self) -> dict[bytes, tuple[Answer, Path]]:
        files: dict[bytes, tuple[Answer, Path]] = {}
        for path in sorted(self._answers.glob("*.bin")):
            with path.open("rb") as file:
                _, answer, _ = _read_header(file.read(_ANSWER.size + _MAX_HEADER + _DIGEST), path)
            files[answer.plan] = (answer, path)
        return files

    def _check_models(self) -> None:
        """Forget models whose files are damaged: they can be fetched again, the floor stays."""
        good = []
        for model in self._record.models:
            try:
                intact = hashlib.sha256(self.model_path(model).read_bytes()).digest() == model.sha256
            except FileNotFoundError:
                intact = False
            if intact and self._card_path(model.card).exists():
                good.append(model)
            else:
                _log.warning("model version %d is damaged or incomplete; it will be fetched again", model.version)
        self._record = replace(self._record, models=tuple(good))

    def _tidy(self) -> None:
        for folder in (self.directory, self._models, self._cards, self._answers):
            for path in folder.glob("*.new"):
                self._disk.remove(path)
        self._tidy_models()
        self._tidy_answers()

    def _tidy_models(self) -> None:
        files = {self.model_path(model) for model in self._record.models}
        for path in self._models.glob("*.tflite"):
            if path not in files:
                self._disk.remove(path)
        if self._record.models:
            cards = {self._card_path(model.card) for model in self._record.models}
            for path in self._cards.glob("*.card"):
                if path not in cards:
                    self._disk.remove(path)

    def _tidy_answers(self) -> None:
        keep = {plan for plan, _ in sorted(self._files.items(), key=lambda item: item[1][0].round)[-1:]}
        keep |= {answer.plan for answer, _ in self._accepted()[:_KEPT_RESIDUALS]}
        with self._guard:
            for plan in [plan for plan in self._files if plan not in keep]:
                _, path = self._files.pop(plan)
                self._disk.remove(path)


def _read_header(raw: bytes, path: Path) -> tuple[_AnswerHeader, Answer, int]:
    """The header at the start of an answer file, and where its message begins."""
    damaged = StorageError(f"{path}: damaged; delete it only when its round is over")
    if len(raw) < _ANSWER.size:
        raise damaged
    magic, size = _ANSWER.unpack_from(raw)
    end = _ANSWER.size + size
    if magic != _MAGIC or size > _MAX_HEADER or digest(raw[:end]) != raw[end : end + _DIGEST]:
        raise damaged
    try:
        header = codec.decode(_AnswerHeader, raw[_ANSWER.size : end], limit=_MAX_HEADER)
    except RemoteProtocolError as error:
        raise StorageError(f"{path}: {error}; a newer program may have written it") from error
    return header, header.answer, end + _DIGEST


def _part_is_good(ref: BlobRef, index: int, data: bytes) -> bool:
    expected = ref.parts[index * _PART_DIGEST : (index + 1) * _PART_DIGEST]
    return digest(data).startswith(expected)
