"""One device as a whole, with a real broker with mutual TLS and a gateway that signs for real and does as told."""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.keys.pki import Role as TlsRole
from fleetfed.device import config
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.device.store import Store
from fleetfed.device.trainer import Trainer, make_trainer
from fleetfed.shared.model.patch import make_patch
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.envelope import Head
from fleetfed.shared.wire.messages import (
    Manifest,
    PatchRef,
)
from fleetfed_testing.brokers import RunningBroker
from fleetfed_testing.lone_gateway import Authority, LoneGateway, manifest_of, plan_for, write_settings
from fleetfed_testing.waiting import PATIENCE

MODEL = zoo.load("digits", seed=1)
CARD = MODEL.card


def digest(file: bytes) -> bytes:
    return hashlib.sha256(file).digest()


def write_data(directory: Path, examples: int = 100) -> None:
    rng = np.random.default_rng(5)
    y = rng.integers(0, 10, examples)
    x = rng.normal(0, 0.1, (examples, *CARD.input_shape)).astype(np.float32)
    x[np.arange(examples), y % 8, :, 0] += 1
    np.savez(directory / "data.npz", x=x, y=y)


class Site:
    """A broker, a gateway that does as told, and one device's folder."""

    def __init__(self, directory: Path, broker: RunningBroker) -> None:
        self.directory = directory
        self.broker = broker
        self.authority = Authority()
        self.gateway = LoneGateway(broker.config("g-north", TlsRole.GATEWAY), self.authority)
        self.manifest, self.blobs = manifest_of(MODEL.data, CARD, version=1, sha256=digest(MODEL.data))
        self.device = self.authority.member(Role.DEVICE, "d-1")
        self.rounds = itertools.count(1)
        write_data(directory)
        self._running: list[Callable[[], Any]] = []

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.directory / "state" / "status.json").read_text())
        return status

    def settings(self, text: str = '[data]\npath = "data.npz"\n[run]\nlog_level = "debug"') -> Path:
        return write_settings(self.directory, self.device, self.broker.config("d-1"), text)

    def thread(self, *, text: str | None = None, trainer: Trainer | None = None) -> Callable[[], None]:
        """Run the device in a thread of this process; returns what stops it."""
        settings = config.load(self.settings() if text is None else self.settings(text))
        runtime = DeviceRuntime(
            settings, self.device, Store(settings.state), trainer or make_trainer(settings), software="test"
        )
        self.runtime = runtime
        failures: list[BaseException] = []

        def run() -> None:
            try:
                runtime.run()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        thread = threading.Thread(target=run, name="device")
        thread.start()

        def stop() -> None:
            runtime.request_stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()
            assert not failures, failures

        self._running.append(stop)
        return stop

    def process(self, text: str | None = None) -> subprocess.Popen[bytes]:
        """Run the device as a program."""
        path = self.settings() if text is None else self.settings(text)
        process = subprocess.Popen(
            [sys.executable, "-m", "fleetfed.device", "run", "--config", str(path)], stderr=subprocess.PIPE
        )
        self._running.append(lambda: end(process))
        return process

    def publish_model(self) -> None:
        self.gateway.publish_model(self.manifest, self.blobs)

    def next_plan(self, **changes: Any) -> Any:
        """Publish the next plan; returns it and its hash."""
        plan = plan_for(CARD, self.manifest, round_=next(self.rounds), **changes)
        return plan, self.gateway.publish_plan(plan)

    def update(self, number: int = 1) -> tuple[Head, bytes]:
        """Wait for so many updates in all; the last."""
        self.gateway.wait(lambda: len(self.gateway.updates) >= number)
        _, head, body = self.gateway.updates[number - 1]
        return head, body

    def wait_status(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        def holds() -> bool:
            try:
                return bool(condition(self.status))
            except (OSError, IndexError):
                return False

        self.gateway.wait(holds)
        return self.status

    def close(self) -> None:
        for stop in reversed(self._running):
            stop()
        self.gateway.close()


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> str:
    """End a process that may have ended; what it logged."""
    if process.stderr is None or process.stderr.closed:
        return ""
    process.send_signal(how)
    return process.communicate(timeout=PATIENCE)[1].decode()


def next_version(site: Site, step: float, *, bits: int = 4) -> tuple[Manifest, tuple[Publishable, ...], bytes]:
    """Version 2 with its patch."""
    made = make_patch(MODEL.data, np.full(CARD.parameters, step), CARD.table, bits=bits)
    blob = publishable(made.patch)
    patch = PatchRef(
        base_version=1,
        base_sha256=digest(MODEL.data),
        target_version=2,
        target_sha256=made.target_sha256,
        blob=blob.ref,
    )
    manifest, blobs = manifest_of(made.file, CARD, version=2, sha256=made.target_sha256, patches=((patch, blob),))
    return manifest, blobs, made.file
