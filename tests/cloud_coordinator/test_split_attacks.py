"""Attacks on masked rounds, by name, with the refusals of the specification (C1 to C5).

Each is refused with its own reason, counted, and leaves the stored facts as they were.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, Update, World, facts, update_of
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper, masked_update

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.quarantine import QuarantineConfig
from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.secure.box import Reader, seal
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import messages
from fleetfed.shared.wire.envelope import BODY_LIMITS, Digest, MessageKind
from fleetfed.shared.wire.masking import NonceHash
from fleetfed.shared.wire.messages import Commit, Life, Mode, Plan, Revocations
from fleetfed.shared.wire.topics import VERBS, Kind, Verb

NORTH = [f"n{i}" for i in range(10)]
SOUTH = [f"s{i}" for i in range(4)]


@dataclass
class Open:
    """A world with an open split round and two gateways."""

    world: World
    north: MaskedGateway
    south: MaskedGateway
    helper: ScriptedHelper
    plan: Plan
    hash: Digest
    ring: Ring

    def update(self, device: str, **changes: Any) -> Update:
        gateway = self.north if device in self.north.site_of else self.south
        return gateway.update(device, self.plan, self.hash, self.ring, **changes)

    def heads(self, *devices: str) -> list[bytes]:
        return [self.update(device).message.head.encode() for device in devices]

    async def propose(self, gateway: MaskedGateway, heads: list[bytes] | None = None, **changes: Any) -> Commit:
        heads = self.heads(*gateway.devices) if heads is None else heads
        message = gateway.propose(self.plan, self.hash, heads, **changes)
        await self.world.deliver(gateway.name, Verb.PROPOSE, message)
        return self.world.commits(gateway.name)[-1][0]

    def reveal(self, gateway: MaskedGateway, **changes: Any) -> Message:
        commit, commit_hash, _ = self.world.commits(gateway.name)[-1]
        return gateway.reveal(self.plan, self.ring, commit, commit_hash, **changes)

    async def refused(self, gateway: ScriptedGateway, verb: Verb, message: Message, reason: RejectReason) -> None:
        """The message is refused with this reason, to its sender too, and nothing has changed."""
        before = facts(self.world)
        count = self.world.coordinator.rejected.snapshot().get(reason, 0)
        await self.world.deliver(gateway.name, verb, message)
        assert facts(self.world) == before
        assert self.world.coordinator.rejected.snapshot()[reason] > count
        receipt = self.world.receipts(gateway.name)[-1]
        assert (receipt.reason, receipt.message_id, receipt.head) == (reason, message.id, message.head.hash)


def reasons(commit: Commit) -> dict[str, int]:
    return dict(Counter(commit.excluded.values()))


def members(commit: Commit) -> int:
    return len(commit.members) // 16


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    made: list[World] = []

    async def make(owners: dict[str, str] | None = None, **changes: Any) -> Open:
        settings: dict[str, Any] = {"mode": Mode.SPLIT, "minimum_cohort": 3, "weight_cap": 50, "start_when": 14}
        fleet = Fleet()
        fleet.owners |= owners or {}
        world = World(tmp_path / str(len(made)), fleet=fleet, rounds=RoundSettings(**{**settings, **changes}))
        made.append(world)
        north, south = MaskedGateway(fleet, "north", NORTH), MaskedGateway(fleet, "south", SOUTH)
        helper = ScriptedHelper(fleet)
        if changes.get("seed_holders") == 2:
            await helper.join(world)
        await world.join(north, south)
        return Open(world, north, south, helper, *world.plan())

    yield make
    for world in made:
        world.coordinator.machine.validate()
        await world.close()


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


# --- C4: reveals ------------------------------------------------------------------------------------------------------


async def test_c4_a_reveal_without_a_commit_is_refused(opened: Any) -> None:
    round_ = await opened()
    commit = Commit(plan=round_.hash, gateway="north", proposal=bytes(32), members=b"")
    message = round_.north.reveal(round_.plan, round_.ring, commit, Digest(bytes(32)))
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.NOT_PROPOSED)


async def test_c4_a_gateway_that_refuses_its_commit_is_waited_for_no_longer(opened: Any) -> None:
    """It says so with a reason that is counted and shown; the others' sums make a version."""
    round_ = await opened(quorum_minimum=3)
    await round_.propose(round_.north)
    await round_.propose(round_.south)
    nothing = {"count": 0, "words": b"", "reason": RejectReason.BELOW_OWNERS, "detail": "1 of 2 owners"}
    refusal = round_.reveal(round_.north, **nothing)
    await round_.world.deliver("north", Verb.REVEAL, refusal)
    receipt = round_.world.receipts("north")[-1]
    assert (receipt.reason, receipt.message_id) == (None, refusal.id), "it is right to"
    await round_.world.restart()
    await round_.world.deliver("north", Verb.REVEAL, refusal)
    assert round_.world.receipts("north")[-1] == receipt
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north), RejectReason.CONFLICT)
    await round_.world.deliver("south", Verb.REVEAL, round_.reveal(round_.south))
    assert round_.world.store.newest_version().version == 2
    row = dict(round_.world.coordinator.history[-1])
    assert (row["contributors"], row["committed"], row["failed_reveals"]) == (4, 14, {"below_owners": 1})


