"""What a client's connections cost, in bytes.

The kernel counts what it carries for each TCP connection, TLS handshake and records included; reading its counters
costs nothing until somebody asks. Where they are missing, the socket wrapper of `fleetfed.shared.mqtt.sockets` counts
the bytes inside TLS instead.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from dataclasses import dataclass
from typing import Final

# linux/tcp.h, struct tcp_info. Offsets never move: fields are only added at its end.
_BYTES_ACKED: Final = 120
_BYTES_RECEIVED: Final = 128
_NOT_SENT: Final = 144
_BYTES_SENT: Final = 200
_BYTES_RETRANS: Final = 208
_WANTED: Final = 216


@dataclass(frozen=True, slots=True)
class ByteCount:
    """Bytes in each direction, seen from the client."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: ByteCount) -> ByteCount:
        return ByteCount(self.sent - other.sent, self.received - other.received)

    @property
    def total(self) -> int:
        """Both directions."""
        return self.sent + self.received


def kernel_count(sock: socket.socket) -> ByteCount | None:
    """Bytes that ``sock`` carried on the TCP stream, without retransmissions; None where the kernel does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return None
    if len(info) < _BYTES_RECEIVED + 8:
        return None
    (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
    if len(info) >= _WANTED:
        # What the kernel still holds is on its way: the last packet before a close must count.
        (waiting,) = struct.unpack_from("=I", info, _NOT_SENT)
        sent, again = struct.unpack_from("=QQ", info, _BYTES_SENT)
        return ByteCount(sent - again + waiting, received)
    (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
    return ByteCount(acked, received)


class ByteMeter:
    """Counts over all connections of one client, across reconnects; safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = ByteCount()
        self._payload = ByteCount()

    def opened(self, sock: socket.socket) -> None:
        """Count ``sock``, from its first byte, until `closing`."""
        with self._lock:
            self._open.add(sock)

    def closing(self, sock: socket.socket) -> None:
        """Take the final count; call before ``sock`` is closed. Harmless for a socket that is not counted."""
        with self._lock:
            if sock in self._open:
                self._open.remove(sock)
                self._closed += kernel_count(sock) or ByteCount()

    def add_wire(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that the kernel does not count for us."""
        with self._lock:
            self._closed += ByteCount(sent, received)

    def add_payload(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes of application payload."""
        with self._lock:
            self._payload += ByteCount(sent, received)

    def snapshot(self) -> ByteCount:
        """Bytes on the TCP streams so far."""
        with self._lock:
            total = self._closed
            for sock in self._open:
                total += kernel_count(sock) or ByteCount()
            return total

    def payload(self) -> ByteCount:
        """Bytes of application payload so far."""
        with self._lock:
            return self._payload
