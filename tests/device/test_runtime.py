"""The device as a whole: a real process or thread, a real broker with mutual TLS, a gateway that signs for real."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.device_site import CARD, MODEL, Site, digest, end, next_version
from fleetfed_testing.lone_gateway import Authority, signer_of

from fleetfed.device.renewal import Renewed
from fleetfed.device.store import Store
from fleetfed.device.trainer import Trained
from fleetfed.shared.aggregate.accumulator import Accumulator, Ring
from fleetfed.shared.aggregate.body import decode_body
from fleetfed.shared.aggregate.lanes import levels
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.trust.certificates import Role, issue
from fleetfed.shared.wire.envelope import Head, MessageKind
from fleetfed.shared.wire.masking import SealKey
from fleetfed.shared.wire.messages import (
    DeclineReason,
    Eligibility,
    Life,
    Outcome,
    Quantization,
    Revocations,
    Training,
    Weighting,
)
from fleetfed.shared.wire.privacy import Mechanism, Privacy
from fleetfed.shared.wire.topics import Broadcast
from fleetfed.shared.wire.update import UpdateExtension


def test_a_round_and_the_patch_after_it(site: Site) -> None:
    """The update is what the plan asks for, adds up, and the next version arrives as a patch."""
    stop = site.thread()
    site.publish_model()
    plan, plan_hash = site.next_plan()
    head, body = site.update()
    extension = UpdateExtension.decode(head)
    assert head.header.round == plan.round
    assert extension.plan == plan_hash
    assert extension.model_sha256 == digest(MODEL.data)
    sizes = tuple(slot.size for slot in CARD.tensors)
    q = plan.quantization
    ring = Ring.of(sizes, bits=q.bits, lane_bits=q.lane_bits, weight_cap=q.weight_cap)
    values, meta = decode_body(body, dimension=plan.dimension, limit=levels(q.bits), meta_words=extension.meta_words)
    accumulator = Accumulator(ring, capacity=10)
    accumulator.accumulate(values, meta)
    summed = accumulator.report().meta()
    assert summed.count == 1
    assert summed.weight == 80
    assert summed.examples == 80
    assert summed.holdout_examples == 20
    assert np.count_nonzero(values) > 100
    manifest, blobs, file = next_version(site, 0.01)
    site.gateway.publish_model(manifest, blobs, missing=frozenset())
    site.gateway.end_round(plan.round, plan_hash, version=2)
    status = site.wait_status(lambda s: s["model_version"] == 2 and s["rounds"][-1]["outcome"] == "accepted")
    assert status["model_sha256"] == hashlib.sha256(file).hexdigest()
    assert status["rejected"] == {}
    assert status["rounds"][0]["steps"] == 5
    stop()
    site.gateway.wait(lambda: site.gateway.presence["d-1"].life is Life.SLEEPING)
    assert len(site.gateway.updates) == 1


@pytest.mark.parametrize("helper", [False, True])
def test_a_masked_round_and_a_restart_in_it(site: Site, helper: bool) -> None:
    """Nothing leaves before the gateway cosigned; what leaves is masked, and after a restart the same bytes."""
    gateway = site.gateway
    gateway.receipts = "silent"
    stop = site.thread()
    site.publish_model()
    plan, plan_hash = site.next_plan(split=gateway.split(helper=helper))
    site.wait_status(lambda s: s["state"] == "waiting")
    assert gateway.updates == []
    gateway.publish_cosign(plan, plan_hash)
    head, body = site.update(1)
    stop()
    gateway.receipts = None
    site.thread()
    site.update(2)
    assert gateway.messages[0] == gateway.messages[1]
    ring = scheme_of(plan, tuple(slot.size for slot in CARD.tensors)).ring
    values, meta = ring.layout.unpack(gateway.unmask(head, body, ring.layout.n_words, helper=helper))
    contribution = ring.meta.decode(meta)
    assert (contribution.count, contribution.weight) == (1, 80)
    assert np.count_nonzero(values) > 100
    assert np.abs(values).max() <= levels(plan.quantization.bits)
    status = site.wait_status(lambda s: s["rounds"][0]["outcome"] == "accepted")
    assert status["rejected"] == {}


def test_a_plan_that_is_refused_is_declined_and_shown(site: Site) -> None:
    """Its helper's key is signed by a gateway."""
    gateway = site.gateway
    site.thread()
    site.publish_model()
    liar = gateway.signer.sign(MessageKind.SEAL_KEY, SealKey(helper="h", seal_key=bytes(range(32))), now=unix_ms())
    plan, plan_hash = site.next_plan(split=dataclasses.replace(gateway.split(), helper=liar.encode()))
    gateway.publish_cosign(plan, plan_hash)
    gateway.wait(lambda: gateway.declines)
    _, decline = gateway.declines[0]
    assert (decline.plan, decline.reason) == (plan_hash, DeclineReason.POLICY)
    assert decline.detail.startswith("wrong_role: the helper's key")
    status = site.wait_status(lambda s: s["rounds"] and s["rounds"][0]["outcome"] == "declined:policy")
    assert status["rejected"] == {"wrong_role": 1}
    assert status["rounds"][0]["detail"] == decline.detail
    assert gateway.updates == []


