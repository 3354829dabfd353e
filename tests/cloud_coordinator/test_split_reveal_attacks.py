"""Attacks on the sums of masked rounds, by name, with the refusals of the specification (C4 and C5).

Each is refused with its own reason, counted, and leaves the stored facts as they were.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from fleetfed_testing.cloud import facts
from fleetfed_testing.masked_cloud import ScriptedHelper
from fleetfed_testing.open_round import NORTH, reasons

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import messages
from fleetfed.shared.wire.envelope import BODY_LIMITS, Digest, MessageKind
from fleetfed.shared.wire.masking import NonceHash
from fleetfed.shared.wire.messages import Commit, Life, Revocations
from fleetfed.shared.wire.topics import VERBS, Kind, Verb

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
