"""The device's store, with a power cut at every single step of every operation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.fragile_disk import FragileDisk, PowerCutError

from fleetfed.cloud_coordinator import zoo
from fleetfed.device.events import Answer, AnswerKind, Fate, HeldModel
from fleetfed.device.store import Store
from fleetfed.shared.errors import ConfigError, LocalProtocolError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.model.patch import make_patch
from fleetfed.shared.model.step import StepBound
from fleetfed.shared.model.table import read_weights, write_weights
from fleetfed.shared.wire import blobs
from fleetfed.shared.wire.blobs import Publishable
from fleetfed.shared.wire.messages import BlobRef, Manifest, PatchRef

publishable = functools.cache(blobs.publishable)
MODEL = zoo.load("digits", seed=1)
CARD = publishable(MODEL.card.encode())
DIMENSION = MODEL.card.parameters
LAYOUT = MODEL.card.layout


def answer(round_: int = 1, kind: AnswerKind = AnswerKind.UPDATE, **changes: Any) -> Answer:
    whole = {
        "round": round_,
        "plan": bytes([round_]) * 32,
        "kind": kind,
        "message_id": bytes([round_]) * 16,
        "head": bytes([round_, 1] * 16),
        "expires": 1000,
        "size": len(HEAD) + len(body(round_)),
    }
    return Answer(**{**whole, **changes})


HEAD = b"head" * 50


def body(round_: int) -> bytes:
    return bytes([round_]) * 5000


def residual(round_: int) -> np.ndarray:
    return np.full(DIMENSION, round_, dtype=np.float32)


def put(store: Store, round_: int) -> Answer:
    made = answer(round_)
    store.store_answer(made, HEAD, body(round_), residual=residual(round_), layout=LAYOUT)
    return made


def settle(store: Store, made: Answer, fate: Fate) -> None:
    store.settle(dataclasses.replace(made, fate=fate))


def fetched(store: Store, blob: Publishable) -> BlobRef:
    for index in range(len(blob.ref.parts) // 16):
        store.store_chunk(blob.ref, index * blob.ref.chunk, blob.chunk(index))
    return blob.ref


def manifest(version: int, file: bytes, *patches: PatchRef) -> Manifest:
    sha256 = hashlib.sha256(file).digest()
    return Manifest(
        version=version,
        parent=version - 1,
        name="digits",
        sha256=sha256,
        size=len(file),
        card=CARD.ref,
        full=publishable(file).ref,
        full_version=version,
        full_sha256=sha256,
        patches=patches,
    )


@functools.cache
def version_two() -> tuple[bytes, PatchRef, Publishable]:
    made = make_patch(MODEL.data, np.full(DIMENSION, 0.01), MODEL.card.table)
    blob = publishable(made.patch)
    reference = PatchRef(
        base_version=1,
        base_sha256=hashlib.sha256(MODEL.data).digest(),
        target_version=2,
        target_sha256=made.target_sha256,
        blob=blob.ref,
    )
    return made.file, reference, blob


def with_version_one(store: Store) -> HeldModel:
    store.install_card(fetched(store, CARD))
    fetched(store, publishable(MODEL.data))
    return store.install_full((), manifest(1, MODEL.data))


# --- Models -----------------------------------------------------------------------------------------------------------


def test_a_model_and_the_patch_to_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    file, reference, blob = version_two()
    fetched(store, blob)
    two = store.install_patches(one, (reference,), manifest(2, file, reference))
    assert store.model_path(two).read_bytes() == file
    assert store.model_path(one).read_bytes() == MODEL.data
    store.close()
    again = Store(tmp_path)
    assert again.facts().models == (two, one)
    assert again.facts().floor == 2
    assert again.card(two) == MODEL.card
    again.close()


def test_only_one_version_before_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    for version in (2, 3):
        file = MODEL.data[:-4] + version.to_bytes(4, "big")
        fetched(store, publishable(file))
        store.install_full((), manifest(version, file))
    assert not store.model_path(one).exists()
    assert len(list((tmp_path / "models").iterdir())) == 2
    store.close()


@pytest.mark.parametrize("how", ["missing", "other", "truncated"])
def test_a_file_that_is_not_the_manifests_changes_nothing(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    file = MODEL.data[:-1] + b"z"
    blob = publishable(file)
    fetched(store, blob)
    wanted = manifest(2, file)
    part = tmp_path / "parts" / blob.ref.digest.hex()
    if how == "missing":
        part.unlink()
    elif how == "truncated":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        wanted = dataclasses.replace(wanted, full_sha256=b"x" * 32)
    with pytest.raises(RemoteProtocolError) as caught:
        store.install_full((), wanted)
    assert caught.value.reason is RejectReason.BODY_MISMATCH
    assert store.facts().models == (one,)
    store.close()


def test_a_patch_of_another_model_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    other = zoo.load("digits", seed=2)
    made = make_patch(other.data, np.full(DIMENSION, 0.01), other.card.table)
    blob = publishable(made.patch)
    fetched(store, blob)
    reference = dataclasses.replace(version_two()[1], blob=blob.ref, target_sha256=made.target_sha256)
    with pytest.raises(RemoteProtocolError) as caught:
        store.install_patches(one, (reference,), manifest(2, made.file, reference))
    assert caught.value.reason is RejectReason.WRONG_MODEL
    assert store.facts().models == (one,)
    store.close()


def test_a_file_that_is_no_model_of_the_card_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.install_card(fetched(store, CARD))
    file = b"not a model" * 100
    fetched(store, publishable(file))
    with pytest.raises(RemoteProtocolError) as caught:
        store.install_full((), manifest(1, file))
    assert caught.value.reason is RejectReason.WRONG_MODEL
    store.close()


def test_an_absurd_card_is_refused(tmp_path: Path) -> None:
    slot = MODEL.card.tensors[0]
    absurd = dataclasses.replace(MODEL.card, tensors=(dataclasses.replace(slot, shape=(1 << 26, 64)),))
    store = Store(tmp_path)
    for raw in (absurd.encode(), b"\xff" * 100):
        with pytest.raises(RemoteProtocolError):
            store.install_card(fetched(store, publishable(raw)))
    assert store.facts().cards == frozenset()
    store.close()


def test_partial_downloads_are_found_again_and_bad_chunks_are_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    blob = publishable(np.random.default_rng(1).bytes(1000), chunk=100)
    for index in (0, 3, 5):
        store.store_chunk(blob.ref, index * 100, blob.chunk(index))
    store.store_chunk(blob.ref, 700, b"x" * 100)
    store.close()
    again = Store(tmp_path)
    assert again.find_parts(blob.ref) == (0, 3, 5)
    again.drop_parts((blob.ref.digest,))
    assert again.find_parts(blob.ref) == (0, 3, 5)
    again.drop_parts()
    assert again.find_parts(blob.ref) == ()
    again.close()


def test_a_damaged_model_is_forgotten_and_the_floor_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    store.raise_floor(9)
    store.close()
    path = store.model_path(one)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = Store(tmp_path)
    assert again.facts().models == ()
    assert again.facts().floor == 9
    again.close()


def step_of(file: bytes, base: int, by: float) -> tuple[bytes, PatchRef, Publishable]:
    """The next version, all of whose weights moved by so much."""
    made = make_patch(file, np.full(DIMENSION, by), MODEL.card.table, bits=8)
    blob = publishable(made.patch)
    reference = PatchRef(
        base_version=base,
        base_sha256=hashlib.sha256(file).digest(),
        target_version=base + 1,
        target_sha256=made.target_sha256,
        blob=blob.ref,
    )
    return made.file, reference, blob


def refuses_step(store: Store, install: Callable[[], HeldModel]) -> None:
    """A refusal that changes nothing on disk."""
    before = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()}
    with pytest.raises(RemoteProtocolError) as refused:
        install()
    assert refused.value.reason is RejectReason.LARGE_STEP
    assert {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()} == before


def test_a_version_planted_far_from_the_one_before(tmp_path: Path) -> None:
    """A stolen coordinator key publishes trap weights, as a patch and as a whole file."""
    store = Store(tmp_path)
    one = with_version_one(store)
    file, patch, blob = step_of(MODEL.data, 1, 0.5)
    fetched(store, blob)
    fetched(store, publishable(file))
    bound = StepBound(0.4)
    refuses_step(store, lambda: store.install_patches(one, (patch,), manifest(2, file, patch), bound))
    refuses_step(store, lambda: store.install_full((), manifest(2, file), bound))
    assert store.facts().models == (one,)
    # Within the bound, and where the owners vouch for the very file, it is taken.
    assert store.install_full((), manifest(2, file), StepBound(0.6)).version == 2
    store.close()


def test_trap_weights_that_the_owners_vouch_for_are_taken_and_the_next_step_is_bound_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    file, patch, blob = step_of(MODEL.data, 1, 0.5)
    after, second, second_blob = step_of(file, 2, 0.5)
    for each in (blob, second_blob):
        fetched(store, each)
    bound = StepBound(0.4, frozenset({hashlib.sha256(file).digest()}))
    refuses_step(store, lambda: store.install_patches(one, (patch, second), manifest(3, after, patch, second), bound))
    assert store.install_patches(one, (patch,), manifest(2, file, patch), bound).version == 2
    store.close()


def test_a_device_behind_is_bound_by_every_patch_or_by_the_way_as_a_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    two, first, first_blob = step_of(MODEL.data, 1, 0.5)
    three, second, second_blob = step_of(two, 2, -0.3)
    for each in (first_blob, second_blob, publishable(three)):
        fetched(store, each)
    bound = StepBound(0.4)
    # By the chain it sees which version went too far; of the whole file it can only say that three is near one.
    wanted = manifest(3, three, first, second)
    refuses_step(store, lambda: store.install_patches(one, (first, second), wanted, bound))
    assert store.install_full((), manifest(3, three), bound).version == 3
    store.close()


def test_a_coordinator_cannot_name_a_step_by_a_number_far_ahead(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with_version_one(store)
    far = bytearray(MODEL.data)
    write_weights(far, MODEL.card.table, read_weights(far, MODEL.card.table) + np.float32(100))
    fetched(store, publishable(bytes(far)))
    refuses_step(store, lambda: store.install_full((), manifest(2**50, bytes(far)), StepBound(0.3)))
    store.close()


def test_a_rollback_to_the_file_before_is_no_step(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_version_one(store)
    file, patch, blob = step_of(MODEL.data, 1, 0.5)
    fetched(store, blob)
    store.install_patches(one, (patch,), manifest(2, file, patch))
    again = store.install_patches(one, (), manifest(3, MODEL.data), StepBound(1e-6))
    assert (again.version, again.sha256) == (3, one.sha256)
    store.close()


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_byte_for_byte(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = put(store, 1)
    store.close()
    again = Store(tmp_path)
    assert again.facts().answer == made
    assert again.message(made) == HEAD + body(1)
    again.close()


def test_one_answer_per_plan_ever(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = put(store, 2)
    for round_ in (2, 1):
        with pytest.raises(LocalProtocolError):
            put(store, round_)
    settle(store, made, Fate.REFUSED)
    put(store, 3)
    store.close()
    again = Store(tmp_path)
    for round_ in (1, 2, 3):
        with pytest.raises(LocalProtocolError):
            put(again, round_)
    again.close()


def test_the_residual_of_the_newest_accepted_update_is_in_force(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def in_force() -> float | None:
        found = store.residual(LAYOUT)
        return None if found is None else float(found[0])

    assert in_force() is None
    one = put(store, 1)
    assert in_force() is None
    settle(store, one, Fate.ACCEPTED)
    assert in_force() == 1.0
    two = put(store, 2)
    settle(store, two, Fate.REFUSED)
    assert in_force() == 1.0
    three = put(store, 3)
    settle(store, three, Fate.ACCEPTED)
    assert in_force() == 3.0
    settle(store, three, Fate.VOID)
    assert in_force() == 1.0
    four = answer(4, AnswerKind.DECLINE)
    store.store_answer(four, HEAD, body(4))
    settle(store, four, Fate.ACCEPTED)
    assert in_force() == 1.0
    assert store.residual(b"x" * 32) is None
    store.close()


def test_old_answers_do_not_pile_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for round_ in range(1, 30):
        settle(store, put(store, round_), Fate.ACCEPTED if round_ % 2 else Fate.REFUSED)
    assert len(list((tmp_path / "answers").iterdir())) <= 3
    store.close()
    Store(tmp_path).close()


# --- Damage and neighbours --------------------------------------------------------------------------------------------


def test_a_second_process_is_turned_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="another process"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


@pytest.mark.parametrize("name", ["record", "answer"])
def test_damage_is_told_and_not_guessed_at(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    store.raise_floor(3)
    put(store, 1)
    store.close()
    path = tmp_path / "record" if name == "record" else next((tmp_path / "answers").glob("*.bin"))
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StorageError, match="damaged"):
        Store(tmp_path)
    raw[20] ^= 1
    path.write_bytes(raw)
    Store(tmp_path).close()


def test_a_damaged_residual_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    settle(store, put(store, 1), Fate.ACCEPTED)
    path = next((tmp_path / "answers").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    with pytest.raises(StorageError, match="residual"):
        store.residual(LAYOUT)
    store.close()


# --- Power cuts -------------------------------------------------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, Any]:
    """All that a restart would know."""
    store = Store(directory)
    facts = store.facts()
    found = store.residual(LAYOUT)
    seen = {
        "models": tuple((m.version, store.model_path(m).read_bytes()) for m in facts.models),
        "floor": facts.floor,
        "answer": facts.answer,
        "message": store.message(facts.answer) if facts.answer is not None else b"",
        "residual": None if found is None else float(found[0]),
        "revoked": store.revocations(),
    }
    for model in facts.models:
        assert store.card(model) == MODEL.card
    leftovers = list(directory.rglob("*.new"))
    store.close()
    assert leftovers == []
    return seen


def install_second(store: Store) -> None:
    file, reference, _ = version_two()
    store.install_patches(store.facts().models[0], (reference,), manifest(2, file, reference))


def answer_second(store: Store) -> None:
    put(store, 2)


def accept(store: Store) -> None:
    pending = store.facts().answer
    assert pending is not None
    settle(store, pending, Fate.ACCEPTED)


def prepare(directory: Path) -> None:
    store = Store(directory)
    with_version_one(store)
    fetched(store, version_two()[2])
    settle(store, put(store, 1), Fate.ACCEPTED)
    store.save_revocations(b"old list")
    store.close()


def prepare_pending(directory: Path) -> None:
    prepare(directory)
    store = Store(directory)
    put(store, 2)
    store.close()


OPERATIONS: dict[str, tuple[Callable[[Path], None], Callable[[Store], None]]] = {
    "raise floor": (prepare, lambda store: store.raise_floor(5)),
    "install": (prepare, install_second),
    "answer": (prepare, answer_second),
    "settle": (prepare_pending, accept),
    "revocations": (prepare, lambda store: store.save_revocations(b"new list")),
    "card": (prepare, lambda store: store.install_card(fetched(store, CARD)) and None),
}


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_at_every_step_leaves_before_or_after(tmp_path: Path, name: str, lossy: bool) -> None:
    """Whatever step power fails at, a restart sees all of the operation or none of it, and can do it again."""
    ready, operation = OPERATIONS[name]
    ready(tmp_path / "before")
    before = snapshot(tmp_path / "before")
    whole = FragileDisk(lossy=lossy)
    ready(tmp_path / "after")
    store = Store(tmp_path / "after", disk=whole)
    first = whole.steps
    operation(store)
    store.close()
    after = snapshot(tmp_path / "after")
    assert (before == after) is (name == "card")
    assert whole.steps > first
    reached = set()
    for cut in range(first, whole.steps):
        directory = tmp_path / str(cut)
        ready(directory)
        store = Store(directory, disk=FragileDisk(cut, lossy=lossy))
        with pytest.raises(PowerCutError):
            operation(store)
        store.close()
        seen = snapshot(directory)
        assert seen in (before, after), f"step {cut}"
        reached.add(seen == after)
        if seen == before:
            again = Store(directory)
            operation(again)
            again.close()
            assert snapshot(directory) == after
    assert reached == ({True} if before == after else {False, True})


def test_a_power_cut_while_tidying_at_the_start_changes_nothing(tmp_path: Path) -> None:
    def litter(directory: Path) -> None:
        prepare(directory)
        (directory / "record.new").write_bytes(b"torn")
        (directory / "models" / f"{'0' * 64}.tflite").write_bytes(b"torn")
        (directory / "answers" / "0001.new").write_bytes(b"torn")

    litter(tmp_path / "whole")
    disk = FragileDisk()
    Store(tmp_path / "whole", disk=disk).close()
    expected = snapshot(tmp_path / "whole")
    assert disk.steps >= 6
    for cut in range(disk.steps):
        directory = tmp_path / str(cut)
        litter(directory)
        with pytest.raises(PowerCutError):
            Store(directory, disk=FragileDisk(cut))
        assert snapshot(directory) == expected
