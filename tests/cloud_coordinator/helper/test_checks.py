"""What a helper gives masks for, and what it does not: every way to ask it for one device's mask, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.helper_round import COMMIT_NONCE, GATEWAY_NONCE, HelperRound, question
from fleetfed_testing.signed_fleet import SignedFleet
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.helper.checks import BadSeedsError, Job, layout_of, verify
from fleetfed.cloud_coordinator.helper.events import Key
from fleetfed.cloud_coordinator.helper.state import SKEW
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader, seal
from fleetfed.shared.secure.buckets import commit_nonce, deal
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.masking import MAX_NAMED, MaskRequest
from fleetfed.shared.wire.messages import Commit, Mode, Proposal, Revocations
from fleetfed.shared.wire.projection import Factor, Projection
from fleetfed.shared.wire.update import BOX_SIZE, UpdateExtension

DEVICES = ("d-1", "d-2", "d-3", "d-4")


class Bench:
    """A helper's checks on their own."""

    def __init__(self) -> None:
        self.fleet = SignedFleet(owners={name: f"owner-{name}" for name in DEVICES})
        self.verifier: Verifier = self.fleet.identity("h-main", Role.HELPER, "_").verifier()
        self.key_expires = self.fleet.now + 10_000_000

    def round(self, *devices: str, **changes: Any) -> HelperRound:
        rnd = HelperRound.of(self.fleet, **changes)
        rnd.add(*devices)
        return rnd

    def verify(self, rnd: HelperRound, request: MaskRequest) -> Job:
        assert rnd.plan.split is not None
        key = Key(
            public=self.fleet.seal("h-main").public,
            message=rnd.plan.split.helper,
            issued=self.fleet.now,
            expires=self.key_expires,
        )
        return verify(
            request,
            question(request),
            verifier=self.verifier,
            key=lambda message: key if message == key.message else None,
            secret=lambda public: self.fleet.seal("h-main"),
            now=self.fleet.now,
        )

    def refuses(self, reason: RejectReason, rnd: HelperRound, request: MaskRequest) -> None:
        with pytest.raises(RemoteProtocolError) as raised:
            self.verify(rnd, request)
        assert raised.value.reason is reason, str(raised.value)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def masks(bench: Bench, rnd: HelperRound, devices: tuple[str, ...] | list[str]) -> list[int]:
    """The sum of the helper's masks, from the devices' updates."""
    words = bench.fleet.ring.layout.zeros()
    for name in devices:
        head = rnd.updates[name].head
        seed = split.open_seed(head, Reader.HELPER, bench.fleet.seal("h-main"))
        split.add_masks(words, [split.mask_key(seed, split.binding_of(head))])
    return words.tolist()


def words(data: bytes) -> list[int]:
    return np.frombuffer(data, dtype="<u8").tolist()


