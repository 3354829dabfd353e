"""One client of the control topics: signs a command, publishes it, waits for the coordinator's signed answer.

`docs/protocol.md` tells the topics and the rules, so another program can do the same; this one serves the command
line and the demo. Example::

    async with ControlClient(OperatorConfig.load(Path("operator.toml"))) as client:
        result = await client.request(Command.ROUND_START, {"rounds": 20})

An operator's identity is also its MQTT client id, so one identity serves one program at a time: the broker ends the
older connection when a second one begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fleetfed.cloud_coordinator.control.errors import NoAnswerError, RefusedError
from fleetfed.shared import config
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.mqtt.tls import client_context
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import MessageId, MessageKind
from fleetfed.shared.wire.messages import Command, Life, Presence, Request, Response, Revocations, Status
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

DEFAULT_TIMEOUT: Final = 15.0
_LIFETIME: Final = 120_000
"""Milliseconds after which a command that could not be delivered must not be carried out any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """``operator.toml``.

    Attributes:
        identity: an operator's identity folder.
        broker: where the coordinator's broker is.
    """

    identity: Path
    broker: Endpoint

    @classmethod
    def load(cls, path: Path) -> OperatorConfig:
        """Read the file.

        Raises:
            ConfigError: with the key and what to do.
        """
        return config.load(cls, path)

    def connection(self, client_id: str) -> ConnectionConfig:
        """The connection to that broker."""
        # Answers belong to one run of one program: nothing is to be kept for the next.
        return self.broker.connection(client_id=client_id, identity=self.identity, session_expiry=0, reconnect_cap=2.0)


