"""The same updates give the same version, however gateways split them, in whatever order they arrive, masked or not."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fleetfed_testing.cloud import ScriptedGateway, World
from fleetfed_testing.masked_cloud import MaskedGateway
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.messages import Mode, Weighting
from fleetfed.shared.wire.topics import Verb

DEVICES = [f"d{i}" for i in range(7)]


async def version_of(
    directory: Path, parts: Sequence[Sequence[str]], rounds: int = 1, weighting: Weighting = Weighting.EXAMPLES
) -> list[bytes]:
    world = World(
        directory, rounds=RoundSettings(weight_cap=50, start_when=len(DEVICES), rounds=rounds, weighting=weighting)
    )
    gateways = [ScriptedGateway(world.fleet, f"g{i}", devices) for i, devices in enumerate(parts)]
    await world.join(*gateways)
    for number in range(rounds):
        await world.run_round(*gateways, seed=number)
    found = [record.sha256 for record in world.store.versions(limit=10)]
    assert len(found) == rounds + 1
    await world.close()
    return found


async def test_flat_two_and_three_uneven_gateways_give_the_same_bits(tmp_path: Path) -> None:
    flat = await version_of(tmp_path / "1", [DEVICES], rounds=3)
    assert len(set(flat)) == 4
    assert await version_of(tmp_path / "2", [DEVICES[:3], DEVICES[3:]], rounds=3) == flat
    assert await version_of(tmp_path / "3", [DEVICES[5:], DEVICES[:1], DEVICES[1:5]], rounds=3) == flat


async def test_plain_and_weighted_means_differ(tmp_path: Path) -> None:
    weighted = await version_of(tmp_path / "w", [DEVICES])
    plain = await version_of(tmp_path / "p", [DEVICES], weighting=Weighting.UNIFORM)
    assert weighted[1:] == plain[1:]
    assert weighted[0] != plain[0]


@settings(max_examples=16)
@given(st.data())
async def test_any_order_and_repetition_gives_the_same_version(data: st.DataObject) -> None:
    masked = data.draw(st.booleans())
    # In split mode a site of one device is left out.
    places = st.sets(st.integers(1, len(DEVICES) - 1), max_size=2)
    split = data.draw(st.sampled_from([[], [2], [3], [2, 4], [3, 5]]) if masked else places.map(sorted))
    mode = {"mode": Mode.SPLIT, "minimum_cohort": 2} if masked else {}
    kind = MaskedGateway if masked else ScriptedGateway
    parts = [DEVICES[a:b] for a, b in zip([0, *split], [*split, len(DEVICES)], strict=True)]
    with tempfile.TemporaryDirectory() as name:
        expected = await version_of(Path(name) / "flat", [DEVICES])
        rounds = RoundSettings(weight_cap=50, start_when=len(DEVICES), rounds=1, **mode)
        world = World(Path(name) / "any", rounds=rounds)
        gateways = {f"g{i}": kind(world.fleet, f"g{i}", devices) for i, devices in enumerate(parts)}
        await world.join(*gateways.values())
        plan, plan_hash, ring = world.plan()
        proposals: dict[str, Message] = {}
        reveals: dict[str, Message] = {}
        for gateway in gateways.values():
            heads = [update.message.head.encode() for update in gateway.train(plan, plan_hash, ring)]
            proposals[gateway.name] = gateway.propose(plan, plan_hash, data.draw(st.permutations(heads)))
        acts = st.tuples(st.sampled_from(sorted(gateways)), st.booleans())
        chaos = data.draw(st.lists(acts, max_size=12))
        finish = data.draw(st.permutations(sorted(gateways)))
        order = [*chaos, *((name, False) for name in finish), *((name, True) for name in reversed(finish))]
        for name, reveal in order:
            commits = world.commits(name)
            if not reveal:
                await world.deliver(name, Verb.PROPOSE, proposals[name])
            elif commits:
                commit, commit_hash, _ = commits[-1]
                if name not in reveals:
                    reveals[name] = gateways[name].reveal(plan, ring, commit, commit_hash)
                await world.deliver(name, Verb.REVEAL, reveals[name])
            world.coordinator.machine.validate()
        assert [record.sha256 for record in world.store.versions(limit=10)] == expected
        for name in gateways:
            assert len({message for _, _, message in world.commits(name)}) == 1
            assert {receipt.reason for receipt in world.receipts(name)} == {None}
        await world.close()
