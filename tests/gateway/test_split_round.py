"""Split rounds as they should go: what leaves the gateway adds up, and nothing else leaves it."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench, opened
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.gateway import events as ev
from fleetfed.gateway.record import Place, RoundSecrets, RoundState
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.summation import Summation
from fleetfed.shared.aggregate.accumulator import Partial
from fleetfed.shared.errors import RejectReason, StorageError
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire.envelope import MessageKind, parse_head
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX, Cosign
from fleetfed.shared.wire.messages import Life, Mode, Reveal
from fleetfed.shared.wire.topics import Broadcast, Kind, Verb

HELPERS = pytest.mark.parametrize("helper", [False, True], ids=["h1", "h2"])


@HELPERS
async def test_a_round_of_one_sum(bench: Bench, helper: bool) -> None:
    site = await (await SplitRound(bench, 5, helper=helper).open()).answer()
    assert all(bench.receipts(name)[0].reason is None for name in site.names)
    head, proposal = bench.proposals()[0]
    assert sorted(proposal.heads) == sorted(update.head.encode() for update in site.updates.values())
    assert proposal.nonces == ()
    commit = await site.committed()
    head, reveal = bench.reveals()[0]
    assert (head.header.kind, reveal.commit, reveal.count) == (MessageKind.REVEAL, commit.head.hash, 5)
    assert not head.header.compressed
    assert len(reveal.words) == 8 * bench.fleet.ring.layout.n_words
    assert np.array_equal(site.unmasked(reveal), site.sum())
    assert bench.counters.snapshot() == {}


async def test_the_cosignature_names_this_plan_and_follows_it(bench: Bench) -> None:
    site = await SplitRound(bench, 2).open()
    topics = [topic for topic, _, retained in bench.below.sent if retained]
    assert topics == [bench.site.broadcast(Broadcast.PLAN), bench.site.broadcast(Broadcast.COSIGN)]
    raw = bench.below.on(topics[1])[0]
    cosign, head, certificate = bench.verifier.open(raw, Cosign, kind=MessageKind.COSIGN, now=bench.fleet.now)
    assert (certificate.id, certificate.site) == (bench.name, bench.site.site)
    assert cosign.plan == site.hash
    assert (head.header.round, head.header.expires_at) == (site.plan.round, site.plan.expires)


async def test_a_plain_round_has_no_cosignature_and_no_secret(bench: Bench) -> None:
    bench.present("d-0")
    bench.open_round()
    await bench.quiet()
    assert bench.cosigns() == []
    assert bench.journal.load().secrets is None


async def test_what_the_commit_leaves_out_is_not_in_the_sum(bench: Bench) -> None:
    site = await (await SplitRound(bench, 5).open()).answer()
    await site.committed("d-0", "d-2", "d-4")
    reveal = bench.reveals()[0][1]
    assert np.array_equal(site.unmasked(reveal, "d-0", "d-2", "d-4"), site.sum("d-0", "d-2", "d-4"))


@HELPERS
async def test_a_round_of_buckets(bench: Bench, helper: bool) -> None:
    site = await (await SplitRound(bench, 11, bucket=3, minimum_cohort=3, helper=helper).open()).answer()
    ((_, proposal),) = bench.proposals()
    assert [nonce.site for nonce in proposal.nonces] == [bench.site.site]
    names = [name for name in site.names if name != "d-7"]
    await site.committed(*names)
    reveal = bench.reveals()[0][1]
    assert (reveal.words, reveal.count) == (b"", 10)
    assert [bucket.count for bucket in reveal.buckets] == [3, 3, 4]
    found = site.unmasked_buckets(reveal, proposal.nonces[0].hash, *names)
    assert np.array_equal(sum(found), site.sum(*names))


async def test_a_part_smaller_than_two_buckets_makes_one(bench: Bench) -> None:
    site = await (await SplitRound(bench, 5, bucket=3, minimum_cohort=2).open()).answer()
    await site.committed()
    reveal = bench.reveals()[0][1]
    assert [bucket.count for bucket in reveal.buckets] == [5]
    await bench.close()
    await bench.start()


async def test_a_gateway_without_updates_has_no_share_in_the_coin(bench: Bench) -> None:
    await SplitRound(bench, 2, bucket=2).open()
    bench.timer(60_000)
    await bench.quiet()
    assert bench.proposals()[0][1].nonces == ()


async def test_the_deal_depends_on_both_shares_of_the_coin(bench: Bench) -> None:
    site = await (await SplitRound(bench, 12, bucket=3).open()).answer()
    nonce = bench.journal.load().secrets.nonce
    await site.committed()
    reveal = bench.reveals()[0][1]
    assert {bucket.nonce for bucket in reveal.buckets} == {nonce}
    assert nonce not in b"".join(bench.above.on(bench.upstream.up(Kind.GATEWAY, bench.name, Verb.PROPOSE)))


@pytest.mark.parametrize("bucket", [0, 3])
async def test_own_contributions_are_released_once_for_each_sum(
    bench: Bench, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a gateway adds to what its devices sent, such as noise, is in the sums that leave, once in each."""
    asked: list[tuple[int, frozenset[bytes]]] = []

    def release(self: Summation, own: Partial, members: Any, source: Any) -> Partial:
        assert len(list(source.updates(members))) == own.count
        asked.append((own.count, frozenset(members)))
        return Partial(own.ring, own.words + np.uint64(1), own.count)

    monkeypatch.setattr(Summation, "release", release)
    site = await (await SplitRound(bench, 6, bucket=bucket).open()).answer()
    await site.committed()
    reveal = bench.reveals()[0][1]
    assert [count for count, _ in asked] == ([3, 3] if bucket else [6])
    assert frozenset().union(*(members for _, members in asked)) == set(site.ids())
    sums = [bucket.words for bucket in reveal.buckets] or [reveal.words]
    total = sum((np.frombuffer(words, dtype="<u8") for words in sums), start=np.uint64(0))
    values, _ = bench.fleet.unmask(site.heads(), total - np.uint64(len(sums)))
    assert np.array_equal(values, site.sum())


