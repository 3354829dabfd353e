"""Plain rounds at a gateway whose plan has a defence: what is refused, left out, and how the rest is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway import defence as module
from fleetfed.gateway import robust
from fleetfed.shared.aggregate.accumulator import decode_words
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.defence import Defence, Rule
from fleetfed.shared.wire.envelope import parse_head
from fleetfed.shared.wire.messages import Eligibility

SIZES = (60, 40)


@pytest.fixture
def fleet() -> SignedFleet:
    return SignedFleet(sizes=SIZES)


def honest(count: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    common = rng.normal(0, 20, sum(SIZES))
    return np.clip(np.rint(common + rng.normal(0, 15, (count, sum(SIZES)))), -127, 127).astype(np.int8)


async def site(bench: Bench, matrix: np.ndarray, defence: Defence) -> tuple[Any, Any, dict[str, Any]]:
    """All devices send their row; returns plan, hash and the updates by device."""
    names = [f"d-{number:02d}" for number in range(len(matrix))]
    bench.present(*names)
    plan, hash = bench.open_round(defence=defence)
    updates = {}
    for name, row in zip(names, matrix, strict=True):
        updates[name] = bench.fleet.update(name, plan, hash, body=bench.fleet.body(row))
        bench.update(name, updates[name])
    await bench.quiet()
    bench.timer(120_000)
    await bench.quiet()
    return plan, hash, updates


async def revealed(bench: Bench, hash: Any) -> np.ndarray:
    head, proposal = bench.proposals()[-1]
    members = [parse_head(each).header.message_id for each in proposal.heads]
    bench.commit(bench.fleet.commit(hash, head.hash, members, gateway=bench.name))
    await bench.quiet()
    _, reveal = bench.reveals()[-1]
    return decode_words(reveal.words, bench.fleet.ring, count=len(members)).values()


async def test_a_flipped_update_is_left_out_and_named(bench: Bench) -> None:
    matrix = honest(9)
    matrix[3] = -matrix[3]
    _, hash, updates = await site(bench, matrix, Defence(outlier_score=6.0))
    _, proposal = bench.proposals()[-1]
    assert list(proposal.outliers) == ["d-03"]
    assert proposal.outliers["d-03"] > 6.0
    assert proposal.rejected == {RejectReason.OUTLIER: 1}
    assert updates["d-03"].head.encode() not in proposal.heads
    assert np.array_equal(await revealed(bench, hash), np.delete(matrix, 3, axis=0).sum(axis=0, dtype=np.int64))


async def test_an_update_beyond_the_norm_bound_is_refused_on_arrival(bench: Bench) -> None:
    matrix = honest(5)
    matrix[2] = 127
    bound = max(robust.norm(row) for row in np.delete(matrix, 2, axis=0)) + 1
    await site(bench, matrix, Defence(norm_bound=bound))
    assert [each.reason for each in bench.receipts("d-02")] == [RejectReason.OUTLIER]
    assert len(bench.proposals()[-1][1].heads) == 4


@pytest.mark.parametrize("rule", [Rule.TRIMMED_MEAN, Rule.MEDIAN])
@pytest.mark.parametrize("on_disk", [False, True])
async def test_a_rule_takes_the_place_of_the_sum(
    bench: Bench, rule: Rule, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_disk:
        monkeypatch.setattr(module, "_IN_MEMORY", 0)
    matrix, defence = honest(7), Defence(rule=rule, hostile=0.2)
    matrix[5] = 127
    _, hash, _ = await site(bench, matrix, defence)
    assert len(bench.proposals()[-1][1].heads) == 7
    expected = robust.combine(matrix, defence)
    assert expected is not None
    assert np.array_equal(await revealed(bench, hash), expected)


async def test_a_restart_comes_to_the_same_judgement(bench: Bench) -> None:
    matrix = honest(9)
    matrix[3] = -matrix[3]
    names = [f"d-{number:02d}" for number in range(9)]
    bench.present(*names)
    plan, hash = bench.open_round(defence=Defence(outlier_score=6.0))
    for name, row in zip(names, matrix, strict=True):
        bench.update(name, bench.fleet.update(name, plan, hash, body=bench.fleet.body(row)))
    await bench.quiet()
    await bench.crash()
    await bench.start()
    await bench.quiet()
    bench.timer(120_000)
    await bench.quiet()
    assert list(bench.proposals()[-1][1].outliers) == ["d-03"]
    await bench.crash()
    await bench.start()
    await bench.quiet()
    assert np.array_equal(await revealed(bench, hash), np.delete(matrix, 3, axis=0).sum(axis=0, dtype=np.int64))


async def test_a_quarantined_device_is_neither_waited_for_nor_heard(bench: Bench) -> None:
    bench.present("d-0", "d-1")
    plan, hash = bench.open_round(eligibility=Eligibility(quarantined=("d-1",)))
    bench.update("d-1", bench.fleet.update("d-1", plan, hash, body=bench.fleet.body(honest(1)[0])))
    await bench.quiet()
    assert [each.reason for each in bench.receipts("d-1")] == [RejectReason.QUARANTINED]
    assert bench.machine.round is not None
    assert bench.machine.round.expected == {"d-0"}
