"""Whatever a member sends against the rules is refused with its own reason, counted, and changes nothing."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.compression import compress, decompress
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Life, Plan
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb

DEVICE = "d-evil"


class Scene:
    """A round in which an honest device has answered and another has not."""

    def __init__(self, bench: Bench, plan: Plan, hash: bytes) -> None:
        self.bench, self.plan, self.hash = bench, plan, hash
        self.before = bench.facts()
        self.counts = bench.counters.snapshot()

    async def refused(
        self, reason: RejectReason, *, receipt: bool = True, device: str = DEVICE, times: int = 1
    ) -> None:
        """Assert that exactly this happened since the scene was set."""
        bench = self.bench
        await bench.quiet()
        assert bench.facts() == self.before
        counts = bench.counters.snapshot()
        assert counts == {**self.counts, str(reason): self.counts.get(str(reason), 0) + times}
        assert [answer.reason for answer in bench.receipts(device)] == ([reason] * times if receipt else [])


@pytest.fixture
async def scene(bench: Bench) -> Scene:
    # The third says nothing, so that the round stays open whatever becomes of the second.
    bench.present("d-good", DEVICE, "d-silent")
    plan, hash = bench.open_round()
    bench.update("d-good", bench.fleet.update("d-good", plan, hash))
    await bench.quiet()
    assert bench.receipts("d-good")[0].reason is None
    return Scene(bench, plan, hash)


async def test_an_honest_update_is_accepted_so_that_the_rest_means_something(scene: Scene) -> None:
    bench = scene.bench
    bench.update(DEVICE, bench.fleet.update(DEVICE, scene.plan, scene.hash, number=1))
    await bench.quiet()
    assert bench.receipts(DEVICE)[0].reason is None
    assert bench.facts() != scene.before


async def test_a_truncated_update(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    for frame in split(message.id, message.encode()[:-5]):
        scene.bench.inbound.receive(scene.bench.site.up(Kind.DEVICE, DEVICE, Verb.UPDATE), frame)
    await scene.refused(RejectReason.TRUNCATED, receipt=False)


async def test_a_chunk_cut_off_in_its_frame(scene: Scene) -> None:
    scene.bench.inbound.receive(scene.bench.site.up(Kind.DEVICE, DEVICE, Verb.UPDATE), b"FFC1\0")
    await scene.refused(RejectReason.TRUNCATED, receipt=False)


async def test_bytes_after_the_body(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    for frame in split(message.id, message.encode() + b"more"):
        scene.bench.inbound.receive(scene.bench.site.up(Kind.DEVICE, DEVICE, Verb.UPDATE), frame)
    await scene.refused(RejectReason.MALFORMED, receipt=False)


async def test_an_update_larger_than_any_message_of_its_kind(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    header = replace(message.head.header, body_size=limits.MAX_UPDATE + 1, raw_size=limits.MAX_UPDATE + 1)
    head = replace(message.head, header=header, signed=header.encode() + message.head.extension)
    scene.bench.update(DEVICE, Message(head, message.body))
    await scene.refused(RejectReason.TOO_LARGE, receipt=False)


async def test_an_update_larger_than_the_plan_can_need(scene: Scene) -> None:
    body = secrets.token_bytes(200_000)
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, body=body))
    await scene.refused(RejectReason.TOO_LARGE)


async def test_a_size_before_compression_that_the_plan_cannot_need(scene: Scene) -> None:
    message = scene.bench.fleet.update(
        DEVICE, scene.plan, scene.hash, body=compress(bytes(10_000_000)), raw_size=10_000_000, compressed=True
    )
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.TOO_LARGE)


async def test_a_bad_signature(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    broken = bytes([message.head.signature[0] ^ 1]) + message.head.signature[1:]
    scene.bench.update(DEVICE, Message(replace(message.head, signature=broken), message.body))
    await scene.refused(RejectReason.BAD_SIGNATURE, receipt=False)


async def test_a_header_changed_after_it_was_signed(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    header = replace(message.head.header, expires_at=0)
    head = replace(message.head, header=header, signed=header.encode() + message.head.extension)
    scene.bench.update(DEVICE, Message(head, message.body))
    await scene.refused(RejectReason.BAD_SIGNATURE, receipt=False)


async def test_a_certificate_of_another_authority(scene: Scene) -> None:
    stranger = SignedFleet()
    scene.bench.update(DEVICE, stranger.update(DEVICE, scene.plan, scene.hash))
    await scene.refused(RejectReason.BAD_CERTIFICATE, receipt=False)


async def test_a_message_of_another_fleet(scene: Scene) -> None:
    other = SignedFleet(name="other", authority=scene.bench.fleet.authority)
    scene.bench.update(DEVICE, other.update(DEVICE, scene.plan, scene.hash))
    await scene.refused(RejectReason.WRONG_FLEET, receipt=False)


async def test_a_device_of_another_site(scene: Scene) -> None:
    scene.bench.update("d-south", scene.bench.fleet.update("d-south", scene.plan, scene.hash, site="south"))
    await scene.refused(RejectReason.WRONG_SITE, device="d-south")


async def test_a_gateway_that_sends_a_devices_update(scene: Scene) -> None:
    fleet = scene.bench.fleet
    fleet.identity(DEVICE, Role.GATEWAY, "south")
    scene.bench.update(DEVICE, fleet.update(DEVICE, scene.plan, scene.hash))
    await scene.refused(RejectReason.WRONG_ROLE, receipt=False)


async def test_an_update_on_the_topic_of_another_device(scene: Scene) -> None:
    message = scene.bench.fleet.update("d-other", scene.plan, scene.hash)
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.WRONG_SENDER, receipt=False)


async def test_a_revoked_device(scene: Scene) -> None:
    fleet = scene.bench.fleet
    message = fleet.update(DEVICE, scene.plan, scene.hash)
    serial = fleet.identity(DEVICE, Role.DEVICE, "north").certificate.serial
    topic = scene.bench.upstream.broadcast(Broadcast.REVOKED)
    scene.bench.inbound.receive(topic, fleet.revocations(2, (serial,)))
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.REVOKED, receipt=False)


async def test_a_round_does_not_wait_for_a_revoked_device(bench: Bench) -> None:
    serial = bench.fleet.identity(DEVICE, Role.DEVICE, "north").certificate.serial
    topic = bench.upstream.broadcast(Broadcast.REVOKED)
    bench.present("d-good")
    bench.present(DEVICE, serial=serial)
    plan, hash = bench.open_round()
    bench.update("d-good", bench.fleet.update("d-good", plan, hash))
    await bench.quiet()
    assert bench.proposals() == []
    bench.inbound.receive(topic, bench.fleet.revocations(2, (serial,)))
    await bench.quiet()
    assert len(bench.proposals()[0][1].heads) == 1
    bench.end_round(1, hash)
    # What the broker retained of it, on a new connection.
    bench.present(DEVICE, serial=serial)
    plan, hash = bench.open_round(2)
    bench.update("d-good", bench.fleet.update("d-good", plan, hash))
    await bench.quiet()
    assert len(bench.proposals()) == 2


@pytest.mark.parametrize("life", [Life.READY, Life.SLEEPING])
async def test_a_gateway_that_starts_anew_waits_for_nobody_whose_certificate_has_ended(
    bench: Bench, life: Life
) -> None:
    # No list names it any more, and its broker keeps its last word for ever.
    bench.present(DEVICE, life=life, serial=12345, until=bench.fleet.now - 1)
    bench.present("d-good", until=bench.fleet.now)
    plan, hash = bench.open_round()
    bench.update("d-good", bench.fleet.update("d-good", plan, hash))
    await bench.quiet()
    assert len(bench.proposals()) == 1
    assert [name for name, _ in bench.machine.members.lives(Kind.DEVICE)] == ["d-good"]


async def test_a_will_that_is_older_than_its_devices_certificate_takes_nobody_away(bench: Bench) -> None:
    bench.present(DEVICE, until=bench.fleet.now + 1000)
    bench.present(DEVICE, life=Life.LOST, until=bench.fleet.now - 1)
    assert bench.machine.members.life(Kind.DEVICE, DEVICE) is Life.LOST


async def test_a_revoked_device_that_hides_its_certificate_is_waited_for_until_it_sends(bench: Bench) -> None:
    bench.present("d-good")
    bench.present(DEVICE, serial=12345)
    plan, hash = bench.open_round()
    message = bench.fleet.update(DEVICE, plan, hash)
    serial = bench.fleet.identity(DEVICE, Role.DEVICE, "north").certificate.serial
    bench.inbound.receive(bench.upstream.broadcast(Broadcast.REVOKED), bench.fleet.revocations(2, (serial,)))
    bench.update("d-good", bench.fleet.update("d-good", plan, hash))
    await bench.quiet()
    assert bench.proposals() == []
    bench.update(DEVICE, message)
    await bench.quiet()
    assert len(bench.proposals()[0][1].heads) == 1


async def test_an_older_revocation_list_brings_nobody_back(scene: Scene) -> None:
    fleet = scene.bench.fleet
    message = fleet.update(DEVICE, scene.plan, scene.hash)
    serial = fleet.identity(DEVICE, Role.DEVICE, "north").certificate.serial
    topic = scene.bench.upstream.broadcast(Broadcast.REVOKED)
    old, new = fleet.revocations(2, ()), fleet.revocations(3, (serial,))
    scene.bench.inbound.receive(topic, new)
    scene.bench.inbound.receive(topic, old)
    assert scene.bench.counters.snapshot() == {"replayed": 1}
    scene.counts = scene.bench.counters.snapshot()
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.REVOKED, receipt=False)


async def test_an_expired_update(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, lifetime=1000)
    scene.bench.fleet.now += 1001
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.EXPIRED)


async def test_an_expired_certificate(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, lifetime=0)
    # The round closes as well, by its deadline, and that is not what this is about.
    scene.bench.timer(20 * 366 * 86_400_000)
    await scene.bench.quiet()
    scene.before = scene.bench.facts()
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.EXPIRED_CERTIFICATE, receipt=False)


async def test_an_update_for_another_round(scene: Scene) -> None:
    other, message = scene.bench.fleet.plan(7)
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, other, message.head.hash))
    await scene.refused(RejectReason.WRONG_ROUND)


async def test_an_update_for_another_plan_of_this_round(scene: Scene) -> None:
    other, message = scene.bench.fleet.plan(1, quorum=0.5)
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, other, message.head.hash))
    await scene.refused(RejectReason.WRONG_PLAN)


async def test_a_header_that_names_another_round_than_its_plan(scene: Scene) -> None:
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, round=2))
    await scene.refused(RejectReason.WRONG_ROUND)


async def test_an_update_made_from_another_model(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, model_sha256=bytes(32))
    scene.bench.update(DEVICE, message)
    await scene.refused(RejectReason.WRONG_MODEL)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": 2**32 - 1},
        {"dimension": 0},
        {"meta_words": 2**32 - 1},
        {"bits": 16},
        {"lane_bits": 64},
        {"mode": 1},
        {"suite": 3},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_absurd_dimensions_reserve_nothing(scene: Scene, change: dict[str, int]) -> None:
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, **change))
    await scene.refused(RejectReason.WRONG_SHAPE)


async def test_a_device_that_the_plan_does_not_select(bench: Bench) -> None:
    bench.present(DEVICE)
    plan, hash = bench.open_round(fraction=0.0)
    await bench.quiet()
    before = bench.facts()
    bench.update(DEVICE, bench.fleet.update(DEVICE, plan, hash))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.receipts(DEVICE)[0].reason is RejectReason.NOT_SELECTED
    assert bench.counters.snapshot() == {"not_selected": 1}


async def test_a_body_that_is_not_the_signed_one(scene: Scene) -> None:
    message = scene.bench.fleet.update(DEVICE, scene.plan, scene.hash)
    other = bytes([message.body[0] ^ 1]) + message.body[1:]
    scene.bench.update(DEVICE, Message(message.head, other))
    await scene.refused(RejectReason.BODY_MISMATCH)


async def test_a_decompression_bomb(scene: Scene) -> None:
    bomb = (1).to_bytes(8, "little") + compress(bytes(1_000_000), level=19)
    assert len(bomb) < 150
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, body=bomb))
    await scene.refused(RejectReason.DECOMPRESSION)


async def test_a_frame_that_does_not_decompress(scene: Scene) -> None:
    good = scene.bench.fleet.body(scene.bench.fleet.values(1))
    body = good[:8] + bytes(len(good) - 8)
    scene.bench.update(DEVICE, scene.bench.fleet.update(DEVICE, scene.plan, scene.hash, body=body))
    await scene.refused(RejectReason.DECOMPRESSION)


async def test_values_out_of_the_plans_range(scene: Scene) -> None:
    fleet = scene.bench.fleet
    values = np.full(sum(fleet.sizes), 1000, dtype=np.int16)
    scene.bench.update(DEVICE, fleet.update(DEVICE, scene.plan, scene.hash, body=fleet.body(values, limit=1000)))
    await scene.refused(RejectReason.OUT_OF_RANGE)


async def test_a_weight_beyond_the_plans_cap(scene: Scene) -> None:
    fleet = scene.bench.fleet
    heavy = SignedFleet(authority=fleet.authority)
    body = heavy.body(heavy.values(1), weight=100)
    peak, frame = body[:8], body[8:]
    raw = bytearray(decompress(frame, size=len_raw(heavy)))
    raw[8:16] = (10**6).to_bytes(8, "little")
    scene.bench.update(DEVICE, fleet.update(DEVICE, scene.plan, scene.hash, body=peak + compress(bytes(raw))))
    await scene.refused(RejectReason.OUT_OF_RANGE)


def len_raw(fleet: SignedFleet) -> int:
    """Bytes of a body with peak 1, once decompressed: five values to a byte behind the meta words."""
    return 8 * fleet.ring.meta.words + -(-sum(fleet.sizes) // 5)


async def test_a_second_different_update(scene: Scene) -> None:
    bench = scene.bench
    bench.update("d-good", bench.fleet.update("d-good", scene.plan, scene.hash, number=5))
    await bench.quiet()
    assert bench.facts() == scene.before
    assert [answer.reason for answer in bench.receipts("d-good")] == [None, RejectReason.DUPLICATE]
    assert bench.counters.snapshot() == {"duplicate": 1}


async def test_a_replayed_update_gets_the_same_receipt_and_counts_once(bench: Bench) -> None:
    bench.present(DEVICE, "d-other")
    plan, hash = bench.open_round()
    message = bench.fleet.update(DEVICE, plan, hash)
    bench.update(DEVICE, message)
    await bench.quiet()
    before = bench.facts()
    for _ in range(3):
        bench.update(DEVICE, message)
    await bench.quiet()
    assert bench.facts() == before
    assert len(set(bench.below.on(bench.site.down(Kind.DEVICE, DEVICE, Verb.RECEIPT)))) == 1
    assert len(bench.receipts(DEVICE)) == 4
    assert bench.counters.snapshot() == {}


async def test_an_update_of_the_round_before_is_replayed(scene: Scene) -> None:
    bench = scene.bench
    old = bench.fleet.update(DEVICE, scene.plan, scene.hash)
    bench.open_round(2)
    scene.before = bench.facts()
    await bench.quiet()
    scene.before = bench.facts()
    bench.update(DEVICE, old)
    await scene.refused(RejectReason.LATE)


async def test_a_late_update(scene: Scene) -> None:
    bench = scene.bench
    message = bench.fleet.update(DEVICE, scene.plan, scene.hash)
    bench.timer(60_000)
    await bench.quiet()
    scene.before = bench.facts()
    bench.update(DEVICE, message)
    await scene.refused(RejectReason.LATE)


async def test_more_contributors_than_the_lanes_are_sized_for(bench: Bench) -> None:
    bench.present("d-a", "d-b", DEVICE)
    plan, hash = bench.open_round(cohort=2)
    for name in ("d-a", "d-b"):
        bench.update(name, bench.fleet.update(name, plan, hash))
    await bench.quiet()
    before = bench.facts()
    bench.update(DEVICE, bench.fleet.update(DEVICE, plan, hash))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.receipts(DEVICE)[0].reason is RejectReason.COHORT_FULL
    assert bench.counters.snapshot() == {"cohort_full": 1}


async def test_half_messages_cannot_take_more_memory_than_their_budget(fleet: SignedFleet, tmp_path: Path) -> None:
    fleet.sizes = (400_000,)
    fleet.bits = 16
    bench = Bench(fleet, tmp_path / "state")
    bench.budget = 900_000
    await bench.start()
    plan, hash = bench.open_round()
    body = secrets.token_bytes(400_000)
    for name in ("d-1", "d-2", "d-3"):
        message = fleet.update(name, plan, hash, body=body)
        bench.inbound.receive(bench.site.up(Kind.DEVICE, name, Verb.UPDATE), split(message.id, message.encode())[0])
    await bench.quiet()
    assert bench.inbound._updates.reserved < bench.budget
    assert [answer.reason for answer in bench.receipts("d-3")] == [RejectReason.OVERLOADED]
    assert bench.counters.snapshot() == {"overloaded": 1}
    bench.end_round(1, hash)
    assert bench.inbound._updates.reserved == 0
    await bench.close()


def planned(fleet: SignedFleet) -> tuple[Plan, Any]:
    plan, message = fleet.plan(1)
    return plan, message.head.hash


async def test_a_full_journal_says_overloaded(fleet: SignedFleet, tmp_path: Path) -> None:
    bench = Bench(fleet, tmp_path / "state")
    size = fleet.update("d-1", *planned(fleet)).head.message_size
    bench.place = replace(bench.place, journal_limit=2 * size + 10)
    await bench.start()
    bench.present("d-1", "d-2", "d-3")
    plan, hash = bench.open_round()
    for name in ("d-1", "d-2", "d-3"):
        bench.update(name, fleet.update(name, plan, hash))
    await bench.quiet()
    reasons = [bench.receipts(name)[0].reason for name in ("d-1", "d-2", "d-3")]
    assert reasons == [None, None, RejectReason.OVERLOADED]
    await bench.close()


async def test_a_plan_that_the_coordinator_did_not_sign(bench: Bench) -> None:
    plan, _ = bench.fleet.plan(1)
    forged = bench.fleet.signer("g-other", Role.GATEWAY, "other").sign(MessageKind.PLAN, plan, now=bench.fleet.now)
    before = bench.facts()
    bench.inbound.receive(bench.upstream.broadcast(Broadcast.PLAN), forged.encode())
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"wrong_role": 1}


async def test_an_old_plan_is_replayed(bench: Bench) -> None:
    _, old = bench.fleet.plan(1)
    bench.open_round(2)
    await bench.quiet()
    before = bench.facts()
    bench.inbound.receive(bench.upstream.broadcast(Broadcast.PLAN), old.encode())
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"replayed": 1}


async def test_a_second_plan_of_the_same_round(bench: Bench) -> None:
    bench.open_round(2)
    await bench.quiet()
    before = bench.facts()
    bench.open_round(2, quorum=0.5)
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"conflict": 1}


async def test_a_plan_whose_lanes_could_overflow(bench: Bench) -> None:
    bench.fleet.lane_bits = 8
    bench.open_round(1, cohort=1000)
    await bench.quiet()
    assert bench.machine.round is None
    assert bench.counters.snapshot() == {"wrong_shape": 1}


async def test_bytes_that_mean_nothing(bench: Bench) -> None:
    before = bench.facts()
    topics = [bench.site.up(Kind.DEVICE, "d-1", verb) for verb in (Verb.UPDATE, Verb.DECLINE, Verb.STATE, Verb.NEED)]
    topics += [bench.site.up(Kind.GATEWAY, "g-1", verb) for verb in (Verb.PROPOSE, Verb.REVEAL, Verb.CENSUS)]
    topics += [bench.upstream.broadcast(what) for what in Broadcast]
    topics += [bench.upstream.down(Kind.GATEWAY, "g-north", verb) for verb in (Verb.RECEIPT, Verb.COMMIT)]
    topics += ["", "x", "ff1/demo/north/d/d-1/up/nothing", "ff1/other/north/b/plan", "ff1/demo/west/b/plan"]
    for topic in topics:
        for payload in (b"\xff", b"FFM1", b"FFC1" + bytes(24), secrets.token_bytes(300)):
            bench.inbound.receive(topic, payload)
    await bench.quiet()
    assert bench.facts() == before
    # The coordinator's status, its trust metadata and what the node above cosigns for its own devices may go unread.
    unread = len((Broadcast.STATUS, Broadcast.TRUST, Broadcast.COSIGN))
    assert sum(bench.counters.snapshot().values()) >= 4 * (len(topics) - unread)


async def test_another_devices_message_id(scene: Scene) -> None:
    bench, taken = scene.bench, next(iter(scene.bench.machine.round.record.accepted.values())).message_id
    bench.fleet.signer(DEVICE)._randomness = lambda size: taken
    bench.update(DEVICE, bench.fleet.update(DEVICE, scene.plan, scene.hash, number=1))
    await scene.refused(RejectReason.CONFLICT)
    bench.machine.validate()


async def test_a_proposal_that_decompresses_to_more_than_its_cohort_can_need(scene: Scene) -> None:
    signer = scene.bench.fleet.signer("g-below", Role.GATEWAY, "below")
    bomb = signer.sign(MessageKind.PROPOSE, bytes(10_000_000), now=scene.bench.fleet.now, round=1)
    scene.bench.say(Kind.GATEWAY, "g-below", Verb.PROPOSE, bomb)
    await scene.bench.quiet()
    assert [answer.reason for answer in scene.bench.receipts("g-below", Kind.GATEWAY)] == [RejectReason.TOO_LARGE]