@pytest.mark.parametrize("more", [{"count": 10}, {"words": bytes(8)}])
async def test_c4_a_refusal_that_holds_a_sum_is_refused(opened: Any, more: dict[str, Any]) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    changes = {"count": 0, "words": b"", "reason": RejectReason.BELOW_OWNERS} | more
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, **changes), RejectReason.WRONG_SHAPE)


async def test_c4_a_refusal_after_a_sum_that_waits_for_the_helper_is_a_conflict(opened: Any) -> None:
    round_ = await opened(seed_holders=2)
    await round_.propose(round_.north)
    await round_.world.deliver("north", Verb.REVEAL, round_.reveal(round_.north))
    refusal = round_.reveal(round_.north, count=0, words=b"", reason=RejectReason.BELOW_OWNERS)
    await round_.refused(round_.north, Verb.REVEAL, refusal, RejectReason.CONFLICT)


async def test_c4_a_reveal_for_another_commit_is_refused(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    await round_.propose(round_.south)
    other = round_.world.commits("south")[-1]
    message = round_.reveal(round_.north, commit=other[1])
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.NOT_PROPOSED)


async def test_c4_a_second_different_reveal_is_a_conflict(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    await round_.propose(round_.south)
    first = round_.reveal(round_.north)
    await round_.world.deliver("north", Verb.REVEAL, first)
    assert round_.world.receipts("north")[-1].reason is None
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north), RejectReason.CONFLICT)
    await round_.world.deliver("north", Verb.REVEAL, first)
    assert round_.world.receipts("north")[-1].reason is None


async def test_c4_a_second_reveal_after_one_that_failed_is_a_conflict_over_restarts_too(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.south)
    await round_.propose(round_.north)
    wrong = round_.reveal(round_.north, words=bytes(8 * round_.ring.layout.n_words))
    await round_.world.deliver("north", Verb.REVEAL, wrong)
    assert round_.world.receipts("north")[-1].reason is RejectReason.OUT_OF_RANGE
    await round_.world.restart()
    await round_.world.deliver("north", Verb.REVEAL, wrong)
    assert round_.world.receipts("north")[-1].reason is RejectReason.OUT_OF_RANGE
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north), RejectReason.CONFLICT)


async def test_c4_a_second_reveal_while_the_helper_is_waited_for_is_a_conflict(opened: Any) -> None:
    round_ = await opened(seed_holders=2)
    await round_.propose(round_.north)
    await round_.propose(round_.south)
    first = round_.reveal(round_.north)
    await round_.world.deliver("north", Verb.REVEAL, first)
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north), RejectReason.CONFLICT)
    await round_.world.deliver("north", Verb.REVEAL, first)
    assert len(round_.helper.asked(round_.world)) == 1


async def test_a_reveal_that_leaves_one_member_out_is_a_wrong_sum(opened: Any) -> None:
    round_ = await opened()
    commit = await round_.propose(round_.north)
    await round_.propose(round_.south)
    ids = [commit.members[i : i + 16] for i in range(0, len(commit.members), 16)]
    words = round_.north.masked_sum(ids[1:], round_.ring).astype("<u8").tobytes()
    await round_.world.deliver("north", Verb.REVEAL, round_.reveal(round_.north, words=words))
    assert round_.world.receipts("north")[-1].reason is RejectReason.OUT_OF_RANGE
    assert round_.world.coordinator.machine.round.revealed == 0


async def test_a_reveal_that_counts_others_than_the_commit_is_refused(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, count=9), RejectReason.OUT_OF_RANGE)


