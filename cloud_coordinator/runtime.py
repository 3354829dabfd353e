"""Runs the coordinator: connection, timers, signals, status file. Decisions are elsewhere.

Everything waits: for packets, for the next deadline, or for the end of a step. Packets to the broker leave in order,
many at a time; what the broker did not confirm and keeps retained is published again after the next connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import signal
from collections import deque
from typing import Any, Final

from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.cloud_coordinator.control.handler import Control
from fleetfed.cloud_coordinator.inbox import Inbox
from fleetfed.cloud_coordinator.monitoring import CoordinatorView
from fleetfed.cloud_coordinator.publish import Outgoing
from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.cloud_coordinator.storage.objectstore import open_blobs
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared import health
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import StorageError
from fleetfed.shared.files import locked, write_atomic
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.config import Will
from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError
from fleetfed.shared.mqtt.meter import ByteCount, ByteMeter
from fleetfed.shared.mqtt.session import Session, SessionStatistics
from fleetfed.shared.systemd import Notifier, beat
from fleetfed.shared.telemetry import name_logs, peak_mb
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Life, Presence
from fleetfed.shared.wire.topics import CLOUD_SITE, Broadcast, SiteTopics

_log = logging.getLogger(__name__)

SOFTWARE: Final = "fleetfed-coordinator 0.1.0"
_WINDOW: Final = 64
"""Packets that may wait for the broker's confirmation at once."""
_FAREWELL: Final = 5.0
"""Seconds that a clean stop waits for the broker to take the last packets."""