# --- Order, repetition, absence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, 2])
@pytest.mark.parametrize("seed", range(4))
async def test_no_order_and_no_repetition_changes_the_sum(bench: Bench, bucket: int, seed: int) -> None:
    rng = random.Random(seed)
    site = await SplitRound(bench, 6, bucket=bucket).open()
    order = [name for name in site.names for _ in range(rng.randint(1, 3))]
    rng.shuffle(order)
    for name in order:
        bench.update(name, site.update(name))
        if rng.random() < 0.5:
            await bench.quiet()
    await bench.quiet()
    for name in site.names:
        assert len(set(bench.below.on(bench.site.down(Kind.DEVICE, name, Verb.RECEIPT)))) == 1
    commit = site.commit()
    for _ in range(3):
        bench.commit(commit)
        await bench.quiet()
    reveals = bench.reveals()
    assert len({head.hash for head, _ in reveals}) == 1, "the stored one, sent again"
    reveal = reveals[0][1]
    if bucket:
        found = site.unmasked_buckets(reveal, bench.proposals()[0][1].nonces[0].hash)
        assert np.array_equal(sum(found), site.sum())
    else:
        assert np.array_equal(site.unmasked(reveal), site.sum())


async def test_who_drops_out_is_simply_not_there(bench: Bench) -> None:
    site = await (await SplitRound(bench, 6).open()).answer("d-0", "d-1", "d-2")
    bench.present("d-3", life=Life.DISCONNECTED)
    bench.timer(60_000)
    await bench.quiet()
    late = site.update("d-4")
    bench.update("d-4", late)
    await bench.quiet()
    assert bench.receipts("d-4")[0].reason is RejectReason.LATE
    present = ("d-0", "d-1", "d-2")
    await site.committed(*present)
    assert np.array_equal(site.unmasked(bench.reveals()[0][1], *present), site.sum(*present))


