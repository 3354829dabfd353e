"""The running helper: one connection, bytes into events, instructions into deeds.

Messages are handled one at a time, and confirmed to the broker only when they are dealt with; whatever verifies, adds
up or writes runs in one thread of its own. The coordinator repeats its request until it has an answer, so nothing here
is ever sent a second time unasked.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from fleetfed.cloud_coordinator.helper import events as ev
from fleetfed.cloud_coordinator.helper.checks import BadSeedsError, Job, verify
from fleetfed.cloud_coordinator.helper.config import HelperConfig
from fleetfed.cloud_coordinator.helper.monitoring import HelperView
from fleetfed.cloud_coordinator.helper.state import HelperMachine
from fleetfed.cloud_coordinator.helper.status import Status, write_status
from fleetfed.cloud_coordinator.helper.store import Store
from fleetfed.shared import health
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.machine import TimerFired
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.mqtt.config import Will
from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError
from fleetfed.shared.mqtt.meter import ByteCount
from fleetfed.shared.mqtt.session import Session, SessionStatistics
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.systemd import Notifier, beat
from fleetfed.shared.telemetry import Counters
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.version import software
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import Digest, Head, MessageKind, digest, open_body, parse_head
from fleetfed.shared.wire.masking import MaskRequest, MaskSums, SealKey
from fleetfed.shared.wire.messages import Commit, Life, Presence, Revocations
from fleetfed.shared.wire.topics import (
    CLOUD_SITE,
    Broadcast,
    BroadcastTopic,
    Kind,
    MemberTopic,
    SiteTopics,
    Verb,
    parse,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MIB: Final = 1 << 20
_HOUR: Final = 3_600_000
_DETAIL: Final = 500
"""Characters of why a request is refused that are sent."""
_GOODBYE: Final = 2.0
"""Seconds that a clean stop may take to say so."""


class Helper:
    """See the module. Create it on the event loop's thread; `run` it once.

    Args:
        config: the settings.
        identity: who we are.
        clock: unix milliseconds.

    Raises:
        ConfigError: the identity is no helper's.
        StorageError: the state folder is damaged.
    """

    def __init__(self, config: HelperConfig, identity: Identity, *, clock: Callable[[], int] = unix_ms) -> None:
        certificate = identity.certificate
        if certificate.role is not Role.HELPER or certificate.site != CLOUD_SITE:
            raise ConfigError(f"{certificate.id} is no helper's identity; issue one with --role helper")
        self.config = config
        self.certificate = certificate
        self.id = certificate.id
        self.topics = SiteTopics(certificate.fleet, CLOUD_SITE)
        self.counters = Counters()
        self.clock = clock
        self._life = secrets.randbits(62)
        self._verifier = identity.verifier()
        config.state.mkdir(parents=True, exist_ok=True)
        self.trust = TrustKeeper(config.state / "trust.bin", identity, self._verifier)
        self._signer = identity.signer(sequence=SequenceFile(config.state / "sequence"), randomness=secrets.token_bytes)
        self.store = Store(config.state / "helper.db")
        self.machine = HelperMachine(
            period=round(config.rotate_hours * _HOUR),
            suite=config.suite,
            keys=self.store.keys(),
            claims=self.store.claims(),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="helper-work")
        self._assembler = Assembler(self._admit)
        self._requests: dict[Digest, MaskRequest] = {}
        self._jobs: dict[Digest, Job] = {}
        self._one = asyncio.Lock()
        self._timer_changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._systemd = Notifier()
        self._load_revocations()
        lost = Will(topic=self._up(Verb.STATE), payload=self._presence(Life.LOST, since=0))
        self._session = Session(
            config.broker.connection(client_id=self.id, identity=config.identity),
            subscriptions=[
                self.topics.broadcast(Broadcast.REVOKED),
                self.topics.broadcast(Broadcast.TRUST),
                self.topics.broadcast(Broadcast.NODE),
                self.topics.down(Kind.HELPER, self.id, Verb.ASK),
            ],
            on_connect=self._on_connect,
            on_message=self._on_message,
            on_disconnect=self._on_disconnect,
            will=lost,
        )

    def _up(self, verb: Verb) -> str:
        return self.topics.up(Kind.HELPER, self.id, verb)

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
            monitoring = MonitoringServer(self.config.monitoring, HelperView(self))
            await self._feed(ev.Started())
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._session.run(), name="helper-session"),
                    group.create_task(self._tick(), name="helper-timer"),
                    group.create_task(beat(self._systemd), name="helper-systemd"),
                    group.create_task(self._keep_status(), name="helper-status"),
                ]
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
        self._thread.shutdown()
        self.store.close()
        write_status(self.config.state, self.status())

    def status(self) -> Status:
        """What the helper is doing."""
        current, answered = self.machine.current, self.machine.claims
        return Status(
            id=self.id,
            software=software("helper"),
            updated=self.clock(),
            connected=self._session.connected,
            obstacle=self.obstacle(),
            keys=len(self.machine.keys),
            key_expires=current.expires if current else 0,
            answered=len(answered),
            round=max((claim.round for claim in answered), default=0),
            rejected=self.counters.snapshot(),
            trust=self.trust.status(self.clock()),
        )

    def connection(self) -> tuple[SessionStatistics, ByteCount]:
        """The connection to the broker, and its bytes."""
        return self._session.statistics(), self._session.meter.snapshot()

    def obstacle(self) -> str:
        """Why this helper cannot serve now; empty when it can."""
        if not self._session.connected:
            return "not connected to the broker"
        if self.trust.status(self.clock()).get("stale"):
            return "the trust metadata has expired: no round counts"
        return ""

    async def _keep_status(self) -> None:
        """Write the status now and then, so that whoever reads it sees that the loop turns."""
        while True:
            await self._save_status()
            await asyncio.sleep(health.EVERY)

    async def _save_status(self) -> None:
        status = self.status()
        await self._in_thread(lambda: write_status(self.config.state, status))

    async def _goodbye(self) -> None:
        try:
            async with asyncio.timeout(_GOODBYE):
                gone = self._presence(Life.DISCONNECTED, since=self.clock())
                await self._session.publish(self._up(Verb.STATE), gone, retain=True)
        except (TimeoutError, SessionLostError, PublishRefusedError):
            _log.warning("stopping without having said so: no connection")

    async def _tick(self) -> None:
        while True:
            deadline = self.machine.next_deadline()
            wait = None if deadline is None else max(0, deadline - self.clock()) / 1000
            try:
                async with asyncio.timeout(wait):
                    await self._timer_changed.wait()
                    self._timer_changed.clear()
            except TimeoutError:
                await self._feed(TimerFired())

    def _presence(self, life: Life, *, since: int) -> bytes:
        serial = self._signer.certificate.serial
        return codec.encode(
            Presence(life=life, session=self._life, since=since, software=software("helper"), serial=serial)
        )

    async def _on_connect(self, session_present: bool) -> None:
        await self._greet()
        self._systemd.ready("connected")
        await self._save_status()

    async def _greet(self) -> None:
        await self._publish(self._up(Verb.STATE), self._presence(Life.READY, since=self.clock()), retain=True)
        await self._feed(ev.Connected())

    async def _on_disconnect(self, reason: str) -> None:
        self._systemd.status("not connected")
        await self._save_status()

    async def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        try:
            await self._session.publish(topic, payload, retain=retain)
        except SessionLostError:
            # What is retained is said again on the next connection, and the coordinator asks again.
            pass
        except PublishRefusedError as error:
            _log.error("%s; is this helper in the broker's access list?", error)

    async def _in_thread(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    # --- Messages ------------------------------------------------------------------------------------------------

    async def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        try:
            match parse(topic):
                case BroadcastTopic(what=Broadcast.REVOKED) if payload:
                    await self._in_thread(lambda: self._revoked(payload))
                case BroadcastTopic(what=Broadcast.TRUST) if payload:
                    await self._in_thread(lambda: self.trust.take(payload, now=self.clock()))
                case BroadcastTopic(what=Broadcast.NODE) if payload and not retained:
                    # A coordinator that has just begun to listen: some brokers hand out what they keep only to who asks
                    # for that very topic.
                    if codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE).life is Life.READY:
                        await self._greet()
                case MemberTopic(member=self.id, verb=Verb.ASK):
                    await self._ask(payload)
        except RemoteProtocolError as error:
            self._count(error.reason, error.detail)

    def _count(self, reason: RejectReason, detail: str) -> None:
        self.counters.add(str(reason))
        _log.warning("refused: %s: %s", reason, detail)

    def _load_revocations(self) -> None:
        path = self.config.state / "revoked.bin"
        if path.exists():
            try:
                self._verifier.restore(path.read_bytes(), now=self.clock())
            except RemoteProtocolError as error:
                _log.warning("%s is of no use: %s", path, error)

    def _revoked(self, payload: bytes) -> None:
        kind = MessageKind.REVOCATIONS
        revocations, _, certificate = self._verifier.open(payload, Revocations, kind=kind, now=self.clock())
        if self._verifier.revoke(revocations, by=certificate):
            write_atomic(self.config.state / "revoked.bin", payload)

    def _admit(self, head: Head) -> None:
        self._verifier.head(head, kind=MessageKind.MASK_REQUEST, now=self.clock())
        if max(head.header.body_size, head.header.raw_size) > self.config.request_mib * _MIB:
            raise RemoteProtocolError(
                RejectReason.TOO_LARGE, f"a request of {head.header.raw_size} bytes; see request_mib in helper.toml"
            )

    async def _ask(self, payload: bytes) -> None:
        complete = await self._in_thread(lambda: self._assembler.feed(payload))
        if complete is None:
            return
        head, body = complete

        def opened() -> tuple[Digest, MaskRequest]:
            raw = open_body(head.header, body)
            return digest(raw), codec.decode(MaskRequest, raw, limit=len(raw))

        question, request = await self._in_thread(opened)
        self._requests[question] = request
        try:
            await self._feed(ev.Asked(question))
        except BadSeedsError as error:
            await self._refuse(question, error.reason, error.detail, bad=error.devices)
        except RemoteProtocolError as error:
            await self._refuse(question, error.reason, error.detail)
        finally:
            self._requests.pop(question, None)
            self._jobs.pop(question, None)
        await self._save_status()

    # --- Instructions --------------------------------------------------------------------------------------------

    async def _feed(self, event: object) -> None:
        """Hand an event to the machine and do what it says, and all that follows, before the next one.

        Raises:
            RemoteProtocolError: a request does not hold.
        """
        # A key must not be destroyed by the timer while an answer is made with it.
        async with self._one:
            await self._handle(event)
        self._timer_changed.set()

    async def _handle(self, event: object) -> None:
        for instruction in self.machine.handle(event, self.clock()):
            result = await self._perform(instruction)
            if result is not None:
                await self._handle(result)

    async def _perform(self, instruction: Any) -> object | None:
        match instruction:
            case ev.MakeKey():
                return await self._in_thread(lambda: self._make_key(instruction))
            case ev.DestroyKeys(keys):
                await self._in_thread(lambda: self.store.destroy(keys))
                _log.info("%d old keys destroyed", len(keys))
            case ev.PublishKey(message):
                if self._session.connected:
                    await self._publish(self._up(Verb.KEY), message, retain=True)
            case ev.Verify(question):
                return await self._in_thread(lambda: self._verify(question))
            case ev.Answer(claim):
                return await self._in_thread(lambda: self._answer(claim))
            case ev.Send(round, gateway):
                message = await self._in_thread(lambda: self.store.answer(round, gateway))
                await self._send(message)
            case ev.Refuse(question, reason, detail):
                await self._refuse(question, reason, detail)
        return None

    def _make_key(self, wanted: ev.MakeKey) -> ev.KeyStored:
        secret = SealSecret.from_bytes(secrets.token_bytes(32), self.config.suite)
        message = self._signer.sign(
            MessageKind.SEAL_KEY,
            SealKey(helper=self.id, seal_key=secret.public),
            now=wanted.issued,
            lifetime=wanted.expires - wanted.issued,
        )
        key = ev.Key(public=secret.public, message=message.encode(), issued=wanted.issued, expires=wanted.expires)
        self.store.add_key(key, secret)
        _log.info("a new key, for rounds that end before %d", key.expires)
        return ev.KeyStored(key)

    def _verify(self, question: Digest) -> ev.Verified:
        job = verify(
            self._requests[question],
            question,
            verifier=self._verifier,
            key=self.machine.key,
            secret=self.store.secret,
            now=self.clock(),
        )
        self._jobs[question] = job
        return ev.Verified(job.claim)

    def _answer(self, claim: ev.Claim) -> ev.AnswerStored:
        job = self._jobs[claim.question]
        sums = MaskSums(plan=claim.plan, commit=job.commit, gateway=claim.gateway, sums=job.add_up())
        self.store.add_answer(claim, self._signed(sums, round=claim.round))
        _log.info("round %d: masks of %d devices for %s", claim.round, len(claim.devices), claim.gateway)
        return ev.AnswerStored(claim)

    def _signed(self, sums: MaskSums, *, round: int) -> bytes:
        # Not compressed: sums of masks look like noise.
        body = codec.encode(sums)
        return self._signer.sign_raw(
            MessageKind.MASK_SUMS, body, raw_size=len(body), compressed=False, now=self.clock(), round=round
        ).encode()

    async def _refuse(self, question: Digest, reason: RejectReason, detail: str, *, bad: tuple[str, ...] = ()) -> None:
        self._count(reason, detail)
        request = self._requests[question]
        try:
            refusal, round = await self._in_thread(lambda: _refusal(request, reason, detail, bad))
        except RemoteProtocolError:
            # What it carries does not even parse: there is no name to answer to.
            return
        await self._send(await self._in_thread(lambda: self._signed(refusal, round=round)))

    async def _send(self, message: bytes) -> None:
        for frame in split(parse_head(message).header.message_id, message):
            await self._publish(self._up(Verb.MASKS), frame)


def _refusal(request: MaskRequest, reason: RejectReason, detail: str, bad: tuple[str, ...]) -> tuple[MaskSums, int]:
    plan, commit = parse_head(request.plan), parse_head(request.commit)
    raw = open_body(commit.header, memoryview(request.commit)[commit.size :])
    gateway = codec.decode(Commit, raw, limit=len(raw)).gateway
    sums = MaskSums(
        plan=plan.hash,
        commit=commit.hash,
        gateway=gateway,
        sums=(),
        reason=reason,
        detail=detail[:_DETAIL],
        bad=bad,
    )
    return sums, plan.header.round