@pytest.mark.parametrize("size", [0, 8, -8])
async def test_words_of_another_length_are_refused(opened: Any, size: int) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    words = bytes(8 * round_.ring.layout.n_words + size if size else 0)
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, words=words), RejectReason.WRONG_SHAPE)


async def test_a_reveal_much_larger_than_due_is_refused_by_its_head(opened: Any) -> None:
    round_ = await opened()
    await round_.propose(round_.north)
    message = round_.reveal(round_.north, words=os.urandom(16 * round_.ring.layout.n_words + 5000))
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.TOO_LARGE)


async def test_buckets_that_are_not_due_are_refused(opened: Any) -> None:
    round_ = await opened(bucket=3)
    await round_.propose(round_.north)
    commit, _, _ = round_.world.commits("north")[-1]
    right = round_.north.buckets(round_.plan, round_.ring, commit)
    words = right[0].words
    for buckets in (
        right[:-1],
        [*right, right[0]],
        [*right[:-1], replace(right[-1], index=len(right))],
        [replace(right[0], count=right[0].count + 1), *right[1:]],
        [replace(right[0], site="south"), *right[1:]],
        [],
    ):
        message = round_.reveal(round_.north, buckets=tuple(buckets))
        await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.WRONG_SHAPE)
    both = round_.reveal(round_.north, words=words)
    await round_.refused(round_.north, Verb.REVEAL, both, RejectReason.WRONG_SHAPE)


async def test_a_gateway_cannot_choose_its_share_of_the_coin_after_the_commit(opened: Any) -> None:
    round_ = await opened(bucket=3)
    await round_.propose(round_.north)
    commit, _, _ = round_.world.commits("north")[-1]
    right = round_.north.buckets(round_.plan, round_.ring, commit)
    other = tuple(replace(bucket, nonce=b"x" * 16) for bucket in right)
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, buckets=other), RejectReason.BAD_NONCE)
    two = (replace(right[0], nonce=b"x" * 16), *right[1:])
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, buckets=two), RejectReason.BAD_NONCE)


@pytest.mark.parametrize("names", [(), ("north", "north")])
async def test_a_site_that_has_not_committed_to_its_nonce_is_left_out(opened: Any, names: tuple[str, ...]) -> None:
    round_ = await opened(bucket=3)
    nonces = tuple(NonceHash(site=name, hash=bytes(32)) for name in names)
    assert reasons(await round_.propose(round_.north, nonces=nonces)) == {"bad_nonce": 10}


# --- C5: what there is no message for ---------------------------------------------------------------------------------


def test_c5_no_message_asks_for_a_seed_or_carries_a_single_masked_vector_upwards() -> None:
    """What may be said to the coordinator, by whom, and what it says: a new way to ask would have to be added here."""
    up = {verb for verb, rule in VERBS.items() if Kind.GATEWAY in rule.kinds and rule.direction == "up"}
    assert up == {Verb.STATE, Verb.NEED, Verb.CENSUS, Verb.LINK, Verb.PROPOSE, Verb.REVEAL}
    down = {verb for verb, rule in VERBS.items() if Kind.GATEWAY in rule.kinds and rule.direction == "dn"}
    assert down == {Verb.RECEIPT, Verb.COMMIT}
    assert set(BODY_LIMITS) == set(MessageKind)
    assert set(messages.Commit.__dataclass_fields__) == {
        "plan", "gateway", "proposal", "members", "excluded", "nonce",
    }  # fmt: skip
    assert set(messages.Receipt.__dataclass_fields__) == {"message_id", "head", "reason", "detail"}


async def test_c5_a_proposal_with_bodies_is_left_out(opened: Any) -> None:
    round_ = await opened()
    whole = [round_.update(device).message.encode() for device in NORTH]
    assert reasons(await round_.propose(round_.north, whole)) == {"malformed": 10}


async def test_no_seed_key_or_secret_is_logged(opened: Any, caplog: Any) -> None:
    with caplog.at_level("DEBUG"):
        round_ = await opened()
        secret = round_.world.coordinator.current.secret.encode()
        await round_.propose(round_.north)
        await round_.propose(round_.south)
        await round_.world.deliver("north", Verb.REVEAL, round_.reveal(round_.north))
    assert secret.hex() not in caplog.text
    assert repr(secret) not in caplog.text
    assert secret.hex() not in repr(round_.world.coordinator.current)


# --- The helper -------------------------------------------------------------------------------------------------------


