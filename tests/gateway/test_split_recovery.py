"""Split rounds and death: no second cosignature, proposal or sum, whenever the gateway dies; no key that lives on."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench, opened
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway.journal import Journal
from fleetfed.gateway.record import RoundSecrets, RoundState
from fleetfed.gateway.round import KEPT
from fleetfed.shared.errors import RejectReason, StorageError
from fleetfed.shared.wire.masking import Cosign
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb

SETTLE = 500


class PowerCutError(Exception):
    """Nothing that follows happens."""


class MortalJournal(Journal):
    """Dies at one of its writes, before or after it is durable."""

    writes = 0
    death = -1
    after = False

    def write(self, batch: Any) -> None:
        number, MortalJournal.writes = MortalJournal.writes, MortalJournal.writes + 1
        if number != MortalJournal.death:
            super().write(batch)
            return
        if MortalJournal.after:
            super().write(batch)
        raise PowerCutError


class Story:
    """A whole round, told as often as it takes: whoever has no answer yet says the same bytes again."""

    def __init__(self, fleet: SignedFleet, folder: Path, bucket: int) -> None:
        self.bench = Bench(fleet, folder)
        self.bench.make_journal = MortalJournal
        self.bucket = bucket
        self.deaths = 0

    async def run(self, death: int, *, after: bool) -> None:
        """Tell it, dying once; `MortalJournal.writes` says how many chances there were."""
        MortalJournal.writes, MortalJournal.death, MortalJournal.after = 0, death, after
        await self._start()
        site = self.site = SplitRound(self.bench, 4, bucket=self.bucket)
        plan, message = self.bench.fleet.plan(1, split=self.bench.fleet.split(bucket=self.bucket))
        site.plan, site.hash = plan, message.head.hash
        self._plan = message.encode()
        self._commit: Any = None
        while not await self._tell():
            self.deaths += 1
            await self.bench.crash()
            await self._start()
        self.bench.machine.validate()
        await self.bench.close()

    async def _start(self) -> None:
        # Presence is not kept: who is there must have the time to say so, or the round closes without them.
        self.bench.settled = self.bench.fleet.now + SETTLE
        await self.bench.start()

    async def _tell(self) -> bool:
        bench, site = self.bench, self.site
        try:
            bench.present(*site.names)
            bench.inbound.receive(bench.upstream.broadcast(Broadcast.PLAN), self._plan)
            await bench.quiet()
            for name in site.names:
                bench.update(name, site.update(name))
                await bench.quiet()
            bench.timer(SETTLE)
            await bench.quiet()
            if self._commit is None:
                self._commit = site.commit("d-0", "d-1", "d-3")
            bench.commit(self._commit)
            await bench.quiet()
            site.acknowledge()
            await bench.quiet()
            bench.end_round(1, site.hash)
            await bench.quiet()
        except PowerCutError:
            return False
        return True

    def check(self) -> None:
        """One of each, ever, and the right sum."""
        bench, site = self.bench, self.site
        kept = ("d-0", "d-1", "d-3")
        cosigns = set(bench.below.on(bench.site.broadcast(Broadcast.COSIGN)))
        assert len(cosigns) == 1
        assert opened(cosigns.pop(), Cosign).plan == site.hash
        for verb in (Verb.PROPOSE, Verb.REVEAL):
            assert len(set(bench.above.on(bench.upstream.up(Kind.GATEWAY, bench.name, verb)))) == 1
        for name in site.names:
            answers = set(bench.below.on(bench.site.down(Kind.DEVICE, name, Verb.RECEIPT)))
            assert len(answers) == 1
            assert bench.receipts(name)[0].reason is None
        reveal = bench.reveals()[0][1]
        if self.bucket:
            found = sum(site.unmasked_buckets(reveal, bench.proposals()[0][1].nonces[0].hash, *kept))
        else:
            found = site.unmasked(reveal, *kept)
        assert np.array_equal(found, site.sum(*kept))
        assert set(bench.counters.snapshot()) <= {"conflict"}


@pytest.mark.parametrize("bucket", [0, 2])
async def test_a_death_at_every_write_of_the_journal_changes_nothing(
    fleet: SignedFleet, tmp_path: Path, bucket: int
) -> None:
    whole = Story(fleet, tmp_path / "whole", bucket)
    await whole.run(-1, after=False)
    whole.check()
    chances = MortalJournal.writes
    assert chances >= 9, "round, four updates, proposal, commit, reveal, answer, end"
    for death in range(chances):
        for after in (False, True):
            story = Story(fleet, tmp_path / f"{death}-{after}", bucket)
            await story.run(death, after=after)
            assert story.deaths == 1
            story.check()


async def test_a_commit_that_was_refused_stays_refused_whenever_it_dies(fleet: SignedFleet, tmp_path: Path) -> None:
    for number, after in enumerate((False, True)):
        bench = Bench(fleet, tmp_path / str(number))
        bench.make_journal = MortalJournal
        MortalJournal.writes, MortalJournal.death, MortalJournal.after = 0, -1, after
        await bench.start()
        site = await (await SplitRound(bench, 4, minimum_cohort=3).open()).answer()
        commit = site.commit("d-0", "d-1")
        MortalJournal.death = MortalJournal.writes
        bench.commit(commit)
        with pytest.raises(PowerCutError):
            await bench.quiet()
        await bench.crash()
        await bench.start()
        await bench.quiet()
        bench.commit(commit)
        await bench.quiet()
        assert bench.reveals() == []
        assert {refusal.reason for _, refusal in bench.refusals()} == {RejectReason.BELOW_MINIMUM}
        assert len({head.header.message_id for head, _ in bench.refusals()}) == 1, "the same bytes again"
        assert bench.machine.round.state is RoundState.REVEALED
        assert bench.machine.round.record.aborted == "below_minimum"
        assert bench.journal.load().secrets is None
        await bench.close()


# --- Keys die with the round -----------------------------------------------------------------------------------------


def on_disk(bench: Bench) -> bytes:
    """All that the database's files hold, the log among them."""
    return b"".join(path.read_bytes() for path in bench.state.glob("journal.db*"))


