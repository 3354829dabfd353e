"""The socket under an MQTT client: metered from its first byte, without Nagle's delay.

paho-mqtt makes its socket, shakes hands and only then calls back, too late for both: a handshake that fails would be
neither counted nor closed, and its last flight would wait for the peer's delayed acknowledgement.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

from fleetfed.shared.mqtt.meter import ByteMeter, kernel_count

if TYPE_CHECKING:
    from typing_extensions import Buffer


def open_socket(
    host: str, port: int, *, timeout: float, context: ssl.SSLContext | None, meter: ByteMeter
) -> socket.socket:
    """Connect and, with ``context``, complete the TLS handshake; blocks for at most ``timeout`` seconds each.

    Returns:
        A blocking socket with a timeout, known to ``meter``; call `close_socket` for it.

    Raises:
        OSError: not reachable, or the handshake failed (`ssl.SSLError` is one).
    """
    sock = socket.create_connection((host, port), timeout=timeout)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kernel_count(sock) is None:
            sock = _counting(sock, host, context, meter)
        else:
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            meter.opened(sock)
        if isinstance(sock, ssl.SSLSocket):
            sock.settimeout(timeout)
            sock.do_handshake()
    except BaseException:
        close_socket(sock, meter)
        raise
    return sock


def close_socket(sock: socket.socket, meter: ByteMeter) -> None:
    """Close ``sock`` after its last count."""
    meter.closing(sock)
    sock.close()


def _counting(sock: socket.socket, host: str, context: ssl.SSLContext | None, meter: ByteMeter) -> socket.socket:
    """A socket that counts in ``send``, ``recv`` and ``recv_into``, the calls that paho and `link` make.

    Inside TLS this misses the handshake and about 29 bytes per record; OpenSSL writes to the descriptor itself.
    """
    if context is None:
        timeout = sock.gettimeout()
        plain = _CountingSocket(fileno=sock.detach())
        plain.settimeout(timeout)
        plain.meter = meter
        return plain
    context.sslsocket_class = _CountingTlsSocket
    wrapped = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    assert isinstance(wrapped, _CountingTlsSocket)
    wrapped.meter = meter
    return wrapped


class _CountingSocket(socket.socket):
    meter: ByteMeter

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        sent = super().send(data, flags)
        self.meter.add_wire(sent=sent)
        return sent

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        self.meter.add_wire(received=len(data))
        return data

    def recv_into(self, buffer: Buffer, size: int = 0, flags: int = 0) -> int:
        count = super().recv_into(buffer, size, flags)
        self.meter.add_wire(received=count)
        return count


class _CountingTlsSocket(ssl.SSLSocket):
    meter: ByteMeter

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        sent = super().send(data, flags)
        self.meter.add_wire(sent=sent)
        return sent

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        data = super().recv(size, flags)
        self.meter.add_wire(received=len(data))
        return data

    def recv_into(self, buffer: Buffer, size: int | None = None, flags: int = 0) -> int:
        count = super().recv_into(buffer, size, flags)
        self.meter.add_wire(received=count)
        return count
