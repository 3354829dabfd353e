"""The fleet's processes: the programs' own runtimes, on simulated sessions, threads and disks."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import queue
import threading
from pathlib import Path
from typing import Any

from fleetfed_testing.fragile_disk import FragileDisk, PowerCutError
from fleetfed_testing.trainers import OneHot

from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.cloud_coordinator.helper.config import HelperConfig
from fleetfed.cloud_coordinator.helper.runtime import Helper
from fleetfed.cloud_coordinator.runtime import Runtime
from fleetfed.device import events
from fleetfed.device.config import DeviceConfig
from fleetfed.device.mqtt import Connected, Disconnected, PublishDone, Received
from fleetfed.device.runtime import DeviceRuntime
from fleetfed.device.store import Store
from fleetfed.device.worker import Job, Worker
from fleetfed.gateway.config import GatewayConfig
from fleetfed.gateway.runtime import Gateway
from fleetfed.shared.machine import Machine, TimerFired
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.meter import ByteMeter
from fleetfed.shared.trust.identity import Identity
from tests.simulation.loop import OWNER, VirtualLoop
from tests.simulation.network import Link, Message, Network, Request


class Process:
    """A program on the event loop: alive or dead."""

    def __init__(self, name: str, loop: VirtualLoop, network: Network) -> None:
        self.name = name
        self.loop = loop
        self.network = network
        self.task: asyncio.Task[Any] | None = None
        self.starts = 0

    @property
    def alive(self) -> bool:
        return self.task is not None

    def start(self) -> None:
        """Start on the disk as it is."""
        assert self.task is None
        self.starts += 1
        contextvars.copy_context().run(self._start)

    def _start(self) -> None:
        OWNER.set(self)
        self.task = self.loop.create_task(self._program(), name=self.name)

    def _program(self) -> Any:
        raise NotImplementedError

    def crash(self, *, write: bool = False) -> None:
        """As SIGKILL, after a job that waits if ``write``."""
        if write:
            job = next((job for job in self.loop.pending_jobs() if job.owner is self), None)
            if job is not None:
                self.loop.perform(job)
        for link in self.network.links(self.name):
            self.network.drop(link)
        self.network.clients = [each for each in self.network.clients if each.config.client_id != self.name]
        task, self.task = self.task, None
        self.loop.end(self)
        assert task is not None
        if not task.cancelled():
            task.exception()

    def check(self) -> None:
        """The program did not end by itself."""
        if self.task is not None and self.task.done():
            self.task.result()
            raise AssertionError(f"{self.name} ended")


class CoordinatorProcess(Process):
    """The coordinator's whole `Runtime`."""

    def __init__(self, name: str, loop: VirtualLoop, network: Network, config: CoordinatorConfig) -> None:
        super().__init__(name, loop, network)
        self._config = config

    def _program(self) -> Any:
        self.runtime = Runtime(self._config)
        return self.runtime.run(asyncio.Event())

    @property
    def coordinator(self) -> Any:
        return self.runtime._coordinator

    @property
    def machine(self) -> Any:
        return self.coordinator.machine


class GatewayProcess(Process):
    """A whole `Gateway`."""

    def __init__(
        self, name: str, loop: VirtualLoop, network: Network, config: GatewayConfig, identity: Identity
    ) -> None:
        super().__init__(name, loop, network)
        self.config = config
        self._identity = identity

    def _program(self) -> Any:
        self.gateway = Gateway(self.config, self._identity)
        return self.gateway.run()

    @property
    def machine(self) -> Any:
        return self.gateway.machine


class HelperProcess(Process):
    """A whole `Helper`."""

    def __init__(
        self, name: str, loop: VirtualLoop, network: Network, config: HelperConfig, identity: Identity
    ) -> None:
        super().__init__(name, loop, network)
        self._config = config
        self._identity = identity

    def _program(self) -> Any:
        self.helper = Helper(self._config, self._identity, clock=self.loop.clock)
        return self.helper.run()

    @property
    def machine(self) -> Any:
        return self.helper.machine


