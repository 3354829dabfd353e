"""kill -9 at any moment, then a start on the same disk: the same contributors, the same bytes, the same sum."""

from __future__ import annotations

import sqlite3
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.waiting import eventually

from fleetfed.gateway.events import StoreDecline
from fleetfed.gateway.journal import Journal, decline_rows, fact_rows
from fleetfed.gateway.record import RoundState
from fleetfed.shared.aggregate.accumulator import Accumulator, decode_words, encode_words
from fleetfed.shared.errors import RejectReason, StorageError
from fleetfed.shared.wire.envelope import parse_head
from fleetfed.shared.wire.messages import Life, Reveal
from fleetfed.shared.wire.topics import Kind, Verb

DEVICES = ("d-0", "d-1", "d-2")


async def restart(bench: Bench) -> None:
    await bench.quiet()
    await bench.crash()
    await bench.start()
    await bench.quiet()


def frames(bench: Bench, verb: Verb) -> set[bytes]:
    return set(bench.above.on(bench.upstream.up(Kind.GATEWAY, bench.name, verb)))


async def test_a_round_that_crashes_after_every_step(bench: Bench) -> None:
    fleet = bench.fleet
    bench.settled = fleet.now + 500
    await restart(bench)
    bench.present(*DEVICES)
    plan, hash = bench.open_round()
    updates = [fleet.update(name, plan, hash, number=number) for number, name in enumerate(DEVICES)]
    for count, (name, message) in enumerate(zip(DEVICES, updates, strict=True), start=1):
        await restart(bench)
        # Presence is not kept: the broker has it, retained.
        bench.present(*DEVICES)
        bench.update(name, message)
        await bench.quiet()
        await restart(bench)
        bench.present(*DEVICES)
        bench.update(name, message)
        await bench.quiet()
        answers = bench.below.on(bench.site.down(Kind.DEVICE, name, Verb.RECEIPT))
        assert len(answers) == 2
        assert len(set(answers)) == 1, "the same receipt, byte for byte"
        assert np.array_equal(bench.total(), sum(fleet.values(number) for number in range(count)))

    bench.timer(500)
    assert bench.machine.round is not None
    assert bench.machine.round.state is RoundState.PROPOSED
    await restart(bench)
    assert len(frames(bench, Verb.PROPOSE)) == 1, "the same proposal, byte for byte"
    head, proposal = bench.proposals()[0]
    assert sorted(proposal.heads) == sorted(message.head.encode() for message in updates)

    commit = fleet.commit(hash, head.hash, [updates[0].id, updates[2].id], gateway=bench.name)
    bench.commit(commit)
    await bench.quiet()
    await restart(bench)
    bench.commit(commit)
    await restart(bench)
    assert len(frames(bench, Verb.REVEAL)) == 1, "the same reveal, byte for byte"
    head, reveal = bench.reveals()[0]
    total = decode_words(reveal.words, fleet.ring, count=2)
    assert np.array_equal(total.values(), fleet.values(0) + fleet.values(2))

    bench.inbound.receive(bench.upstream.down(Kind.GATEWAY, bench.name, Verb.RECEIPT), fleet.receipt(head))
    await restart(bench)
    assert bench.machine.round is not None
    assert bench.machine.round.state is RoundState.CLOSED
    bench.end_round(1, hash)
    await restart(bench)
    assert bench.machine.round is None
    bench.update("d-0", updates[0])
    await bench.quiet()
    assert len(set(bench.below.on(bench.site.down(Kind.DEVICE, "d-0", Verb.RECEIPT)))) == 1
    late = fleet.update("d-9", plan, hash)
    bench.update("d-9", late)
    await bench.quiet()
    assert bench.receipts("d-9")[0].reason is RejectReason.LATE