async def test_a_round_without_own_updates_reveals_nothing(bench: Bench) -> None:
    site = await SplitRound(bench, 2).open()
    bench.timer(60_000)
    await bench.quiet()
    bench.commit(site.fleet.commit(site.hash, bench.proposals()[0][0].hash, [], gateway=bench.name))
    await bench.quiet()
    assert bench.reveals() == []
    assert bench.machine.round.state is RoundState.CLOSED
    assert bench.journal.load().secrets is None


# --- Two tiers -------------------------------------------------------------------------------------------------------


class TwoTiers:
    """A gateway with devices of its own above another one, each on its bench; what one says the other hears."""

    def __init__(self, fleet: SignedFleet, folder: Path) -> None:
        self.top = Bench(fleet, folder / "top")
        self.low = Bench(fleet, folder / "low", name="g-low", site="low", upstream="north")
        self.low.place = Place(gateway="g-low", direct=False)
        self._heard = {Verb.PROPOSE: 0, Verb.REVEAL: 0}

    async def start(self, count: int, **split: Any) -> None:
        for bench in (self.top, self.low):
            await bench.start()
        self.top.present("g-low", kind=Kind.GATEWAY)
        self.above = SplitRound(self.top, count, tiers=2, **split)
        self.below = SplitRound(self.low, count, prefix="e", tiers=2, **split)
        await self.above.open()
        plan = self.top.below.on(self.top.site.broadcast(Broadcast.PLAN))[0]
        self.low.present(*self.below.names)
        self.low.inbound.receive(self.low.upstream.broadcast(Broadcast.PLAN), plan)
        self.below.plan, self.below.hash = self.above.plan, self.above.hash
        await self.low.quiet()

    async def carry(self, verb: Verb) -> None:
        """What the lower one said reaches the upper one."""
        await self.low.quiet()
        topic = self.low.upstream.up(Kind.GATEWAY, "g-low", verb)
        for frame in self.low.above.on(topic)[self._heard[verb] :]:
            self.top.inbound.receive(topic, frame)
            self._heard[verb] += 1
        await self.top.quiet()

    async def down(self) -> None:
        """The commit that the upper one passes on reaches the lower one."""
        topic = self.top.site.down(Kind.GATEWAY, "g-low", Verb.COMMIT)
        for frame in self.top.below.on(topic):
            self.low.inbound.receive(topic, frame)
        await self.low.quiet()

    async def close(self) -> None:
        for bench in (self.top, self.low):
            bench.machine.validate()
            await bench.close()


@pytest.fixture
async def tiers(fleet: SignedFleet, tmp_path: Path) -> Any:
    made = TwoTiers(fleet, tmp_path)
    yield made
    await made.close()


@pytest.mark.parametrize("bucket", [0, 2])
async def test_two_tiers_come_to_the_sum_of_all(tiers: TwoTiers, bucket: int) -> None:
    await tiers.start(5, bucket=bucket)
    assert tiers.top.cosigns()[0].seal_key != tiers.low.cosigns()[0].seal_key, "each has a key of its own"
    await tiers.below.answer()
    await tiers.carry(Verb.PROPOSE)
    await tiers.above.answer()
    ((_, proposal),) = tiers.top.proposals()
    assert len(proposal.heads) == 10
    assert sorted(nonce.site for nonce in proposal.nonces) == (["low", "north"] if bucket else [])
    kept_above, kept_below = tiers.above.names[1:], tiers.below.names[:4]
    await tiers.above.committed(*kept_above, more=tiers.below.ids(*kept_below))
    assert tiers.top.reveals() == []
    await tiers.down()
    await tiers.carry(Verb.REVEAL)
    ((_, low),), ((_, top),) = tiers.low.reveals(), tiers.top.reveals()
    assert (low.count, top.count) == (4, 8)
    if not bucket:
        heads = tiers.above.heads(*kept_above) + tiers.below.heads(*kept_below)
        values, meta = tiers.top.fleet.unmask(heads, top.words)
        assert int(meta[0]) == 8
        assert np.array_equal(values, tiers.above.sum(*kept_above) + tiers.below.sum(*kept_below))
        return
    assert top.buckets[2:] == low.buckets, "byte for byte"
    hashes = {nonce.site: nonce.hash for nonce in proposal.nonces}
    found = tiers.above.unmasked_buckets(top, hashes["north"], *kept_above)
    found += tiers.below.unmasked_buckets(top, hashes["low"], *kept_below)
    assert np.array_equal(sum(found), tiers.above.sum(*kept_above) + tiers.below.sum(*kept_below))