def noisy_plan() -> dict[str, Any]:
    noisy = Privacy(
        mechanism=Mechanism.CENTRAL, clip=100.0, noise_multiplier=1.0, max_participations=1, epsilon=10.0, delta=1e-6
    )
    quantization = Quantization(bits=4, lane_bits=16, clips=(0.05,) * len(CARD.tensors), weight_cap=1)
    return {"privacy": noisy, "quantization": quantization, "weighting": Weighting.UNIFORM}


def test_who_declines_a_noisy_round_says_no_number_of_its_data(site: Site) -> None:
    site.thread()
    site.publish_model()
    eligibility = Eligibility(minimum_examples=100_000)
    for number, more in enumerate((noisy_plan(), {}), 1):
        site.next_plan(eligibility=eligibility, **more)
        site.gateway.wait(lambda number=number: len(site.gateway.declines) == number)
    (_, noisy), (_, plain) = site.gateway.declines
    assert noisy.reason is plain.reason is DeclineReason.TOO_FEW_EXAMPLES
    assert "of 100000" in plain.detail
    assert noisy.detail == ""
    # The device's own people may know.
    assert "of 100000" in site.wait_status(lambda s: len(s["rounds"]) == 2)["rounds"][0]["detail"]


def test_the_budget_of_noisy_rounds_ends(site: Site) -> None:
    wanted = noisy_plan()
    stop = site.thread()
    site.publish_model()
    site.next_plan(**wanted)
    site.update()
    status = site.wait_status(lambda s: s["rounds"][-1]["outcome"] == "accepted")
    assert status["privacy"] == {"participations": 1, "most": 1, "left": 0, "last_round": 1}
    stop()
    site.thread()
    site.next_plan(**wanted)
    site.gateway.wait(lambda: site.gateway.declines)
    _, decline = site.gateway.declines[0]
    assert (decline.reason, decline.detail) == (DeclineReason.PRIVACY_BUDGET, "took part 1 times of 1")
    site.next_plan()
    assert site.update(2)[0].header.round == 3


@pytest.mark.mosquitto
def test_a_round_and_a_sleep_over_mosquitto(mosquitto_site: Site) -> None:
    """What was said while it slept is waiting for it."""
    site = mosquitto_site
    stop = site.thread()
    site.publish_model()
    site.next_plan()
    site.update(1)
    site.wait_status(lambda s: s["rounds"][-1]["outcome"] == "accepted")
    stop()
    site.next_plan()
    site.thread()
    site.update(2)
    site.wait_status(lambda s: s["rounds"][-1]["outcome"] == "accepted")


