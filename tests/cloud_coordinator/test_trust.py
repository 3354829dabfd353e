"""The coordinator signs what is current, takes what owners sign, and plans under the policy in force."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from fleetfed_testing.cloud import START, Fleet, ScriptedGateway, World
from fleetfed_testing.trust_repository import DAY, Owners, key

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.metadata import TrustSet
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire.envelope import parse_head
from fleetfed.shared.wire.messages import Command, Mode, Outcome
from fleetfed.shared.wire.topics import Broadcast


class Trusting:
    """A coordinator with owners, and a member that listens."""

    def __init__(self, directory: Path) -> None:
        fleet = Fleet()
        identity = fleet.member(Role.COORDINATOR, "coordinator", "_")
        self.owners = Owners(now=START, coordinators=[identity.key.public], authority=fleet.authority.key)
        fleet.identities["coordinator"] = replace(identity, root=self.owners.roots[0], bundle=self.offer())
        for name in ("timestamp", "snapshot"):
            key(name).save(directory / "identity" / "trust" / f"{name}.key")
        self.world = World(directory, fleet=fleet, autostart=False)
        self.member = TrustSet(self.owners.roots[0])

    def offer(self) -> bytes:
        return self.owners.bundle(snapshot=b"", timestamp=b"")

    @property
    def published(self) -> bytes:
        return self.world.sent.retained[self.world.topics.broadcast(Broadcast.TRUST)]


@pytest.fixture
async def trusting(tmp_path: Path) -> AsyncIterator[Trusting]:
    made = Trusting(tmp_path)
    yield made
    await made.world.close()


async def test_it_publishes_what_members_need_before_anything_that_they_are_to_believe(trusting: Trusting) -> None:
    topics = [topic for topic, _, _ in trusting.world.sent.packets]
    trust, model = (trusting.world.topics.broadcast(what) for what in (Broadcast.TRUST, Broadcast.MODEL))
    assert topics.index(trust) < topics.index(model)
    assert trusting.member.update(trusting.published, now=START)
    assert trusting.member.trust is not None
    assert trusting.member.trust.expires == START + DAY


async def test_it_signs_again_by_itself_and_after_a_restart(trusting: Trusting) -> None:
    first = trusting.published
    await trusting.world.pass_time(DAY // 2 + 1000)
    second = trusting.published
    assert second != first
    assert trusting.member.update(first, now=START)
    assert trusting.member.update(second, now=trusting.world.clock.now)
    await trusting.world.restart()
    assert trusting.published == second, "not due yet"
    await trusting.world.close()
    trusting.world.clock.now += 3 * DAY
    trusting.world.open()
    assert trusting.member.update(trusting.published, now=trusting.world.clock.now)


async def test_plans_are_made_under_the_policy_that_was_published_last(trusting: Trusting) -> None:
    world = trusting.world
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(north)
    trusting.owners.policy = Policy(version=7, minimum_lane_bits=8)
    trusting.owners.next("targets")
    answer = await world.ask(Command.KEYS_PUBLISH, bundle=trusting.offer())
    assert (answer.error, answer.result["policy"]) == ("", 7)
    assert trusting.member.update(trusting.published, now=world.clock.now)
    await world.ask(Command.ROUND_START, rounds=1)
    assert world.plan()[0].policy == 7
    # The settings do not keep this one: no such round is opened.
    await world.run_round(north)
    trusting.owners.policy = Policy(version=8, modes=(Mode.SPLIT,))
    trusting.owners.next("targets")
    await world.ask(Command.KEYS_PUBLISH, bundle=trusting.offer())
    refused = await world.ask(Command.ROUND_START, rounds=1)
    assert refused.error
    assert "policy" in refused.detail


async def test_what_owners_did_not_sign_changes_nothing(trusting: Trusting) -> None:
    before = trusting.published
    trusting.owners.policy = Policy(version=2)
    trusting.owners.next("targets")
    bad = trusting.owners.bundle(signers={"targets": [key("timestamp"), key("snapshot")]})
    answer = await trusting.world.ask(Command.KEYS_PUBLISH, bundle=bad)
    assert answer.error == RejectReason.BAD_METADATA
    assert "nothing has changed" in answer.detail
    assert trusting.published == before
    assert (await trusting.world.ask(Command.KEYS_PUBLISH, bundle=trusting.offer())).error == ""


async def test_the_status_says_what_expires(trusting: Trusting) -> None:
    status = (await trusting.world.ask(Command.ROUND_STATUS)).result["trust"]
    assert (status["stale"], status["warnings"], status["versions"]["root"]) == (False, [], 1)
    await trusting.world.pass_time(80 * DAY)
    status = (await trusting.world.ask(Command.ROUND_STATUS)).result["trust"]
    assert "keys renew targets" in status["warnings"][0]
    await trusting.world.pass_time(12 * DAY)
    status = (await trusting.world.ask(Command.ROUND_STATUS)).result["trust"]
    assert status["stale"]


async def test_a_fleet_without_metadata_says_so(tmp_path: Path) -> None:
    world = World(tmp_path, autostart=False)
    answer = await world.ask(Command.KEYS_PUBLISH, bundle=b"x")
    assert (answer.error, "no trust metadata" in answer.detail) == ("invalid", True)
    assert (await world.ask(Command.ROUND_STATUS)).result["trust"] == {}
    assert world.topics.broadcast(Broadcast.TRUST) not in world.sent.retained
    await world.close()


async def test_a_coordinator_with_a_new_key_says_again_what_the_old_one_said(trusting: Trusting) -> None:
    world = trusting.world
    north = ScriptedGateway(world.fleet, "north", ["a", "b", "c"])
    await world.join(north)
    await world.ask(Command.ROUND_START, rounds=1)
    plan, _, _ = world.plan()
    before = world.manifest()
    # The owners list another key, and the coordinator is started with it.
    await world.close()
    identity = world.fleet.member(Role.COORDINATOR, "coordinator-2", "_")
    trusting.owners.coordinators.append(identity.key.public)
    trusting.owners.next("targets")
    world.identity = replace(identity, root=trusting.owners.roots[0], bundle=trusting.offer())
    world._signer = world.fleet.signer(Role.COORDINATOR, "coordinator-2", "_")
    world.open()
    for what in (Broadcast.MODEL, Broadcast.PLAN):
        said = world.sent.retained[world.topics.broadcast(what)]
        assert parse_head(said).header.sender == identity.certificate.key_id
    assert (world.manifest().version, world.manifest().sha256) == (before.version, before.sha256)
    assert (world.end().round, world.end().outcome) == (plan.round, Outcome.ABORTED)
