"""The refusals of the specification's gateway that concern the sum (G6 to G9), each as an attack: nothing gets out.

G6 one commit, G7 over which set, G8 once ever, G9 nothing but that sum.
"""

from __future__ import annotations

import logging
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
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.chunks import split as chunks
from fleetfed.shared.wire.envelope import Digest, MessageId, MessageKind
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb

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