async def test_a_crash_before_the_disk_has_it_loses_an_update_that_nobody_was_promised(bench: Bench) -> None:
    bench.present(*DEVICES)
    plan, hash = bench.open_round()
    await bench.quiet()
    message = bench.fleet.update("d-0", plan, hash)
    bench.update("d-0", message)
    await bench.crash()
    assert bench.receipts("d-0") == []
    await bench.start()
    assert bench.machine.round is not None
    assert bench.machine.round.record.accepted == {}
    bench.update("d-0", message)
    await bench.quiet()
    assert bench.receipts("d-0")[0].reason is None


async def test_who_leaves_right_after_its_update_is_counted(bench: Bench) -> None:
    bench.present(*DEVICES)
    plan, hash = bench.open_round()
    await bench.quiet()
    for number, name in enumerate(DEVICES):
        bench.update(name, bench.fleet.update(name, plan, hash, number=number))
        bench.present(name, life=Life.DISCONNECTED)
    await bench.quiet()
    assert [bench.receipts(name)[0].reason for name in DEVICES] == [None] * len(DEVICES)
    assert len(bench.proposals()[0][1].heads) == len(DEVICES)


@pytest.mark.parametrize("bucket", [0, 3])
async def test_a_round_that_ends_while_its_reveal_is_made_takes_nothing_down(bench: Bench, bucket: int) -> None:
    site = await (await SplitRound(bench, 6, bucket=bucket).open()).answer()
    gate, waiting = threading.Event(), len(bench.worker._queue)
    bench.worker.do(gate.wait, small=False)
    bench.commit(site.commit())
    # The reveal is to be made, behind what holds the thread.
    await eventually(lambda: len(bench.worker._queue) > waiting and bench.pipeline.idle)
    bench.end_round(1, site.hash)
    await eventually(lambda: bench.pipeline.idle)
    gate.set()
    await bench.quiet()
    assert bench.machine.round is None
    assert bench.reveals() == []


async def test_many_updates_share_one_fsync(bench: Bench) -> None:
    names = [f"d-{number}" for number in range(50)]
    bench.present(*names)
    plan, hash = bench.open_round()
    await bench.quiet()
    commits = bench.pipeline.commits
    for number, name in enumerate(names):
        bench.update(name, bench.fleet.update(name, plan, hash, number=number))
    await bench.quiet()
    assert bench.pipeline.commits - commits <= 2
    assert all(bench.receipts(name)[0].reason is None for name in names)


async def test_declines_survive(bench: Bench) -> None:
    bench.present("d-0", "d-1")
    plan, hash = bench.open_round()
    bench.inbound.receive(
        bench.site.up(Kind.DEVICE, "d-0", Verb.DECLINE), bench.fleet.decline("d-0", plan, hash).encode()
    )
    await restart(bench)
    bench.present("d-0", "d-1")
    bench.update("d-1", bench.fleet.update("d-1", plan, hash))
    await bench.quiet()
    assert bench.proposals()[0][1].declined == {"too_few_examples": 1}


async def test_a_gateway_below_is_added_and_survives(bench: Bench) -> None:
    fleet = bench.fleet
    bench.present("d-0")
    bench.present("g-low", kind=Kind.GATEWAY)
    plan, hash = bench.open_round(tiers=2)
    own = fleet.update("d-0", plan, hash, number=0)
    bench.update("d-0", own)
    below = [fleet.update(f"e-{number}", plan, hash, number=number, site="low") for number in (1, 2)]
    proposal = fleet.proposal("g-low", plan, hash, below, site="low")
    bench.say(Kind.GATEWAY, "g-low", Verb.PROPOSE, proposal)
    await bench.quiet()
    assert bench.receipts("g-low", Kind.GATEWAY)[0].reason is None
    await restart(bench)
    head, proposed = bench.proposals()[0]
    assert sorted(proposed.heads) == sorted(message.head.encode() for message in (own, *below))

    commit = fleet.commit(hash, head.hash, [own.id, below[0].id], gateway=bench.name)
    bench.commit(commit)
    await bench.quiet()
    down = bench.below.on(bench.site.down(Kind.GATEWAY, "g-low", Verb.COMMIT))
    assert down[0].endswith(commit.encode()), "byte for byte"
    part = Accumulator(fleet.ring, capacity=10)
    part.accumulate(fleet.values(1), meta_of(fleet, 1))
    words = encode_words(part.report())
    answer = fleet.reveal("g-low", plan, Reveal(plan=hash, commit=commit.head.hash, count=1, words=words), site="low")
    bench.say(Kind.GATEWAY, "g-low", Verb.REVEAL, answer)
    await restart(bench)
    _, reveal = bench.reveals()[0]
    assert reveal.count == 2
    total = decode_words(reveal.words, fleet.ring, count=2)
    assert np.array_equal(total.values(), fleet.values(0) + fleet.values(1))