async def helped(opened: Any, **changes: Any) -> Any:
    round_ = await opened(seed_holders=2, **changes)
    for gateway in (round_.north, round_.south):
        await round_.propose(gateway)
    await round_.world.deliver("north", Verb.REVEAL, round_.reveal(round_.north))
    return round_


async def masks_refused(round_: Any, helper: ScriptedHelper, message: Message, reason: RejectReason) -> None:
    before = facts(round_.world)
    count = round_.world.coordinator.rejected.snapshot().get(reason, 0)
    await helper.say(round_.world, message)
    assert facts(round_.world) == before
    assert round_.world.coordinator.rejected.snapshot()[reason] == count + 1


async def test_masks_of_another_helper_are_refused(opened: Any) -> None:
    round_ = await helped(opened)
    other = ScriptedHelper(round_.world.fleet, "h-other")
    other.seal = round_.helper.seal
    request, _ = round_.helper.asked(round_.world)[0]
    await masks_refused(round_, other, other.answer(round_.world, request), RejectReason.WRONG_SENDER)


async def test_masks_signed_by_a_gateway_are_refused(opened: Any) -> None:
    round_ = await helped(opened)
    request, _ = round_.helper.asked(round_.world)[0]
    liar = ScriptedHelper(round_.world.fleet)
    liar.signer = round_.world.fleet.signer(Role.GATEWAY, "south", "south")
    await masks_refused(round_, liar, liar.answer(round_.world, request), RejectReason.WRONG_ROLE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plan": bytes(32)}, RejectReason.WRONG_PLAN),
        ({"commit": bytes(32)}, RejectReason.NOT_PROPOSED),
        ({"gateway": "south"}, RejectReason.NOT_PROPOSED),
        ({"gateway": "nobody"}, RejectReason.NOT_PROPOSED),
        ({"sums": (b"",)}, RejectReason.WRONG_SHAPE),
        ({"sums": (b"", b"")}, RejectReason.WRONG_SHAPE),
    ],
)
async def test_masks_that_answer_something_else_are_refused(
    opened: Any, changes: dict[str, Any], reason: RejectReason
) -> None:
    round_ = await helped(opened)
    request, _ = round_.helper.asked(round_.world)[0]
    await masks_refused(round_, round_.helper, round_.helper.answer(round_.world, request, **changes), reason)
    await round_.helper.answer_all(round_.world)
    assert round_.world.receipts("north")[-1].reason is None


async def test_wrong_masks_make_a_wrong_sum(opened: Any) -> None:
    round_ = await helped(opened)
    request, _ = round_.helper.asked(round_.world)[0]
    wrong = (os.urandom(8 * round_.ring.layout.n_words),)
    await round_.helper.say(round_.world, round_.helper.answer(round_.world, request, sums=wrong))
    assert round_.world.receipts("north")[-1].reason is RejectReason.OUT_OF_RANGE


async def test_the_helpers_answer_twice_changes_nothing_the_second_time(opened: Any) -> None:
    round_ = await helped(opened)
    await round_.helper.answer_all(round_.world)
    before = facts(round_.world)
    await round_.helper.answer_all(round_.world)
    assert facts(round_.world) == before
    topic = round_.world.topics.down(Kind.HELPER, "h-main", Verb.RECEIPT)
    assert sum(sent == topic for sent, _, _ in round_.world.sent.packets) == 2


async def test_a_key_in_anothers_name_and_an_older_one_are_refused(opened: Any) -> None:
    round_ = await opened(seed_holders=2)
    world, helper = round_.world, round_.helper
    old, now = helper.key(now=world.clock.now - 10_000_000), world.clock.now
    before = world.coordinator.helpers.fresh(now=now, until=now)
    await helper.hear(world, Verb.KEY, helper.key(now=now, helper="h-other"))
    await helper.hear(world, Verb.KEY, old)
    assert world.coordinator.helpers.fresh(now=now, until=now) == before
    assert world.coordinator.rejected.snapshot() == {"wrong_sender": 1, "replayed": 1}


async def test_a_revoked_helpers_key_opens_no_round(opened: Any) -> None:
    round_ = await opened(seed_holders=2)
    world = round_.world
    serial = world.fleet.identities["h-main"].certificate.serial
    world.coordinator.verifier.revoke(Revocations(version=1, serials=(serial,)))
    assert world.coordinator.helpers.fresh(now=world.clock.now, until=world.clock.now) is None
    await round_.helper.join(world, Life.DISCONNECTED, session=9)
    assert not world.coordinator.helpers.ready