class ControlClient:
    """See the module. Use as an asynchronous context manager.

    Args:
        config: identity and broker.
        timeout: seconds to wait for the connection, and again for each answer.
    """

    def __init__(self, config: OperatorConfig, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.identity = Identity.load(config.identity, role=Role.OPERATOR)
        self.id = self.identity.certificate.id
        self.topics = SiteTopics(self.identity.certificate.fleet, CLOUD_SITE)
        self.rejected: dict[str, int] = {}
        self.connection = config.connection(self.id)
        self._timeout = timeout
        self._verifier = self.identity.verifier()
        self._signer = self.identity.signer(sequence=_sequence(config.identity / "sequence"), randomness=os.urandom)
        self._session = Session(
            self.connection,
            subscriptions=[
                self.topics.all_down(Kind.OPERATOR, self.id),
                *(self.topics.broadcast(what) for what in (Broadcast.REVOKED, Broadcast.STATUS, Broadcast.NODE)),
            ],
            on_connect=self._on_connect,
            on_message=self._on_message,
        )
        self._running: asyncio.Task[None] | None = None
        self._pending: dict[MessageId, tuple[bytes, asyncio.Future[Response]]] = {}
        self._coordinator: Presence | None = None
        self._status: Status | None = None
        self._news = asyncio.Condition()

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            NoAnswerError: there is no connection in time.
        """
        self._running = asyncio.create_task(self._session.run(), name="control-session")
        connected = asyncio.create_task(self._session.wait_connected())
        try:
            await asyncio.wait({connected, self._running}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._running.done():
                self._running.result()
            if not connected.done():
                why = await asyncio.to_thread(diagnose, self.connection)
                raise NoAnswerError(why)
        except BaseException:
            await self._stop()
            raise
        finally:
            connected.cancel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def request(
        self, command: Command, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Ask the coordinator; return its result.

        Args:
            command: what.
            arguments: with what; what MessagePack can hold.
            timeout: seconds, where the command takes longer than usual.

        Raises:
            RefusedError: it will not; the exception has its label and words.
            NoAnswerError: no answer in time. The command may still be carried out.
        """
        message = self._signer.sign(
            MessageKind.REQUEST,
            Request(command=command, arguments=dict(arguments or {})),
            now=unix_ms(),
            lifetime=_LIFETIME,
        )
        data = message.encode()
        if len(data) > limits.MAX_SMALL_MESSAGE:
            raise ConfigError(f"{command}: {len(data)} bytes of arguments; at most {limits.MAX_SMALL_MESSAGE} fit")
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._pending[message.id] = (data, answer)
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                await self._publish(data)
                response = await self._unless_stopped(answer)
        except TimeoutError:
            raise NoAnswerError(await self._silence(command, seconds)) from None
        finally:
            del self._pending[message.id]
        if response.error:
            raise RefusedError(response.error, response.detail)
        return response.result

    async def watch(self) -> AsyncIterator[Status]:
        """The coordinator's status, now and whenever it changes; never ends by itself."""
        seen: Status | None = None
        while True:
            async with self._news:
                while self._status is None or self._status is seen:
                    await self._news.wait()
                seen = self._status
            yield seen

    @property
    def coordinator(self) -> Presence | None:
        """The coordinator's own word on its presence; None where it was never there."""
        return self._coordinator

    async def _publish(self, data: bytes) -> None:
        from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError

        try:
            await self._session.publish(self.topics.up(Kind.OPERATOR, self.id, Verb.REQUEST), data)
        except SessionLostError:
            # `_on_connect` sends the same bytes again; the coordinator answers a repeated request once.
            return
        except PublishRefusedError as error:
            raise NoAnswerError(
                f"the broker does not let {self.id} publish commands ({error}); its access list must name this "
                "operator: write it again with `fleetfed broker render`"
            ) from error

    async def _unless_stopped(self, answer: asyncio.Future[Response]) -> Response:
        assert self._running is not None
        waited: set[asyncio.Future[Any]] = {answer, self._running}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._running.result()
        return answer.result()

    async def _silence(self, command: Command, seconds: float) -> str:
        if not self._session.connected:
            why = await asyncio.to_thread(diagnose, self.connection)
            return (
                f"the connection was lost while waiting for {command}: {why}. If it comes and goes, another program "
                f"is using the identity {self.id}: each needs its own"
            )
        life = None if self._coordinator is None else self._coordinator.life
        if life is None or life is not Life.READY:
            state = "was never connected to this broker" if life is None else f"is {life}"
            return f"the coordinator {state}; start it with `fleetfed coordinator run` and try again"
        return (
            f"the coordinator did not answer {command} within {seconds:g} s although it is connected; "
            "look into its log, and compare the clocks of both machines"
        )

    async def _on_connect(self, session_present: bool) -> None:
        del session_present
        await self._publish_pending()

    async def revocations(self) -> Revocations | None:
        """The revocation list that the fleet obeys now; None where nobody was ever revoked.

        Raises:
            NoAnswerError: nobody answered.
        """
        # It is retained, and the broker hands it over before the answer to what was asked after subscribing.
        await self.request(Command.ROUND_STATUS)
        return self._verifier.revocations if self._verifier.has_list else None

    async def _publish_pending(self) -> None:
        for data, _ in list(self._pending.values()):
            await self._publish(data)

    async def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        try:
            match parse(topic):
                case BroadcastTopic(what=Broadcast.NODE):
                    self._coordinator = codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE)
                    if self._coordinator.life is Life.READY and not retained:
                        # It has just come: before its first subscription the broker kept nothing for it.
                        await self._publish_pending()
                case BroadcastTopic(what=Broadcast.REVOKED):
                    now = unix_ms()
                    news, _, by = self._verifier.open(payload, Revocations, kind=MessageKind.REVOCATIONS, now=now)
                    self._verifier.revoke(news, by=by)
                case BroadcastTopic(what=Broadcast.STATUS):
                    status, _, _ = self._verifier.open(payload, Status, kind=MessageKind.STATUS, now=unix_ms())
                    async with self._news:
                        self._status = status
                        self._news.notify_all()
                case MemberTopic(verb=Verb.RESPONSE):
                    response, _, _ = self._verifier.open(payload, Response, kind=MessageKind.RESPONSE, now=unix_ms())
                    _, answer = self._pending.get(MessageId(response.request), (b"", None))
                    if answer is not None and not answer.done():
                        answer.set_result(response)
                case _:
                    pass
        except RemoteProtocolError as error:
            self.rejected[error.reason] = self.rejected.get(error.reason, 0) + 1
            _log.warning("%s: refused: %s", topic, error)

    async def _stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running


def _sequence(path: Path) -> SequenceFile:
    """Numbers of this process alone: each takes a block of its own while no other reads the file."""
    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}; an operator's identity folder must be writable") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        sequence = SequenceFile(path)
        sequence()
    finally:
        os.close(descriptor)
    return sequence


def diagnose(connection: ConnectionConfig, *, timeout: float = 3.0) -> str:
    """Say why there is no connection to the broker, by trying each step alone."""
    where = f"{connection.host}:{connection.port}"
    try:
        with socket.create_connection((connection.host, connection.port), timeout=timeout) as plain:
            if connection.tls is None:
                return f"{where} accepts connections but not this client: is it an MQTT broker without TLS?"
            with client_context(connection.tls).wrap_socket(plain, server_hostname=connection.host) as secure:
                # TLS 1.3: a refused client certificate shows only when something is read.
                secure.settimeout(timeout)
                secure.recv(1)
    except TimeoutError:
        return f"{where} is there but did not accept {connection.client_id} in time; look into the broker's log"
    except ssl.SSLCertVerificationError as error:
        return f"{where}: the broker's certificate is not trusted: {error.verify_message}; compare host and ca.pem"
    except ssl.SSLError as error:
        return (
            f"{where}: TLS failed ({error.reason}); the certificate of {connection.client_id} may have expired or "
            "been revoked, or the broker belongs to another fleet"
        )
    except OSError as error:
        return f"no connection to {where}: {error.strerror or error}; is the broker running there?"
    return f"{where} closes the connection of {connection.client_id}; look into the broker's log"
