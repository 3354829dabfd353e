"""Between asyncio's transports and `fleetfed.broker.connection`: plain TCP, and TLS.

TLS is done here with `ssl.SSLObject` instead of asyncio's own layer, which keeps a buffer of 256 KiB for every
connection: a thousand idle devices would cost 290 MB. One buffer for all of them is enough, since what is received is
consumed before the next connection reads. It also lets a reload change the context for the next handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Final, cast

from fleetfed.broker.connection import Connection
from fleetfed.broker.properties import Buffer

if TYPE_CHECKING:
    from fleetfed.broker.embedded import EmbeddedBroker

_LOG = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 5.0
"""How long a closed connection may take to flush before it is cut."""
_HANDSHAKE_SECONDS: Final = 10.0
_WRITE_HIGH: Final = 256 * 1024
_JOIN_BELOW: Final = 64 * 1024


class PlainClient(asyncio.BufferedProtocol):
    """One TCP transport; moves bytes between it and its `Connection`.

    Attributes:
        connection: once the transport is ready to be served.
        serial: serial number of the client's certificate, if it has one.
    """

    def __init__(self, server: EmbeddedBroker) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._own_buffer = False
        self._reading = True
        self._closed = False
        self.connection: Connection | None = None
        self.serial: int | None = None

    # ------------------------------------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, if there is room."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        # asyncio leaves Nagle's algorithm on for sockets that were not made by its own resolver.
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._server.arrived(self):
            self._begin()
        else:
            self.abort()

    def _begin(self) -> None:
        self.connection = self._server.open(self, None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive: the rest of a large packet, or the buffer that all connections share."""
        if self.connection is not None and (buffer := self.connection.receive_buffer()) is not None:
            self._own_buffer = True
            return buffer
        self._own_buffer = False
        return self._server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Hand what was received to the connection."""
        if self.connection is None:
            return
        now = self._server.clock()
        if self._own_buffer:
            self.connection.buffer_filled(nbytes, now)
        else:
            self.connection.receive_data(self._server.scratch[:nbytes], now)
        self._server.received()

    def eof_received(self) -> bool:
        """The client has closed its side: close ours."""
        return False

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        if self.connection is not None:
            self.connection.pause_writing()

    def resume_writing(self) -> None:
        """The transport's buffer has drained."""
        if self.connection is not None:
            self.connection.resume_writing(self._server.clock())
            self._server.schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        connection, self.connection = self.connection, None
        self._closed = True
        self._server.left(self)
        if connection is not None:
            self._server.closed(connection)

    # ------------------------------------------------------------------------------------------ the broker's side

    def flush(self) -> None:
        """Write what there is, and follow the connection's wishes."""
        connection, transport = self.connection, self._transport
        if connection is None or transport is None or self._closed:
            return
        while data := connection.data_to_send():
            self._write(data)
        if connection.closing:
            self._closed = True
            self._say_goodbye()
            transport.close()
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, transport.abort)
            return
        if connection.wants_read != self._reading:
            self._reading = connection.wants_read
            if self._reading:
                transport.resume_reading()
                connection.resume_reading(self._server.clock())
                self._continue_reading()
                self._server.schedule_flush()
            else:
                transport.pause_reading()

    def abort(self) -> None:
        """Cut the transport."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: list[Buffer]) -> None:
        assert self._transport is not None
        for piece in _pieces(data):
            self._transport.write(piece)

    def _say_goodbye(self) -> None:
        pass

    def _continue_reading(self) -> None:
        pass


class TlsClient(PlainClient):
    """One TCP transport with TLS on it; the client proves its name with its certificate."""

    def __init__(self, server: EmbeddedBroker) -> None:
        super().__init__(server)
        assert server.tls is not None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = server.tls.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._timeout: asyncio.TimerHandle | None = None

    def _begin(self) -> None:
        self._timeout = asyncio.get_running_loop().call_later(_HANDSHAKE_SECONDS, self.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive ciphertext: a buffer that all connections share."""
        return self._server.ciphertext

    def buffer_updated(self, nbytes: int) -> None:
        """Shake hands, or decrypt what was received for the connection."""
        if self._closed:
            return
        self._incoming.write(self._server.ciphertext[:nbytes])
        if self.connection is None and not self._shake_hands():
            return
        self._read()
        self._server.received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        if self._timeout is not None:
            self._timeout.cancel()
        super().connection_lost(exc)

    def _shake_hands(self) -> bool:
        assert self._transport is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._transport.write(self._outgoing.read())
            return False
        except ssl.SSLError as error:
            # Every port scan ends here; the client's side has the alert.
            _LOG.debug("handshake refused: %s", error)
            self._transport.write(self._outgoing.read())
            self._closed = True
            self._transport.close()
            return False
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())
        assert self._timeout is not None
        self._timeout.cancel()
        certificate = self._tls.getpeercert()
        name = _common_name(certificate)
        if certificate is None or name is None:
            _LOG.warning("a client's certificate has no common name: refused")
            self.abort()
            return False
        self.serial = int(str(certificate["serialNumber"]), 16)
        self.connection = self._server.open(self, name)
        return True

    def _read(self) -> None:
        """Decrypt until nothing is left, or the connection has enough; the rest stays encrypted."""
        connection, tls, scratch = self.connection, self._tls, self._server.scratch
        now = self._server.clock()
        while connection is not None and connection.wants_read:
            own = connection.receive_buffer()
            buffer = scratch if own is None else own
            try:
                # With a buffer it returns a count, which its type does not say.
                size = cast(int, tls.read(len(buffer), cast(bytearray, buffer)))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                if not isinstance(error, ssl.SSLZeroReturnError):
                    _LOG.info("%s: TLS: %s", connection.identity, error)
                size = 0
            if size == 0:
                self.abort()
                return
            if own is None:
                connection.receive_data(scratch[:size], now)
            else:
                connection.buffer_filled(size, now)
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())  # what TLS itself has to say, such as a key update

    def _continue_reading(self) -> None:
        self._read()

    def _write(self, data: list[Buffer]) -> None:
        assert self._transport is not None
        try:
            for piece in _pieces(data):
                self._tls.write(piece)
                self._transport.write(self._outgoing.read())
        except ssl.SSLError as error:
            _LOG.info("TLS: %s", error)
            self.abort()

    def _say_goodbye(self) -> None:
        assert self._transport is not None
        # The client's own goodbye is not waited for.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._transport.write(self._outgoing.read())


def _pieces(data: list[Buffer]) -> list[Buffer]:
    """Join what is small, so that few system calls and TLS records are needed; what is large is not copied."""
    pieces: list[Buffer] = []
    small: list[Buffer] = []
    for item in data:
        if len(item) < _JOIN_BELOW:
            small.append(item)
            continue
        if small:
            pieces.append(b"".join(small))
            small = []
        pieces.append(item)
    if small:
        pieces.append(small[0] if len(small) == 1 else b"".join(small))
    return pieces


def _common_name(certificate: object) -> str | None:
    subject = certificate.get("subject", ()) if isinstance(certificate, dict) else ()
    for attributes in subject:
        for name, value in attributes:
            if name == "commonName" and value:
                return str(value)
    return None
