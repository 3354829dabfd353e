"""Attacks on what masked rounds are made of, by name, with the refusals of the specification (C1 to C3).

Each is refused with its own reason, counted, and leaves the stored facts as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import ScriptedGateway, update_of
from fleetfed_testing.masked_cloud import MaskedGateway, masked_update
from fleetfed_testing.open_round import NORTH, SOUTH, members, reasons

from fleetfed.cloud_coordinator.quarantine import QuarantineConfig
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.secure.box import Reader, seal
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Mode, Revocations
from fleetfed.shared.wire.topics import Verb

# --- C1: a proposal for what is committed already ---------------------------------------------------------------------


async def test_c1_a_second_different_proposal_after_the_commit_is_a_conflict(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    fewer = round_.north.propose(round_.plan, round_.hash, round_.heads(*NORTH[1:]))
    await round_.refused(round_.north, Verb.PROPOSE, fewer, RejectReason.CONFLICT)


async def test_c1_the_same_proposal_again_gets_the_same_bytes_over_restarts_too(opened: Any) -> None:
    round_ = await opened()
    proposal = round_.north.propose(round_.plan, round_.hash, round_.heads(*NORTH))
    await round_.world.deliver("north", Verb.PROPOSE, proposal)
    await round_.world.restart()
    await round_.world.deliver("north", Verb.PROPOSE, proposal)
    assert len({message for _, _, message in round_.world.commits("north")}) == 1


# --- C2: too few, or too few who answer for them ----------------------------------------------------------------------


async def test_c2_fewer_than_the_minimum_are_not_committed(opened: Any) -> None:
    round_ = await opened()
    commit = await round_.propose(round_.north, round_.heads("n0", "n1"))
    assert reasons(commit) == {"below_minimum": 2}
    assert not commit.members


async def test_c2_the_minimum_of_devices_of_one_owner_is_not_committed(opened: Any) -> None:
    round_ = await opened(owners=dict.fromkeys(NORTH, "acme"), minimum_owners=2)
    commit = await round_.propose(round_.north, round_.heads(*NORTH[:3]))
    assert reasons(commit) == {"below_owners": 3}


async def test_c2_no_bucket_of_fewer_owners_than_a_sum_must_have_is_taken(opened: Any) -> None:
    owners = dict.fromkeys(NORTH[2:], "mallory") | {"n0": "victim", "n1": "another"}
    round_ = await opened(owners=owners, minimum_owners=3, bucket=5)
    commit = await round_.propose(round_.north)
    whole = round_.north.buckets(round_.plan, round_.ring, commit)
    assert [bucket.count for bucket in whole] == [10]
    parts = tuple(replace(whole[0], index=index, count=5) for index in range(2))
    await round_.refused(
        round_.north, Verb.REVEAL, round_.reveal(round_.north, buckets=parts), RejectReason.WRONG_SHAPE
    )
    await round_.world.deliver("north", Verb.REVEAL, round_.reveal(round_.north))
    assert round_.world.receipts("north")[-1].reason is None


async def test_c2_devices_without_an_owner_have_one_together(opened: Any) -> None:
    round_ = await opened(minimum_owners=2)
    assert reasons(await round_.propose(round_.north)) == {"below_owners": 10}


async def test_c2_two_owners_are_enough_for_two(opened: Any) -> None:
    round_ = await opened(owners={"n0": "acme"}, minimum_owners=2)
    assert members(await round_.propose(round_.north)) == 10


async def test_c2_a_cohort_that_exclusion_shrinks_below_the_minimum_is_not_committed(opened: Any) -> None:
    round_ = await opened(minimum_cohort=4)
    heads = [*round_.heads("s0", "s1", "s2"), round_.update("s3", change=spoilt).message.head.encode()]
    assert reasons(await round_.propose(round_.south, heads)) == {"bad_box": 1, "below_minimum": 3}


async def test_c2_a_proposal_of_which_too_many_are_left_out_is_not_committed_at_all(opened: Any) -> None:
    round_ = await opened()
    bad = [round_.update(device, change=spoilt).message.head.encode() for device in NORTH[:3]]
    commit = await round_.propose(round_.north, bad + round_.heads(*NORTH[3:]))
    assert reasons(commit) == {"bad_box": 3, "too_many_excluded": 7}


@pytest.mark.parametrize("strikes", [0, 3])
async def test_c2_devices_with_junk_seals_stop_their_site_in_one_round_only(opened: Any, strikes: int) -> None:
    """Three that may not be left out would keep the other seven from ever being added up."""
    round_ = await opened(quarantine=QuarantineConfig(strikes=strikes))
    bad = [round_.update(device, change=spoilt).message.head.encode() for device in NORTH[:3]]
    forged = replace(round_.update("n9", change=spoilt).message.head, signature=bytes(64)).encode()
    commit = await round_.propose(round_.north, [*bad, forged, *round_.heads(*NORTH[3:])])
    assert reasons(commit) == {"bad_box": 3, "bad_signature": 1, "too_many_excluded": 7}
    await round_.world.pass_time(round_.plan.expires - round_.world.clock.now)
    await round_.world.pass_time(60_000)
    plan = round_.world.plan()[0]
    assert (plan.round, plan.eligibility.quarantined) == (2, ("n0", "n1", "n2") if strikes else ())


async def test_c2_two_left_out_are_not_too_many(opened: Any) -> None:
    round_ = await opened()
    bad = [round_.update(device, change=spoilt).message.head.encode() for device in NORTH[:2]]
    commit = await round_.propose(round_.north, bad + round_.heads(*NORTH[2:]))
    assert (members(commit), reasons(commit)) == (8, {"bad_box": 2})


async def test_c2_each_site_counts_for_itself(opened: Any) -> None:
    round_ = await opened()
    world = round_.world
    both = MaskedGateway(world.fleet, "north", NORTH[:4], below={"west": ["w0", "w1"]})
    heads = [both.update(d, round_.plan, round_.hash, round_.ring).message.head.encode() for d in both.devices]
    commit = await round_.propose(both, heads)
    assert (members(commit), reasons(commit)) == (4, {"below_minimum": 2})


async def test_c2_junk_in_the_name_of_a_site_does_not_count_against_it(opened: Any) -> None:
    round_ = await opened()
    junk = []
    for device in NORTH[:4]:
        head = round_.update(device).message.head
        junk.append(replace(head, signature=bytes(64)).encode())
    commit = await round_.propose(round_.north, round_.heads(*NORTH) + junk)
    assert (members(commit), reasons(commit)) == (10, {"bad_signature": 4})


# --- C3: heads of something else --------------------------------------------------------------------------------------


async def test_c3_heads_of_another_plan_or_round_are_left_out(opened: Any) -> None:
    round_ = await opened()
    other = masked_update(
        round_.world.fleet, "n0", "north", round_.plan, Digest(bytes(32)), round_.ring, gateway_key=bytes(31) + b"\x09"
    )
    later = round_.update("n1", round=round_.plan.round + 1)
    heads = [other.message.head.encode(), later.message.head.encode(), *round_.heads(*NORTH[2:])]
    commit = await round_.propose(round_.north, heads)
    assert (members(commit), reasons(commit)) == (8, {"wrong_plan": 1, "wrong_round": 1})


async def test_c3_a_proposal_for_another_plan_is_refused(opened: Any) -> None:
    round_ = await opened()
    message = round_.north.propose(round_.plan, Digest(bytes(32)), round_.heads(*NORTH))
    await round_.refused(round_.north, Verb.PROPOSE, message, RejectReason.WRONG_PLAN)


async def test_c3_a_plain_update_in_a_masked_round_is_left_out(opened: Any) -> None:
    round_ = await opened()
    plain = update_of(round_.world.fleet, "n0", "north", round_.plan, round_.hash, round_.ring)
    commit = await round_.propose(round_.north, [plain.message.head.encode(), *round_.heads(*NORTH[1:])])
    assert (members(commit), reasons(commit)) == (9, {"wrong_shape": 1})


async def test_c3_a_masked_update_of_another_length_is_left_out(opened: Any) -> None:
    round_ = await opened()
    short = round_.update("n0", words=np.zeros(round_.ring.layout.n_words - 1, dtype=np.uint64))
    commit = await round_.propose(round_.north, [short.message.head.encode(), *round_.heads(*NORTH[1:])])
    assert reasons(commit) == {"wrong_shape": 1}


async def test_a_masked_update_in_a_plain_round_is_left_out(opened: Any) -> None:
    split = await opened()
    plain = await opened(mode=Mode.PLAIN)
    lying = replace(plain.plan, split=split.plan.split)
    update = masked_update(
        plain.world.fleet, "n0", "north", lying, plain.hash, plain.ring, gateway_key=plain.north.seal.public
    )
    proposal = ScriptedGateway.propose(plain.north, plain.plan, plain.hash, [update.message.head.encode()])
    await plain.world.deliver("north", Verb.PROPOSE, proposal)
    assert reasons(plain.world.commits("north")[-1][0]) == {"wrong_shape": 1}


# --- Boxes and seeds --------------------------------------------------------------------------------------------------


def spoilt(bound: Digest, boxes: tuple[bytes, ...]) -> tuple[bytes, ...]:
    del bound
    return (boxes[0], bytes(len(boxes[1])), *boxes[2:])


async def test_a_copied_box_under_a_sybils_id_opens_to_nothing(opened: Any) -> None:
    """The victim's masked vector and seed, sent again under other names, would make the sum a multiple of it."""
    round_ = await opened()
    taken: list[tuple[bytes, ...]] = []

    def remember(bound: Digest, boxes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        del bound
        taken.append(boxes)
        return boxes

    victim = round_.update("n0", change=remember)
    sybils = [round_.update(device, change=lambda bound, boxes: taken[0]) for device in NORTH[1:3]]
    heads = [each.message.head.encode() for each in (victim, *sybils)] + round_.heads(*NORTH[3:])
    commit = await round_.propose(round_.north, heads)
    assert (members(commit), reasons(commit)) == (8, {"bad_box": 2})


async def test_a_seed_sealed_for_the_gateway_is_not_one_for_the_coordinator(opened: Any) -> None:
    round_ = await opened()

    def misaddressed(bound: Digest, boxes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return boxes[0], seal(bytes(32), Reader.GATEWAY, bound, round_.plan.split.seal_key)

    heads = [round_.update("n0", change=misaddressed).message.head.encode(), *round_.heads(*NORTH[1:])]
    assert reasons(await round_.propose(round_.north, heads)) == {"bad_box": 1}


def same_seed(round_: Any) -> Callable[[Digest, tuple[bytes, ...]], tuple[bytes, ...]]:
    def change(bound: Digest, boxes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return boxes[0], seal(b"s" * 32, Reader.COORDINATOR, bound, round_.plan.split.seal_key)

    return change


async def test_the_later_of_two_updates_with_one_seed_is_left_out(opened: Any) -> None:
    round_ = await opened()
    heads = [round_.update(device, change=same_seed(round_)).message.head.encode() for device in NORTH[:2]]
    commit = await round_.propose(round_.north, heads + round_.heads(*NORTH[2:]))
    assert (members(commit), reasons(commit)) == (9, {"reused_seed": 1})


@pytest.mark.parametrize("restart", [False, True])
async def test_a_seed_counts_once_over_all_gateways_and_restarts(opened: Any, restart: bool) -> None:
    round_ = await opened()
    for gateway, device in ((round_.north, "n0"), (round_.south, "s0")):
        others = [other for other in gateway.devices if other != device]
        heads = [round_.update(device, change=same_seed(round_)).message.head.encode(), *round_.heads(*others)]
        commit = await round_.propose(gateway, heads)
        if restart:
            await round_.world.restart()
    assert reasons(commit) == {"reused_seed": 1}


async def test_a_revocation_that_comes_after_the_update_acts_at_the_commit(opened: Any) -> None:
    round_ = await opened()
    heads = round_.heads(*NORTH)
    serial = round_.world.fleet.identities["n4"].certificate.serial
    round_.world.coordinator.verifier.revoke(Revocations(version=1, serials=(serial,)))
    commit = await round_.propose(round_.north, heads)
    assert (members(commit), reasons(commit)) == (9, {"revoked": 1})


async def test_a_device_is_committed_once_over_all_gateways(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    again = round_.update("n0").message.head.encode()
    commit = await round_.propose(round_.south, [again, *round_.heads(*SOUTH)])
    assert (members(commit), reasons(commit)) == (4, {"duplicate": 1})