class SimulatedDeviceSession:
    """In the place of `fleetfed.device.mqtt.DeviceSession`, with its rules. Set `network` before any is made."""

    network: Network

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        inbox: queue.Queue[Any],
        will: Will | None = None,
        subscriptions: Any = (),
        **_: Any,
    ) -> None:
        self.config = config
        self.will = will
        self.meter = ByteMeter()
        self._inbox = inbox
        self._filters = dict.fromkeys(subscriptions)
        self.link: Link | None = None
        self._tokens = itertools.count(1)
        self._unconfirmed: dict[int, tuple[Link, Message]] = {}

    # --- What the program calls ---------------------------------------------------------------------------------------

    def start(self) -> None:
        self.network.clients.append(self)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        token = next(self._tokens)
        if self.link is not None:
            self.link.uplink.append(
                Request(topic=topic, payload=bytes(payload), retain=retain, done=lambda taken: self._done(token, taken))
            )
        return token

    def _done(self, token: int, taken: bool) -> None:
        if taken:
            self._inbox.put(PublishDone(token))

    def subscribe(self, *filters: str) -> None:
        self._filters.update(dict.fromkeys(filters))
        if self.link is not None:
            self.link.uplink.append(Request(subscribe=filters))

    def unsubscribe(self, *filters: str) -> None:
        for each in filters:
            self._filters.pop(each, None)
        if self.link is not None:
            self.link.uplink.append(Request(unsubscribe=filters))

    def ack(self, message: Received) -> None:
        link, sent = self._unconfirmed.pop(message.mid)
        if link.alive:
            link.session.confirm(sent)

    def close(self, state_payload: bytes | None = None, *, timeout: float = 5.0) -> None:
        link = self.link
        if link is not None:
            broker = self.network.broker(self.config.port)
            if state_payload is not None and self.will is not None:
                broker.publish(Message(self.config.client_id, self.will.topic, state_payload), retain=True)
            broker.close(link, clean=state_payload is not None)
        if self in self.network.clients:
            self.network.clients.remove(self)

    # --- What the broker calls ----------------------------------------------------------------------------------------

    def filters(self) -> list[str]:
        return list(self._filters)

    def dropped(self) -> list[str]:
        return []

    def linked(self, link: Link, *, session_present: bool) -> None:
        self.link = link
        self._inbox.put(Connected(session_present))

    def lost(self, link: Link) -> None:
        self.link = None
        self._inbox.put(Disconnected("broke"))

    def receive(self, link: Link, message: Message) -> None:
        number = next(self._tokens)
        self._unconfirmed[number] = (link, message)
        self._inbox.put(Received(message.topic, message.payload, message.retained, mid=number, qos=1))


class SimulatedWorker(Worker):
    """Ends a training when the world says so."""

    job: Job | None = None

    def start(self, job: Job) -> None:
        self.cancel()
        self._cancel = threading.Event()
        self.job = job

    def cancel(self) -> None:
        super().cancel()
        self.job = None

    def finish(self) -> None:
        """Do the job that was begun."""
        job, self.job = self.job, None
        if job is not None:
            self._done(self._attempt(job, self._cancel))


class DeviceProcess:
    """A `DeviceRuntime`, its loop turned by the world; its disk may lose power at any step."""

    def __init__(
        self, name: str, loop: VirtualLoop, network: Network, config: DeviceConfig, identity: Identity
    ) -> None:
        self.name = name
        self.loop = loop
        self.network = network
        self.config = config
        self.identity = identity
        self.disk = FragileDisk()
        self.runtime: DeviceRuntime | None = None
        self._store: Store | None = None
        self.cuts = 0

    @property
    def alive(self) -> bool:
        return self.runtime is not None

    @property
    def folder(self) -> Path:
        return self.config.state

    @property
    def machine(self) -> Machine[Any]:
        assert self.runtime is not None
        return self.runtime._machine

    @property
    def worker(self) -> SimulatedWorker:
        assert self.runtime is not None
        worker = self.runtime._worker
        assert isinstance(worker, SimulatedWorker)
        return worker

    def start(self) -> None:
        """Start on the disk as it is."""
        assert self.runtime is None
        self.disk = FragileDisk()
        self._store = Store(self.config.state, disk=self.disk)
        self.runtime = DeviceRuntime(
            self.config, self.identity, self._store, OneHot(self.config), software="simulated", clock=self.loop.clock
        )
        self.runtime._load_revocations()
        self.runtime._session.start()

    def cut_power(self, step: int, *, lossy: bool) -> None:
        """Die now, or ``step`` steps of the disk later."""
        if step == 0:
            self.crash()
        else:
            self.disk.cut = self.disk.steps + step
            self.disk._lossy = lossy

    def crash(self) -> None:
        """As SIGKILL."""
        assert self._store is not None
        for link in self.network.links(self.name):
            self.network.drop(link)
        self.network.clients = [each for each in self.network.clients if each.config.client_id != self.name]
        self.runtime = None
        self._store.close()
        self._store = None

    def sleep(self) -> None:
        """Stop in good order, as the end of `DeviceRuntime.run` does."""
        runtime = self.runtime
        assert runtime is not None
        with_power = self._with_power(lambda: runtime._handle(events.StopRequested()))
        if with_power:
            runtime._session.close(runtime._farewell())
            runtime._write_status()
            assert self._store is not None
            self._store.close()
            self.runtime, self._store = None, None

    def turn(self) -> None:
        """Deal with everything that came."""
        # The queue's own deque: there is no other thread, and this is asked more often than anything.
        while self.runtime is not None and self.runtime._inbox.queue:
            self._with_power(self.runtime._turn)

    def train(self) -> None:
        """End the training that was begun."""
        if self.runtime is not None:
            self.worker.finish()
            self.turn()

    def next_deadline(self) -> int | None:
        return None if self.runtime is None else self.machine.next_deadline()

    def timer(self) -> None:
        """Time has passed."""
        runtime = self.runtime
        deadline = self.next_deadline()
        if runtime is not None and deadline is not None and deadline <= self.loop.now:
            self._with_power(lambda: runtime._handle(TimerFired()))

    def _with_power(self, act: Any) -> bool:
        try:
            act()
        except PowerCutError:
            self.cuts += 1
            self.crash()
            return False
        return True

    def check(self) -> None:
        """Nothing can end it but the world."""