def test_error_feedback_of_an_accepted_update_reaches_the_next(site: Site) -> None:
    """A trainer that never moves: what the first round lost is all that the second can send."""

    class Tiny:
        rounds = 0

        def prepare(self, card: ModelCard) -> str:
            return ""

        def train(self, task: Any) -> Trained:
            self.rounds += 1
            delta = np.full(task.card.parameters, 1e-3 if self.rounds == 1 else 0.0, dtype=np.float32)
            return Trained(delta=delta, examples=1000, seen=1000, steps=1, training_loss=0.0)

    site.thread(trainer=Tiny())
    site.publish_model()
    sums = []
    for number in (1, 2):
        plan, _ = site.next_plan(clip=0.07)
        _, body = site.update(number)
        values, _ = decode_body(body, dimension=plan.dimension, limit=7, meta_words=7 + 2 * len(CARD.tensors))
        sums.append(values.astype(int))
        site.wait_status(lambda s, n=number: s["rounds"][n - 1]["outcome"] == "accepted")
    # Grid steps are 0.01: a tenth of them rounds up, nothing else; the lost tenths add up to nearly nothing.
    assert 0.05 < sums[0].mean() < 0.15
    assert abs(sums[1].mean()) < 0.05
    assert np.count_nonzero(sums[1]) > 0


def test_a_refused_update_brings_the_old_residual_back(site: Site) -> None:
    site.gateway.receipts = RejectReason.OUT_OF_RANGE
    stop = site.thread()
    site.publish_model()
    site.next_plan()
    site.wait_status(lambda s: s["rounds"][0]["outcome"] == "refused:out_of_range")
    stop()
    store = Store(site.directory / "state")
    assert store.residual(CARD.layout) is None
    store.close()


def test_asleep_during_the_announcement(site: Site) -> None:
    """Everything was said before it woke."""
    site.publish_model()
    site.next_plan()
    site.thread()
    head, _ = site.update()
    assert head.header.round == 1


def test_a_restart_sends_the_same_bytes(site: Site) -> None:
    site.gateway.receipts = "silent"
    stop = site.thread()
    site.publish_model()
    site.next_plan()
    site.update(1)
    stop()
    site.gateway.wait(lambda: site.gateway.presence["d-1"].life is Life.SLEEPING)
    site.gateway.receipts = None
    site.thread()
    site.update(2)
    assert site.gateway.messages[0] == site.gateway.messages[1]
    site.wait_status(lambda s: s["rounds"][0]["outcome"] == "accepted")


def test_a_broker_that_goes_away_and_comes_back(site: Site) -> None:
    site.gateway.receipts = "silent"
    site.thread()
    site.publish_model()
    site.next_plan()
    site.update(1)
    site.broker.restart()
    site.update(2)
    assert site.gateway.messages[0] == site.gateway.messages[1]


def test_a_new_certificate_is_taken_and_what_was_sent_under_the_old_one_still_counts(site: Site) -> None:
    site.gateway.receipts = "silent"
    site.thread()
    site.publish_model()
    site.next_plan()
    site.update(1)
    old = site.device
    certificate = dataclasses.replace(old.certificate, serial=old.certificate.serial + 1000)
    renewed = dataclasses.replace(
        old, certificate=certificate, encoded_certificate=issue(certificate, site.authority.key)
    )
    assert site.gateway.presence["d-1"].serial == old.certificate.serial
    site.runtime._inbox.put(Renewed(renewed))
    # At once: an old certificate that has run out is on no list.
    site.gateway.wait(lambda: site.gateway.presence["d-1"].serial == certificate.serial)
    assert site.gateway.presence["d-1"].until == certificate.not_after
    site.gateway.receipts = None
    site.broker.restart()
    # The update in flight is the same message, with the certificate that it was signed with.
    site.update(2)
    assert site.gateway.messages[0] == site.gateway.messages[1]
    site.wait_status(lambda s: s["rounds"][0]["outcome"] == "accepted")
    plan, _ = site.next_plan()
    # Not the third update: the first may have come three times, again from the device and again from the broker.
    new: list[Head] = []
    site.gateway.wait(lambda: new.extend(u[1] for u in site.gateway.updates if u[1].header.round == plan.round) or new)
    assert new[0].certificate == renewed.encoded_certificate
    site.wait_status(lambda s: s["rounds"][1]["outcome"] == "accepted")


