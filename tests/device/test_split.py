"""Masked updates of a device: what it believes of a split plan, and what its bytes are."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.device_driver import CARD as DRIVER_CARD
from fleetfed_testing.device_driver import Driver, held
from fleetfed_testing.lone_gateway import Authority, manifest_of, plan_for, signer_of
from fleetfed_testing.split_site import SplitSite

from fleetfed.cloud_coordinator import zoo
from fleetfed.device import update
from fleetfed.device.cosign import Cosigns
from fleetfed.device.events import CosignArrived, Verdict
from fleetfed.device.inbound import Inbound
from fleetfed.device.state import Facts
from fleetfed.device.trainer import Trained
from fleetfed.shared.aggregate.body import decode_body
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import hybrid, split
from fleetfed.shared.secure.box import Reader
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.policy import Policy, PrivacyFloor
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest, MessageKind
from fleetfed.shared.wire.masking import HYBRID, Cosign
from fleetfed.shared.wire.messages import DeclineReason, Mode, Plan, Revocations
from fleetfed.shared.wire.privacy import Mechanism, Privacy
from fleetfed.shared.wire.update import BOX_SIZE, UpdateExtension

NOW = unix_ms()
MODEL = zoo.load("digits", seed=1)
CARD = MODEL.card
SIZES = tuple(slot.size for slot in CARD.tensors)
AUTHORITY = Authority()
DEVICE = AUTHORITY.member(Role.DEVICE, "d-1")
COORDINATOR = signer_of(AUTHORITY.member(Role.COORDINATOR, "coordinator", "_"))
GATEWAY_IDENTITY = AUTHORITY.member(Role.GATEWAY, "g-north")
GATEWAY = signer_of(GATEWAY_IDENTITY)
SITE = SplitSite(AUTHORITY)
HELPED = SplitSite(AUTHORITY, helper=True)
HYBRID_SITE = SplitSite(AUTHORITY, suite=HYBRID)
HELPED_HYBRID = SplitSite(AUTHORITY, helper=True, suite=HYBRID)
COSIGN_TOPIC, PLAN_TOPIC = "ff1/demo/north/b/cosign", "ff1/demo/north/b/plan"
PLAN_HASH = Digest(b"p" * 32)
SMALL_ORDER = bytes(32)


def plan(site: SplitSite = SITE, **changes: Any) -> Plan:
    manifest, _ = manifest_of(MODEL.data, CARD, version=1, sha256=b"m" * 32)
    return plan_for(CARD, manifest, **site.changes(**changes))


def inbound(policy: Policy | None = None) -> Inbound:
    verifier = DEVICE.verifier()
    if policy is not None:
        verifier.policy = policy
    return Inbound(verifier, DEVICE.certificate, keep_revocations=lambda _: None)


def judged(asked: Plan, policy: Policy | None = None) -> Verdict:
    """The verdict that comes with the signed plan."""
    message = COORDINATOR.sign(MessageKind.PLAN, asked, now=NOW, round=asked.round)
    event = inbound(policy).event(PLAN_TOPIC, message.encode(), NOW)
    assert event.plan == asked
    verdict: Verdict = event.verdict
    return verdict


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_a_good_split_plan_brings_the_helpers_key() -> None:
    assert judged(plan()) == Verdict()
    assert judged(plan(HELPED)) == Verdict(helper_key=HELPED.helper_secret.public)


@pytest.mark.parametrize(
    ("policy", "changes", "rule"),
    [
        (Policy(modes=(Mode.SPLIT,)), {"mode": Mode.PLAIN, "split": None}, "mode plain is not allowed"),
        (Policy(minimum_cohort=5), {}, "cohorts from 2"),
        (Policy(minimum_owners=2), {}, "owners from 1"),
        (Policy(seed_holders=2), {}, "one seed holder where two are due"),
        (Policy(version=3), {"policy": 2}, "made under policy 2, in force is 3"),
    ],
)
def test_a_plan_below_the_policy_says_which_rule_it_breaks(policy: Policy, changes: dict[str, Any], rule: str) -> None:
    verdict = judged(plan(**changes), policy)
    assert (verdict.reason, verdict.detail) == (RejectReason.BELOW_POLICY, rule)


def test_the_policys_privacy_floor_comes_with_the_verdict() -> None:
    floor = PrivacyFloor(max_participations=4)
    assert judged(plan(), Policy(privacy=floor)).floor == floor


@pytest.mark.parametrize("changes", [{"split": None}, {"mode": Mode.PLAIN}])
def test_mode_and_masks_must_agree(changes: dict[str, Any]) -> None:
    assert judged(plan(**changes)).reason is RejectReason.WRONG_SHAPE


def test_a_promise_of_privacy_that_cannot_be_kept() -> None:
    noisy = Privacy(
        mechanism=Mechanism.CENTRAL, clip=100.0, noise_multiplier=1.0, max_participations=2, epsilon=10.0, delta=1e-6
    )
    verdict = judged(plan(privacy=noisy))
    assert verdict.reason is RejectReason.WRONG_SHAPE
    assert "uniform weights" in verdict.detail


def test_a_suite_that_nobody_here_knows() -> None:
    asked = plan(split=SITE.block(suite=9))
    assert judged(asked).reason is RejectReason.BELOW_POLICY
    assert judged(asked, Policy(suites=(1, 9))).reason is RejectReason.UNKNOWN_SUITE


def test_a_plan_that_falls_back_to_a_suite_which_the_owners_forbid() -> None:
    """A thief of the coordinator's key orders seals that a quantum computer could open later."""
    only_hybrid = Policy(suites=(HYBRID,))
    verdict = judged(plan(), only_hybrid)
    assert (verdict.reason, verdict.detail) == (RejectReason.BELOW_POLICY, "suite 1")
    assert judged(plan(HELPED_HYBRID), only_hybrid) == Verdict(helper_key=HELPED_HYBRID.helper_secret.public)


