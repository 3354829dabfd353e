"""The helper's own checks and memory, asked by a whole coordinator: they agree on what is due, and on what is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import START, Fleet, ScriptedGateway, World
from fleetfed_testing.masked_cloud import MaskedGateway, ScriptedHelper

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.helper import events as ev
from fleetfed.cloud_coordinator.helper.checks import BadSeedsError, verify
from fleetfed.cloud_coordinator.helper.events import Key
from fleetfed.cloud_coordinator.helper.state import HelperMachine
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import split
from fleetfed.shared.wire.envelope import MessageKind, digest
from fleetfed.shared.wire.masking import MaskRequest, MaskSums
from fleetfed.shared.wire.messages import Commit, Mode, Revocations
from fleetfed.shared.wire.topics import Kind, Verb

DEVICES = [f"d{i}" for i in range(12)]
DAY = 86_400_000


class CheckingHelper(ScriptedHelper):
    """Answers by the code that ships: `verify`, then the machine."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self.verifier = fleet.member(Role.HELPER, self.name, "_").verifier()
        self.machine = HelperMachine(period=15 * DAY)
        self.machine.handle(ev.Started(), START)

    def key(self, *, now: int = START, lifetime: int = 30 * DAY, **changes: Any) -> bytes:
        """Its signed key, which it remembers."""
        message = super().key(now=now, lifetime=lifetime, **changes)
        key = Key(public=self.seal.public, message=message, issued=now, expires=now + lifetime)
        self.machine.handle(ev.KeyStored(key), now)
        return message

    def answer(self, world: World, request: MaskRequest, /, **changes: Any) -> Message:
        """Sums, or why there are none."""
        question, now = digest(codec.encode(request)), world.clock.now
        commit, head = world.opened(Commit, request.commit)
        fields: dict[str, Any] = {"commit": head.hash, "gateway": commit.gateway, "plan": commit.plan}
        try:
            job = verify(
                request,
                question,
                verifier=self.verifier,
                key=self.machine.key,
                secret=lambda public: self.seal,
                now=now,
            )
            (step,) = self.machine.handle(ev.Verified(job.claim), now)
            if isinstance(step, ev.Refuse):
                raise RemoteProtocolError(step.reason, step.detail)
            self.machine.handle(ev.AnswerStored(job.claim), now)
            fields["sums"] = job.add_up()
        except RemoteProtocolError as error:
            bad = error.devices if isinstance(error, BadSeedsError) else ()
            fields |= {"sums": (), "reason": error.reason, "detail": error.detail, "bad": bad}
        self.machine.validate()
        assert world.coordinator.current is not None
        number = world.coordinator.current.plan.round
        return self.signer.sign(MessageKind.MASK_SUMS, MaskSums(**{**fields, **changes}), now=now, round=number)


def settings(**changes: Any) -> RoundSettings:
    values: dict[str, Any] = {
        "mode": Mode.SPLIT,
        "seed_holders": 2,
        "minimum_cohort": 3,
        "weight_cap": 50,
        "start_when": len(DEVICES),
    }
    return RoundSettings(**{**values, **changes})


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[World] = []

    def make(**rounds: Any) -> World:
        made.append(World(tmp_path / str(len(made)), rounds=settings(**rounds)))
        return made[-1]

    yield make
    for world in made:
        world.coordinator.machine.validate()
        await world.close()


@pytest.mark.parametrize("bucket", [0, 3])
async def test_two_rounds_of_a_tree_give_the_versions_that_plain_ones_give(worlds: Any, bucket: int) -> None:
    plain = worlds(mode=Mode.PLAIN, seed_holders=1, rounds=2)
    flat = ScriptedGateway(plain.fleet, "g", DEVICES)
    await plain.join(flat)
    world = worlds(rounds=2, bucket=bucket)
    helper = CheckingHelper(world.fleet)
    top = MaskedGateway(world.fleet, "top", DEVICES[:6], below={"a-west": DEVICES[6:]})
    await helper.join(world)
    await world.join(top)
    for version in (2, 3):
        await plain.run_round(flat)
        await world.run_round(top)
        await helper.answer_all(world)
        assert world.receipts("top")[-1].reason is None
        newest = world.store.newest_version()
        assert newest.version == version
        assert newest.sha256 == plain.store.newest_version().sha256
        await plain.pass_time(60_000)
        await world.pass_time(60_000)
    assert helper.machine.answered(1) == helper.machine.answered(2) == {"top"}