class Sender:
    """Publishes packets in order, without waiting for one confirmation before the next packet.

    Args:
        session: the connection.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._queue: deque[Outgoing] = deque()
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._window = asyncio.Semaphore(_WINDOW)
        self._sending: set[asyncio.Task[None]] = set()
        self.stale = True
        """Whether the broker may lack something retained: then all of it is published after the next connect."""

    def put(self, packet: Outgoing) -> None:
        """Take a packet; without a connection it is dropped, as peers ask again and retained ones are repeated."""
        if not self._session.connected:
            self.stale = self.stale or packet.retain
            return
        self._queue.append(packet)
        self._empty.clear()
        self._arrived.set()

    async def drain(self) -> None:
        """Return when every packet is confirmed or dropped."""
        await self._empty.wait()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                while self._queue:
                    await self._window.acquire()
                    task = group.create_task(self._publish(self._queue.popleft()))
                    self._sending.add(task)
                    task.add_done_callback(self._sent)
                self._arrived.clear()
                await self._arrived.wait()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._window.release()
        if not self._sending and not self._queue:
            self._empty.set()

    async def _publish(self, packet: Outgoing) -> None:
        try:
            payload = packet.payload if isinstance(packet.payload, bytes) else packet.payload()
        except StorageError as error:
            # An object that became obsolete while it waited: nobody wants it any more, or asks for it again.
            _log.warning("%s: not published: %s", packet.topic, error)
            return
        try:
            await self._session.publish(packet.topic, payload, retain=packet.retain)
        except SessionLostError:
            self.stale = self.stale or packet.retain
        except PublishRefusedError as error:
            _log.error("%s", error)
        else:
            if packet.done is not None:
                packet.done()


class Runtime:
    """One run of the coordinator.

    Args:
        config: the settings.

    Raises:
        ConfigError: a setting, the identity, the model or the validation set cannot be used.
        StorageError: durable state is damaged.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.identity = Identity.load(config.identity, role=Role.COORDINATOR)
        certificate = self.identity.certificate
        name_logs(certificate.id, certificate.site)
        self._id = certificate.id
        self._topics = SiteTopics(certificate.fleet, CLOUD_SITE)
        self._session_number = secrets.randbits(63)
        self._changed = asyncio.Event()
        self._meter = ByteMeter()
        self._open(config)

    def _open(self, config: CoordinatorConfig) -> None:
        blobs = open_blobs(config.state / "blobs", config.storage.blobs, config.storage.blobs_options)
        self._store = Store(config.database_url, blobs)
        try:
            self._coordinator = Coordinator(
                config,
                identity=self.identity,
                store=self._store,
                blobs=blobs,
                clock=unix_ms,
                signer=self.identity.signer(sequence=SequenceFile(config.state / "sequence"), randomness=os.urandom),
                randomness=os.urandom,
                send=self._send,
                wake=self._changed.set,
            )
            control = Control(self._coordinator)
            self._inbox = Inbox(self._coordinator, control.request)
            self._session = Session(
                config.connection(self._id),
                subscriptions=self._inbox.subscriptions,
                on_connect=self._connected,
                on_message=self._message,
                on_disconnect=self._disconnected,
                will=Will(topic=self._topics.broadcast(Broadcast.NODE), payload=self._presence(Life.LOST)),
                rng=random.Random(),  # noqa: S311
                meter=self._meter,
            )
        except BaseException:
            self._store.close()
            raise
        self._sender = Sender(self._session)
        self._status_due = asyncio.Event()
        self._written_rounds = -1
        self._systemd = Notifier()

    async def run(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set.

        Raises:
            ConfigError: ``[monitoring] listen`` cannot be listened on.
            StorageError: durable state cannot be written.
        """
        tasks: list[asyncio.Task[Any]] = []
        life = asyncio.create_task(beat(self._systemd), name="systemd")
        monitoring: MonitoringServer | None = None
        try:
            monitoring = MonitoringServer(self.config.monitoring, CoordinatorView(self))
            # Before anything can arrive.
            run = self._coordinator.machine.run.settings
            await self._coordinator.book.privacy.prepare(run.privacy, self.config.rounds.privacy)
            session = asyncio.create_task(self._session.run(), name="session")
            tasks += [session, asyncio.create_task(self._sender.run(), name="sender")]
            self._coordinator.start()
            assert self._coordinator.failed is not None
            timers = asyncio.create_task(self._timers(), name="timers")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            noting = asyncio.create_task(self._keep_status(), name="status")
            tasks += [timers, stopping, noting]
            waited: set[asyncio.Future[Any]] = {*tasks, self._coordinator.failed}
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if stopping not in done:
                for each in done:
                    each.result()
            self._systemd.stopping()
            await self._farewell()
        finally:
            if monitoring is not None:
                monitoring.close()
            for task in (*reversed(tasks), life):
                task.cancel()
            await asyncio.gather(*tasks, life, return_exceptions=True)
            await self._coordinator.stop()
            write_atomic(self.config.state / "status.json", self._status())
            self._store.close()

    async def _farewell(self) -> None:
        await self._coordinator.stop()
        self._sender.put(self._node(Life.DISCONNECTED))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await self._sender.drain()

    async def _connected(self, session_present: bool) -> None:
        self._sender.put(self._node(Life.READY))
        self._systemd.ready("connected")
        self._status_due.set()
        if self._sender.stale or not session_present:
            self._sender.stale = False
            self._coordinator.publish_everything()

    async def _disconnected(self, reason: str) -> None:
        self._systemd.status("not connected")
        self._status_due.set()

    async def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        del retained
        await self._inbox.message(topic, payload)

    async def _timers(self) -> None:
        while True:
            self._changed.clear()
            deadline = self._coordinator.next_deadline()
            wait = None if deadline is None else max(0, deadline - unix_ms()) / 1000
            # Not wait_for: in Python 3.11 it loses a cancellation that meets the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            self._coordinator.timer()
            rounds = self._coordinator.finished_rounds
            if rounds != self._written_rounds:
                self._written_rounds = rounds
                self._status_due.set()

    async def _keep_status(self) -> None:
        """Write the status when it changes, and now and then, so that whoever reads it sees that the loop turns."""
        while True:
            self._status_due.clear()
            try:
                await asyncio.to_thread(write_atomic, self.config.state / "status.json", self._status())
            except OSError as error:
                # What matters more than this file says for itself that the disk is full.
                _log.warning("status.json: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(health.EVERY):
                    await self._status_due.wait()

    @property
    def coordinator(self) -> Coordinator:
        """Which decides."""
        return self._coordinator

    def connection(self) -> tuple[SessionStatistics, ByteCount]:
        """The connection to the broker, and its bytes."""
        return self._session.statistics(), self._meter.snapshot()

    def obstacle(self) -> str:
        """Why the coordinator cannot work now; empty when it can."""
        if not self._session.connected:
            return "not connected to the broker"
        if self._coordinator.trust.status().get("stale"):
            return "the trust metadata has expired: no round counts"
        return ""

    def _presence(self, life: Life) -> bytes:
        since = 0 if life is Life.LOST else unix_ms()
        return codec.encode(Presence(life=life, session=self._session_number, since=since, software=SOFTWARE))

    def _node(self, life: Life) -> Outgoing:
        return Outgoing(topic=self._topics.broadcast(Broadcast.NODE), payload=self._presence(life), retain=True)

    def _send(self, packet: Outgoing) -> None:
        self._sender.put(packet)

    def _status(self) -> bytes:
        coordinator = self._coordinator
        newest = coordinator.newest()
        wire = self._meter.snapshot()
        facts = {
            "id": self._id,
            "role": "coordinator",
            "pid": os.getpid(),
            "software": SOFTWARE,
            "updated": unix_ms(),
            "model_version": 0 if newest is None else newest.version,
            "model_sha256": "" if newest is None else newest.sha256.hex(),
            "state": coordinator.machine.state.value,
            "obstacle": self.obstacle(),
            "round": coordinator.machine.last_round,
            "wire": {"sent": wire.sent, "received": wire.received},
            "rss_mb_max": round(peak_mb(), 1),
            "rejected": coordinator.rejected.snapshot(),
            "trust": coordinator.trust.status(),
        }
        return json.dumps(facts, indent=1).encode()


async def run_coordinator(config: CoordinatorConfig, *, stop: asyncio.Event | None = None) -> int:
    """Run the coordinator until SIGTERM, SIGINT or ``stop``; return the exit code 0.

    Args:
        config: the settings.
        stop: ends the run where the caller handles signals itself.

    Raises:
        ConfigError: a setting, the identity, the model or the validation set cannot be used (exit code 2).
        StorageError: durable state is damaged, or cannot be written (exit code 3).
    """
    with locked(config.state):
        return await _run(Runtime(config), stop)


async def _run(runtime: Runtime, stop: asyncio.Event | None) -> int:
    loop = asyncio.get_running_loop()
    ours = stop is None
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    try:
        await runtime.run(stop)
    except BaseExceptionGroup as group:
        raise _first(group) from group
    finally:
        if ours:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