async def _secrets(bench: Bench, **split: Any) -> tuple[SplitRound, RoundSecrets]:
    site = await (await SplitRound(bench, 4, **split).open()).answer()
    stored = bench.journal.load().secrets
    assert stored is not None
    assert stored.seal.encode() in on_disk(bench), "so that the rest means something"
    assert stored.nonce in on_disk(bench)
    return site, stored


def gone(bench: Bench, stored: RoundSecrets) -> None:
    content = on_disk(bench)
    assert stored.seal.encode() not in content
    for start in range(0, 32, 8):
        assert stored.seal.encode()[start : start + 8] not in content
    assert bench.journal.load().secrets is None


@pytest.mark.parametrize("bucket", [0, 2])
async def test_the_key_is_gone_from_the_disk_once_the_reveal_is_durable(bench: Bench, bucket: int) -> None:
    site, stored = await _secrets(bench, bucket=bucket)
    await site.committed()
    gone(bench, stored)
    assert (stored.nonce in on_disk(bench)) == bool(bucket), "with buckets it is opened in the reveal"
    ids = site.ids()
    assert {body for _, body in bench.journal.updates(ids)} == {b""}
    assert bench.journal.fact("reveal") is not None
    assert all(bench.journal.receipt(message_id) is not None for message_id in ids)


async def test_the_key_is_gone_when_the_round_ends_without_a_commit(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    bench.end_round(1, site.hash)
    await bench.quiet()
    gone(bench, stored)


async def test_the_key_is_gone_when_the_commit_is_refused(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    await site.committed("d-0")
    gone(bench, stored)


async def test_the_key_is_gone_when_the_proposal_is_refused(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    topic = bench.upstream.down(Kind.GATEWAY, bench.name, Verb.RECEIPT)
    refusal = site.fleet.receipt(bench.proposals()[0][0], reason=RejectReason.LATE)
    bench.inbound.receive(topic, refusal)
    await bench.quiet()
    gone(bench, stored)


async def test_the_key_is_gone_a_day_after_a_cloud_that_does_not_come_back(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    bench.timer(120_000 + KEPT - 1)
    await bench.quiet()
    assert bench.journal.load().secrets is not None
    bench.timer(1)
    await bench.quiet()
    gone(bench, stored)
    await site.committed()
    assert bench.reveals() == []


async def test_the_key_is_gone_when_the_next_round_begins(bench: Bench) -> None:
    _, stored = await _secrets(bench)
    bench.open_round(2, split=bench.fleet.split())
    await bench.quiet()
    content = on_disk(bench)
    assert stored.seal.encode() not in content
    assert bench.journal.load().secrets.seal.encode() in content


async def test_a_log_that_a_reader_kept_from_being_cut_is_cut_at_the_next_write(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    reader = sqlite3.connect(bench.state / "journal.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM updates").fetchone()
    bench.journal._writer.execute("PRAGMA busy_timeout = 1")
    await site.committed()
    assert bench.reveals()[0][1].count == 4, "nobody waits for it"
    assert stored.seal.encode() in on_disk(bench)
    reader.close()
    site.acknowledge()
    await bench.quiet()
    gone(bench, stored)


async def test_a_log_that_a_dead_process_left_is_cut_at_the_start(bench: Bench) -> None:
    site, stored = await _secrets(bench)
    bench.journal._cut_log = lambda: False
    await site.committed()
    assert stored.seal.encode() in on_disk(bench)
    await bench.crash()
    await bench.start()
    gone(bench, stored)


async def test_secrets_are_in_no_log_line_and_no_repr(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    site, stored = await _secrets(bench)
    await site.committed()
    text = f"{caplog.text} {stored!r} {bench.performer.__dict__!r}"
    for secret in (stored.seal.encode(), stored.nonce):
        assert secret.hex() not in text
        assert repr(secret) not in text


# --- The journal alone -----------------------------------------------------------------------------------------------


async def test_a_masked_round_without_its_key_is_damaged(bench: Bench) -> None:
    await (await SplitRound(bench, 2).open()).answer("d-0")
    await bench.crash()
    connection = sqlite3.connect(bench.state / "journal.db", isolation_level=None)
    connection.execute("DELETE FROM secrets")
    connection.close()
    with pytest.raises(StorageError, match="without its key"):
        await bench.start()
    bench.journal._writer.execute("DELETE FROM facts")
    bench.journal.close()
    await bench.start()


def test_a_journal_of_the_format_before_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE updates (message_id BLOB PRIMARY KEY, device TEXT NOT NULL UNIQUE, serial TEXT NOT NULL,
            hash BLOB NOT NULL, head BLOB NOT NULL, body BLOB NOT NULL, receipt BLOB NOT NULL);
        INSERT INTO updates VALUES (x'01', 'd-1', '7', x'02', x'03', x'04', x'05');
        PRAGMA user_version = 1;
        """
    )
    connection.close()
    for _ in range(2):
        journal = Journal(path)
        assert journal._rows("SELECT device, owner FROM updates") == [("d-1", "")]
        journal.close()