def test_a_device_without_the_library_of_a_suite_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan(HYBRID_SITE)
    monkeypatch.setattr(hybrid, "_library", lambda: None)
    verdict = judged(asked)
    assert verdict.reason is RejectReason.UNKNOWN_SUITE
    assert "pip install 'fleetfed[hybrid]'" in verdict.detail
    # The cosignature cannot be looked into; that is no fault of the gateway's.
    word = HYBRID_SITE.cosign(asked, PLAN_HASH, GATEWAY).encode()
    assert isinstance(inbound().event(COSIGN_TOPIC, word, NOW), CosignArrived)
    device = Driver(Facts(models=(held(1),), cards=frozenset({DRIVER_CARD.ref.digest}), floor=1))
    _refused, decline = device.plan(mode=Mode.SPLIT, split=asked.split, verdict=verdict)
    assert (decline.reason, decline.detail) == (DeclineReason.SUITE, f"unknown_suite: {verdict.detail}")


@pytest.mark.parametrize("whose", ["seal_key", "helper"])
def test_keys_of_another_suite_than_the_plans(whose: str) -> None:
    weak = {"seal_key": SITE.coordinator_secret.public, "helper": HELPED.helper_word()}[whose]
    assert judged(plan(split=HELPED_HYBRID.block(**{whose: weak}))).reason is RejectReason.BAD_BOX


def test_a_cosignature_with_a_key_of_another_suite_is_none() -> None:
    """A gateway whose key is stolen may not take its devices' seals back to suite 1."""
    asked = plan(HYBRID_SITE)
    for site, expected in ((SITE, None), (HYBRID_SITE, HYBRID_SITE.gateway_secret.public)):
        cosigns = Cosigns()
        event = inbound().event(COSIGN_TOPIC, site.cosign(asked, PLAN_HASH, GATEWAY).encode(), NOW)
        assert cosigns.hear(event, current=asked.round)
        assert cosigns.key(asked, PLAN_HASH, NOW) == expected


def test_a_coordinators_key_of_small_order() -> None:
    assert judged(plan(split=SITE.block(seal_key=SMALL_ORDER))).reason is RejectReason.BAD_BOX


def _helper_words() -> dict[str, tuple[bytes, RejectReason]]:
    liar = SplitSite(AUTHORITY, helper=True)
    stranger = signer_of(Authority().member(Role.HELPER, "h-1", "_"))
    foreign = Authority("other")
    foreign.key = AUTHORITY.key
    word = HELPED.helper_word()
    return {
        "of a gateway": (liar.helper_word(signer=GATEWAY), RejectReason.WRONG_ROLE),
        "of the coordinator": (liar.helper_word(signer=COORDINATOR), RejectReason.WRONG_ROLE),
        "of another authority": (liar.helper_word(signer=stranger), RejectReason.BAD_CERTIFICATE),
        "of another fleet": (
            liar.helper_word(signer=signer_of(foreign.member(Role.HELPER, "h-1", "_"))),
            RejectReason.WRONG_FLEET,
        ),
        "of another helper": (liar.helper_word(helper="h-2"), RejectReason.WRONG_SENDER),
        "expired": (liar.helper_word(now=NOW - 10_000, lifetime=1000), RejectReason.EXPIRED),
        "of small order": (liar.helper_word(seal_key=SMALL_ORDER), RejectReason.BAD_BOX),
        "cut": (word[:-1], RejectReason.TRUNCATED),
        "changed": (word[:-1] + bytes([word[-1] ^ 1]), RejectReason.BODY_MISMATCH),
        "noise": (b"x" * 300, RejectReason.MALFORMED),
    }