def test_the_masks_of_a_committed_set(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    job = bench.verify(rnd, rnd.request(DEVICES[:3]))
    assert (job.claim.round, job.claim.gateway, job.claim.devices) == (1, "g-north", frozenset(DEVICES[:3]))
    (total,) = job.add_up()
    assert words(total) == masks(bench, rnd, DEVICES[:3])


def test_with_the_coordinators_part_the_sum_comes_out(bench: Bench) -> None:
    """Gateway, coordinator and helper, each with its own piece."""
    fleet, rnd = bench.fleet, bench.round(*DEVICES)
    total = fleet.ring.layout.zeros()
    for update in rnd.updates.values():
        n_words = fleet.ring.layout.n_words
        total += split.open_words(update.head, update.body, secret=fleet.seal("g-north"), n_words=n_words)
    (helpers,) = bench.verify(rnd, rnd.request()).add_up()
    total -= np.frombuffer(helpers, dtype="<u8")
    values, meta = fleet.unmask([update.head for update in rnd.updates.values()], total)
    assert values.tolist() == sum(fleet.values(number) for number in range(len(DEVICES))).tolist()
    assert int(meta[0]) == len(DEVICES)


def test_one_sum_for_every_bucket_by_site_and_index(bench: Bench) -> None:
    rnd = HelperRound.of(bench.fleet, split={"minimum_cohort": 2, "bucket": 2})
    rnd.add("d-s1", "d-s2", "d-s3", "d-s4", "d-s5", site="south")
    rnd.add(*DEVICES)
    job = bench.verify(rnd, rnd.request())
    by_id = {update.id: name for name, update in rnd.updates.items()}
    expected = []
    for site in ("north", "south"):
        ids = [each.id for name, each in rnd.updates.items() if bench.fleet.signer(name).certificate.site == site]
        coin = {"gateway_nonce": GATEWAY_NONCE, "coordinator_nonce": COMMIT_NONCE}
        for bucket in deal(dict.fromkeys(ids, ""), 2, minimum_owners=1, **coin):
            expected.append(masks(bench, rnd, [by_id[each] for each in bucket]))
    assert [words(each) for each in job.add_up()] == expected
    assert len(expected) == 4


# --- The plan --------------------------------------------------------------------------------------------------------


def test_a_plan_that_the_coordinator_did_not_sign(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    forged = bench.fleet.signer("g-north", Role.GATEWAY, "north").sign(MessageKind.PLAN, rnd.plan, now=bench.fleet.now)
    bench.refuses(RejectReason.WRONG_ROLE, rnd, replace(rnd.request(), plan=forged.encode()))


def test_a_plan_below_the_policy(bench: Bench) -> None:
    bench.verifier.policy = Policy(minimum_cohort=3, seed_holders=2)
    rnd = bench.round(*DEVICES, split={"minimum_cohort": 2})
    bench.refuses(RejectReason.BELOW_POLICY, rnd, rnd.request())
    fine = bench.round("d-5", "d-6", "d-7", round=2, split={"minimum_cohort": 3})
    bench.verify(fine, fine.request())


def test_a_plain_plan(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    plan, message = bench.fleet.plan(1, mode=Mode.PLAIN)
    bench.refuses(RejectReason.WRONG_PLAN, rnd, replace(rnd.request(), plan=message.encode()))
    assert plan.split is None


def test_a_plan_with_one_seed_holder(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    _, message = bench.fleet.plan(1, mode=Mode.SPLIT, split=bench.fleet.split())
    bench.refuses(RejectReason.WRONG_PLAN, rnd, replace(rnd.request(), plan=message.encode()))


def test_a_plan_that_names_another_helpers_key(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    _, message = bench.fleet.plan(1, mode=Mode.SPLIT, split=bench.fleet.split(helper=True))
    assert rnd.plan.split is not None
    bench.refuses(RejectReason.WRONG_PLAN, rnd, replace(rnd.request(), plan=message.encode()))


def test_a_round_that_outlives_the_key(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    bench.key_expires = rnd.plan.expires - 1
    bench.refuses(RejectReason.EXPIRED, rnd, rnd.request())


def test_a_round_that_is_over(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    request = rnd.request()
    bench.fleet.now = rnd.plan.expires + SKEW + 1
    bench.refuses(RejectReason.LATE, rnd, request)


def test_buckets_below_the_minimum(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, split={"minimum_cohort": 3, "bucket": 2})
    bench.refuses(RejectReason.BELOW_POLICY, rnd, rnd.request())


# --- Proposal and commit ---------------------------------------------------------------------------------------------


def test_a_proposal_that_no_gateway_signed(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    body = Proposal(plan=rnd.hash, heads=tuple(each.head.encode() for each in rnd.updates.values()))
    forged = bench.fleet.coordinator.sign(MessageKind.PROPOSE, body, now=bench.fleet.now, round=1)
    bench.refuses(RejectReason.WRONG_ROLE, rnd, rnd.ask(forged, rnd.commit(forged)))


def test_a_proposal_for_another_plan(bench: Bench) -> None:
    rnd, other = bench.round(*DEVICES), bench.round("d-1", round=2)
    bench.refuses(RejectReason.WRONG_PLAN, rnd, rnd.ask(other.proposal(), rnd.commit(rnd.proposal())))


def test_a_commit_that_the_coordinator_did_not_sign(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    proposal = rnd.proposal()
    members = b"".join(sorted(each.id for each in rnd.updates.values()))
    body = Commit(plan=rnd.hash, gateway="g-north", proposal=proposal.head.hash, members=members)
    forged = bench.fleet.signer("g-north", Role.GATEWAY, "north").sign(
        MessageKind.COMMIT, body, now=bench.fleet.now, round=1
    )
    bench.refuses(RejectReason.WRONG_ROLE, rnd, rnd.ask(proposal, forged))


def test_a_commit_for_another_proposal(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    bench.refuses(RejectReason.NOT_PROPOSED, rnd, rnd.ask(rnd.proposal(), rnd.commit(rnd.proposal())))


def test_a_commit_to_another_gateway(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    proposal = rnd.proposal()
    bench.refuses(RejectReason.NOT_PROPOSED, rnd, rnd.ask(proposal, rnd.commit(proposal, gateway="g-south")))


def test_a_commit_for_another_plan(bench: Bench) -> None:
    rnd, other = bench.round(*DEVICES), bench.round(*DEVICES, round=2)
    proposal = rnd.proposal()
    bench.refuses(RejectReason.WRONG_PLAN, rnd, rnd.ask(proposal, other.commit(proposal)))


@pytest.mark.parametrize(
    "members",
    [b"", b"x" * 15, lambda ids: b"".join(sorted(ids, reverse=True)), lambda ids: b"".join(sorted([*ids, ids[0]]))],
    ids=["none", "half an id", "not sorted", "twice"],
)
def test_members_that_are_no_set(bench: Bench, members: bytes | Callable[[list[bytes]], bytes]) -> None:
    rnd = bench.round(*DEVICES)
    proposal = rnd.proposal()
    ids = [each.id for each in rnd.updates.values()]
    body = Commit(
        plan=rnd.hash,
        gateway="g-north",
        proposal=proposal.head.hash,
        members=members if isinstance(members, bytes) else members(list(ids)),
    )
    commit = bench.fleet.coordinator.sign(MessageKind.COMMIT, body, now=bench.fleet.now, round=1)
    bench.refuses(RejectReason.MALFORMED, rnd, rnd.ask(proposal, commit))


def test_a_member_that_was_not_proposed(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    bench.refuses(RejectReason.NOT_PROPOSED, rnd, rnd.request(DEVICES, proposed=DEVICES[:3]))


def test_a_proposal_that_is_larger_than_its_cohort_can_be(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, cohort=4)
    bomb = bench.fleet.signer("g-north", Role.GATEWAY, "north").sign(
        MessageKind.PROPOSE, bytes(1_000_000), now=bench.fleet.now, round=1
    )
    bench.refuses(RejectReason.TOO_LARGE, rnd, rnd.ask(bomb, rnd.commit(bomb)))


# --- Heads -----------------------------------------------------------------------------------------------------------


def test_a_head_that_its_device_did_not_sign(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    head = rnd.updates["d-1"].head
    raw = bytearray(head.encode())
    raw[48] ^= 1
    heads = [bytes(raw), *(rnd.updates[name].head.encode() for name in DEVICES[1:])]
    body = Proposal(plan=rnd.hash, heads=tuple(heads))
    proposal = bench.fleet.signer("g-north", Role.GATEWAY, "north").sign(
        MessageKind.PROPOSE, body, now=bench.fleet.now, round=1
    )
    bench.refuses(RejectReason.BAD_SIGNATURE, rnd, rnd.ask(proposal, rnd.commit(proposal)))


def test_a_head_of_a_device_that_is_revoked(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    serial = bench.fleet.signer("d-2").certificate.serial
    bench.verifier.revoke(Revocations(version=2, serials=(serial,)))
    bench.refuses(RejectReason.REVOKED, rnd, rnd.request())
    bench.verify(rnd, rnd.request(("d-1", "d-3", "d-4")))


def test_a_head_that_no_device_signed(bench: Bench) -> None:
    """A gateway that makes up devices cannot certify them."""
    rnd = bench.round("d-1", "d-2")
    bench.fleet.identity("g-sybil", Role.GATEWAY, "sybil")
    rnd.add("g-sybil")
    bench.refuses(RejectReason.WRONG_ROLE, rnd, rnd.request())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_sha256": b"o" * 32}, RejectReason.WRONG_MODEL),
        ({"mode": 0}, RejectReason.WRONG_SHAPE),
        ({"suite": 9}, RejectReason.WRONG_SHAPE),
        ({"bits": 4}, RejectReason.WRONG_SHAPE),
        ({"lane_bits": 16}, RejectReason.WRONG_SHAPE),
        ({"dimension": 9}, RejectReason.WRONG_SHAPE),
        ({"meta_words": 1}, RejectReason.WRONG_SHAPE),
        ({"round": 2}, RejectReason.WRONG_PLAN),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_head_of_another_shape(bench: Bench, change: dict[str, Any], reason: RejectReason) -> None:
    rnd = bench.round("d-1", "d-2")
    rnd.add("d-3", **change)
    bench.refuses(reason, rnd, rnd.request())


def test_a_head_for_another_plan(bench: Bench) -> None:
    rnd, other = bench.round("d-1", "d-2"), bench.round("d-3")
    rnd.updates |= other.updates
    bench.refuses(RejectReason.WRONG_PLAN, rnd, rnd.request())


def test_a_device_that_the_plan_does_not_select(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, fraction=0.0)
    bench.refuses(RejectReason.NOT_SELECTED, rnd, rnd.request())


def test_two_updates_of_one_device(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    again = bench.fleet.split_update("d-1", rnd.plan, rnd.hash, gateway_key=bench.fleet.seal("g-north").public)
    rnd.updates["again"] = again
    bench.fleet._signers["again"] = bench.fleet.signer("d-1")
    bench.refuses(RejectReason.DUPLICATE, rnd, rnd.request())


def test_a_box_for_another_header(bench: Bench) -> None:
    """A victim's seed under another's name: the box is bound to the head that it was sealed for."""
    rnd = bench.round(*DEVICES)
    victim = rnd.updates["d-1"].head

    def copied(header: Any, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
        return body, (*boxes[:2], UpdateExtension.decode(victim).boxes[2])

    rnd.add("d-sybil", change=copied)
    bench.refuses(RejectReason.BAD_BOX, rnd, rnd.request())


def test_a_seed_that_another_update_has(bench: Bench) -> None:
    """Devices that share a broken generator: their masks are not independent."""
    rnd = bench.round("d-1", "d-2")

    def same(device: str) -> None:
        def change(header: Any, body: bytes, boxes: tuple[bytes, ...]) -> tuple[bytes, tuple[bytes, ...]]:
            fixed = bench.fleet.extension(rnd.plan, rnd.hash, mode=1, suite=1)
            bound = split.binding(header, fixed)
            return body, (*boxes[:2], seal(b"s" * 32, Reader.HELPER, bound, bench.fleet.seal("h-main").public))

        rnd.add(device, change=change)

    same("d-3")
    bench.verify(rnd, rnd.request())
    same("d-4")
    bench.refuses(RejectReason.REUSED_SEED, rnd, rnd.request())
    assert named(bench, rnd) == ("d-3", "d-4")


def named(bench: Bench, rnd: HelperRound) -> tuple[str, ...]:
    """Whom the helper names when it refuses."""
    with pytest.raises(BadSeedsError) as raised:
        bench.verify(rnd, rnd.request())
    return raised.value.devices


def test_all_whose_boxes_do_not_open_are_named_and_nobody_else(bench: Bench) -> None:
    """One junk box makes the sum of its whole gateway noise; the helper alone can see whose it is."""
    rnd = bench.round(*DEVICES)
    for name in ("d-6", "d-5"):
        rnd.add(name, change=lambda _, body, boxes: (body, (*boxes[:2], bytes(BOX_SIZE))))
    assert named(bench, rnd) == ("d-5", "d-6")
    many = [f"d-j{number:03}" for number in range(MAX_NAMED)]
    for name in many:
        rnd.add(name, change=lambda _, body, boxes: (body, (*boxes[:2], bytes(BOX_SIZE))))
    assert named(bench, rnd) == ("d-5", "d-6", *many)[:MAX_NAMED]


# --- Sites -----------------------------------------------------------------------------------------------------------


def test_a_set_of_one(bench: Bench) -> None:
    rnd = bench.round(*DEVICES[:3])
    bench.refuses(RejectReason.BELOW_MINIMUM, rnd, rnd.request(("d-1",)))


def test_a_site_with_too_few_members_of_a_large_set(bench: Bench) -> None:
    """Every site counts for itself: its own gateway may give its sum to whoever it likes."""
    rnd = bench.round(*DEVICES, split={"minimum_cohort": 3})
    rnd.add("d-s1", "d-s2", site="south")
    bench.refuses(RejectReason.BELOW_MINIMUM, rnd, rnd.request())
    rnd.add("d-s3", site="south")
    bench.verify(rnd, rnd.request())


def test_too_few_owners(bench: Bench) -> None:
    bench.fleet.owners |= dict.fromkeys(("d-x", "d-y", "d-z"), "one")
    rnd = bench.round("d-x", "d-y", "d-z", split={"minimum_owners": 2})
    bench.refuses(RejectReason.BELOW_OWNERS, rnd, rnd.request())
    rnd.add("d-1")
    bench.verify(rnd, rnd.request())


def test_no_bucket_has_fewer_owners_than_a_sum_must_have(bench: Bench) -> None:
    """Whatever the coin says, of two buckets one at least would have one or two owners."""
    names = [f"d-m{number}" for number in range(6)]
    bench.fleet.owners |= dict.fromkeys(names, "mallory")
    rnd = bench.round("d-1", "d-2", *names, split={"minimum_cohort": 4, "minimum_owners": 3, "bucket": 4})
    (total,) = bench.verify(rnd, rnd.request()).add_up()
    assert words(total) == masks(bench, rnd, ["d-1", "d-2", *names])


def test_devices_without_an_owner_count_as_one(bench: Bench) -> None:
    rnd = bench.round("d-x", "d-y", "d-z", split={"minimum_owners": 2})
    bench.refuses(RejectReason.BELOW_OWNERS, rnd, rnd.request())


def test_more_members_than_the_lanes_hold(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, cohort=3)
    bench.refuses(RejectReason.COHORT_FULL, rnd, rnd.request())


def test_too_many_left_out(bench: Bench) -> None:
    """A coordinator that could leave out whom it likes could leave out all but its own."""
    rnd = bench.round(*DEVICES, "d-5", "d-6")
    bench.refuses(RejectReason.TOO_MANY_EXCLUDED, rnd, rnd.request(DEVICES[:3]))
    bench.verify(rnd, rnd.request(DEVICES))


def proposal_with(bench: Bench, rnd: HelperRound, *more: bytes, first: bool = False) -> Any:
    """A proposal with further heads before or after the right ones."""
    heads = [update.head.encode() for update in rnd.updates.values()]
    body = Proposal(plan=rnd.hash, heads=tuple([*more, *heads] if first else [*heads, *more]))
    gateway = bench.fleet.signer("g-north", Role.GATEWAY, "north")
    return gateway.sign(MessageKind.PROPOSE, body, now=bench.fleet.now, round=1)


def test_junk_in_the_name_of_a_site_does_not_count_against_it(bench: Bench) -> None:
    """Of a hostile gateway elsewhere in the tree, which could else stop every round."""
    rnd = bench.round(*DEVICES)
    other = bench.round("d-x1", "d-x2", "d-x3")
    junk = []
    for update in other.updates.values():
        raw = bytearray(update.head.encode())
        raw[60] ^= 1
        junk.append(bytes(raw))
    proposal = proposal_with(bench, rnd, *junk, b"no head at all")
    assert len(bench.verify(rnd, rnd.ask(proposal, rnd.commit(proposal))).claim.devices) == len(DEVICES)


@pytest.mark.parametrize("first", [False, True])
def test_a_copy_of_a_head_with_a_broken_signature_hides_nobody(bench: Bench, first: bool) -> None:
    rnd = bench.round(*DEVICES)
    head = rnd.updates["d-1"].head
    broken = replace(head, signature=bytes(64)).encode()
    proposal = proposal_with(bench, rnd, broken, head.encode(), first=first)
    job = bench.verify(rnd, rnd.ask(proposal, rnd.commit(proposal)))
    assert words(job.add_up()[0]) == masks(bench, rnd, DEVICES)


def test_two_good_heads_with_one_message_id(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    taken = rnd.updates["d-1"].id
    bench.fleet.signer("d-5")._randomness = lambda size: taken
    rnd.add("d-5")
    extra = rnd.updates.pop("d-5").head.encode()
    proposal = proposal_with(bench, rnd, extra)
    bench.refuses(RejectReason.DUPLICATE, rnd, rnd.ask(proposal, rnd.commit(proposal)))


# --- Nonces ----------------------------------------------------------------------------------------------------------


def test_nonces(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, split={"minimum_cohort": 2, "bucket": 2})
    request = rnd.request()
    bench.verify(rnd, request)
    for nonces in ({}, {"north": b"x" * 16}, {"north": GATEWAY_NONCE, "south": GATEWAY_NONCE}):
        bench.refuses(RejectReason.BAD_NONCE, rnd, replace(request, nonces=nonces))


def test_a_site_that_committed_to_two_nonces(bench: Bench) -> None:
    rnd = bench.round(*DEVICES, split={"minimum_cohort": 2, "bucket": 2})
    two = [("north", commit_nonce(nonce)) for nonce in (GATEWAY_NONCE, b"other nonce 1234")]
    proposal = rnd.proposal(nonces=two)
    bench.refuses(RejectReason.BAD_NONCE, rnd, rnd.ask(proposal, rnd.commit(proposal)))


def test_nonces_without_buckets(bench: Bench) -> None:
    rnd = bench.round(*DEVICES)
    bench.refuses(RejectReason.BAD_NONCE, rnd, replace(rnd.request(), nonces={"north": GATEWAY_NONCE}))


def test_every_bit_of_what_was_signed_counts(bench: Bench) -> None:
    """Whatever byte of the three messages is changed, there are no masks."""
    rnd = bench.round(*DEVICES[:2])
    request = rnd.request()
    for name in ("plan", "proposal", "commit"):
        raw = getattr(request, name)
        for at in itertools.chain(range(0, len(raw), 7), [len(raw) - 1]):
            changed = bytearray(raw)
            changed[at] ^= 1
            with pytest.raises(RemoteProtocolError):
                bench.verify(rnd, replace(request, **{name: bytes(changed)}))


# --- All rules at once -----------------------------------------------------------------------------------------------

NORTH, SOUTH = tuple(f"d-n{i}" for i in range(7)), tuple(f"d-s{i}" for i in range(5))


@pytest.fixture(scope="module")
def crowd() -> tuple[Bench, HelperRound]:
    """Two sites and three owners, in a round that wants three members of two owners."""
    bench = Bench()
    bench.fleet.owners = {name: f"owner-{index % 3}" for index, name in enumerate(NORTH + SOUTH)}
    rnd = HelperRound.of(bench.fleet, split={"minimum_cohort": 3, "minimum_owners": 2, "bucket": 3})
    rnd.add(*NORTH)
    rnd.add(*SOUTH, site="south")
    return bench, rnd


@settings(max_examples=150, deadline=None)
@given(members=st.sets(st.sampled_from(NORTH + SOUTH), min_size=1), hidden=st.sets(st.sampled_from(NORTH + SOUTH)))
def test_masks_are_given_exactly_where_every_site_keeps_every_rule(
    crowd: tuple[Bench, HelperRound], members: set[str], hidden: set[str]
) -> None:
    bench, rnd = crowd
    proposed = [name for name in rnd.updates if name in members or name not in hidden]
    allowed = True
    for site in (NORTH, SOUTH):
        own, out = [n for n in site if n in members], [n for n in site if n in proposed and n not in members]
        owners = {bench.fleet.owners[name] for name in own}
        if own:
            allowed &= len(own) >= 3 and len(owners) >= 2 and not (len(out) > 2 and 20 * len(out) > len(own) + len(out))
    chosen = [name for name in rnd.updates if name in members]
    proposal = rnd.proposal(devices=proposed)
    sites = {bench.fleet.signer(name).certificate.site for name in chosen}
    request = rnd.ask(proposal, rnd.commit(proposal, chosen), nonces=dict.fromkeys(sites, GATEWAY_NONCE))
    try:
        job = bench.verify(rnd, request)
    except RemoteProtocolError:
        assert not allowed
        return
    assert allowed
    assert all(len(keys) >= 3 for keys in job.sums)
    total = bench.fleet.ring.layout.zeros()
    for part in job.add_up():
        total += np.frombuffer(part, dtype="<u8")
    assert total.tolist() == masks(bench, rnd, chosen)


def test_masks_are_as_long_as_what_travels_and_never_longer_than_the_model(bench: Bench) -> None:
    plan = bench.round("d-1").plan
    size = plan.dimension
    factors = (Factor(tensor=0, rows=2, rank=1),)
    small = Projection(seed=bytes(16), factors=factors, sizes=(size - 2,))
    assert layout_of(plan).dimension == size
    assert layout_of(replace(plan, projection=small)).dimension == size - 2
    large = replace(small, sizes=(size, 1))
    with pytest.raises(RemoteProtocolError) as caught:
        layout_of(replace(plan, projection=large))
    assert caught.value.reason is RejectReason.WRONG_SHAPE
