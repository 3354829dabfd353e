"""How the device's machine comes to its models, without I/O; its invariants are checked after every event."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fleetfed_testing.device_driver import (
    CARD,
    FILE,
    LARGEST,
    Driver,
    answer,
    hash_of,
    held,
    kinds,
    manifest,
    patch,
    patch_blob,
    plan,
    sha,
)

from fleetfed.device import events as e
from fleetfed.device.events import AnswerKind
from fleetfed.device.state import DeviceState, Facts
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.wire.blobs import Publishable
from fleetfed.shared.wire.messages import (
    DeclineReason,
)

# --- Models -----------------------------------------------------------------------------------------------------------


def fetch(driver: Driver, blob: Publishable, found: e.FindParts, *, have: tuple[int, ...] = ()) -> list[Any]:
    """Answer a `FindParts` and deliver every chunk that is subscribed to; what comes after the last one."""
    assert found == e.FindParts(blob.ref)
    out = driver(e.PartsFound(blob.ref.digest, have))
    rest: list[Any] = []
    while out:
        each = out.pop(0)
        match each:
            case e.SubscribeChunk(digest, index):
                out += driver(e.ChunkArrived(digest[:16], index, blob.chunk(index)))
            case e.StoreChunk() | e.UnsubscribeChunk():
                pass
            case _:
                rest.append(each)
    return rest


def test_the_first_model_is_the_card_and_the_full_file(new: Driver) -> None:
    new(e.Connected())
    wanted = manifest(1)
    floor, drop, find = new(e.ManifestArrived(wanted))
    assert floor == e.RaiseFloor(1)
    assert drop == e.DropParts((CARD.ref.digest, FILE.ref.digest))
    assert fetch(new, CARD, find) == [e.InstallCard(CARD.ref)]
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    assert fetch(new, FILE, find) == [e.InstallFull((), wanted)]
    assert new(e.ModelInstalled(held(1))) == [e.DropParts()]
    assert new(e.ManifestArrived(wanted)) == []


def test_a_plan_waits_for_its_model(new: Driver) -> None:
    new(e.Connected())
    assert new.plan() == []
    assert new.state is DeviceState.WAITING
    find = new(e.ManifestArrived(manifest(1)))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    fetch(new, FILE, find)
    assert kinds(new(e.ModelInstalled(held(1)))) == ["DropParts", "Train"]


def test_a_device_behind_takes_the_chain_of_patches(ready: Driver) -> None:
    wanted = manifest(3, patch(0, 1), patch(1, 2), patch(2, 3))
    find = ready(e.ManifestArrived(wanted))[-1]
    (find,) = fetch(ready, patch_blob(2), find)
    assert fetch(ready, patch_blob(3), find) == [e.InstallPatches(held(1), (patch(1, 2), patch(2, 3)), wanted)]
    ready(e.ModelInstalled(held(3)))
    assert ready.machine.sync.models == (held(3), held(1))


def test_a_chain_larger_than_the_file_is_not_taken(ready: Driver) -> None:
    big = dataclasses.replace(patch(1, 2), blob=dataclasses.replace(FILE.ref, digest=b"b" * 32))
    find = ready(e.ManifestArrived(manifest(2, big)))[-1]
    assert find.ref == FILE.ref


def test_a_full_file_of_an_earlier_version_is_patched(new: Driver) -> None:
    new(e.Connected())
    wanted = manifest(3, patch(1, 2), patch(2, 3), full_version=2)
    find = new(e.ManifestArrived(wanted))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    (find,) = fetch(new, FILE, find)
    assert fetch(new, patch_blob(3), find) == [e.InstallFull((patch(2, 3),), wanted)]


def test_a_rollback_to_the_file_before_needs_no_download(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(2, patch(1, 2))))
    ready(e.ModelInstalled(held(2)))
    wanted = manifest(3, sha256=sha(1), full_sha256=sha(1))
    assert ready(e.ManifestArrived(wanted))[-1] == e.InstallPatches(held(1), (), wanted)


def test_training_may_need_the_version_before(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(2, patch(1, 2))), e.ModelInstalled(held(2)))
    assert ready.plan(version=1) == [e.Train(plan(), hash_of(1), held(1))]


def test_a_manifest_that_goes_back_is_refused(ready: Driver) -> None:
    ready(e.ManifestArrived(manifest(5)))
    for version in (1, 4):
        (refusal,) = ready(e.ManifestArrived(manifest(version)))
        assert refusal.reason is RejectReason.REPLAYED
    assert ready.machine.sync.floor == 5


def test_the_floor_holds_over_a_restart() -> None:
    driver = Driver(Facts(models=(held(1),), floor=7))
    (refusal,) = driver(e.ManifestArrived(manifest(6)))
    assert refusal.reason is RejectReason.REPLAYED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 1, "sha256": b"x" * 32, "full_sha256": b"x" * 32}, RejectReason.CONFLICT),
        ({"size": LARGEST + 1, "full": dataclasses.replace(FILE.ref, raw_size=LARGEST + 1)}, RejectReason.TOO_LARGE),
        ({"size": 5}, RejectReason.MALFORMED),
        ({"full_sha256": b"x" * 32}, RejectReason.MALFORMED),
        ({"full": dataclasses.replace(FILE.ref, parts=bytes(16))}, RejectReason.MALFORMED),
        ({"card": dataclasses.replace(CARD.ref, raw_size=LARGEST + 1)}, RejectReason.TOO_LARGE),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    ready: Driver, changes: dict[str, Any], reason: RejectReason
) -> None:
    (refusal,) = ready(e.ManifestArrived(manifest(**{"version": 2, **changes})))
    assert refusal.reason is reason
    assert ready.machine.sync.floor == 1
    assert kinds(ready.plan()) == ["Train"]


def test_a_step_that_the_policy_forbids_is_tried_again_with_what_is_on_disk(ready: Driver) -> None:
    wanted = manifest(2, patch(1, 2))
    find = ready(e.ManifestArrived(wanted))[-1]
    install = fetch(ready, patch_blob(2), find)
    assert install == [e.InstallPatches(held(1), (patch(1, 2),), wanted)]
    (refusal,) = ready(e.InstallFailed(RejectReason.LARGE_STEP, "too far"))
    assert refusal == e.CountRejection(RejectReason.LARGE_STEP, "too far")
    assert ready.machine.sync.models == (held(1),)
    # It says so to whoever asks it to train that version, and trains the one that it has.
    (decline,) = ready.plan(version=2)
    assert (decline.reason, decline.detail) == (DeclineReason.NO_MODEL, "large_step: too far")
    ready(e.AnswerStored(answer(kind=AnswerKind.DECLINE, reason="no_model")))
    assert kinds(ready.plan(2, version=1, deadline=90_000)) == ["Train"]
    # The owners changed the policy meanwhile: nothing is fetched again.
    pause = ready.machine.next_deadline()
    assert pause is not None
    ready.now = pause
    assert ready(TimerFired()) == install
    ready(e.ModelInstalled(held(2)))
    assert ready.machine.sync.models == (held(2), held(1))


def test_a_bad_patch_is_followed_by_the_full_file(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2, patch(1, 2))))[-1]
    fetch(ready, patch_blob(2), find)
    refusal, _, find = ready(e.InstallFailed(RejectReason.BODY_MISMATCH, "hash"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert fetch(ready, FILE, find) == [e.InstallFull((), manifest(2, patch(1, 2)))]


def test_a_bad_full_file_is_tried_again_later_and_declined_meanwhile(new: Driver) -> None:
    new(e.Connected())
    new.plan()
    find = new(e.ManifestArrived(manifest(1)))[-1]
    fetch(new, CARD, find)
    (find,) = new(e.CardInstalled(CARD.ref.digest))
    fetch(new, FILE, find)
    refusal, _drop, decline = new(e.InstallFailed(RejectReason.BODY_MISMATCH, "hash"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert decline.reason is DeclineReason.NO_MODEL
    new(e.AnswerStored(answer(kind=AnswerKind.DECLINE)))
    deadline = new.machine.next_deadline()
    assert deadline is not None
    assert kinds(new(TimerFired(), now=deadline)) == ["FindParts"]


def test_a_corrupt_chunk_is_counted_and_stays_wanted(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    (refusal,) = ready(e.ChunkArrived(find.ref.digest[:16], 0, b"wrong"))
    assert refusal.reason is RejectReason.BODY_MISMATCH
    assert e.StoreChunk(find.ref, 0, FILE.chunk(0)) in ready(e.ChunkArrived(find.ref.digest[:16], 0, FILE.chunk(0)))


def test_a_download_goes_on_where_it_was(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    out = ready(e.PartsFound(find.ref.digest, (0, 1)))
    assert [each.index for each in out] == list(range(2, len(FILE.ref.parts) // 16))


@pytest.mark.parametrize("data", [b"chunk", b""])
def test_a_subscription_of_a_process_before_us_is_ended(ready: Driver, data: bytes) -> None:
    assert ready(e.ChunkArrived(b"\x77" * 16, 3, data)) == [e.UnsubscribeChunk(b"\x77" * 16, 3)]


def test_chunks_are_subscribed_once_after_a_reconnect(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    first = ready(e.PartsFound(find.ref.digest, ()))
    gone = ready(e.Disconnected())
    assert [each.index for each in gone] == [each.index for each in first]
    assert kinds(gone) == ["UnsubscribeChunk"] * len(first)
    assert ready(e.Connected())[1:] == first


def test_a_silent_broker_is_asked_again_then_the_gateway(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    assert "SubscribeChunk" in kinds(ready(TimerFired(), now=ready.machine.next_deadline()))
    assert "AskChunks" in kinds(ready(TimerFired(), now=ready.machine.next_deadline()))


def test_a_newer_manifest_takes_over(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2)))[-1]
    ready(e.PartsFound(find.ref.digest, ()))
    out = ready(e.ManifestArrived(manifest(3, patch(1, 2), patch(2, 3))))
    assert "UnsubscribeChunk" in kinds(out)
    assert out[-1] == e.FindParts(patch_blob(2).ref)


def test_an_installation_that_a_newer_manifest_overtook(ready: Driver) -> None:
    find = ready(e.ManifestArrived(manifest(2, patch(1, 2))))[-1]
    fetch(ready, patch_blob(2), find)
    assert ready(e.ManifestArrived(manifest(3, patch(1, 2), patch(2, 3))))[-1] == e.DropParts(
        (patch_blob(2).ref.digest, patch_blob(3).ref.digest)
    )
    assert ready(e.ModelInstalled(held(2))) == [e.FindParts(patch_blob(3).ref)]