HELPER_WORDS = _helper_words()


@pytest.mark.parametrize("name", HELPER_WORDS)
def test_a_helpers_key_that_is_not_to_be_trusted(name: str) -> None:
    word, reason = HELPER_WORDS[name]
    verdict = judged(plan(split=SITE.block(helper=word)))
    assert verdict.reason is reason
    assert "helper" in verdict.detail
    assert verdict.helper_key == b""


def test_a_revoked_helper_and_a_helper_that_expires_while_the_device_trains() -> None:
    asked = plan(split=SITE.block(helper=HELPED.helper_word(now=NOW, lifetime=1000)))
    door = inbound()
    assert door.judge(asked, NOW).reason is None
    assert door.judge(asked, NOW + 1001).reason is RejectReason.EXPIRED
    door._verifier.revoke(Revocations(version=2, serials=(HELPED.helper_signer.certificate.serial,)))
    assert door.judge(asked, NOW).reason is RejectReason.REVOKED


# --- Cosignatures -----------------------------------------------------------------------------------------------------


def refused(payload: bytes, now: int = NOW) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as caught:
        inbound().event(COSIGN_TOPIC, payload, now)
    return caught.value.reason


def test_the_own_gateways_cosignature() -> None:
    asked = plan()
    message = SITE.cosign(asked, PLAN_HASH, GATEWAY)
    assert inbound().event(COSIGN_TOPIC, message.encode(), NOW) == CosignArrived(
        round=1, plan=PLAN_HASH, seal_key=SITE.gateway_secret.public, expires=message.head.header.expires_at
    )


def test_cosignatures_of_others() -> None:
    asked = plan()
    south = signer_of(AUTHORITY.member(Role.GATEWAY, "g-south", "south"))
    assert refused(SITE.cosign(asked, PLAN_HASH, south).encode()) is RejectReason.WRONG_SITE
    for role in (Role.COORDINATOR, Role.DEVICE, Role.HELPER, Role.OPERATOR):
        liar = signer_of(AUTHORITY.member(role, "x"))
        assert refused(SITE.cosign(asked, PLAN_HASH, liar).encode()) is RejectReason.WRONG_ROLE
    stranger = signer_of(Authority().member(Role.GATEWAY, "g-north"))
    assert refused(SITE.cosign(asked, PLAN_HASH, stranger).encode()) is RejectReason.BAD_CERTIFICATE


def test_a_cosignature_that_is_late_changed_or_weak() -> None:
    asked = plan()
    good = SITE.cosign(asked, PLAN_HASH, GATEWAY).encode()
    assert refused(good, unix_ms() + 90_001) is RejectReason.EXPIRED
    assert refused(good[:-1] + bytes([good[-1] ^ 1])) is RejectReason.BODY_MISMATCH
    weak = Cosign(plan=PLAN_HASH, seal_key=SMALL_ORDER)
    assert refused(GATEWAY.sign(MessageKind.COSIGN, weak, now=NOW, round=1).encode()) is RejectReason.BAD_BOX


# --- Updates ----------------------------------------------------------------------------------------------------------


def trained(seed: int, scale: float = 0.02) -> Trained:
    delta = np.random.default_rng(seed).normal(0, scale, CARD.parameters).astype(np.float32)
    return Trained(delta=delta, examples=90, seen=90, steps=1, training_loss=0.5)


def prepared(asked: Plan, seed: int = 1, scale: float = 0.02) -> update.Prepared:
    return update.prepare(trained(seed, scale), asked, CARD, rng=np.random.default_rng(7), residual=None)


def frozen(seed: int = 1) -> Any:
    """Randomness of a board whose generator does not work: the same after every start."""
    rng = np.random.default_rng(seed)
    return rng.bytes


