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
from collections.abc import Callable
from typing import Any, Final, cast

from fleetfed.broker.acl import load_acl
from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.connection import Connection
from fleetfed.broker.core import Broker
from fleetfed.broker.persistence import SqliteStore
from fleetfed.broker.properties import Buffer
from fleetfed.broker.store import NO_STORE
from fleetfed.broker.tls import revoked_serials, server_context
from fleetfed.shared.errors import ConfigError

_LOG = logging.getLogger(__name__)

_SCRATCH: Final = 256 * 1024
_WRITE_HIGH: Final = 256 * 1024
_BACKLOG: Final = 1024
_HANDSHAKE_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 5.0
"""How long a closed connection may take to flush before it is cut."""
_JOIN_BELOW: Final = 64 * 1024


class _Client(asyncio.BufferedProtocol):
    """One transport; moves bytes between it and its `Connection`."""

    def __init__(self, server: EmbeddedBroker, *, certified: bool) -> None:
        self._server = server
        self._certified = certified
        self._transport: asyncio.Transport | None = None
        self._connection: Connection | None = None
        self._own_buffer = False
        self._reading = True
        self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        identity = None
        if self._certified:
            identity = _common_name(transport)
            if identity is None:
                _LOG.warning("a client's certificate has no common name: refused")
                self._transport.abort()
                return
        # asyncio does this by itself only for sockets that were made with IPPROTO_TCP, which those of a listener from
        # `socket.create_server` are not. Nagle's algorithm and delayed acknowledgements cost 40 ms per message.
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = self._server.open(self, identity)

    def serial_number(self) -> int | None:
        """The serial number of the client's certificate."""
        certificate = self._transport.get_extra_info("peercert") if self._transport is not None else None
        return int(certificate["serialNumber"], 16) if certificate else None

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._connection is not None and (buffer := self._connection.receive_buffer()) is not None:
            self._own_buffer = True
            return buffer
        self._own_buffer = False
        # Shared by all connections: what is received is consumed before the next one reads.
        return self._server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._connection is None:
            return
        now = self._server.clock()
        if self._own_buffer:
            self._connection.buffer_filled(nbytes, now)
        else:
            self._connection.receive_data(self._server.scratch[:nbytes], now)
        self._server.received()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if self._connection is not None:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        if self._connection is not None:
            self._connection.resume_writing(self._server.clock())
            self._server.schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        connection, self._connection = self._connection, None
        self._closed = True
        if connection is not None:
            self._server.closed(connection)

    def flush(self) -> None:
        """Write what there is, and follow the connection's wishes."""
        connection, transport = self._connection, self._transport
        if connection is None or transport is None or self._closed:
            return
        while data := connection.data_to_send():
            _write(transport, data)
        if connection.closing:
            self._closed = True
            transport.close()
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, transport.abort)
            return
        if connection.wants_read != self._reading:
            self._reading = connection.wants_read
            if self._reading:
                transport.resume_reading()
                connection.resume_reading(self._server.clock())
                self._server.schedule_flush()
            else:
                transport.pause_reading()


def _write(transport: asyncio.Transport, data: list[Buffer]) -> None:
    """Write with few system calls and TLS records, without copying what is large."""
    small: list[Buffer] = []
    for item in data:
        if len(item) < _JOIN_BELOW:
            small.append(item)
            continue
        if small:
            transport.write(small[0] if len(small) == 1 else b"".join(small))
            small = []
        transport.write(item)
    if small:
        transport.write(small[0] if len(small) == 1 else b"".join(small))


def _common_name(transport: asyncio.BaseTransport) -> str | None:
    certificate = transport.get_extra_info("peercert") or {}
    for attributes in certificate.get("subject", ()):
        for name, value in attributes:
            if name == "commonName" and value:
                return str(value)
    return None


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
    """

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._core: Broker | None = None
        self._store: SqliteStore | None = None
        self._clients: dict[Connection, _Client] = {}
        self._listeners: list[tuple[socket.socket, bool]] = []
        self._servers: list[asyncio.Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_due = False
        self._idle = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.scratch = memoryview(bytearray(_SCRATCH))
        self.port = 0
        self.plain_port: int | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: a file of the configuration is wrong, or the address cannot be listened on.
        """
        config = self._config
        acl = load_acl(config.acl_file) if config.acl_file is not None else None
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
            self._bind(config.host, config.port, tls=config.tls is not None)
            if config.plain_port is not None:
                self._bind("127.0.0.1", config.plain_port, tls=False)
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
        """Accept on duplicates of the listening sockets, so that a reload loses no connection that waits there."""
        assert self._loop is not None
        for sock, tls in self._listeners:
            files = self._config.tls if tls else None
            options: dict[str, Any] = {}
            if files is not None:
                options = {"ssl": server_context(files), "ssl_handshake_timeout": _HANDSHAKE_SECONDS}
            certified = tls
            server = await self._loop.create_server(
                lambda certified=certified: _Client(self, certified=certified),  # type: ignore[misc]
                sock=sock.dup(),
                backlog=_BACKLOG,
                **options,
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        core = self._core
        if core is not None:
            core.shut_down(self.clock())
            self._flush()
            self._idle.clear()
            if self._clients:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), _CLOSE_SECONDS)
            for client in list(self._clients.values()):
                client.connection_lost(None)
            core.commit()
        if self._store is not None:
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
            server_context(config.tls)
            if config.tls.crl is not None:
                revoked = revoked_serials(config.tls.crl)
        old, self._servers = self._servers, []
        await self._serve()
        for server in old:
            server.close()
        self._core.set_acl(acl)
        for connection, client in list(self._clients.items()):
            if client.serial_number() in revoked:
                _LOG.info("%s is revoked: disconnected", connection.identity)
                connection.revoke(self.clock())
        self._flush()

    def statistics(self) -> dict[str, int]:
        """Counters and present sizes, by name."""
        return self._core.statistics() if self._core is not None else {}

    # ------------------------------------------------------------------------------------------ for _Client

    def open(self, client: _Client, identity: str | None) -> Connection:
        """A transport is ready."""
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
        core.commit()
        for connection in core.take_dirty():
            client = self._clients.get(connection)
            if client is not None:
                client.flush()
        self._arm_timer()

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