async def test_the_part_of_a_site_below_is_that_sites_business(tiers: TwoTiers) -> None:
    """Two of five are fewer than the minimum: the lower gateway reveals nothing, and the upper one passes that on."""
    await tiers.start(5, minimum_cohort=3)
    await tiers.below.answer()
    await tiers.carry(Verb.PROPOSE)
    await tiers.above.answer()
    await tiers.above.committed(*tiers.above.names, more=tiers.below.ids("e-0", "e-1"))
    await tiers.down()
    await tiers.carry(Verb.REVEAL)
    assert tiers.low.reveals() == tiers.top.reveals() == []
    assert tiers.low.machine.round.record.aborted == "below_minimum"
    topic = tiers.top.site.down(Kind.GATEWAY, "g-low", Verb.RECEIPT)
    tiers.low.inbound.receive(topic, tiers.top.below.on(topic)[-1])
    await tiers.low.quiet()
    assert tiers.low.machine.round.state is RoundState.CLOSED, "the tier above has heard it"
    assert tiers.low.counters.snapshot() == {"below_minimum": 1}
    assert tiers.top.machine.round.record.aborted == "below_minimum"
    assert tiers.top.journal.load().secrets is None
    ((_, refusal),) = tiers.top.refusals()
    assert (refusal.reason, refusal.count) == (RejectReason.BELOW_MINIMUM, 0)
    assert refusal.detail.startswith("g-low: 2 of 3")


def lie(reveal: Reveal, index: int = 0, **changes: Any) -> Reveal:
    buckets = list(reveal.buckets)
    buckets[index] = replace(buckets[index], **changes)
    return replace(reveal, buckets=tuple(buckets))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: replace(r, words=bytes(8)), RejectReason.WRONG_SHAPE),
        (lambda r: lie(r, words=r.buckets[0].words[:-8]), RejectReason.WRONG_SHAPE),
        (lambda r: lie(r, words=r.buckets[0].words + bytes(8)), RejectReason.WRONG_SHAPE),
        (lambda r: lie(r, count=1), RejectReason.BELOW_MINIMUM),
        (lambda r: lie(r, count=3), RejectReason.OUT_OF_RANGE),
        (lambda r: replace(r, buckets=r.buckets[:1]), RejectReason.OUT_OF_RANGE),
        (lambda r: replace(r, count=2, buckets=r.buckets[:1]), RejectReason.OUT_OF_RANGE),
        (lambda r: replace(r, buckets=r.buckets * 3), RejectReason.TOO_LARGE),
        (lambda r: lie(r, site="north"), RejectReason.WRONG_SITE),
    ],
    ids=["words", "short", "long", "one", "count", "half", "fewer", "many", "ours"],
)
async def test_buckets_from_below_that_do_not_fit(tiers: TwoTiers, change: Any, reason: RejectReason) -> None:
    tiers.top.fleet.sizes = (600, 4)
    await tiers.start(4, bucket=2)
    await tiers.below.answer()
    await tiers.carry(Verb.PROPOSE)
    await tiers.above.answer()
    await tiers.above.committed(more=[*tiers.above.ids(), *tiers.below.ids()])
    await tiers.down()
    before = tiers.top.facts()
    honest = tiers.low.reveals()[0][1]
    wrong = tiers.top.fleet.reveal("g-low", tiers.above.plan, change(honest), site="low")
    tiers.top.say(Kind.GATEWAY, "g-low", Verb.REVEAL, wrong)
    await tiers.top.quiet()
    assert tiers.top.facts() == before
    assert tiers.top.receipts("g-low", Kind.GATEWAY)[-1].reason is reason
    await tiers.carry(Verb.REVEAL)
    assert tiers.top.reveals()[0][1].count == 8, "the honest one still counts"


