"""The refusals of the specification's gateway (G1 to G9), each as an attack: nothing that breaks a rule gets a sum out.

G1 who says it, G2 for which plan, G3 how often, G4 when, G5 what is in it, G6 one commit, G7 over which set, G8 once
ever, G9 nothing but that sum.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway.modes import rules_of
from fleetfed.gateway.record import Accepted, RoundState
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import SealSecret, encrypt
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.chunks import split as chunks
from fleetfed.shared.wire.envelope import Digest, Header, MessageId, MessageKind
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


# --- G6: one commit --------------------------------------------------------------------------------------------------


async def _proposed(bench: Bench, count: int, **split: Any) -> SplitRound:
    return await (await SplitRound(bench, count, **split).open()).answer()


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("bucket", [0, 2])
async def test_g6_a_second_commit_with_another_set(bench: Bench, bucket: int, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 4, bucket=bucket)
    first, second = site.commit(), site.commit("d-0", "d-1", "d-2")
    bench.commit(first)
    bench.commit(second)
    await bench.quiet()
    bench.commit(second)
    await bench.quiet()
    assert {reveal.commit for _, reveal in bench.reveals()} == {first.head.hash}
    assert bench.counters.snapshot() == {"conflict": 2}
    assert len(alarms(caplog)) == 2
    assert "the first counts" in alarms(caplog)[0]


async def test_g6_a_second_commit_with_another_coin(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Dealt again, the same members would make other buckets: their differences are sums of fewer."""
    site = await _proposed(bench, 8, bucket=2)
    first, second = site.commit(), site.commit(nonce=b"another coordina")
    for commit in (first, second, second):
        bench.commit(commit)
        await bench.quiet()
    assert {reveal.commit for _, reveal in bench.reveals()} == {first.head.hash}
    assert bench.counters.snapshot() == {"conflict": 2}
    assert alarms(caplog)


async def test_g6_the_same_commit_again_gets_the_same_reveal(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 3)
    commit = site.commit()
    for _ in range(4):
        bench.commit(commit)
        await bench.quiet()
    assert len(set(bench.above.on(bench.upstream.up(Kind.GATEWAY, bench.name, Verb.REVEAL)))) == 1
    assert (bench.counters.snapshot(), alarms(caplog)) == ({}, [])


async def test_g6_a_commit_that_the_coordinator_did_not_sign(bench: Bench) -> None:
    site = await _proposed(bench, 3)
    before = bench.facts()
    honest = site.commit()
    forger = bench.fleet.signer("g-other", Role.GATEWAY, "other")
    bench.commit(forger.sign(MessageKind.COMMIT, honest.body, now=bench.fleet.now, round=1))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"wrong_role": 1}
    bench.commit(Message(replace(honest.head, signature=bytes(64)), honest.body))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"bad_signature": 1, "wrong_role": 1}


# --- G7: over which set ----------------------------------------------------------------------------------------------


async def aborted(bench: Bench, reason: RejectReason, caplog: pytest.LogCaptureFixture) -> None:
    """The round is over here: no sum, no key, no body; and a person is told, and the tier above until it has heard."""
    record = bench.machine.round.record
    assert (bench.machine.round.state, record.aborted) == (RoundState.REVEALED, str(reason))
    assert bench.reveals() == []
    assert bench.performer.total is None
    stored = bench.journal.load()
    assert (stored.secrets, stored.record.state(), stored.record.aborted) == (None, RoundState.REVEALED, str(reason))
    ((head, refusal),) = bench.refusals()
    assert (refusal.reason, refusal.count, refusal.words, refusal.buckets) == (reason, 0, b"", ())
    assert (refusal.plan, refusal.commit) == (record.hash, record.commit.head)
    bench.inbound.receive(bench.upstream.down(Kind.GATEWAY, bench.name, Verb.RECEIPT), bench.fleet.receipt(head))
    await bench.quiet()
    assert bench.machine.round.state is RoundState.CLOSED
    assert {body for _, body in bench.journal.updates(u.message_id for u in record.accepted.values())} == {b""}
    assert bench.counters.snapshot() == {str(reason): 1}
    (alarm,) = alarms(caplog)
    assert str(reason) in alarm
    assert "reveals nothing" in alarm


@pytest.mark.parametrize("bucket", [0, 3])
async def test_g7_a_cohort_below_the_minimum(bench: Bench, bucket: int, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 4, minimum_cohort=3, bucket=bucket)
    await site.committed("d-0", "d-3")
    await aborted(bench, RejectReason.BELOW_MINIMUM, caplog)


async def test_g7_a_single_device(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 3)
    await site.committed("d-1")
    await aborted(bench, RejectReason.BELOW_MINIMUM, caplog)


