"""The service: HTTPS before an `Enroller`, and what has to be done daily.

::

    POST /v1/enrol    a sealed request with a token       200 a sealed answer
    POST /v1/renew    a sealed request of an old key      200 a sealed answer
    GET  /v1/head     the log's signed head, hex          200 {"head": …}
    GET  /v1/log/N    up to 100 entries from N on, hex    200 {"start": N, "entries": […]}
    GET  /v1/revocations   the signed list                200 application/octet-stream, 404 where there is none
    GET  /v1/health                                       200 {"ok": true}

Whatever is refused is ``{"error": label, "detail": what to do}``, with a label of `RejectReason`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from fleetfed.cloud_coordinator.enroll.brokerfiles import write_broker_files
from fleetfed.cloud_coordinator.enroll.config import EnrollConfig
from fleetfed.cloud_coordinator.enroll.enroller import Enroller
from fleetfed.cloud_coordinator.enroll.http import HttpServer, Request, Response
from fleetfed.cloud_coordinator.enroll.monitoring import EnrolView
from fleetfed.cloud_coordinator.enroll.ratelimit import RateLimit
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, FleetFedError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.monitoring.server import MonitoringServer
from fleetfed.shared.systemd import Notifier, beat
from fleetfed.shared.telemetry import name_logs
from fleetfed.shared.trust.identity import TLS_DIRECTORY
from fleetfed.shared.wire.enrolment import MAX_REQUEST, Purpose

_log = logging.getLogger(__name__)

_PAGE: Final = 100
_DAY: Final = 86_400.0
_BINARY: Final = "application/octet-stream"
_PURPOSES: Final = {"/v1/enrol": Purpose.ENROL, "/v1/renew": Purpose.RENEW}
_STATUS: Final = {
    RejectReason.MALFORMED: HTTPStatus.BAD_REQUEST,
    RejectReason.TRUNCATED: HTTPStatus.BAD_REQUEST,
    RejectReason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    RejectReason.OVERLOADED: HTTPStatus.TOO_MANY_REQUESTS,
    RejectReason.CLONED_KEY: HTTPStatus.CONFLICT,
}


class EnrolService:
    """One service on one port.

    Args:
        enroller: decides.
        settings: ``enroll.toml``.
        clock: unix milliseconds.
        monotonic: seconds, for the rate limit.

    Raises:
        ConfigError: the TLS files do not work.
    """

    def __init__(
        self,
        enroller: Enroller,
        settings: EnrollConfig,
        *,
        clock: Callable[[], int] = unix_ms,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enroller = enroller
        self._settings = settings
        self._clock = clock
        self._monotonic = monotonic
        self._limit = RateLimit(settings.limits.per_minute)
        self._files_due = asyncio.Event()
        self.http = HttpServer(
            self.handle, context=server_context(settings), limits=settings.limits, max_body=MAX_REQUEST
        )

    async def handle(self, request: Request) -> Response:
        """Answer one request."""
        if request.path == "/v1/health":
            return Response.json({"ok": True})
        if not self._limit.allows(request.address, self._monotonic()):
            self.enroller.refused[RejectReason.OVERLOADED] += 1
            return _refusal(RemoteProtocolError(RejectReason.OVERLOADED, "too many requests; wait a minute"))
        if request.method == "POST" and request.path in _PURPOSES:
            return await self._certify(request, _PURPOSES[request.path])
        if request.method == "GET":
            return await asyncio.to_thread(self._read, request.path)
        return _unknown(request.path)

    async def _certify(self, request: Request, purpose: Purpose) -> Response:
        try:
            # The disk may be slow, and others ask too.
            answer = await asyncio.to_thread(self.enroller.answer, request.body, now=self._clock(), purpose=purpose)
        except RemoteProtocolError as error:
            _log.warning("%s: %s: refused: %s", request.address, purpose, error)
            return _refusal(error)
        except StorageError as error:
            _log.error("%s: %s: %s", request.address, purpose, error)
            return Response.error(HTTPStatus.SERVICE_UNAVAILABLE, "storage", "try again later")
        _log.info("%s: %s: done", request.address, purpose)
        self._files_due.set()
        return Response(HTTPStatus.OK, answer, _BINARY)

    def _read(self, path: str) -> Response:
        if path == "/v1/head":
            return Response.json({"head": self.enroller.head(now=self._clock()).hex()})
        if path == "/v1/revocations":
            signed = self.enroller.revocations()
            return _unknown(path) if signed is None else Response(HTTPStatus.OK, signed, _BINARY)
        prefix, _, number = path.rpartition("/")
        if prefix == "/v1/log" and number.isdecimal() and len(number) < 12:
            entries = self.enroller.log(int(number), _PAGE)
            return Response.json({"start": int(number), "entries": [each.hex() for each in entries]})
        return _unknown(path)

    # --- Running ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and bring the broker's files up to date.

        Raises:
            ConfigError: the address cannot be listened on, or the broker's files cannot be written.
        """
        self._write_files()
        try:
            await self.http.start(self._settings.host, self._settings.port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self._settings.host}:{self._settings.port}: {error.strerror or error}"
            ) from error

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``.

        Raises:
            ConfigError: ``[monitoring] listen`` cannot be listened on.
        """
        try:
            monitoring = MonitoringServer(self._settings.monitoring, EnrolView(self))
        except ConfigError:
            await self.http.stop()
            raise
        daily = asyncio.create_task(self._daily(), name="enroll-daily")
        notifier = Notifier()
        life = asyncio.create_task(beat(notifier), name="enroll-systemd")
        notifier.ready(f"listening on {self._settings.host}:{self.http.port}")
        try:
            await stop.wait()
        finally:
            notifier.stopping()
            daily.cancel()
            life.cancel()
            monitoring.close()
            await self.http.stop()

    async def _daily(self) -> None:
        """Write lists again before they grow old; and where devices are listed, after each enrolment."""
        listed = self._settings.broker is not None and self._settings.broker.listed
        due = time.monotonic() + _DAY
        while True:
            try:
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await (self._files_due.wait() if listed else asyncio.Event().wait())
            except TimeoutError:
                due = time.monotonic() + _DAY
            self._files_due.clear()
            try:
                await asyncio.to_thread(self._write_files)
                await asyncio.to_thread(self.enroller.tidy, now=self._clock())
            except FleetFedError as error:
                _log.error("the broker's files stay as they are: %s", error)

    def _write_files(self) -> None:
        if self._settings.broker is not None:
            write_broker_files(self.enroller, self._settings.broker, self._settings.authority, now=self._clock())


def server_context(settings: EnrollConfig) -> ssl.SSLContext:
    """TLS with the identity's certificate; devices have none yet, and are not asked for one.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    tls = settings.identity / TLS_DIRECTORY
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem", password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{tls}: {error}; issue the identity with `fleetfed keys issue --role enroller`") from error
    return context


async def serve(settings: EnrollConfig) -> None:
    """Run the service until SIGTERM or SIGINT; prints where it listens.

    Raises:
        ConfigError: a file is wrong, or the address cannot be listened on.
        StorageError: the register cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    enroller = Enroller.open(settings)
    try:
        certificate = enroller.identity.certificate
        name_logs(certificate.id, certificate.site)
        service = EnrolService(enroller, settings)
        await service.start()
        print(f"listening on {settings.host}:{service.http.port}", flush=True)
        await service.run(stop)
    finally:
        enroller.close()


def _refusal(error: RemoteProtocolError) -> Response:
    return Response.error(_STATUS.get(error.reason, HTTPStatus.FORBIDDEN), str(error.reason), error.detail)


def _unknown(path: str) -> Response:
    return Response.error(HTTPStatus.NOT_FOUND, "unknown", f"{path} is nothing here")