def meta_of(fleet: SignedFleet, number: int) -> Any:
    from fleetfed.gateway.plain import decode_values

    return decode_values(fleet.body(fleet.values(number)), fleet.ring)[1]


async def test_a_reveal_with_another_count_word_is_refused(bench: Bench) -> None:
    fleet = bench.fleet
    bench.present("g-low", kind=Kind.GATEWAY)
    plan, hash = bench.open_round(tiers=2)
    below = [fleet.update(f"e-{number}", plan, hash, number=number, site="low") for number in (1, 2)]
    bench.say(Kind.GATEWAY, "g-low", Verb.PROPOSE, fleet.proposal("g-low", plan, hash, below, site="low"))
    await bench.quiet()
    commit = fleet.commit(hash, bench.proposals()[0][0].hash, [each.id for each in below], gateway=bench.name)
    bench.commit(commit)
    await bench.quiet()
    before = bench.facts()
    part = Accumulator(fleet.ring, capacity=10)
    part.accumulate(fleet.values(1), meta_of(fleet, 1))
    words = encode_words(part.report())
    lie = Reveal(plan=hash, commit=commit.head.hash, count=2, words=words)
    bench.say(Kind.GATEWAY, "g-low", Verb.REVEAL, fleet.reveal("g-low", plan, lie, site="low"))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.receipts("g-low", Kind.GATEWAY)[-1].reason is RejectReason.OUT_OF_RANGE


async def test_a_revoked_devices_update_is_taken_out_before_the_proposal(bench: Bench) -> None:
    from fleetfed.shared.trust.certificates import Role
    from fleetfed.shared.wire.topics import Broadcast

    fleet = bench.fleet
    bench.present(*DEVICES)
    plan, hash = bench.open_round()
    for number, name in enumerate(DEVICES[:2]):
        bench.update(name, fleet.update(name, plan, hash, number=number))
    await bench.quiet()
    serial = fleet.identity("d-0", Role.DEVICE, "north").certificate.serial
    bench.inbound.receive(bench.upstream.broadcast(Broadcast.REVOKED), fleet.revocations(2, (serial,)))
    bench.update("d-2", fleet.update("d-2", plan, hash, number=2))
    await bench.quiet()
    _, proposal = bench.proposals()[0]
    assert len(proposal.heads) == 2
    assert proposal.rejected == {"revoked": 1}
    assert np.array_equal(bench.total(), fleet.values(1) + fleet.values(2))
    await restart(bench)
    assert np.array_equal(bench.total(), fleet.values(1) + fleet.values(2))


async def test_large_models_are_decoded_off_the_loop_with_the_same_result(tmp_path: Path) -> None:
    fleet = SignedFleet(sizes=(300_000, 10))
    bench = Bench(fleet, tmp_path / "state")
    bench.budget = 1 << 26
    await bench.start()
    bench.present(*DEVICES)
    plan, hash = bench.open_round()
    updates = [fleet.update(name, plan, hash, number=number) for number, name in enumerate(DEVICES)]
    for name, message in zip(DEVICES, updates, strict=True):
        bench.update(name, message)
        bench.update(name, message)
    await bench.quiet()
    commit = fleet.commit(hash, bench.proposals()[0][0].hash, [each.id for each in updates[1:]], gateway=bench.name)
    bench.commit(commit)
    await bench.quiet()
    total = decode_words(bench.reveals()[0][1].words, fleet.ring, count=2)
    assert np.array_equal(total.values(), fleet.values(1) + fleet.values(2))
    await bench.close()


