"""Attacks on a round, by name: each is refused with its own reason and changes nothing that is stored."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, Update, World, facts, update_of

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.shared.aggregate.accumulator import Accumulator, Ring, encode_words
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import BODY_LIMITS, HEADER_SIZE, Digest, MessageKind
from fleetfed.shared.wire.messages import Commit, Life, Need, Plan, Presence, Revocations
from fleetfed.shared.wire.topics import Kind, Verb


@dataclass
class Open:
    """A world with an open round and two gateways."""

    world: World
    north: ScriptedGateway
    south: ScriptedGateway
    plan: Plan
    hash: Digest
    ring: Ring

    def updates(self, gateway: ScriptedGateway) -> list[Update]:
        return gateway.train(self.plan, self.hash, self.ring)

    def proposal(self, gateway: ScriptedGateway, heads: list[bytes] | None = None, **changes: object) -> Message:
        if heads is None:
            heads = [update.message.head.encode() for update in self.updates(gateway)]
        return gateway.propose(self.plan, self.hash, heads, **changes)

    async def propose(self, gateway: ScriptedGateway, heads: list[bytes] | None = None) -> Commit:
        await self.world.deliver(gateway.name, Verb.PROPOSE, self.proposal(gateway, heads))
        return self.world.commits(gateway.name)[-1][0]

    def reveal(self, gateway: ScriptedGateway, **changes: object) -> Message:
        commit, commit_hash, _ = self.world.commits(gateway.name)[-1]
        return gateway.reveal(self.plan, self.ring, commit, commit_hash, **changes)

    def update(self, device: str, site: str = "north", **changes: object) -> Update:
        return update_of(self.world.fleet, device, site, self.plan, self.hash, self.ring, **changes)

    async def refused(self, gateway: ScriptedGateway, verb: Verb, message: Message, reason: RejectReason) -> None:
        """The message is refused with this reason, to its sender too, and nothing has changed."""
        before = facts(self.world)
        count = self.world.coordinator.rejected.snapshot().get(reason, 0)
        await self.world.deliver(gateway.name, verb, message)
        assert facts(self.world) == before
        assert self.world.coordinator.rejected.snapshot()[reason] > count
        receipt = self.world.receipts(gateway.name)[-1]
        assert (receipt.reason, receipt.message_id, receipt.head) == (reason, message.id, message.head.hash)


def reasons(commit: Commit) -> list[str]:
    return sorted(commit.excluded.values())


def with_head(message: Message, **changes: object) -> Message:
    return Message(replace(message.head, **changes), message.body)  # type: ignore[arg-type]


@pytest.fixture
async def round_(tmp_path: Path) -> AsyncIterator[Open]:
    world = World(tmp_path, rounds=RoundSettings(weight_cap=50, start_when=5, cohort_cap=6))
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    south = ScriptedGateway(world.fleet, "south", ["d", "e"])
    await world.join(north, south)
    yield Open(world, north, south, *world.plan())
    world.coordinator.machine.validate()
    await world.close()


async def test_the_same_proposal_again_gets_the_stored_commit(round_: Open) -> None:
    proposal = round_.proposal(round_.north)
    for _ in range(2):
        await round_.world.deliver("north", Verb.PROPOSE, proposal)
    first, second = round_.world.commits("north")
    assert first == second
    assert len(first[0].members) == 3 * 16


async def test_a_second_different_proposal_is_a_conflict(round_: Open) -> None:
    await round_.propose(round_.north)
    await round_.refused(round_.north, Verb.PROPOSE, round_.proposal(round_.north, []), RejectReason.CONFLICT)


async def test_a_forged_head_is_left_out(round_: Open) -> None:
    good, *_ = round_.updates(round_.north)
    forged = bytearray(good.message.head.encode())
    forged[HEADER_SIZE + 4] ^= 1
    commit = await round_.propose(round_.north, [bytes(forged)])
    assert reasons(commit) == ["bad_signature"]
    assert not commit.members


async def test_a_device_of_another_authority_is_left_out(round_: Open) -> None:
    stranger = update_of(Fleet(), "x", "north", round_.plan, round_.hash, round_.ring)
    assert reasons(await round_.propose(round_.north, [stranger.message.head.encode()])) == ["bad_certificate"]


async def test_an_update_signed_by_a_gateway_is_left_out(round_: Open) -> None:
    good, *_ = round_.updates(round_.north)
    forged = round_.north.signer.sign_raw(
        MessageKind.UPDATE,
        good.message.body,
        raw_size=good.message.head.header.raw_size,
        compressed=True,
        now=round_.plan.opened,
        round=1,
        extension=good.message.head.extension,
    )
    assert reasons(await round_.propose(round_.north, [forged.head.encode()])) == ["wrong_role"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 7}, "wrong_round"),
        ({"plan": b"p" * 32}, "wrong_plan"),
        ({"model_sha256": b"m" * 32}, "wrong_model"),
        ({"dimension": 3}, "wrong_shape"),
        ({"bits": 3}, "wrong_shape"),
        ({"meta_words": 1}, "wrong_shape"),
        ({"mode": 9}, "wrong_shape"),
    ],
)
async def test_an_update_for_something_else_is_left_out(round_: Open, changes: dict[str, object], reason: str) -> None:
    head = round_.update("a", **changes).message.head.encode()
    assert reasons(await round_.propose(round_.north, [head])) == [reason]


@pytest.mark.parametrize("head", [b"x", b"FFM1" + bytes(300), random.Random(1).randbytes(500)])
async def test_a_head_that_is_none_is_left_out(round_: Open, head: bytes) -> None:
    commit = await round_.propose(round_.north, [head])
    assert reasons(commit) in (["truncated"], ["malformed"], ["unknown_version"])


async def test_a_device_in_two_proposals_counts_for_the_first(round_: Open) -> None:
    shared = round_.update("a", "north").message.head.encode()
    first = await round_.propose(round_.north, [shared])
    second = await round_.propose(round_.south, [shared])
    assert len(first.members) == 16
    assert not second.members
    assert reasons(second) == ["duplicate"]


async def test_two_updates_of_one_device_count_for_the_first(round_: Open) -> None:
    heads = [round_.update("a", seed=seed).message.head.encode() for seed in (1, 2)]
    commit = await round_.propose(round_.north, heads)
    assert len(commit.members) == 16
    assert reasons(commit) == ["duplicate"]


async def test_more_than_the_cohort_are_left_out(round_: Open) -> None:
    heads = [round_.update(f"m{i}").message.head.encode() for i in range(8)]
    commit = await round_.propose(round_.north, heads)
    assert len(commit.members) == 6 * 16
    assert reasons(commit) == ["cohort_full"] * 2


async def _revoke(round_: Open, name: str) -> None:
    from fleetfed.shared.wire.messages import Command

    serial = round_.world.fleet.identities[name].certificate.serial
    authority = round_.world.fleet.signer(Role.AUTHORITY, "authority", "_")
    signed = authority.sign(
        MessageKind.REVOCATIONS, Revocations(version=1, serials=(serial,)), now=round_.world.clock.now
    )
    assert (await round_.world.ask(Command.KEYS_REVOKE, revocations=signed.encode())).error == ""


async def test_a_device_revoked_between_ingest_and_commit_is_left_out(round_: Open) -> None:
    heads = [update.message.head.encode() for update in round_.updates(round_.north)]
    await _revoke(round_, "b")
    commit = await round_.propose(round_.north, heads)
    assert len(commit.members) == 2 * 16
    assert reasons(commit) == ["revoked"]


async def test_a_gateway_whose_certificate_has_ended_is_not_there_whatever_the_broker_kept(round_: Open) -> None:
    world = round_.world
    for until, there in ((world.clock.now, True), (world.clock.now - 1, False)):
        said = Presence(life=Life.READY, session=7, until=until)
        await world.hear("north", Verb.STATE, codec.encode(said))
        assert ("north" in world.coordinator.fleet_summary().gateways) is there


async def test_a_proposal_for_another_plan_is_refused(round_: Open) -> None:
    other = round_.north.propose(round_.plan, Digest(b"p" * 32), [])
    await round_.refused(round_.north, Verb.PROPOSE, other, RejectReason.WRONG_PLAN)


async def test_a_proposal_for_another_round_is_refused(round_: Open) -> None:
    other = round_.north.propose(replace(round_.plan, round=9), round_.hash, [])
    await round_.refused(round_.north, Verb.PROPOSE, other, RejectReason.WRONG_ROUND)
    before = round_.north.propose(replace(round_.plan, round=0), round_.hash, [])
    await round_.refused(round_.north, Verb.PROPOSE, before, RejectReason.LATE)


async def test_a_proposal_on_another_gateways_topic_is_refused(round_: Open) -> None:
    await round_.refused(round_.south, Verb.PROPOSE, round_.proposal(round_.north), RejectReason.WRONG_SENDER)


async def test_a_proposal_with_a_forged_signature_is_refused(round_: Open) -> None:
    message = with_head(round_.proposal(round_.north), signature=bytes(64))
    await round_.refused(round_.north, Verb.PROPOSE, message, RejectReason.BAD_SIGNATURE)


async def test_a_proposal_with_another_body_is_refused(round_: Open) -> None:
    message = round_.proposal(round_.north)
    changed = Message(message.head, message.body[:-1] + bytes([message.body[-1] ^ 1]))
    await round_.refused(round_.north, Verb.PROPOSE, changed, RejectReason.BODY_MISMATCH)


async def test_a_reveal_without_a_commit_is_refused(round_: Open) -> None:
    await round_.propose(round_.south)
    commit, commit_hash, _ = round_.world.commits("south")[0]
    round_.north.updates |= round_.south.updates
    foreign = round_.north.reveal(round_.plan, round_.ring, commit, commit_hash)
    await round_.refused(round_.north, Verb.REVEAL, foreign, RejectReason.NOT_PROPOSED)


async def test_a_reveal_of_another_commit_is_refused(round_: Open) -> None:
    await round_.propose(round_.north)
    message = round_.reveal(round_.north, commit=b"c" * 32)
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.NOT_PROPOSED)


async def test_a_reveal_of_another_count_is_refused(round_: Open) -> None:
    await round_.propose(round_.north)
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north, count=2), RejectReason.OUT_OF_RANGE)


async def test_a_reveal_whose_sum_has_another_count_is_refused(round_: Open) -> None:
    await round_.propose(round_.north)
    total = Accumulator(round_.ring, capacity=6)
    for update in list(round_.north.updates.values())[:2]:
        total.accumulate(update.values, update.meta)
    message = round_.reveal(round_.north, words=encode_words(total.report()))
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.OUT_OF_RANGE)


async def test_a_reveal_out_of_range_is_refused(round_: Open) -> None:
    from fleetfed.shared.aggregate.body import encode_body

    await round_.propose(round_.north)
    limit = round_.ring.limit(6)
    meta = sum(update.meta for update in round_.north.updates.values())
    values = np.full(round_.plan.dimension, limit, dtype=np.int16)
    message = round_.reveal(round_.north, words=encode_body(values, np.asarray(meta), limit=limit))
    await round_.refused(round_.north, Verb.REVEAL, message, RejectReason.OUT_OF_RANGE)


async def test_a_reveal_that_is_noise_is_refused(round_: Open) -> None:
    await round_.propose(round_.north)
    before = facts(round_.world)
    await round_.world.deliver(
        "north", Verb.REVEAL, round_.reveal(round_.north, words=b"\x28\xb5\x2f\xfd" + b"\xff" * 40)
    )
    assert facts(round_.world) == before
    assert round_.world.receipts("north")[-1].reason is not None


async def test_a_reveal_too_large_for_its_plan_is_refused_by_its_head(round_: Open) -> None:
    await round_.propose(round_.north)
    message = round_.reveal(round_.north, words=os.urandom(200_000))
    before = facts(round_.world)
    await round_.world.hear("north", Verb.REVEAL, split(message.id, message.encode())[0])
    assert facts(round_.world) == before
    assert round_.world.receipts("north")[-1].reason is RejectReason.TOO_LARGE


@pytest.mark.parametrize("verb", [Verb.PROPOSE, Verb.REVEAL])
async def test_a_compressed_body_reserves_no_more_than_its_plan_needs(round_: Open, verb: Verb) -> None:
    """A head may promise half a gigabyte as sent that is ten bytes once decompressed."""
    await round_.propose(round_.north)
    kind = MessageKind.PROPOSE if verb is Verb.PROPOSE else MessageKind.REVEAL
    huge = bytes(BODY_LIMITS[MessageKind.PROPOSE])
    message = round_.north.signer.sign_raw(
        kind, huge, raw_size=10, compressed=True, now=round_.plan.opened, round=round_.plan.round
    )
    await round_.world.hear("north", verb, split(message.id, message.encode())[0])
    assert round_.world.inbox._assemblers["north", verb].reserved == 0
    assert round_.world.receipts("north")[-1].reason is RejectReason.TOO_LARGE


async def test_the_same_reveal_again_gets_the_stored_receipt(round_: Open) -> None:
    await round_.propose(round_.north)
    await round_.propose(round_.south)
    message = round_.reveal(round_.north)
    for _ in range(2):
        await round_.world.deliver("north", Verb.REVEAL, message)
    topic = round_.world.topics.down(Kind.GATEWAY, "north", Verb.RECEIPT)
    stored = [payload for sent, payload, _ in round_.world.sent.packets if sent == topic]
    assert len(stored) == 2
    assert stored[0] == stored[1]
    await round_.refused(round_.north, Verb.REVEAL, round_.reveal(round_.north), RejectReason.CONFLICT)


async def test_a_repeated_message_of_a_finished_round_gets_its_first_answer(round_: Open) -> None:
    proposal = round_.proposal(round_.north)
    await round_.world.deliver("north", Verb.PROPOSE, proposal)
    await round_.propose(round_.south)
    reveal = round_.reveal(round_.north)
    await round_.world.deliver("north", Verb.REVEAL, reveal)
    await round_.world.deliver("south", Verb.REVEAL, round_.reveal(round_.south))
    assert round_.world.manifest().version == 2
    before = facts(round_.world)
    await round_.world.deliver("north", Verb.PROPOSE, proposal)
    await round_.world.deliver("north", Verb.REVEAL, reveal)
    assert facts(round_.world) == before
    assert len({message for _, _, message in round_.world.commits("north")}) == 1
    assert [receipt.reason for receipt in round_.world.receipts("north")] == [None, None]
    late = round_.proposal(round_.north, [])
    await round_.refused(round_.north, Verb.PROPOSE, late, RejectReason.LATE)


@pytest.mark.parametrize("payload", [b"", b"x", random.Random(1).randbytes(40), b"FFC1" + bytes(60)])
@pytest.mark.parametrize("verb", [Verb.PROPOSE, Verb.REVEAL, Verb.CENSUS, Verb.STATE, Verb.NEED])
async def test_noise_changes_nothing(round_: Open, verb: Verb, payload: bytes) -> None:
    if verb is Verb.STATE and not payload:
        return
    before = facts(round_.world)
    await round_.world.hear("north", verb, payload)
    assert facts(round_.world) == before


async def test_a_census_of_another_site_or_gateway_is_refused(round_: Open) -> None:
    world = round_.world
    await world.hear("north", Verb.CENSUS, round_.north.census(site="south", ready=99))
    await world.hear("south", Verb.CENSUS, round_.north.census(ready=99))
    assert world.coordinator.machine.fleet.devices == 5
    assert world.coordinator.rejected.snapshot() == {"wrong_sender": 1, "wrong_site": 1}


async def test_no_round_is_opened_for_a_gateway_whose_bridge_is_down(round_: Open) -> None:
    world, fleet = round_.world, round_.world.coordinator.machine
    await world.hear("north", Verb.LINK, b"0")
    assert fleet.fleet.gateways == {"south"}
    await world.hear("north", Verb.STATE, round_.north.presence(session=9))
    assert fleet.fleet.gateways == {"south"}, "an old word that the broker kept"
    await world.hear("north", Verb.LINK, b"1")
    assert fleet.fleet.gateways == {"north", "south"}


async def test_a_revoked_gateway_is_neither_waited_for_nor_counted(round_: Open) -> None:
    world = round_.world
    assert world.coordinator.machine.round is not None
    retained = round_.north.presence(), round_.north.census(now=world.clock.now)
    await _revoke(round_, "north")
    for _ in range(2):
        assert world.coordinator.machine.fleet.gateways == {"south"}
        assert world.coordinator.machine.fleet.devices == len(round_.south.devices)
        # Its open round is the others' alone.
        assert "north" in world.coordinator.machine.fleet.stopped
        # The broker refuses its last word, so that this is what it goes on retaining.
        await world.restart()
        await world.join(round_.south)
        await world.hear("north", Verb.STATE, retained[0])
        await world.hear("north", Verb.CENSUS, retained[1])


async def test_a_bridge_says_three_words(round_: Open) -> None:
    before = facts(round_.world)
    await round_.world.hear("north", Verb.LINK, b"down")
    assert facts(round_.world) == before
    assert round_.world.coordinator.rejected.snapshot() == {"malformed": 1}


async def test_a_stale_will_does_not_make_a_gateway_lost(round_: Open) -> None:
    from fleetfed.shared.wire.messages import Life

    await round_.world.hear("north", Verb.STATE, round_.north.presence(session=2))
    await round_.world.hear("north", Verb.STATE, round_.north.presence(Life.LOST, session=1))
    assert "north" in round_.world.coordinator.machine.fleet.gateways
    await round_.world.hear("north", Verb.STATE, round_.north.presence(Life.LOST, session=2))
    assert "north" not in round_.world.coordinator.machine.fleet.gateways


async def test_needed_chunks_are_published_again_once(round_: Open) -> None:
    world = round_.world
    ref = world.manifest().full
    topic = world.topics.blob(ref.digest, 0)
    sent = sum(each == topic for each, _, _ in world.sent.packets)
    need = codec.encode(Need(digest=ref.digest, missing=(0, 5)))
    unknown = codec.encode(Need(digest=b"u" * 32, missing=(0,)))
    for payload in (need, need, unknown):
        await world.hear("north", Verb.NEED, payload)
    assert sum(each == topic for each, _, _ in world.sent.packets) == sent + 1


async def test_a_round_that_no_database_can_hold_is_refused(round_: Open) -> None:
    for number in (2**63, 2**64 - 1):
        other = round_.north.propose(replace(round_.plan, round=number), round_.hash, [])
        await round_.refused(round_.north, Verb.PROPOSE, other, RejectReason.WRONG_ROUND)


async def test_two_devices_under_one_message_id_count_for_the_first(round_: Open) -> None:
    for device in ("a", "b"):
        signer = round_.world.fleet.signer(Role.DEVICE, device, "north")
        signer._randomness = lambda size: b"i" * size
    commit = await round_.propose(round_.north)
    assert len(commit.members) == 2 * 16
    assert reasons(commit) == ["duplicate"]


async def test_counts_that_would_not_fit_are_refused_and_sums_of_large_ones_cut(round_: Open) -> None:
    for claim in (2**64 - 1, -1):
        impossible = round_.proposal(round_.north, declined={"busy": claim})
        await round_.refused(round_.north, Verb.PROPOSE, impossible, RejectReason.OUT_OF_RANGE)
    for gateway in (round_.north, round_.south):
        large = round_.proposal(gateway, declined={"busy": limits.MAX_TALLY})
        await round_.world.deliver(gateway.name, Verb.PROPOSE, large)
    for gateway in (round_.north, round_.south):
        await round_.world.deliver(gateway.name, Verb.REVEAL, round_.reveal(gateway))
    assert round_.world.end().version == 2
    assert round_.world.store.rounds(limit=2)[-1].report["declined"] == {"busy": limits.MAX_TALLY}


async def test_gateways_that_count_too_many_devices_do_not_stop_the_status(round_: Open) -> None:
    for gateway in (round_.north, round_.south):
        impossible = gateway.census(ready=2**63, answered=2**63, round=1)
        await round_.world.hear(gateway.name, Verb.CENSUS, impossible)
        large = gateway.census(ready=limits.MAX_TALLY, answered=limits.MAX_TALLY, round=1)
        await round_.world.hear(gateway.name, Verb.CENSUS, large)
    await round_.world.pass_time(1_000)
    assert round_.world.coordinator.rejected.snapshot() == {"out_of_range": 2}
    assert round_.world.coordinator.status().accepted == limits.MAX_TALLY


async def test_a_proposal_that_decompresses_to_more_than_its_cohort_can_need_is_refused(round_: Open) -> None:
    bomb = round_.north.signer.sign(MessageKind.PROPOSE, bytes(10_000_000), now=round_.plan.opened, round=1)
    assert len(bomb.body) < 10_000
    await round_.refused(round_.north, Verb.PROPOSE, bomb, RejectReason.TOO_LARGE)