async def test_g7_a_cohort_of_one_owner(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fleet.owners = {f"d-{number}": "mallory" for number in range(1, 4)} | {"d-0": "victim"}
    site = await _proposed(bench, 4, minimum_owners=3)
    await site.committed()
    await aborted(bench, RejectReason.BELOW_OWNERS, caplog)


async def test_g7_the_coin_leaves_no_victim_alone_with_the_devices_of_one_owner(bench: Bench) -> None:
    """The site has three owners, but of two buckets one at least has fewer: its sum less theirs would be the victim."""
    bench.fleet.owners = dict.fromkeys((f"d-{number}" for number in range(2, 8)), "mallory")
    bench.fleet.owners |= {"d-0": "victim", "d-1": "another"}
    site = await _proposed(bench, 8, minimum_owners=3, bucket=4)
    await site.committed()
    (bucket,) = bench.reveals()[0][1].buckets
    assert bucket.count == 8
    (values,) = site.unmasked_buckets(bench.reveals()[0][1], bench.proposals()[-1][1].nonces[0].hash)
    assert np.array_equal(values, site.sum())


async def test_g7_devices_without_an_owner_are_one_owners(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 4, minimum_owners=2)
    await site.committed()
    await aborted(bench, RejectReason.BELOW_OWNERS, caplog)


async def test_g7_owners_are_known_after_a_restart(bench: Bench) -> None:
    bench.fleet.owners = {"d-0": "a", "d-1": "b"}
    site = await _proposed(bench, 2, minimum_owners=2)
    await bench.crash()
    await bench.start()
    await site.committed()
    assert np.array_equal(site.unmasked(bench.reveals()[0][1]), site.sum())


async def test_g7_too_many_left_out(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 20)
    await site.committed(*site.names[3:])
    await aborted(bench, RejectReason.TOO_MANY_EXCLUDED, caplog)


async def test_g7_two_left_out_are_not_too_many(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 20)
    await site.committed(*site.names[2:])
    assert np.array_equal(site.unmasked(bench.reveals()[0][1], *site.names[2:]), site.sum(*site.names[2:]))
    assert alarms(caplog) == []


@pytest.mark.parametrize("bucket", [0, 5])
async def test_g7_a_commit_that_leaves_out_one_of_twenty_twice(
    bench: Bench, bucket: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The two sums would differ in two devices, and a third one would tell them apart: there is one sum."""
    site = await _proposed(bench, 20, bucket=bucket)
    first, second = site.commit(*site.names[1:]), site.commit(*site.names[:-1])
    bench.commit(first)
    await bench.quiet()
    bench.commit(second)
    await bench.quiet()
    site.acknowledge()
    bench.commit(second)
    await bench.quiet()
    assert {reveal.commit for _, reveal in bench.reveals()} == {first.head.hash}
    assert bench.counters.snapshot() == {"conflict": 2}
    assert len(alarms(caplog)) == 2


async def test_g7_members_that_were_never_proposed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 3)
    before = bench.facts()
    await site.committed(more=[*site.ids(), bytes(16)])
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"not_proposed": 1}
    assert alarms(caplog)
    await site.committed()
    assert np.array_equal(site.unmasked(bench.reveals()[0][1]), site.sum()), "the honest one is the first that counts"


async def test_g7_a_commit_for_another_proposal_or_gateway(bench: Bench) -> None:
    site = await _proposed(bench, 3)
    before = bench.facts()
    await site.committed(proposal=bytes(32))
    await site.committed(gateway="g-other")
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"not_proposed": 2}


async def test_g7_a_refused_commit_is_no_first_one_for_a_better(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = await _proposed(bench, 4, minimum_cohort=3)
    await site.committed("d-0", "d-1")
    caplog.clear()
    await bench.crash()
    await bench.start()
    await site.committed()
    assert bench.reveals() == []
    assert bench.counters.snapshot() == {"conflict": 1}
    assert alarms(caplog)


async def test_g7_a_refused_commit_is_not_passed_on(bench: Bench) -> None:
    bench.present("g-low", kind=Kind.GATEWAY)
    site = await SplitRound(bench, 3, tiers=2).open()
    below = [site.update(f"e-{i}", site="low", gateway_key=bench.fleet.seal("g-low").public) for i in range(3)]
    proposal = bench.fleet.proposal("g-low", site.plan, site.hash, below, site="low")
    bench.say(Kind.GATEWAY, "g-low", Verb.PROPOSE, proposal)
    await site.answer()
    await site.committed("d-0", more=[update.id for update in below])
    bench.say(Kind.GATEWAY, "g-low", Verb.PROPOSE, proposal)
    await bench.quiet()
    assert bench.below.on(bench.site.down(Kind.GATEWAY, "g-low", Verb.COMMIT)) == []
    assert bench.machine.round.record.aborted == "below_minimum"


def accepted(count: int, owners: int = 1) -> list[Accepted]:
    names = [MessageId(number.to_bytes(16, "big")) for number in range(count)]
    return [Accepted(name, Digest(name * 2), 1, 1, f"o{i % owners}") for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("part", "proposed", "reason"),
    [
        (2, 4, None),
        (1, 1, RejectReason.BELOW_MINIMUM),
        (2, 5, RejectReason.TOO_MANY_EXCLUDED),
        (57, 60, None),
        (56, 60, RejectReason.TOO_MANY_EXCLUDED),
        (95, 100, None),
        (94, 100, RejectReason.TOO_MANY_EXCLUDED),
        (100, 100, None),
        (101, 101, RejectReason.COHORT_FULL),
    ],
)
def test_g7_the_bounds_of_a_part(fleet: SignedFleet, part: int, proposed: int, reason: RejectReason | None) -> None:
    rules = rules_of(fleet.plan(split=fleet.split())[0], fleet.ring)
    if reason is None:
        rules.check_part(accepted(part), proposed=proposed)
        return
    with pytest.raises(RemoteProtocolError) as error:
        rules.check_part(accepted(part), proposed=proposed)
    assert error.value.reason is reason


def test_g7_more_buckets_than_a_message_can_hold(fleet: SignedFleet) -> None:
    plan, _ = fleet.plan(split=fleet.split(bucket=2))
    fleet.sizes = (6_000_000,)
    rules = rules_of(plan, fleet.ring)
    rules.check_part(accepted(44), proposed=44)
    with pytest.raises(RemoteProtocolError) as error:
        rules.check_part(accepted(46), proposed=46)
    assert error.value.reason is RejectReason.TOO_LARGE


# --- G8: once ever ---------------------------------------------------------------------------------------------------


async def test_g8_members_of_a_round_that_was_revealed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    first = await _proposed(bench, 3)
    await first.committed()
    reveals = len(bench.reveals())
    bench.end_round(1, first.hash)
    second = await (await SplitRound(bench, 3, number=2).open()).answer()
    before = bench.facts()
    await second.committed(more=[*second.ids(), first.ids()[0]])
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"not_proposed": 1}
    bench.commit(
        bench.fleet.commit(first.hash, bench.proposals()[0][0].hash, first.ids("d-0", "d-1"), gateway="g-north")
    )
    await bench.quiet()
    assert bench.facts() == before
    assert bench.counters.snapshot() == {"not_proposed": 1, "wrong_plan": 1}
    assert len(bench.reveals()) == reveals


async def test_g8_a_commit_after_the_round_is_over(bench: Bench) -> None:
    site = await _proposed(bench, 3)
    commit = site.commit()
    bench.end_round(1, site.hash)
    await bench.quiet()
    before = bench.facts()
    bench.commit(commit)
    await bench.quiet()
    assert bench.facts() == before
    assert bench.reveals() == []
    assert bench.journal.load().secrets is None


async def test_g8_the_plan_of_a_revealed_round_opens_no_second_one(bench: Bench) -> None:
    site = await _proposed(bench, 3)
    await site.committed()
    bench.end_round(1, site.hash)
    await bench.quiet()
    reveals, cosigns = len(bench.reveals()), len(bench.cosigns())
    bench.open_round(1, split=bench.fleet.split())
    await bench.quiet()
    assert (bench.machine.round, len(bench.reveals()), len(bench.cosigns())) == (None, reveals, cosigns)
    assert bench.counters.snapshot() == {"conflict": 1}


# --- G9: nothing but that sum ----------------------------------------------------------------------------------------


async def test_g9_nothing_that_anybody_says_before_the_commit_gets_a_sum_or_a_body_out(bench: Bench) -> None:
    """Every kind of message, well signed by the coordinator and by a gateway, on every topic that is heard."""
    site = await _proposed(bench, 3)
    before, said = bench.facts(), len(bench.above.sent)
    fleet = bench.fleet
    signers = (fleet.coordinator, fleet.signer("g-other", Role.GATEWAY, "other"), fleet.signer("d-0"))
    bodies = [update.body for update in site.updates.values()]
    topics = [bench.upstream.broadcast(what) for what in Broadcast]
    topics += [bench.upstream.down(Kind.GATEWAY, bench.name, verb) for verb in (Verb.RECEIPT, Verb.COMMIT)]
    topics += [bench.site.up(Kind.DEVICE, "d-0", verb) for verb in (Verb.UPDATE, Verb.DECLINE, Verb.NEED)]
    topics += [bench.site.up(Kind.GATEWAY, "g-other", verb) for verb in (Verb.PROPOSE, Verb.REVEAL, Verb.NEED)]
    content = site.commit().body
    for signer in signers:
        for kind in MessageKind:
            if signer is fleet.coordinator and kind is MessageKind.COMMIT:
                continue
            message = signer.sign(kind, content, now=fleet.now, round=1, extension=bytes(76))
            for topic in topics:
                bench.inbound.receive(topic, message.encode())
                for frame in chunks(message.id, message.encode()):
                    bench.inbound.receive(topic, frame)
    await bench.quiet()
    assert bench.facts() == before
    assert bench.reveals() == []
    later = b"".join(payload for _, payload, _ in bench.above.sent[said:] + bench.below.sent)
    assert not any(body in later for body in bodies)


async def test_g9_a_child_cannot_ask_for_what_its_neighbours_sent(bench: Bench) -> None:
    site = await _proposed(bench, 3)
    await site.committed()
    sent = b"".join(payload for _, payload, _ in bench.below.sent)
    assert not any(update.body in sent for update in site.updates.values())
    assert not any(bench.reveals()[0][1].words in payload for _, payload, _ in bench.below.sent)