async def test_what_the_helper_refuses_counts_nothing_and_the_round_goes_on(worlds: Any) -> None:
    """It heard of a revocation that came too late for the commit."""
    world = worlds()
    helper = CheckingHelper(world.fleet)
    one = MaskedGateway(world.fleet, "one", DEVICES[:5])
    two = MaskedGateway(world.fleet, "two", DEVICES[5:])
    await helper.join(world)
    await world.join(one, two)
    await world.run_round(one)
    serial = world.fleet.member(Role.DEVICE, "d0", "one").certificate.serial
    helper.verifier.revoke(Revocations(version=2, serials=(serial,)))
    await helper.answer_all(world)
    assert world.receipts("one")[-1].reason is RejectReason.REVOKED
    assert helper.machine.answered(1) == frozenset()
    assert world.coordinator.reveals.waiting_for_helper == []
    await world.run_round(two)
    await helper.answer_all(world)
    assert world.store.newest_version().version == 2
    row = dict(world.coordinator.history[-1])
    assert (row["contributors"], row["failed_reveals"]) == (7, {"revoked": 1})


@pytest.mark.parametrize("bucket", [0, 3])
async def test_a_junk_seal_for_the_helper_costs_its_gateway_one_sum_and_its_device_all_later_rounds(
    worlds: Any, bucket: int
) -> None:
    """The commit is final, a second sum without the device would be the device: it is left out of the next plan."""
    world = worlds(bucket=bucket)
    helper = CheckingHelper(world.fleet)
    one = MaskedGateway(world.fleet, "one", DEVICES)
    await helper.join(world)
    await world.join(one)
    plan, plan_hash, ring = world.plan()
    one.train(plan, plan_hash, ring)
    bad = one.update("d3", plan, plan_hash, ring, change=lambda _, boxes: (*boxes[:2], bytes(len(boxes[2]))))
    heads = [each.message.head for each in one.updates.values() if each.device != "d3" or each is bad]
    await world.deliver("one", Verb.PROPOSE, one.propose(plan, plan_hash, [head.encode() for head in heads]))
    commit, commit_hash, _ = world.commits("one")[-1]
    assert bad.message.id in commit.members, "the coordinator cannot see it"
    await world.deliver("one", Verb.REVEAL, one.reveal(plan, ring, commit, commit_hash))
    await helper.answer_all(world)
    assert world.receipts("one")[-1].reason is RejectReason.BAD_BOX
    assert world.coordinator.history[-1]["failed_reveals"] == {"bad_box": 1}
    await world.pass_time(60_000)
    plan, plan_hash, ring = world.plan()
    assert (plan.round, plan.eligibility.quarantined) == (2, ("d3",))
    one.devices.remove("d3")
    await world.run_round(one)
    await helper.answer_all(world)
    assert world.receipts("one")[-1].reason is None
    assert world.store.newest_version().version == 2


async def test_a_helper_can_have_nobody_set_aside_who_is_not_in_the_set(worlds: Any) -> None:
    world = worlds()
    helper = ScriptedHelper(world.fleet)
    one = MaskedGateway(world.fleet, "one", DEVICES[:5])
    two = MaskedGateway(world.fleet, "two", DEVICES[5:])
    await helper.join(world)
    await world.join(one, two)
    await world.run_round(one)
    ((request, _),) = helper.asked(world)
    lie = helper.answer(world, request, sums=(), reason=RejectReason.BAD_BOX, bad=("d0", "d9", "d-else"))
    for frame in split(lie.id, lie.encode()):
        await world.inbox.message(world.topics.up(Kind.HELPER, helper.name, Verb.MASKS), frame)
    assert world.coordinator.book.asides.devices() == ("d0",)