def test_the_end_of_the_round_stops_training(site: Site) -> None:
    began, cancelled = threading.Event(), threading.Event()

    class Endless:
        def prepare(self, card: ModelCard) -> str:
            return ""

        def train(self, task: Any) -> Trained:
            began.set()
            while not task.cancelled():
                time.sleep(0.005)
            cancelled.set()
            raise RuntimeError("nobody listens")

    site.thread(trainer=Endless())
    site.publish_model()
    plan, plan_hash = site.next_plan()
    site.gateway.wait(began.is_set)
    site.gateway.end_round(plan.round, plan_hash, Outcome.ABORTED)
    site.gateway.wait(cancelled.is_set)
    site.wait_status(lambda s: s["rounds"][0]["outcome"] == "cancelled")
    assert site.gateway.updates == []


def test_what_cannot_train_declines(site: Site) -> None:
    site.thread(text='[data]\npath = "data.npz"\nscale = 1e9')
    site.publish_model()
    site.next_plan(training=Training(learning_rate=1000.0, epochs=30, momentum=0.99))
    site.gateway.wait(lambda: site.gateway.declines)
    _, decline = site.gateway.declines[0]
    assert decline.reason is DeclineReason.DIVERGED
    site.next_plan(dimension=CARD.parameters - 1)
    site.gateway.wait(lambda: len(site.gateway.declines) == 2)
    assert site.gateway.declines[1][1].reason is DeclineReason.TRAINING_FAILED
    site.wait_status(lambda s: [r["outcome"] for r in s["rounds"]] == ["declined:diverged", "declined:training_failed"])


@pytest.mark.slow
def test_chunks_that_the_broker_lost_are_asked_for(site: Site) -> None:
    site.thread()
    site.gateway.publish_model(site.manifest, site.blobs, missing=frozenset({0}))
    site.gateway.wait(lambda: site.gateway.needs)
    assert site.gateway.needs[0].missing == (0,)


def test_bad_input_is_counted_and_changes_nothing(site: Site) -> None:
    """Attacks, one after the other, on a device that holds version 1; then an honest round."""
    gateway = site.gateway
    site.thread()
    site.publish_model()
    site.wait_status(lambda s: s["model_version"] == 1)
    before = site.status["model_sha256"]
    model, plan = gateway.topics.broadcast(Broadcast.MODEL), gateway.topics.broadcast(Broadcast.PLAN)
    manifest, _, _ = next_version(site, 0.01)
    stranger = signer_of(Authority().member(Role.COORDINATOR, "coordinator", "_"))
    traitor = signer_of(site.authority.member(Role.GATEWAY, "g-north"))
    honest = gateway.coordinator
    now = unix_ms()
    good = honest.sign(MessageKind.MANIFEST, manifest, now=now).encode()
    attacks = [
        (model, b"garbage", "truncated"),
        (plan, os.urandom(3000), "malformed"),
        (plan, good, "malformed"),
        (model, good[:-1], "truncated"),
        (model, good[:200] + bytes([good[200] ^ 1]) + good[201:], None),
        (model, good[:-1] + bytes([good[-1] ^ 1]), "body_mismatch"),
        (model, stranger.sign(MessageKind.MANIFEST, manifest, now=now).encode(), "bad_certificate"),
        (model, traitor.sign(MessageKind.MANIFEST, manifest, now=now).encode(), "wrong_role"),
        (model, honest.sign(MessageKind.MANIFEST, manifest, now=now - 9000, lifetime=1000).encode(), "expired"),
        (model, honest.sign(MessageKind.MANIFEST, b"\xc1", now=now).encode(), "malformed"),
    ]
    counted: dict[str, int] = {}
    for number, (topic, payload, reason) in enumerate(attacks, start=1):
        gateway.publish(topic, payload)
        status = site.wait_status(lambda s, n=number: sum(s["rejected"].values()) == n)
        if reason is not None:
            assert status["rejected"].get(reason, 0) == counted.get(reason, 0) + 1, (number, status["rejected"])
        counted = status["rejected"]
    # A patch that makes another file than promised; the full file that follows it is not there.
    _, wrong, _ = next_version(site, 0.02)
    patch = dataclasses.replace(manifest.patches[0], blob=wrong[-1].ref)
    gateway.publish_model(dataclasses.replace(manifest, patches=(patch,)), wrong[-1:])
    site.wait_status(lambda s: s["rejected"].get("body_mismatch") == counted["body_mismatch"] + 1)
    assert site.status["model_sha256"] == before
    assert site.status["model_version"] == 1
    plan_, _ = site.next_plan()
    head, _ = site.update()
    assert head.header.round == plan_.round


