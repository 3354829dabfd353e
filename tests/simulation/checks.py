"""What must hold of a fleet when all is over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetfed.shared.aggregate.accumulator import Partial
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import open_body, parse_head
from fleetfed.shared.wire.messages import Commit
from tests.simulation.setting import DIRECT, SITES

if TYPE_CHECKING:
    from tests.simulation.world import World


@dataclass
class Sum:
    """What the coordinator made a version of: integers of the coordinates, contributors, a device's limit, words."""

    values: list[int]
    count: int
    limit: int
    words: Any

    @classmethod
    def of(cls, total: Partial) -> Sum:
        """A sum that may change later."""
        values = [int(value) for value in total.values()]
        return cls(values, total.count, total.ring.limit(1), total.words.copy())


def check(world: World) -> None:
    """Assert all that `world` promises.

    Raises:
        AssertionError: what does not hold.
    """
    coordinator = world.coordinator.coordinator
    rounds, versions = coordinator.store.rounds(limit=1000), coordinator.store.versions(limit=1000)
    assert len({each.number for each in rounds}) == len(rounds)
    assert len({each.version for each in versions}) == len(versions)
    for record in rounds:
        assert record.outcome, f"round {record.number} is open"
        assert record.outcome == "committed" or record.reason, f"round {record.number}: no reason"
        exchanges = coordinator.store.exchanges(record.number)
        for each in exchanges:
            # Nobody here lies, so no sum is garbage.
            assert not each.result.failed, f"round {record.number}: {each.gateway}: {each.result.failed}"
            assert not each.result.lost, f"round {record.number}: {each.gateway} loses buckets"
        if record.outcome == "committed":
            _check_sum(world, record.number, exchanges)
    newest = coordinator.newest()
    for name, device in world.devices.items():
        models = device.machine.sync.models  # type: ignore[attr-defined]
        if name in world.revoked and (not models or models[0].sha256 != newest.sha256):
            continue
        assert device.runtime is not None
        file = device.runtime._store.model_path(models[0]).read_bytes()
        assert file == coordinator.blobs.get(newest.file), f"{name} holds another file"
    _check_leftovers(world)
    held = secrets_on_disk(world)
    assert not held, f"keys of rounds that are over: {held}"


def _check_sum(world: World, number: int, exchanges: list[Any]) -> None:
    total, ledger = world.sums[number], world.ledger
    members = [member for each in exchanges for member in each.contributors]
    names = {member.device for member in members}
    assert len(names) == len(members) == total.count, f"round {number}: {len(members)} members, sum {total.count}"
    for index, value in enumerate(total.values):
        expected = total.limit if f"d-{index + 1}" in names else 0
        assert value == expected, f"round {number}: d-{index + 1} counts {value / total.limit}"
    if world.setting.split:
        plain = np.zeros_like(total.words)
        for member in members:
            plain += ledger.contributions[member.message_id]
        assert np.array_equal(total.words, plain), f"round {number}: not the sum of what its devices packed"
    ids = {member.message_id for member in members}
    revealed = {each.gateway: each for each in exchanges if each.reveal_head is not None}
    for message_id, (device, gateway, round_) in ledger.accepted.items():
        exchange = revealed.get(DIRECT[gateway])
        if round_ != number or exchange is None or message_id in ids or device in world.revoked:
            continue
        raw = exchange.commit
        head = parse_head(raw)
        commit = codec.decode(Commit, open_body(head.header, raw[head.size :]), limit=1 << 20)
        if ledger.heads[message_id] in commit.excluded:
            continue
        siblings = [each for each in exchange.members if world.setting.devices[each.device] == SITES[gateway]]
        if gateway == DIRECT[gateway] or siblings:
            raise AssertionError(f"round {number}: {device} was accepted by {gateway} and is not in the sum")


def _check_leftovers(world: World) -> None:
    assert not world.moves()
    for broker in world.network.brokers.values():
        for session in broker.sessions.values():
            assert session.link is None or not session.waiting(), f"{session.name} has {session.waiting()} waiting"
            # Whoever died while it listened to a chunk listens until that is cleared.
            chunks = [each for each in session.filters if "/blob/" in each and each not in broker.retained]
            assert not chunks or session.name in world.revoked, f"{session.name} still listens to {chunks}"
    for gateway in world.gateways.values():
        assert not gateway.gateway.performer._tasks
        assert gateway.gateway._pipeline.idle
        assert gateway.gateway._worker.idle


def secrets_on_disk(world: World) -> list[str]:
    """Files of coordinator and gateways that hold a key which ever opened a mask seed or a body."""
    found = []
    if world.ledger.secrets:
        for name in ("c-main", *world.gateways):
            folder: Path = world.root / name / "state"
            for path in sorted(each for each in folder.rglob("*") if each.is_file()):
                data = path.read_bytes()
                if any(secret in data for secret in world.ledger.secrets):
                    found.append(str(path.relative_to(world.root)))
    return found
