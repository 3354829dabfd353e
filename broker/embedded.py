"""The embedded broker: sockets, TLS and time around `fleetfed.broker.core`.

Its job is the demonstration, tests with faults, and a small site without Mosquitto: one process, no cluster, no
bridge, no websockets, and QoS 2 is not kept over a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import socket
import ssl
from collections.abc import Callable
from typing import Final

from fleetfed.broker.acl import load_acl
from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.connection import Connection
from fleetfed.broker.core import Broker
from fleetfed.broker.persistence import SqliteStore
from fleetfed.broker.store import NO_STORE
from fleetfed.broker.tls import revoked_serials, server_context
from fleetfed.broker.transports import CLOSE_SECONDS, PlainClient, TlsClient
from fleetfed.shared.errors import ConfigError, StorageError

_LOG = logging.getLogger(__name__)

_SCRATCH: Final = 256 * 1024
_BACKLOG: Final = 1024


class EmbeddedBroker:
    """A broker in this process.

    Example::

        broker = EmbeddedBroker(BrokerConfig(tls=TlsFiles(ca, cert, key), acl_file=acl))
        await broker.start()
        ... broker.port ...
        await broker.stop()

    Attributes:
        port: TCP port of the first listener, once started.
        plain_port: port of the second, plain listener, if the configuration asks for one.
        failed: set when durable state could not be written. The broker has cut all connections then, without
            acknowledging what is lost, and only `stop` is left to do.
        failure: why.
    """

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._core: Broker | None = None
        self._store: SqliteStore | None = None
        self._clients: dict[Connection, PlainClient] = {}
        self._transports: set[PlainClient] = set()
        self._listeners: list[tuple[socket.socket, bool]] = []
        self._servers: list[asyncio.Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_due = False
        self._idle = asyncio.Event()
        self.failure: StorageError | None = None
        self.failed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.scratch = memoryview(bytearray(_SCRATCH))
        self.ciphertext = memoryview(bytearray(_SCRATCH))
        self.tls: ssl.SSLContext | None = None
        self.port = 0
        self.plain_port: int | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: a file of the configuration is wrong, or the address cannot be listened on.
        """
        config = self._config
        acl = load_acl(config.acl_file) if config.acl_file is not None else None
        if config.tls is not None:
            self.tls = server_context(config.tls)
        if config.persistence_dir is not None:
            self._store = SqliteStore(config.persistence_dir / "broker.sqlite")
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self._core = Broker(
            limits=config.limits,
            acl=acl,
            make_id=lambda: "auto-" + secrets.token_hex(12),
            now=self.clock(),
            store=self._store or NO_STORE,
            sys_interval=config.sys_interval,
        )
        try:
            # Like Mosquitto's, a restarted broker is found where it was.
            self._bind(config.host, self.port or config.port, tls=config.tls is not None)
            if config.plain_port is not None:
                self._bind("127.0.0.1", self.plain_port or config.plain_port, tls=False)
            await self._serve()
        except BaseException:
            await self.stop()
            raise
        self.port = self._listeners[0][0].getsockname()[1]
        if config.plain_port is not None:
            self.plain_port = self._listeners[1][0].getsockname()[1]
        self._arm_timer()

    def _bind(self, host: str, port: int, *, tls: bool) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        sock.setblocking(False)
        self._listeners.append((sock, tls))

    async def _serve(self) -> None:
        assert self._loop is not None
        for sock, tls in self._listeners:
            make = TlsClient if tls else PlainClient
            server = await self._loop.create_server(
                lambda make=make: make(self),  # type: ignore[misc]
                sock=sock,
                backlog=_BACKLOG,
            )
            self._servers.append(server)

    async def stop(self) -> None:
        """End all connections, telling the clients, and close the listeners; durable state is kept."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for sock, _ in self._listeners:
            sock.close()
        self._listeners.clear()
        for client in list(self._transports):
            if client.connection is None:
                client.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._timer_at = None
        core = self._core
        if core is not None:
            core.shut_down(self.clock())
            self._flush()
            self._idle.clear()
            if self._clients:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), CLOSE_SECONDS)
            for client in list(self._clients.values()):
                client.connection_lost(None)
        if self._store is not None:
            with contextlib.suppress(StorageError) if self.failure is not None else contextlib.nullcontext():
                self._store.close()
            self._store = None

    async def reload(self) -> None:
        """Read the ACL, the certificates and the revocation list again.

        New rules hold at once, for live connections too; a revoked client that is connected is disconnected.

        Raises:
            ConfigError: a file is wrong; then everything stays as it was.
        """
        assert self._core is not None
        config = self._config
        acl = load_acl(config.acl_file) if config.acl_file is not None else None
        revoked: frozenset[int] = frozenset()
        if config.tls is not None:
            context = server_context(config.tls)
            if config.tls.crl is not None:
                revoked = revoked_serials(config.tls.crl)
            self.tls = context
        self._core.set_acl(acl)
        for connection, client in list(self._clients.items()):
            if client.serial in revoked:
                _LOG.info("%s is revoked: disconnected", connection.identity)
                connection.revoke(self.clock())
        self._flush()

    def statistics(self) -> dict[str, int]:
        """Counters and present sizes, by name."""
        return self._core.statistics() if self._core is not None else {}

    # ------------------------------------------------------------------------------------------ for the transports

    def arrived(self, client: PlainClient) -> bool:
        """A transport has connected, perhaps to shake hands first; ``False`` if there is no room for it."""
        assert self._core is not None
        if len(self._transports) >= self._config.limits.max_connections:
            self._core.router.counters.connections_refused += 1
            return False
        self._transports.add(client)
        return True

    def left(self, client: PlainClient) -> None:
        """A transport is gone, whether it was served or not."""
        self._transports.discard(client)

    def open(self, client: PlainClient, identity: str | None) -> Connection:
        """A transport is ready, its identity proven."""
        assert self._core is not None
        connection = self._core.open(identity, self.clock())
        self._clients[connection] = client
        self.schedule_flush()
        return connection

    def closed(self, connection: Connection) -> None:
        """A transport is gone."""
        self._clients.pop(connection, None)
        if not self._clients:
            self._idle.set()
        connection.connection_lost(self.clock())
        self.schedule_flush()

    def received(self) -> None:
        """Bytes were taken: answer soon, or at once if others must not be read any more in this turn of the loop."""
        if self._core is not None and self._core.take_urgent():
            self._flush()
        else:
            self.schedule_flush()

    def schedule_flush(self) -> None:
        """Write at the end of this turn of the loop: many packets then share one write and one commit."""
        if not self._flush_due:
            self._flush_due = True
            assert self._loop is not None
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        core = self._core
        if core is None:
            return
        if self.failure is not None:
            return
        try:
            core.commit()
        except StorageError as error:
            self._fail(error)
            return
        for connection in core.take_dirty():
            client = self._clients.get(connection)
            if client is not None:
                client.flush()
        self._arm_timer()

    def _fail(self, error: StorageError) -> None:
        _LOG.critical("durable state cannot be written, all connections are cut: %s", error)
        self.failure = error
        for server in self._servers:
            server.close()
        for client in list(self._transports):
            client.abort()
        self.failed.set()

    def _arm_timer(self) -> None:
        assert self._core is not None
        assert self._loop is not None
        when = self._core.next_deadline()
        if not self._servers or when == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._on_timer) if when is not None else None

    def _on_timer(self) -> None:
        assert self._core is not None
        self._timer = self._timer_at = None
        self._core.handle_timer(self.clock())
        self._flush()


def tune_process() -> None:
    """Settings for a process that does nothing but serve: rarer garbage collection, as the core makes no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