def test_a_revoked_coordinator_is_not_believed_also_after_a_restart(site: Site) -> None:
    stop = site.thread()
    site.publish_model()
    site.wait_status(lambda s: s["model_version"] == 1)
    serial = site.gateway.coordinator.certificate.serial
    authority = Authority(site.authority.fleet)
    authority.key = site.authority.key
    signer = signer_of(_as_authority(site.authority))
    message = signer.sign(MessageKind.REVOCATIONS, Revocations(version=2, serials=(serial,)), now=unix_ms())
    site.gateway.publish(site.gateway.topics.broadcast(Broadcast.REVOKED), message.encode())
    site.next_plan()
    site.wait_status(lambda s: s["rejected"].get("revoked") == 1)
    stop()
    site.gateway.session.publish(site.gateway.topics.broadcast(Broadcast.REVOKED), b"", retain=True)
    site.thread()
    # The manifest and the plan, both retained.
    site.wait_status(lambda s: s["rejected"].get("revoked", 0) >= 3)
    assert site.gateway.updates == []


def _as_authority(authority: Authority) -> Any:
    """The authority's own identity: it signs revocations under a certificate of its own."""
    from fleetfed.shared.trust import certificates
    from fleetfed.shared.trust.certificates import Certificate
    from fleetfed.shared.trust.identity import Identity

    now = unix_ms()
    certificate = Certificate(
        serial=0,
        role=Role.AUTHORITY,
        fleet=authority.fleet,
        id="authority",
        site="_",
        not_before=now - 1000,
        not_after=now + 10**9,
        public_key=authority.key.public,
    )
    return Identity(
        key=authority.key,
        certificate=certificate,
        encoded_certificate=certificates.issue(certificate, authority.key),
        authority_key=authority.key.public,
    )


SLOW_TRAINER = """
import os, time
from pathlib import Path
import numpy as np
from fleetfed.device.trainer import Trained

HERE = Path(__file__).parent

class Slow:
    def prepare(self, card): return ""
    def train(self, task):
        (HERE / "began").write_text("")
        while not (HERE / "go").exists():
            time.sleep(0.005)
        delta = task.rng.normal(0, 0.01, task.card.parameters).astype(np.float32)
        return Trained(delta=delta, examples=10, seen=10, steps=1, training_loss=1.0)

def factory(settings): return Slow()
"""


def test_kill_in_mid_training_and_after_the_update(site: Site) -> None:
    """A real process, SIGKILL twice: it trains again, makes one update, and sends the same bytes after the second."""
    (site.directory / "slow_trainer.py").write_text(SLOW_TRAINER)
    text = 'trainer = "slow_trainer:factory"'
    began, go = site.directory / "began", site.directory / "go"
    site.publish_model()
    site.next_plan()
    first = site.process(text)
    site.gateway.wait(began.exists)
    end(first)
    site.gateway.wait(lambda: site.gateway.presence["d-1"].life is Life.LOST)
    began.unlink()
    go.write_text("")
    site.gateway.receipts = "silent"
    second = site.process(text)
    site.update(1)
    end(second)
    assert began.exists()
    site.gateway.receipts = None
    third = site.process(text)
    site.update(2)
    assert site.gateway.messages[0] == site.gateway.messages[1]
    site.wait_status(lambda s: s["rounds"][0]["outcome"] == "accepted")
    log = end(third, signal.SIGTERM)
    assert third.returncode == 0, log
    site.gateway.wait(lambda: site.gateway.presence["d-1"].life is Life.SLEEPING)
