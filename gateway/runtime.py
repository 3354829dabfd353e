"""The running gateway: connections, bytes into events, instructions into deeds.

Two sites, one or two MQTT sessions: members below, the tier above. A connection has one last will, so where one session
serves both, the will is the presence upstream (the coordinator must not wait for us), and the presence on the own site
(``b/node``) is published without one: members there learn of a crash from our next birth, which has another session
number, and send again whatever is unanswered. Such a session may be with the site's own broker, which is then bridged
to the one above; when its bridge breaks it tells us, and the broker above tells the node there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from fleetfed.gateway import events as ev
from fleetfed.gateway.config import GatewayConfig
from fleetfed.gateway.inbound import Inbound
from fleetfed.gateway.journal import Journal
from fleetfed.gateway.monitoring import GatewayTally, GatewayView
from fleetfed.gateway.perform import Performer
from fleetfed.gateway.pipeline import Pipeline
from fleetfed.gateway.record import Place
from fleetfed.gateway.relay import Relay
from fleetfed.gateway.rivals import Rivals
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.status import Status, write_status
from fleetfed.gateway.telemetry import Tales
from fleetfed.gateway.worker import Worker
from fleetfed.shared import health
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RemoteProtocolError, StorageError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.config import Will
from fleetfed.shared.mqtt.errors import PublishRefusedError
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.mqtt.session import Session, SessionStatistics
from fleetfed.shared.systemd import Notifier, beat
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.version import software
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.messages import Life, Need, Presence
from fleetfed.shared.wire.topics import CLOUD_SITE, Broadcast, Kind, SiteTopics, Verb

_log = logging.getLogger(__name__)

_MIB: Final = 1 << 20
_GOODBYE: Final = 2.0
"""Seconds that a clean stop may take to say so."""

_HEARD_BELOW: Final = (
    (Kind.DEVICE, Verb.STATE),
    (Kind.GATEWAY, Verb.LINK),
    (Kind.GATEWAY, Verb.STATE),
    (Kind.GATEWAY, Verb.CENSUS),
    (Kind.DEVICE, Verb.UPDATE),
    (Kind.DEVICE, Verb.DECLINE),
    (Kind.DEVICE, Verb.NEED),
    (Kind.GATEWAY, Verb.NEED),
    (Kind.GATEWAY, Verb.PROPOSE),
    (Kind.GATEWAY, Verb.REVEAL),
)
"""Presence first: brokers deliver retained messages in the order of the subscriptions."""
_HEARD_ABOVE: Final = (Broadcast.REVOKED, Broadcast.TRUST, Broadcast.MODEL, Broadcast.PLAN, Broadcast.NODE)


@dataclass(frozen=True, slots=True)
class _Side:
    """A connection whose session may be made later than what uses it."""

    session: Callable[[], Session]

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        await self.session().publish(topic, payload, qos=qos, retain=retain)

    async def subscribe(self, filters: list[str]) -> None:
        await self.session().subscribe(filters)

    async def unsubscribe(self, filters: list[str]) -> None:
        await self.session().unsubscribe(filters)


class Gateway:
    """See the module. Create it on the event loop's thread; `run` it once.

    Args:
        config: the settings.
        identity: who we are; its certificate names the site that we serve.

    Raises:
        ConfigError: the identity does not fit the settings.
        StorageError: the state folder is damaged.
    """

    def __init__(self, config: GatewayConfig, identity: Identity) -> None:
        certificate = identity.certificate
        if certificate.role is not Role.GATEWAY or certificate.site == CLOUD_SITE:
            raise ConfigError(f"{certificate.id} is no gateway's identity; issue one with role gateway and a site")
        if certificate.site == config.upstream.site:
            raise ConfigError(f"upstream.site: {certificate.site} is the site that this gateway serves itself")
        self.config = config
        self.certificate = certificate
        self.id = certificate.id
        self.site = SiteTopics(certificate.fleet, certificate.site)
        self.upstream = SiteTopics(certificate.fleet, config.upstream.site)
        self.counters = Counters()
        self.tally = GatewayTally()
        self.tales = Tales()
        self._bridge_up = True
        self._birth = self._site_birth = b""
        self._life = secrets.randbits(62)
        self._verifier = identity.verifier()
        self.rivals = Rivals(certificate.site, certificate.serial, self._is_revoked)
        state = config.state
        state.mkdir(parents=True, exist_ok=True)
        self.trust = TrustKeeper(state / "trust.bin", identity, self._verifier)
        self._signer = identity.signer(sequence=SequenceFile(state / "sequence"), randomness=secrets.token_bytes)
        self._disk_thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-journal")
        self._work_thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-work")
        self._journal = Journal(state / "journal.db")
        self._pipeline = Pipeline(self._journal, self._disk_thread)
        self._worker = Worker(self._work_thread)
        below, above = _Side(lambda: self._below), _Side(lambda: self._above)
        stored = self._journal.load()
        place = Place(
            gateway=self.id,
            direct=config.upstream.site == CLOUD_SITE,
            journal_limit=config.limits.journal_mib * _MIB,
        )
        self.machine = GatewayMachine(
            certificate.site,
            place,
            last_round=stored.last_round,
            previous=stored.previous,
            counted=stored.counted,
        )
        self.performer = Performer(
            gateway=self.id,
            machine=self.machine,
            journal=self._journal,
            pipeline=self._pipeline,
            worker=self._worker,
            signer=self._signer,
            below=below,
            above=above,
            site=self.site,
            upstream=self.upstream,
            counters=self.counters,
            randomness=secrets.token_bytes,
            clock=unix_ms,
            round_over=self._round_over,
        )
        self.relay = Relay(
            state / "relay",
            above=above,
            below=below,
            upstream=self.upstream,
            site=self.site,
            ask=self._ask,
            served=self._fed,
            believed=self._verifier.is_coordinator,
        )
        self.inbound = Inbound(
            verifier=self._verifier,
            machine=self.machine,
            performer=self.performer,
            relay=self.relay,
            worker=self._worker,
            site=self.site,
            upstream=self.upstream,
            gateway=self.id,
            counters=self.counters,
            budget=config.limits.assembling_mib * _MIB,
            fed=self._fed,
            revoked=self._new_revocations,
            reborn=self._upstream_reborn,
            clock=unix_ms,
            trusted=self._new_trust,
            linked=self._bridged,
            told=lambda device, payload: self.tales.take(device, payload, now=unix_ms()),
            neighbour=self._neighbour,
        )
        self._systemd = Notifier()
        self._timer_changed = asyncio.Event()
        self._deadline: int | None = None
        self._stop = asyncio.Event()
        self._site_up = asyncio.Event()
        self._revoked_raw = self.inbound.load_revocations(state / "revoked.bin")
        self._make_sessions(identity)
        self._restore()

    def _restore(self) -> None:
        served = self.relay.served_now()
        if served is not None:
            self.machine.handle(served, unix_ms())
        self.machine.handle(ev.Revoked(serials=frozenset(self._verifier.revocations.serials)), unix_ms())
        stored = self._journal.load()
        if stored.record is None:
            return
        try:
            ring = scheme_of(stored.record.plan, stored.sizes).ring
            rnd = self.machine.restore(stored.record, ring, unix_ms())
        except RemoteProtocolError as error:
            raise StorageError(f"{self.config.state}: the stored plan does not fit its model: {error}") from error
        self.performer.restore(rnd, stored)
        plan, accepted = rnd.record.plan, len(rnd.record.accepted)
        _log.info("round %d goes on (%s mode, %s) with %d updates", plan.round, plan.mode, rnd.state, accepted)

    def _make_sessions(self, identity: Identity) -> None:
        config, folder = self.config, self.config.identity
        below = [self.site.broadcast(Broadcast.NODE)]
        below += [self.site.all_up(kind, verb) for kind, verb in _HEARD_BELOW]
        if config.monitoring.listen:
            # Else nobody would look at it.
            below.append(self.site.all_up(Kind.DEVICE, Verb.TELEMETRY))
        above = [self.upstream.broadcast(what) for what in _HEARD_ABOVE]
        above.append(self.upstream.all_down(Kind.GATEWAY, self.id))
        lost = self._presence(Life.LOST, since=0)
        will_above = Will(topic=self.upstream.up(Kind.GATEWAY, self.id, Verb.STATE), payload=lost)
        will_below = Will(topic=self.site.broadcast(Broadcast.NODE), payload=lost)
        connection = config.broker.connection(client_id=self.id, identity=folder)
        if config.shared:
            # Where this broker is bridged to the one above, it says there whether the bridge is up.
            above.append(self.upstream.up(Kind.GATEWAY, self.id, Verb.LINK))
            self._below = self._above = Session(
                connection,
                subscriptions=[*below, *above],
                on_connect=self._on_both,
                on_message=self._on_message,
                on_disconnect=self._on_above_lost,
                will=will_above,
            )
            return
        assert config.upstream.broker is not None
        self._below = Session(
            connection, subscriptions=below, on_connect=self._on_below, on_message=self._on_message, will=will_below
        )
        self._above = Session(
            config.upstream.broker.connection(client_id=self.id, identity=folder),
            subscriptions=above,
            on_connect=self._on_direct,
            on_message=self._on_message,
            on_disconnect=self._on_above_lost,
            will=will_above,
        )

    # --- Running -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `run` to end in good order."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            ConfigError: ``[monitoring] listen`` cannot be listened on.
            StorageError: the disk is full or broken.
        """
        monitoring: MonitoringServer | None = None
        try:
            monitoring = MonitoringServer(self.config.monitoring, GatewayView(self))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._pipeline.run(), name="gateway-pipeline"),
                    group.create_task(self._worker.run(), name="gateway-worker"),
                    group.create_task(self._tick(), name="gateway-timer"),
                    group.create_task(beat(self._systemd), name="gateway-systemd"),
                    group.create_task(self._keep_status(), name="gateway-status"),
                    group.create_task(self.relay.run(), name="gateway-relay"),
                    group.create_task(self._below.run(), name="gateway-below"),
                ]
                if self._above is not self._below:
                    tasks.append(group.create_task(self._above.run(), name="gateway-above"))
                self.performer.perform(self.machine.resume(unix_ms()))
                if self.trust.trust is not None:
                    self._fed(ev.CoordinatorsChanged(listed=frozenset(self.trust.coordinators)))
                self._timer_changed.set()
                await self._stop.wait()
                self._systemd.stopping()
                await self._goodbye()
                for task in tasks:
                    task.cancel()
        finally:
            if monitoring is not None:
                monitoring.close()
            await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._work_thread.shutdown()
        self._disk_thread.shutdown()
        self._journal.close()
        self._write_status()

    async def _goodbye(self) -> None:
        gone = self._presence(Life.DISCONNECTED, since=unix_ms())
        try:
            async with asyncio.timeout(_GOODBYE):
                await asyncio.gather(
                    self._above.publish(self.upstream.up(Kind.GATEWAY, self.id, Verb.STATE), gone, retain=True),
                    self._below.publish(self.site.broadcast(Broadcast.NODE), gone, retain=True),
                    return_exceptions=True,
                )
                await self.performer.drain()
        except TimeoutError:
            _log.warning("stopping without having said so: no connection")

    async def _tick(self) -> None:
        while True:
            self._deadline = deadline = self.machine.next_deadline()
            wait = None if deadline is None else max(0, deadline - unix_ms()) / 1000
            try:
                async with asyncio.timeout(wait):
                    await self._timer_changed.wait()
                    self._timer_changed.clear()
            except TimeoutError:
                self.performer.feed(TimerFired())

    def _fed(self, event: object) -> None:
        """Hand an event to the machine; its next deadline may be another."""
        if isinstance(event, ev.PresenceArrived) and event.kind is Kind.DEVICE:
            before = self.machine.members.life(event.kind, event.member)
            self.performer.feed(event)
            after = self.machine.members.life(event.kind, event.member)
            self.tally.presence(before, after)
            if after is None:
                self.tales.forget(event.member)
        else:
            self.performer.feed(event)
        self._rearm()

    def _rearm(self) -> None:
        if self.machine.next_deadline() != self._deadline:
            self._timer_changed.set()

    # --- Connections ---------------------------------------------------------------------------------------------

    def _presence(self, life: Life, *, since: int) -> bytes:
        own = self.certificate
        return codec.encode(
            Presence(
                life=life,
                session=self._life,
                since=since,
                software=software("gateway"),
                serial=own.serial,
                until=own.not_after,
            )
        )

    async def _say(self, session: Session, topic: str, payload: bytes) -> None:
        try:
            await session.publish(topic, payload, retain=True)
        except PublishRefusedError as error:
            # Whoever wrote the broker's access list must see it; a restart would not help.
            _log.error("%s; is this gateway in the broker's access list?", error)

    async def _on_below(self, session_present: bool) -> None:
        first = not self._site_up.is_set()
        if first or not session_present:
            # The broker may have lost what it retained for us, or a process before us has left something else.
            self.relay.republish()
            known = ((Broadcast.REVOKED, self._revoked_raw), (Broadcast.TRUST, self.trust.bundle))
            for what, raw in (*known, *self.performer.retained()):
                if raw:
                    await self._say(self._below, self.site.broadcast(what), raw)
        else:
            self.relay.resume()
        self._site_birth = self._presence(Life.READY, since=unix_ms())
        await self._say(self._below, self.site.broadcast(Broadcast.NODE), self._site_birth)
        if first:
            self._fed(ev.SiteConnected(unix_ms() + round(1000 * self.config.limits.settle)))
            self._site_up.set()

    async def _on_direct(self, session_present: bool) -> None:
        # A bridge that carried us before may have said that it is down, and nobody else would take that back.
        await self._say(self._above, self.upstream.up(Kind.GATEWAY, self.id, Verb.LINK), b"")
        await self._on_above(session_present)

    async def _on_above(self, session_present: bool) -> None:
        # Ready means: can serve. Nobody need wait for a gateway that does not reach its own site.
        await self._site_up.wait()
        self._birth = self._presence(Life.READY, since=unix_ms())
        await self._say(self._above, self.upstream.up(Kind.GATEWAY, self.id, Verb.STATE), self._birth)
        self.relay.reconnected()
        self._fed(ev.UpstreamConnected())
        self._systemd.ready("connected")
        self._save_status()

    async def _on_both(self, session_present: bool) -> None:
        await self._on_below(session_present)
        await self._on_above(session_present)

    async def _on_above_lost(self, reason: str) -> None:
        self._systemd.status("not connected upstream")
        self._fed(ev.UpstreamLost())
        self._save_status()

    async def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        self.inbound.receive(topic, payload, live=not retained)
        # Before the broker is told that it was handled.
        await self._worker.room()
        await self._pipeline.room()
        self._rearm()

    def _neighbour(self, presence: Presence, live: bool) -> None:
        if self.rivals.heard(presence, live=live):
            self.performer.publish(self._below, self.site.broadcast(Broadcast.NODE), self._site_birth, retain=True)
            self._save_status()

    def _is_revoked(self, serial: int) -> bool:
        return serial in self._verifier.revocations.serials

    def _upstream_reborn(self) -> None:
        """The node above started anew, or its connection did: it may have missed what we said."""
        if self._above.connected and self._birth:
            topic = self.upstream.up(Kind.GATEWAY, self.id, Verb.STATE)
            self.performer.publish(self._above, topic, self._birth, retain=True)
            self._fed(ev.UpstreamConnected())

    def _bridged(self, up: bool) -> None:
        """Our broker's bridge came up, and may have lost what it was to carry; or it went down."""
        _log.info("the bridge to site %s is %s", self.upstream.site, "up" if up else "down")
        self._bridge_up = up
        if up:
            self.relay.reconnected()
            self._fed(ev.UpstreamConnected())
        else:
            self._fed(ev.UpstreamLost())
        self._save_status()

    async def _ask(self, need: Need) -> None:
        topic = self.upstream.up(Kind.GATEWAY, self.id, Verb.NEED)
        await self._above.publish(topic, codec.encode(need))

    def _new_revocations(self, raw: bytes) -> None:
        write_atomic(self.config.state / "revoked.bin", raw)
        self._revoked_raw = raw
        self.performer.publish(self._below, self.site.broadcast(Broadcast.REVOKED), raw, retain=True)
        before = {device for device, _ in self.machine.members.lives(Kind.DEVICE)}
        self._fed(ev.Revoked(serials=frozenset(self._verifier.revocations.serials)))
        for device in before.difference(device for device, _ in self.machine.members.lives(Kind.DEVICE)):
            self.tales.forget(device)

    def _new_trust(self, raw: bytes) -> None:
        try:
            news = self.trust.take(raw, now=unix_ms())
        finally:
            # Also where only the root was news: it may have taken a coordinator away.
            if self.trust.trust is not None:
                self._fed(ev.CoordinatorsChanged(listed=frozenset(self.trust.coordinators)))
        if news:
            self.performer.publish(self._below, self.site.broadcast(Broadcast.TRUST), raw, retain=True)
            self.inbound.judge_again()

    # --- Status --------------------------------------------------------------------------------------------------

    def _round_over(self, round: int) -> None:
        self.inbound.round_over()
        self.tally.round_over(self.machine.previous, unix_ms())
        _log.info("round %d is over", round)
        self._save_status()

    def _save_status(self) -> None:
        task = asyncio.get_running_loop().run_in_executor(self._disk_thread, self._write_status)
        task.add_done_callback(_log_failure)

    async def _keep_status(self) -> None:
        """Write the status now and then, so that whoever reads it sees whether the loop turns and we are connected."""
        while True:
            self._save_status()
            await asyncio.sleep(health.EVERY)

    def connections(self) -> list[tuple[str, SessionStatistics, ByteCount]]:
        """The MQTT connections: ``site`` and, where it is another one, ``upstream``."""
        found = [("site", self._below.statistics(), self._below.meter.snapshot())]
        if self._above is not self._below:
            found.append(("upstream", self._above.statistics(), self._above.meter.snapshot()))
        return found

    def obstacle(self) -> str:
        """Why this gateway cannot serve now; empty when it can."""
        if not self._below.connected:
            return "not connected to the site's broker"
        if not self._above.connected:
            return "not connected upstream"
        if not self._bridge_up:
            return f"the bridge to site {self.upstream.site} is down"
        if self.trust.status(unix_ms()).get("stale"):
            return "the trust metadata has expired: no round counts"
        if self._is_revoked(self.certificate.serial):
            return "this gateway's own certificate was revoked: nobody believes it"
        return self.rivals.describe()

    def status(self) -> Status:
        """What the gateway is doing."""
        manifest, rnd = self.relay.manifest, self.machine.round
        return Status(
            id=self.id,
            site=self.site.site,
            software=software("gateway"),
            model_version=manifest.version if manifest else 0,
            model_sha256=manifest.sha256.hex() if manifest else "",
            shared_connection=self._below is self._above,
            wire_site=self._below.meter.snapshot(),
            wire_upstream=self._above.meter.snapshot(),
            rejected=self.counters.snapshot(),
            accepted=self.performer.accepted,
            round=rnd.record.plan.round if rnd else self.machine.last_round,
            round_state=str(rnd.state) if rnd else str(self.machine.state),
            mode=str(rnd.record.plan.mode) if rnd else self.machine.previous.mode,
            aborted=rnd.record.aborted if rnd else self.machine.previous.aborted,
            answered=rnd.answered if rnd else 0,
            expected=len(rnd.expected) if rnd else 0,
            level=self.machine.members.level,
            journal_commits=self._pipeline.commits,
            trust=self.trust.status(unix_ms()),
            obstacle=self.obstacle(),
            updated=unix_ms(),
        )

    def _write_status(self) -> None:
        write_status(self.config.state, self.status())


def _log_failure(task: asyncio.Future[None]) -> None:
    error = task.exception() if not task.cancelled() else None
    if error is not None:
        _log.warning("status.json: %s", error)