@pytest.mark.parametrize("devices", [400, pytest.param(2000, marks=pytest.mark.slow)])
async def test_memory_does_not_grow_with_the_number_of_devices(tmp_path: Path, devices: int) -> None:
    """Bodies and heads are on disk: what stays of an update is an entry of some hundred bytes."""

    async def grown(devices: int) -> int:
        fleet = SignedFleet(sizes=(20_000,), cohort=5000)
        bench = Bench(fleet, tmp_path / f"state-{devices}")
        await bench.start()
        bench.present("d-last")
        plan, hash = bench.open_round()
        rng = np.random.default_rng(1)
        body = fleet.body(rng.integers(-7, 8, 20_000).astype(np.int8))
        assert len(body) > 9_000
        bench.update("d-first", fleet.update("d-first", plan, hash, body=body))
        await bench.quiet()
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        for number in range(devices):
            bench.update(f"d-{number}", fleet.update(f"d-{number}", plan, hash, body=body))
            if number % 20 == 19:
                await bench.quiet()
                bench.below.sent.clear()
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        own = [tracemalloc.Filter(True, "*fleetfed/gateway/*"), tracemalloc.Filter(True, "*/aggregate/*")]
        growth = sum(
            each.size_diff for each in after.filter_traces(own).compare_to(before.filter_traces(own), "filename")
        )
        await bench.close()
        return growth

    few, many = await grown(20), await grown(devices)
    assert (many - few) / (devices - 20) < 1000, "bytes per device beyond the first: an entry, not a body of 9,000"


# --- The journal alone -----------------------------------------------------------------------------------------------


def test_a_torn_transaction_is_not_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.write(decline_rows(StoreDecline(device="d-1", reason="busy")))
    with pytest.raises(StorageError):
        journal.write(
            [*decline_rows(StoreDecline(device="d-2", reason="busy")), ("INSERT INTO nowhere VALUES (1)", ())]
        )
    journal.write(fact_rows("answered", b"\x01"))
    journal.close()
    again = Journal(tmp_path / "journal.db")
    rows = again._reader.execute("SELECT device FROM declines").fetchall()
    assert rows == [("d-1",)]
    again.close()


def test_what_was_written_survives_a_copy_of_the_files_without_a_close(tmp_path: Path) -> None:
    """The write-ahead log alone carries a committed batch: the database file need not have been touched."""
    import shutil

    journal = Journal(tmp_path / "journal.db")
    journal.write(fact_rows("proposal", b"bytes"))
    (tmp_path / "copy").mkdir()
    for path in tmp_path.glob("journal.db*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, tmp_path / "copy")
    journal.close()
    copy = Journal(tmp_path / "copy" / "journal.db")
    assert copy.fact("proposal") == b"bytes"
    copy.close()


def test_a_damaged_journal_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match="move it away"):
        Journal(tmp_path / "journal.db")


def test_a_journal_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="format 99"):
        Journal(tmp_path / "journal.db")


async def test_a_round_that_is_over_leaves_only_its_receipts(bench: Bench) -> None:
    bench.present("d-0", "d-1")
    plan, hash = bench.open_round()
    message = bench.fleet.update("d-0", plan, hash)
    bench.update("d-0", message)
    await bench.quiet()
    bench.end_round(1, hash)
    await bench.quiet()
    counts = {
        table: bench.journal._reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("updates", "declines", "children", "previous")
    }
    assert counts == {"updates": 0, "declines": 0, "children": 0, "previous": 1}
    receipt = bench.journal.receipt(message.id)
    assert receipt is not None
    assert parse_head(receipt).header.round == 1
