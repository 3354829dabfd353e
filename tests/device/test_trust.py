"""A device and trust metadata: it takes a bundle while it runs, keeps it, and forgets coordinators that are gone."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.brokers import RunningBroker
from fleetfed_testing.lone_gateway import Authority, LoneGateway, manifest_of, plan_for, signer_of, write_settings
from fleetfed_testing.trust_repository import DAY, Owners
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.keys.pki import Role as TlsRole
from fleetfed.device import config
from fleetfed.device.events import Answer, AnswerKind, Fate
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.device.store import Store
from fleetfed.device.trainer import make_trainer
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire.messages import DeclineReason, Mode
from fleetfed.shared.wire.topics import Broadcast

MODEL = zoo.load("digits", seed=1)
HONEST, THIEF = b"h" * 16, b"t" * 16
FAR = 2**50


# --- What is on disk --------------------------------------------------------------------------------------------------


def answer(round_: int, signer: bytes, **changes: Any) -> Answer:
    plan = hashlib.sha256(f"{round_}".encode()).digest()
    made = Answer(
        round=round_,
        plan=plan,
        kind=AnswerKind.DECLINE,
        message_id=plan[:16],
        head=plan,
        expires=1000,
        size=8,
        signer=signer,
    )
    return replace(made, **changes)


def test_a_floor_that_a_thief_pushed_up_falls_to_what_others_said(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.raise_floor(3, HONEST)
    store.raise_floor(FAR, THIEF)
    assert not store.forget(lambda _: True)
    assert store.forget(lambda key: key == HONEST)
    assert store.facts().floor == 3
    store.close()
    again = Store(tmp_path)
    assert again.facts().floor == 3
    again.close()


def test_a_floor_from_before_keys_were_remembered_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.raise_floor(3, HONEST)
    store.raise_floor(9)
    store.forget(lambda _: False)
    assert store.facts().floor == 9
    store.close()


def test_answers_to_a_thief_bar_no_honest_round(tmp_path: Path) -> None:
    store = Store(tmp_path)
    honest, far = answer(4, HONEST), answer(FAR, THIEF)
    for each in (honest, far):
        store.store_answer(each, b"head", b"body")
        store.settle(replace(each, fate=Fate.UNANSWERED))
    assert store.forget(lambda key: key == HONEST)
    assert store.facts().answer == replace(honest, fate=Fate.UNANSWERED)
    store.close()
    again = Store(tmp_path)
    assert again.facts().answer == replace(honest, fate=Fate.UNANSWERED)
    again.store_answer(answer(5, HONEST), b"head", b"body")
    again.close()


def test_no_more_keys_are_remembered_than_fit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(1, 40):
        store.raise_floor(number, bytes([number]) * 16)
    store.close()
    again = Store(tmp_path)
    assert again.facts().floor == 39
    again.close()


# --- A running device -------------------------------------------------------------------------------------------------


class Site:
    """A broker, a gateway that does as told, owners, and a device that trusts them."""

    def __init__(self, directory: Path, broker: RunningBroker) -> None:
        self.directory, self.broker = directory, broker
        self.authority = Authority()
        self.gateway = LoneGateway(broker.config("g-north", TlsRole.GATEWAY), self.authority)
        self.thief = signer_of(self.authority.member(Role.COORDINATOR, "thief", "_"))
        self.honest = self.gateway.coordinator
        self.owners = Owners(
            now=unix_ms(),
            authority=self.authority.key,
            coordinators=[each.certificate.public_key for each in (self.honest, self.thief)],
        )
        device = self.authority.member(Role.DEVICE, "d-1")
        self.device = replace(device, root=self.owners.roots[0])
        rng = np.random.default_rng(5)
        shape = (50, *MODEL.card.input_shape)
        np.savez(directory / "data.npz", x=rng.normal(0, 0.1, shape).astype(np.float32), y=rng.integers(0, 10, 50))
        self._stop: Callable[[], None] | None = None

    def start(self) -> None:
        path = write_settings(self.directory, self.device, self.broker.config("d-1"), '[data]\npath = "data.npz"')
        settings = config.load(path)
        runtime = DeviceRuntime(settings, self.device, Store(settings.state), make_trainer(settings), software="test")
        thread = threading.Thread(target=runtime.run, name="device")
        thread.start()

        def stop() -> None:
            runtime.request_stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()

        self._stop = stop

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

    def close(self) -> None:
        self.stop()
        self.gateway.close()

    def publish_trust(self, bundle: bytes | None = None) -> None:
        topic = self.gateway.topics.broadcast(Broadcast.TRUST)
        self.gateway.publish(topic, self.owners.bundle() if bundle is None else bundle)

    def publish_model(self, version: int = 1) -> None:
        sha256 = hashlib.sha256(MODEL.data).digest()
        self.manifest, blobs = manifest_of(MODEL.data, MODEL.card, version=version, sha256=sha256)
        self.gateway.publish_model(self.manifest, blobs)

    def publish_plan(self, round_: int, policy: int = 1, **changes: Any) -> None:
        plan = plan_for(MODEL.card, self.manifest, round_=round_, policy=policy, **changes)
        self.gateway.publish_plan(plan)

    def speak_as(self, coordinator: Any) -> None:
        self.gateway.coordinator = coordinator

    def wait_status(self, condition: Callable[[dict[str, Any]], Any]) -> None:
        def holds() -> bool:
            try:
                return bool(condition(json.loads((self.directory / "state" / "status.json").read_text())))
            except (OSError, ValueError, KeyError):
                return False

        self.gateway.wait(holds)


@pytest.fixture
def site(tmp_path: Path, embedded_broker: Callable[..., RunningBroker]) -> Iterator[Site]:
    site = Site(tmp_path, embedded_broker())
    yield site
    site.close()


def test_it_believes_coordinators_once_the_owners_name_them_and_heeds_a_new_policy(site: Site) -> None:
    site.start()
    site.publish_model()
    site.wait_status(lambda status: status["rejected"].get("wrong_role"))
    site.publish_trust()
    site.wait_status(lambda status: status["trust"]["policy"] == 1)
    site.publish_model()
    site.publish_plan(1)
    site.gateway.wait(lambda: len(site.gateway.updates) == 1)
    # A policy that comes while it runs: the same plan would be too weak now.
    site.owners.policy = Policy(version=2, modes=(Mode.SPLIT,))
    site.owners.next("targets")
    site.publish_trust()
    site.wait_status(lambda status: status["trust"]["policy"] == 2)
    site.publish_plan(2, policy=2)
    site.gateway.wait(lambda: site.gateway.declines)
    assert site.gateway.declines[-1][1].reason is DeclineReason.POLICY
    site.wait_status(lambda status: status["rejected"].get(RejectReason.BELOW_POLICY))


def test_after_a_restart_it_needs_no_new_bundle_and_takes_no_old_one(site: Site) -> None:
    site.publish_trust()
    old = site.owners.bundle()
    site.owners.next()
    site.publish_trust()
    site.start()
    site.wait_status(lambda status: status["trust"]["versions"]["timestamp"] == 2)
    site.stop()
    # The broker has nothing, and then an old one.
    site.publish_trust(b"")
    site.start()
    site.publish_model()
    site.wait_status(lambda status: status["model_version"] == 1)
    site.publish_trust(old)
    site.wait_status(lambda status: status["rejected"].get(RejectReason.BAD_METADATA))
    site.wait_status(lambda status: status["trust"]["versions"]["timestamp"] == 2)


def test_when_nothing_says_that_trust_is_current_it_makes_no_update(site: Site) -> None:
    site.owners.now -= 2 * DAY
    withheld = site.owners.bundle()
    site.owners.now += 2 * DAY
    # What a device that was off for two days has on disk.
    site.device = replace(site.device, bundle=withheld)
    site.start()
    site.publish_model()
    site.wait_status(lambda status: status["model_version"] == 1)
    site.publish_plan(1)
    site.gateway.wait(lambda: site.gateway.declines)
    assert site.gateway.declines[-1][1].reason is DeclineReason.POLICY
    site.wait_status(lambda status: status["trust"]["stale"] and status["rejected"].get(RejectReason.STALE_TRUST))
    site.owners.next()
    site.publish_trust()
    site.wait_status(lambda status: not status["trust"]["stale"])
    site.publish_plan(2)
    site.gateway.wait(lambda: len(site.gateway.updates) == 1)


def test_a_stolen_coordinators_numbers_fall_when_the_owners_list_it_no_more(site: Site) -> None:
    site.publish_trust()
    site.start()
    site.wait_status(lambda status: status["trust"]["policy"] == 1)
    site.publish_model(1)
    site.publish_plan(1)
    site.gateway.wait(lambda: len(site.gateway.updates) == 1)
    site.speak_as(site.thief)
    site.publish_model(FAR)
    site.publish_plan(FAR)
    site.gateway.wait(lambda: len(site.gateway.updates) == 2)
    site.speak_as(site.honest)
    site.publish_model(2)
    site.wait_status(lambda status: status["rejected"].get(RejectReason.REPLAYED))
    site.owners.coordinators = [site.honest.certificate.public_key]
    site.owners.next("targets")
    site.publish_trust()
    site.wait_status(lambda status: status["model_version"] == 2)
    site.publish_plan(2)
    site.gateway.wait(lambda: len(site.gateway.updates) == 3)
    assert site.gateway.updates[-1][1].header.round == 2
