"""``/metrics``, ``/healthz`` and ``/readyz`` on a port of their own, in threads of their own.

A look at the process is taken on its event loop, where its state is; it is short, and everything else (the disk,
rendering thousands of series, a slow scraper) happens here. Where the loop does not answer in time it is not healthy,
and that is the answer.

    ========  ============================================  =====================================================
    path      200                                           503
    ========  ============================================  =====================================================
    /healthz  the loop turns                                it has not turned for some seconds
    /readyz   connected and able to work                    why not, in one line
    /metrics  Prometheus' text format                       as /healthz
    ========  ============================================  =====================================================
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final, Protocol, TypeVar

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.monitoring.config import MonitoringConfig, address
from fleetfed.shared.monitoring.exporter import CONTENT_TYPE, render
from fleetfed.shared.monitoring.process import process
from fleetfed.shared.monitoring.samples import Samples

_log = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE: Final = 5.0
"""Seconds within which a loop that turns answers."""
_TIMEOUT: Final = 10.0
"""Seconds that a client may be silent, or take nothing."""
_AT_ONCE: Final = 8
"""Requests that are served at one time; more are turned away."""
_SLOW_EVERY: Final = 30.0
"""Seconds between two looks at the disk."""


class Watched(Protocol):
    """A role that can be looked at. `ready` and `look` run on its loop, `look_slowly` in a thread of the server."""

    def ready(self) -> str:
        """Empty when connected and able to work, else one line that says why not."""

    def look(self) -> Samples:
        """What the process knows by itself; short. What takes longer and needs no loop is deferred."""

    def look_slowly(self, samples: Samples) -> None:
        """Add what must be read from the disk."""


class MonitoringServer:
    """See the module. Make it on the role's event loop.

    Args:
        config: where to listen.
        watched: what to show.
        patience: seconds within which the loop has to answer.

    Attributes:
        port: where it listens; 0 where it does not.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, config: MonitoringConfig, watched: Watched, *, patience: float = _PATIENCE) -> None:
        self.port = 0
        self._server: _Server | None = None
        if not config.listen:
            return
        host, port = address(config.listen)
        pages = _Pages(asyncio.get_running_loop(), watched, patience)
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, where, pages)
        except OSError as error:
            raise ConfigError(
                f"monitoring.listen: cannot listen on {config.listen}: {error.strerror or error}; "
                "give another port, or leave it empty"
            ) from error
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="monitoring", daemon=True
        ).start()
        _log.info("metrics on http://%s:%d/metrics", config.listen.rpartition(":")[0], self.port)

    def close(self) -> None:
        """Stop listening; may be called again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Pages:
    """The answers, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, watched: Watched, patience: float) -> None:
        self._loop = loop
        self._watched = watched
        self._patience = patience
        self._slow_lock = threading.Lock()
        self._slow: Samples | None = None
        self._slow_at = 0.0

    def answer(self, path: str) -> tuple[int, bytes, str]:
        """Status, body, content type."""
        text = "text/plain; charset=utf-8"
        try:
            match path:
                case "/healthz":
                    self._ask(lambda: None)
                    return 200, b"ok\n", text
                case "/readyz":
                    reason = self._ask(self._watched.ready)
                    return (503, reason.encode() + b"\n", text) if reason else (200, b"ok\n", text)
                case "/metrics":
                    samples = self._ask(self._watched.look).complete()
                    self._add_slow(samples)
                    process(samples)
                    return 200, render(samples), CONTENT_TYPE
        except (TimeoutError, concurrent.futures.CancelledError):
            return 503, f"the loop has not turned for {self._patience:g} s\n".encode(), text
        return 404, b"there are /metrics, /healthz and /readyz\n", text

    def _ask(self, question: Callable[[], T]) -> T:
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def ask() -> None:
            # Whoever asked may have given up.
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(ask)
        except RuntimeError as error:
            raise TimeoutError("the loop is closed") from error
        try:
            return answer.result(self._patience)
        finally:
            answer.cancel()

    def _add_slow(self, samples: Samples) -> None:
        with self._slow_lock:
            now = time.monotonic()
            if self._slow is None or now - self._slow_at >= _SLOW_EVERY:
                slow = Samples(samples.role)
                self._watched.look_slowly(slow)
                self._slow, self._slow_at = slow, now
            samples.update(self._slow)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT
    server: _Server

    def do_GET(self) -> None:
        try:
            status, body, content_type = self.server.pages.answer(self.path.partition("?")[0])
        except Exception:  # noqa: BLE001 - one request must not end the server; what is wrong is in the log
            _log.exception("no answer for %s", self.path[:100])
            status, body, content_type = 500, b"failed: look into the log\n", "text/plain; charset=utf-8"
        self._send(status, body, content_type)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        # No word about the interpreter's version.
        return "fleetfed"

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, where: Any, pages: _Pages) -> None:
        self.address_family = family
        self.pages = pages
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for our own name and may wait for it.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A scraper that went away is no error of ours.
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        _log.log(level, "a request for metrics failed", exc_info=error)