def signed(
    site: SplitSite,
    asked: Plan,
    *,
    hedge: bytes = b"e" * 32,
    randomness: Any = None,
    seed: int = 1,
    scale: float = 0.02,
) -> Message:
    signer = DEVICE.signer(sequence=itertools.count(1).__next__, randomness=frozen())
    seals = update.Seals(
        gateway=site.gateway_secret.public,
        coordinator=site.coordinator_secret.public,
        helper=site.helper_secret.public if site.helper else b"",
        hedge=hedge,
        randomness=randomness or frozen(2),
    )
    return update.sign(prepared(asked, seed, scale), asked, PLAN_HASH, signer=signer, now=NOW, seals=seals)


@pytest.mark.parametrize("site", [SITE, HELPED], ids=["one seed holder", "two"])
def test_the_update_opens_to_exactly_the_plain_values(site: SplitSite) -> None:
    asked = plan(site)
    message = signed(site, asked)
    DEVICE.verifier().head(message.head, kind=MessageKind.UPDATE, now=NOW, sender="d-1")
    ring = scheme_of(asked, SIZES).ring
    values, meta = site.open(message.head, message.body, ring)
    plain = prepared(dataclasses.replace(asked, mode=Mode.PLAIN, split=None))
    wanted, wanted_meta = decode_body(
        plain.body,
        dimension=asked.dimension,
        limit=7,
        meta_words=plain.meta_words,
    )
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(meta, wanted_meta)


def test_the_head_says_what_a_gateway_checks() -> None:
    for site, boxes in ((SITE, 2), (HELPED, 3)):
        asked = plan(site)
        message = signed(site, asked)
        extension = UpdateExtension.decode(message.head)
        ring = scheme_of(asked, SIZES).ring
        header = message.head.header
        assert (extension.mode, extension.suite) == (1, 1)
        assert [len(box) for box in extension.boxes] == [BOX_SIZE] * boxes
        assert header.body_size == header.raw_size == split.body_size(ring.layout.n_words) == len(message.body)
        assert not header.compressed


def test_all_updates_of_a_round_have_one_length_and_look_like_noise() -> None:
    asked = plan()
    messages = [signed(SITE, asked, seed=seed, scale=scale) for seed, scale in ((1, 0.02), (2, 0.0), (3, 10.0))]
    assert len({len(message.encode()) for message in messages}) == 1
    for message in messages:
        bits = np.unpackbits(np.frombuffer(message.body, dtype=np.uint8))
        assert abs(bits.mean() - 0.5) < 0.01


def test_the_masked_words_are_all_that_is_left_of_the_words() -> None:
    asked = plan()
    made = prepared(asked)
    assert made.words is not None
    before = made.words.copy()
    seals = update.Seals(
        gateway=SITE.gateway_secret.public, coordinator=SITE.coordinator_secret.public, hedge=bytes(32)
    )
    update.sign(made, asked, PLAN_HASH, signer=signer_of(DEVICE), now=NOW, seals=seals)
    assert np.count_nonzero(made.words == before) < 3


def test_a_generator_that_repeats_itself_makes_other_seeds_with_another_hedge() -> None:
    asked = plan(HELPED)
    ones, others = signed(HELPED, asked), signed(HELPED, asked, hedge=b"f" * 32)
    assert ones.head.header.message_id == others.head.header.message_id, "everything else is the same"

    def seeds(message: Message) -> set[bytes]:
        return {
            split.open_seed(message.head, Reader.COORDINATOR, HELPED.coordinator_secret),
            split.open_seed(message.head, Reader.HELPER, HELPED.helper_secret),
        }

    assert len(seeds(ones) | seeds(others)) == 4


def test_a_generator_that_repeats_itself_makes_other_seeds_for_another_header() -> None:
    """A card that was copied with its hedge secret: what is signed anew has another sequence number."""
    asked, hedge = plan(), b"e" * 32
    signer = DEVICE.signer(sequence=itertools.count(1).__next__, randomness=lambda size: bytes(size))
    seals = update.Seals(
        gateway=SITE.gateway_secret.public,
        coordinator=SITE.coordinator_secret.public,
        hedge=hedge,
        randomness=lambda size: bytes(size),
    )
    made = [update.sign(prepared(asked), asked, PLAN_HASH, signer=signer, now=NOW, seals=seals) for _ in range(2)]
    seeds = {split.open_seed(each.head, Reader.COORDINATOR, SITE.coordinator_secret) for each in made}
    assert len(seeds) == 2


def test_plain_updates_carry_no_boxes() -> None:
    asked = plan(mode=Mode.PLAIN, split=None)
    message = update.sign(prepared(asked), asked, PLAN_HASH, signer=signer_of(DEVICE), now=NOW)
    extension = UpdateExtension.decode(message.head)
    assert (extension.mode, extension.suite, extension.boxes) == (0, 0, ())
