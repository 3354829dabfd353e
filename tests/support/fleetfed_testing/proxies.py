"""TCP servers that stand between a client and a broker, or misbehave in a broker's place; each in its own threads."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

from fleetfed_testing.waiting import PATIENCE

_CONNACK_OK = b"\x20\x02\x00\x00"


class _Server:
    """Accepts on a free port until closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self._more: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept, self._listener)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether every connection has ended and all that was said on it was passed on."""
        with self._lock:
            return not self._open

    def cut(self) -> None:
        """Reset every connection, as a lost radio or a killed process does."""
        with self._lock:
            sockets = list(self._open)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RD)
                sock.close()

    def close(self) -> None:
        for listener in (self._listener, *self._more):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _spawn(self, call: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=call, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _track(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(sock)

    def attach(self, listener: socket.socket) -> None:
        """Serve what connects to ``listener`` too, until `close`."""
        self._more.append(listener)
        self._spawn(self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._track(client)
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.serve(client)
        with self._lock:
            self._open.discard(client)


class Proxy(_Server):
    """Passes bytes on to ``target`` and counts them, as the client sees them: ``sent``, ``received``."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.sent = 0
        self.received = 0
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        self.forward(client, b"")

    def forward(self, client: socket.socket, first: bytes) -> None:
        """Connect to the target, send ``first`` and pass on everything until one side closes."""
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            self._track(server)
            server.sendall(first)
            back = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            back.start()
            self._pump(client, server, True)
            back.join(PATIENCE)
            with self._lock:
                self._open.discard(server)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up:
                    self.sent += len(data)
                else:
                    self.received += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class LegacyProxy(Proxy):
    """A broker without MQTT 5 (plain TCP): answers it with ``answer`` and closes, passes 3.1.1 on."""

    def __init__(self, target: int, answer: bytes) -> None:
        self.answer = answer
        self.versions: list[int] = []
        super().__init__(target)

    def serve(self, client: socket.socket) -> None:
        first = client.recv(65536)
        level = first[first.index(b"MQTT") + 4]
        self.versions.append(level)
        if level == 5:
            client.sendall(self.answer)
            return
        self.forward(client, first)


class RawBroker(_Server):
    """A 3.1.1 broker that grants every subscription, then sends ``flood`` as it is and takes whatever comes.

    Attributes:
        confirmed: PUBACKs seen.
        confirms: whether to confirm what the client publishes.
    """

    def __init__(self, flood: list[bytes], *, confirms: bool = True, silent: bool = False) -> None:
        self.flood = flood
        self.confirms = confirms
        self.silent = silent
        self.confirmed = 0
        self._sending = threading.Lock()
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        stream = client.makefile("rb")
        with stream:
            while head := stream.read(1):
                length = shift = 0
                while True:
                    byte = stream.read(1)[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                body = stream.read(length)
                kind = head[0] >> 4
                if self.silent:
                    continue
                if kind == 1:
                    self._send(client, _CONNACK_OK)
                elif kind == 8:
                    granted = body.count(b"\x01", 2)  # one requested QoS byte per filter; filters are printable
                    self._send(client, bytes([0x90, 2 + granted]) + body[:2] + b"\x01" * granted)
                    self._spawn(self._pour, client)
                elif kind == 4:
                    self.confirmed += 1
                elif kind == 3 and head[0] & 6 and self.confirms:
                    (size,) = struct.unpack_from("!H", body)
                    self._send(client, b"\x40\x02" + body[2 + size : 4 + size])
                elif kind == 12:
                    self._send(client, b"\xd0\x00")

    def _send(self, client: socket.socket, packet: bytes) -> None:
        with self._sending:
            client.sendall(packet)

    def _pour(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for packet in self.flood:
                self._send(client, packet)


class BreakingBroker(_Server):
    """Takes a CONNECT and breaks.

    Args:
        answer: bytes to send before it closes; None to reset the connection instead.

    Attributes:
        connections: that were broken.
    """

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.connections = 0
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        client.recv(4096)
        self.connections += 1
        if self.answer is None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            client.sendall(self.answer)
            # Until it is read, or the close would overtake it.
            client.recv(4096)
        client.close()


def publish_packet(topic: bytes, payload: bytes, *, mid: int = 0) -> bytes:
    """A 3.1.1 PUBLISH: QoS 1 with ``mid``, QoS 0 without."""
    body = struct.pack("!H", len(topic)) + topic + (struct.pack("!H", mid) if mid else b"") + payload
    length, size = bytearray(), len(body)
    while True:
        length.append(size & 127 | (128 if size > 127 else 0))
        size >>= 7
        if not size:
            return bytes([0x32 if mid else 0x30]) + bytes(length) + body