async def test_a_masked_sum_from_below_of_another_size(tiers: TwoTiers) -> None:
    await tiers.start(3)
    await tiers.below.answer()
    await tiers.carry(Verb.PROPOSE)
    await tiers.above.answer()
    await tiers.above.committed(more=[*tiers.above.ids(), *tiers.below.ids()])
    await tiers.down()
    honest = tiers.low.reveals()[0][1]
    for wrong in (honest.words[:-8], honest.words + bytes(8)):
        message = tiers.top.fleet.reveal("g-low", tiers.above.plan, replace(honest, words=wrong), site="low")
        tiers.top.say(Kind.GATEWAY, "g-low", Verb.REVEAL, message)
        await tiers.top.quiet()
        assert tiers.top.receipts("g-low", Kind.GATEWAY)[-1].reason is RejectReason.WRONG_SHAPE


async def test_nobody_below_commits_to_a_nonce_in_our_name(bench: Bench) -> None:
    fleet = bench.fleet
    bench.present("g-low", kind=Kind.GATEWAY)
    site = await SplitRound(bench, 2, bucket=2, tiers=2).open()
    below = [site.update(f"e-{number}", site="low", gateway_key=fleet.seal("g-low").public) for number in range(2)]
    nonces = tuple((name, bytes([number]) * 32) for number, name in enumerate(("low", bench.site.site)))
    proposal = fleet.proposal("g-low", site.plan, site.hash, below, site="low", nonces=nonces)
    bench.say(Kind.GATEWAY, "g-low", Verb.PROPOSE, proposal)
    await site.answer()
    found = {nonce.site: nonce.hash for nonce in bench.proposals()[0][1].nonces}
    assert found["low"] == bytes(32)
    assert found["north"] != bytes([1]) * 32


# --- What the gateway can see ----------------------------------------------------------------------------------------


async def test_every_update_has_one_length_whatever_is_in_it(bench: Bench) -> None:
    site = await SplitRound(bench, 1).open()
    layout = bench.fleet.ring.layout
    cases = [layout.zeros(), np.full(layout.n_words, 2**64 - 1, dtype=np.uint64)]
    messages = [site.update("d-0", words=words) for words in cases] + [site.update("d-0", number=5)]
    assert {len(message.encode()) for message in messages} == {messages[0].head.size + body_size(layout.n_words)}
    assert len({len(message.head.encode()) for message in messages}) == 1


