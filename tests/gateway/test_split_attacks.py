"""The refusals of the specification's gateway that concern updates (G1 to G5), each as an attack: none gets in.

G1 who says it, G2 for which plan, G3 how often, G4 when, G5 what is in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import SealSecret, encrypt
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.chunks import split as chunks
from fleetfed.shared.wire.envelope import Header
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb
from fleetfed.shared.wire.update import BOX_SIZE, PLAIN

EVIL = "d-evil"


class Scene:
    """An open split round in which two honest devices have answered."""

    def __init__(self, site: SplitRound) -> None:
        self.site, self.bench = site, site.bench
        self.before = self.bench.facts()

    def update(self, device: str = EVIL, **changes: Any) -> Message:
        """What the evil device would send."""
        return self.site.update(device, **{"number": 3, **changes})

    async def refused(
        self, message: Message, reason: RejectReason, *, receipt: bool = True, device: str = EVIL
    ) -> None:
        """Send it; exactly this happened."""
        bench = self.bench
        counts, receipts = bench.counters.snapshot(), len(bench.receipts(device))
        bench.update(device, message)
        await bench.quiet()
        assert bench.facts() == self.before
        assert bench.counters.snapshot() == {**counts, str(reason): counts.get(str(reason), 0) + 1}
        assert [answer.reason for answer in bench.receipts(device)[receipts:]] == ([reason] if receipt else [])


@pytest.fixture(params=[0, 2], ids=["one sum", "buckets"])
async def scene(bench: Bench, request: pytest.FixtureRequest) -> Scene:
    bench.present(EVIL, "d-silent")
    site = await SplitRound(bench, 2, bucket=request.param).open()
    await site.answer()
    return Scene(site)


async def test_an_honest_masked_update_is_taken_so_that_the_rest_means_something(scene: Scene) -> None:
    scene.bench.update(EVIL, scene.update())
    await scene.bench.quiet()
    assert scene.bench.receipts(EVIL)[0].reason is None
    assert scene.bench.facts() != scene.before


# --- G1: who ---------------------------------------------------------------------------------------------------------


async def test_g1_a_changed_box_breaks_the_signature(scene: Scene) -> None:
    message = scene.update()
    extension = message.head.extension[:-1] + bytes([message.head.extension[-1] ^ 1])
    head = replace(message.head, extension=extension, signed=message.head.header.encode() + extension)
    await scene.refused(Message(head, message.body), RejectReason.BAD_SIGNATURE, receipt=False)


async def test_g1_a_certificate_of_another_authority(scene: Scene) -> None:
    stranger = SignedFleet()
    message = stranger.split_update(
        EVIL, scene.site.plan, scene.site.hash, gateway_key=scene.bench.cosigns()[0].seal_key
    )
    await scene.refused(message, RejectReason.BAD_CERTIFICATE, receipt=False)


async def test_g1_a_device_of_another_site(scene: Scene) -> None:
    message = scene.update("d-south", site="south")
    await scene.refused(message, RejectReason.WRONG_SITE, device="d-south")


async def test_g1_a_revoked_device(scene: Scene) -> None:
    message = scene.update()
    serial = scene.bench.fleet.identity(EVIL, Role.DEVICE, "north").certificate.serial
    revocations = scene.bench.fleet.revocations(2, (serial,))
    scene.bench.inbound.receive(scene.bench.upstream.broadcast(Broadcast.REVOKED), revocations)
    await scene.refused(message, RejectReason.REVOKED, receipt=False)


# --- G2: which plan --------------------------------------------------------------------------------------------------


async def test_g2_an_update_for_another_plan_of_the_round(scene: Scene) -> None:
    plan, message = scene.bench.fleet.plan(1, split=scene.site.plan.split, quorum=0.5)
    scene.site.plan, scene.site.hash = plan, message.head.hash
    await scene.refused(scene.update(), RejectReason.WRONG_PLAN)


async def test_g2_an_update_from_another_model(scene: Scene) -> None:
    await scene.refused(scene.update(model_sha256=bytes(32)), RejectReason.WRONG_MODEL)


@pytest.mark.parametrize("change", [{"mode": PLAIN}, {"suite": 2}, {"suite": 0}, {"bits": 4}, {"lane_bits": 64}])
async def test_g2_another_mode_suite_or_ring(scene: Scene, change: dict[str, int]) -> None:
    await scene.refused(scene.update(**change), RejectReason.WRONG_SHAPE)


async def test_g2_a_plain_update_in_a_split_round(scene: Scene) -> None:
    message = scene.bench.fleet.update(EVIL, scene.site.plan, scene.site.hash)
    await scene.refused(message, RejectReason.WRONG_SHAPE)


async def test_g2_a_masked_update_in_a_plain_round(bench: Bench) -> None:
    bench.present("d-0", EVIL)
    plan, hash = bench.open_round()
    await bench.quiet()
    before = bench.facts()
    masked = replace(plan, split=bench.fleet.split())
    key = bench.fleet.seal(bench.name).public
    bench.update(EVIL, bench.fleet.split_update(EVIL, masked, hash, gateway_key=key))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.receipts(EVIL)[0].reason is RejectReason.WRONG_SHAPE


@pytest.mark.parametrize("boxes", [0, 1, 3])
async def test_g2_another_number_of_boxes(scene: Scene, boxes: int) -> None:
    def change(_: Header, body: bytes, sealed: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
        return body, (*sealed, bytes(BOX_SIZE))[:boxes]

    await scene.refused(scene.update(change=change, boxes=boxes), RejectReason.WRONG_SHAPE)


# --- G3: how often ---------------------------------------------------------------------------------------------------


async def test_g3_a_second_update_of_the_device(scene: Scene) -> None:
    await scene.refused(scene.update("d-0"), RejectReason.DUPLICATE, device="d-0")


async def test_g3_the_same_update_again_counts_once_and_gets_the_same_receipt(scene: Scene) -> None:
    for _ in range(3):
        scene.bench.update("d-0", scene.site.updates["d-0"])
        await scene.bench.quiet()
    assert scene.bench.facts() == scene.before
    topic = scene.bench.site.down(Kind.DEVICE, "d-0", Verb.RECEIPT)
    assert len(set(scene.bench.below.on(topic))) == 1


async def test_g3_another_devices_message_id(scene: Scene) -> None:
    taken = scene.site.updates["d-0"].id
    scene.bench.fleet.signer(EVIL)._randomness = lambda size: taken
    await scene.refused(scene.update(), RejectReason.CONFLICT)


async def test_g3_a_victims_whole_message_under_another_name(scene: Scene) -> None:
    await scene.refused(scene.site.updates["d-0"], RejectReason.WRONG_SENDER, receipt=False)


async def test_g3_a_report_of_an_earlier_round(scene: Scene) -> None:
    message = scene.update()
    scene.bench.open_round(2, split=scene.bench.fleet.split())
    await scene.bench.quiet()
    scene.before = scene.bench.facts()
    await scene.refused(message, RejectReason.LATE)


# --- G4: when --------------------------------------------------------------------------------------------------------


async def test_g4_after_the_close(scene: Scene) -> None:
    message = scene.update()
    scene.bench.timer(60_000)
    await scene.bench.quiet()
    scene.before = scene.bench.facts()
    await scene.refused(message, RejectReason.LATE)


async def test_g4_past_its_own_expiry(scene: Scene) -> None:
    message = scene.update(lifetime=1000)
    scene.bench.fleet.now += 1001
    await scene.refused(message, RejectReason.EXPIRED)


# --- G5: what is in it -----------------------------------------------------------------------------------------------


async def test_g5_a_body_that_is_not_the_signed_one(scene: Scene) -> None:
    message = scene.update()
    await scene.refused(
        Message(message.head, message.body[:-1] + bytes([message.body[-1] ^ 1])), RejectReason.BODY_MISMATCH
    )


Change = Callable[[Header, bytes, tuple[bytes, ...]], tuple[bytes, tuple[bytes, ...]]]


def _flipped_body(_: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    return bytes([body[0] ^ 1]) + body[1:], boxes


def _cut_tag(_: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    return body[:-16] + bytes(16), boxes


def _flipped_box(_: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    return body, (boxes[0][:-1] + bytes([boxes[0][-1] ^ 1]), *boxes[1:])


def _swapped_boxes(_: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    return body, (boxes[1], boxes[0])


def _of_another_header(header: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    other = split.binding(replace(header, sequence=header.sequence + 1), bytes(76))
    return encrypt(memoryview(body[:-16]), secrets.token_bytes(32), other), boxes


def _nothing(_: Header, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
    return bytes(len(body)), tuple(bytes(BOX_SIZE) for _ in boxes)


@pytest.mark.parametrize(
    "change", [_flipped_body, _cut_tag, _flipped_box, _swapped_boxes, _of_another_header, _nothing]
)
async def test_g5_a_signed_body_or_box_that_does_not_open(scene: Scene, change: Change) -> None:
    await scene.refused(scene.update(change=change), RejectReason.BAD_BOX)


async def test_g5_a_victims_masked_vector_and_boxes_under_an_accomplices_name(scene: Scene) -> None:
    """n times the victim's vector would be n times the victim: whatever is copied is bound to the victim's header."""
    victim = scene.site.updates["d-0"]
    boxes = tuple(victim.head.extension[-2 * BOX_SIZE :][i : i + BOX_SIZE] for i in (0, BOX_SIZE))
    await scene.refused(scene.update(change=lambda *_: (victim.body, boxes)), RejectReason.BAD_BOX)
    await scene.refused(scene.update(change=lambda _, body, own: (victim.body, own)), RejectReason.BAD_BOX)
    await scene.refused(scene.update(change=lambda _, body, own: (body, boxes)), RejectReason.BAD_BOX)


async def test_g5_a_body_sealed_to_another_gateway(scene: Scene) -> None:
    other = SealSecret.from_bytes(secrets.token_bytes(32)).public
    await scene.refused(scene.update(gateway_key=other), RejectReason.BAD_BOX)


async def test_g5_a_body_sealed_to_the_key_of_another_round(bench: Bench) -> None:
    first = await (await SplitRound(bench, 2).open()).answer()
    old = bench.cosigns()[-1].seal_key
    bench.end_round(1, first.hash)
    bench.present(EVIL)
    site = await (await SplitRound(bench, 1, number=2).open()).answer()
    scene = Scene(site)
    assert bench.cosigns()[-1].seal_key != old
    await scene.refused(scene.update(gateway_key=old), RejectReason.BAD_BOX)


@pytest.mark.parametrize("words", [1, 10**4])
async def test_g5_another_number_of_words_reserves_nothing(scene: Scene, words: int) -> None:
    message = scene.update(words=np.zeros(words, dtype=np.uint64))
    first = chunks(message.id, message.encode())[0]
    scene.bench.inbound.receive(scene.bench.site.up(Kind.DEVICE, EVIL, Verb.UPDATE), first)
    assert scene.bench.inbound._updates.reserved == 0
    await scene.bench.quiet()
    assert scene.bench.receipts(EVIL)[-1].reason is RejectReason.WRONG_SHAPE
    assert scene.bench.facts() == scene.before


async def test_garbage_under_a_mask_is_taken_and_costs_its_bucket_alone(bench: Bench) -> None:
    """Nobody can see it: that is what buckets are for."""
    site = await SplitRound(bench, 6, bucket=3).open()
    garbage = np.full(bench.fleet.ring.layout.n_words, 0x7F7F7F7F7F7F7F7F, dtype=np.uint64)
    site.updates["d-2"] = bench.masked("d-2", site.plan, site.hash, words=garbage)
    await site.answer()
    await site.committed()
    reveal = bench.reveals()[0][1]
    heads = {head.header.message_id: head for head in site.heads()}
    spoilt = []
    for members, bucket in zip(site.dealt(reveal.buckets[0].nonce), reveal.buckets, strict=True):
        values, meta = bench.fleet.unmask([heads[i] for i in members], bucket.words)
        if site.updates["d-2"].id in members:
            spoilt.append(bucket.index)
            assert int(meta[0]) != bucket.count
        else:
            names = [name for name, update in site.updates.items() if update.id in members]
            assert np.array_equal(values, site.sum(*names))
    assert len(spoilt) == 1
