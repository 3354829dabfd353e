"""As much of HTTP/1.1 (RFC 9112) as enrolment needs: one request per connection, every size and time bounded.

There is no proxy before it, because devices pin its certificate; so there is nobody to disagree with about where a
request ends. What it does not know, it refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fleetfed.cloud_coordinator.enroll.config import Limits

_log = logging.getLogger(__name__)

_MAX_HEADERS: Final = 8192
_REQUEST: Final = re.compile(rb"(GET|POST) (/[!-~]{0,200}) HTTP/1\.[01]")


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``address`` is whose."""

    method: str
    path: str
    body: bytes
    address: str


@dataclass(frozen=True, slots=True)
class Response:
    """One response."""

    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"

    @classmethod
    def json(cls, value: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
        """A response in JSON."""
        return cls(status, json.dumps(value).encode() + b"\n")

    @classmethod
    def error(cls, status: HTTPStatus, label: str, detail: str) -> Response:
        """What went wrong, for programs and for people."""
        return cls.json({"error": label, "detail": detail}, status)


class RefusedError(Exception):
    """A request that is answered before anybody has seen it."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class HttpServer:
    """Serves ``handle`` over TLS.

    Args:
        handle: from request to response.
        context: TLS.
        limits: bounds.
        max_body: bytes of a request's body.

    Attributes:
        port: once started.
        refused: connections that found no room.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Response]],
        *,
        context: ssl.SSLContext,
        limits: Limits,
        max_body: int,
    ) -> None:
        self._handle = handle
        self._context = context
        self._limits = limits
        self._max_body = max_body
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self.port = 0
        self.refused = 0

    @property
    def busy(self) -> int:
        """Connections open now."""
        return len(self._open)

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._server = await asyncio.start_server(
            self._connected,
            host,
            port,
            limit=_MAX_HEADERS,
            ssl=self._context,
            ssl_handshake_timeout=self._limits.seconds,
            ssl_shutdown_timeout=self._limits.seconds,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the listener and end what is open."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= self._limits.connections:
            self.refused += 1
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._serve(reader, writer)
        except (TimeoutError, OSError, ssl.SSLError, asyncio.IncompleteReadError):
            # It was slow, or is gone: nobody is left to be told.
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._read(reader, writer)
        except RefusedError as error:
            response = error.response
        else:
            try:
                response = await self._handle(request)
            except Exception:  # noqa: BLE001 - one request must not end the service; what is wrong is in the log
                _log.exception("%s %s", request.method, request.path)
                response = Response.error(HTTPStatus.INTERNAL_SERVER_ERROR, "failed", "look into the service's log")
        head = (
            f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
            f"Content-Type: {response.content_type}\r\n"
            f"Content-Length: {len(response.body)}\r\n"
            "Cache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + response.body)
        await writer.drain()
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.close()
            await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:
            raise RefusedError(
                Response.error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too_large", f"{_MAX_HEADERS} bytes at most")
            ) from error
        first, *lines = head[:-4].split(b"\r\n")
        match = _REQUEST.fullmatch(first)
        if match is None:
            raise RefusedError(Response.error(HTTPStatus.BAD_REQUEST, "malformed", "no request that is known here"))
        headers: dict[bytes, bytes] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or name.lower() in headers:
                raise RefusedError(Response.error(HTTPStatus.BAD_REQUEST, "malformed", "bad header fields"))
            headers[name.lower()] = value.strip()
        body = b""
        if match[1] == b"POST":
            body = await reader.readexactly(self._length(headers))
        peer = writer.get_extra_info("peername") or ("",)
        return Request(match[1].decode(), match[2].decode(), body, str(peer[0]))

    def _length(self, headers: dict[bytes, bytes]) -> int:
        text = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not re.fullmatch(rb"[0-9]{1,10}", text):
            raise RefusedError(Response.error(HTTPStatus.LENGTH_REQUIRED, "malformed", "give Content-Length"))
        length = int(text)
        if length > self._max_body:
            raise RefusedError(
                Response.error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"{self._max_body} bytes at most")
            )
        return length