async def test_the_gateway_never_holds_what_a_device_has(fleet: SignedFleet, tmp_path: Path) -> None:
    """Every device has the same values; what the gateway opens, adds and stores is uniform, and never the same."""
    fleet.sizes = (20_000,)
    bench = Bench(fleet, tmp_path / "state")
    bench.budget = 1 << 24
    await bench.start()
    site = await SplitRound(bench, 4).open()
    packed = fleet.ring.layout.pack(np.full(20_000, 77, dtype=np.int8), fleet.meta())
    for name in site.names[:3]:
        bench.update(name, site.update(name, words=packed))
    await bench.quiet()
    total = bench.performer.total
    seen = [bench.words()]
    for head, body in bench.journal.updates([u.message_id for u in bench.machine.round.record.accepted.values()]):
        seen.append(total.open(parse_head(head), body))
        seen.append(np.frombuffer(body[: len(body) // 8 * 8], dtype="<u8"))
    for words in seen:
        counts = np.bincount(np.frombuffer(words.tobytes(), dtype=np.uint8), minlength=256)
        expected = counts.sum() / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        # Chi squared of 255 degrees of freedom: 255 ± 23; packed values alone would give millions.
        assert statistic < 255 + 8 * 23
        assert not np.isin(words, packed).any()
    for one, other in itertools.combinations(seen, 2):
        assert not np.isin(one, other).any()
    await bench.close()


async def test_large_rounds_are_opened_and_revealed_off_the_loop(fleet: SignedFleet, tmp_path: Path) -> None:
    fleet.sizes = (300_000, 10)
    for bucket in (0, 2):
        bench = Bench(fleet, tmp_path / f"state-{bucket}")
        bench.budget = 1 << 26
        await bench.start()
        site = await (await SplitRound(bench, 4, bucket=bucket).open()).answer()
        await site.committed()
        reveal = bench.reveals()[0][1]
        if bucket:
            found = sum(site.unmasked_buckets(reveal, bench.proposals()[0][1].nonces[0].hash))
        else:
            found = site.unmasked(reveal)
        assert np.array_equal(found, site.sum())
        await bench.close()


# --- Plans -----------------------------------------------------------------------------------------------------------


async def test_a_plan_below_the_policy_is_not_passed_on(bench: Bench) -> None:
    bench.verifier.policy = Policy(modes=(Mode.SPLIT,), minimum_cohort=5)
    before = bench.facts()
    bench.open_round(1)
    bench.open_round(2, split=bench.fleet.split(minimum_cohort=4))
    await bench.quiet()
    assert bench.facts() == before
    assert bench.below.sent == []
    assert bench.counters.snapshot() == {"below_policy": 2}
    bench.open_round(3, split=bench.fleet.split(minimum_cohort=5))
    await bench.quiet()
    assert bench.machine.round.record.plan.round == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suite": 7}, RejectReason.UNKNOWN_SUITE),
        ({"suite": 3}, RejectReason.BAD_BOX),
        ({"bucket": 3, "minimum_cohort": 4}, RejectReason.WRONG_SHAPE),
    ],
    ids=["suite", "key", "bucket"],
)
def test_a_plan_that_contradicts_itself_or_is_too_new(
    fleet: SignedFleet, change: dict[str, int], reason: RejectReason
) -> None:
    machine = GatewayMachine("north", Place(gateway="g", direct=True))
    sha256 = fleet.model(1)[0].sha256
    machine.handle(ev.ModelServed(version=1, sha256=sha256, sizes=fleet.sizes), fleet.now)
    plan, message = fleet.plan(1, split=fleet.split(**change))
    (refused,) = machine.handle(ev.PlanArrived(plan=plan, hash=message.head.hash, raw=message.encode()), fleet.now)
    assert refused.reason is reason
    assert machine.round is None
    machine.validate()


@pytest.mark.parametrize("suite", [SEALED_BOX, HYBRID])
def test_a_rounds_secrets_come_back_from_the_journal_with_their_suite(suite: int) -> None:
    made = RoundSecrets.new(os.urandom, suite)
    again = RoundSecrets.decode(made.encode())
    assert (again.seal.suite, again.seal.public, again.nonce) == (suite, made.seal.public, made.nonce)
    for damaged in (made.encode()[:-1], made.encode()[:-1] + b"\x09"):
        with pytest.raises(StorageError):
            RoundSecrets.decode(damaged)


async def test_rounds_of_both_modes_follow_each_other(bench: Bench) -> None:
    keys = set()
    for number in range(1, 5):
        if number % 2:
            site = await (await SplitRound(bench, 3, number=number).open()).answer()
            keys.add(bench.cosigns()[-1].seal_key)
            await site.committed()
            assert np.array_equal(site.unmasked(bench.reveals()[-1][1]), site.sum())
            bench.end_round(number, site.hash)
        else:
            bench.present("d-0")
            plan, hash = bench.open_round(number)
            bench.update("d-0", bench.fleet.update("d-0", plan, hash, number=2))
            await bench.quiet()
            assert np.array_equal(bench.total(), bench.fleet.values(2))
            bench.end_round(number, hash)
        await bench.quiet()
    assert len(keys) == 2, "a key serves one round"
    assert opened(bench.below.on(bench.site.broadcast(Broadcast.COSIGN))[-1], Cosign).seal_key in keys
