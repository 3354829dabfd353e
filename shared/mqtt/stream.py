"""Between the kernel and paho: messages of QoS 1, and of QoS 0 that come in, take the short way; all else is paho's.

paho receives and sends through here (its ``_sock_recv`` and ``_sock_send``), so that packets of both leave in one
order, and all of one turn of the loop in one go, without a trip through the selector.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as paho

from fleetfed.shared.mqtt.frames import DISCONNECT, PUBACK, PUBLISH, Publish, read_puback, read_publish, whole
from fleetfed.shared.mqtt.outbox import Outbox
from fleetfed.shared.mqtt.reader import PacketReader, StreamError

_PACKETS: Final = 512
"""Of any kind, before other tasks have their turn."""
_COMPANY: Final = 0.002
"""Seconds that a confirmation may wait for others: a write of its own costs as much as reading a small message."""

_log = logging.getLogger(__name__)


class Stream:
    """See the module. All but `write_soon` on the event loop's thread.

    Args:
        client: paho's, not connected yet.
        loop: the event loop.
        version5: MQTT 5, or else 3.1.1.
        most: bytes of the largest packet that may come.
        window: messages to take in as long as `handled` keeps up; beyond that, one in each turn of the loop, so that
            confirmations get through. Mosquitto 2.0 does not keep to the window that it was told once confirmations
            come in numbers.
        on_publish: called with every message that takes the short way.
        on_puback: called with packet identifier and reason code of what was confirmed.
        on_broken: called with the reason when the connection is of no use any more.
    """

    def __init__(
        self,
        client: paho.Client,
        loop: asyncio.AbstractEventLoop,
        *,
        version5: bool,
        most: int,
        window: int,
        on_publish: Callable[[Publish], None],
        on_puback: Callable[[int, int], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._client = client
        self._loop = loop
        self._thread = threading.get_ident()
        self._version5 = version5
        self._on_publish = on_publish
        self._on_puback = on_puback
        self._broken = on_broken
        self._reader = PacketReader(most)
        self._outbox = Outbox()
        self._window = window
        self._unhandled = 0
        self._again: asyncio.Handle | None = None
        self._fd = -1
        self._reading = True
        self._writing = False
        # For paho to receive; None is the end of the stream.
        self._lent: bytes | None = b""
        self._along = 0
        self._later: asyncio.TimerHandle | None = None
        hooks: Any = client
        hooks._sock_recv = self._lend
        hooks._sock_send = self._gather

    def start(self, fd: int) -> None:
        """Read from now on."""
        self._fd = fd
        self._loop.add_reader(fd, self._read)

    def stop(self, fd: int) -> None:
        """Before the socket is closed."""
        for handle in (self._again, self._later):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)

    def pause_reading(self) -> None:
        """Leave what comes in the kernel's buffer, so that TCP holds it back."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Read again."""
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._read)
            self._read_soon()

    def send(self, packet: bytes) -> None:
        """Queue a packet behind all others; it leaves in a later turn of the loop."""
        if self._client.want_write():
            self._client.loop_write()
        self._outbox.put(packet)
        self.write_soon()

    def send_along(self, packet: bytes) -> None:
        """Queue a packet that may wait for company: for `_COMPANY` seconds, or until half a window of such has come."""
        self._outbox.put(packet)
        self._along += 1
        if self._along * 2 >= self._window:
            self.write_soon()
        elif self._later is None:
            self._later = self._loop.call_later(_COMPANY, self._write)

    def write_soon(self) -> None:
        """There is something to write; from any thread."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self.write_soon)
        elif not self._writing:
            self._writing = True
            self._loop.call_soon(self._write)

    def taken(self) -> None:
        """A message is about to be handled."""
        self._unhandled += 1

    def handled(self) -> None:
        """One of the messages was handled."""
        self._unhandled -= 1

    def _read(self) -> None:
        if self._again is not None:
            # Called by the selector in the same turn, perhaps.
            self._again.cancel()
            self._again = None
        sock: Any = self._client.socket()
        left = max(1, self._window - self._unhandled)
        turn = _PACKETS
        try:
            while sock is not None and self._reading:
                packet = self._reader.next()
                if packet is None:
                    if self._reader.receive(sock):
                        continue
                    self._lend_to_paho(None)
                    return
                left -= self._take(*packet)
                turn -= 1
                if not left or not turn:
                    self._read_soon()
                    return
                sock = self._client.socket()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (OSError, StreamError) as error:
            self._broken(str(error) or repr(error))
        except Exception as error:  # noqa: BLE001  # whatever paho trips over, the connection is not usable any more
            _log.exception("reading from the broker")
            self._broken(repr(error))
        finally:
            self._client._last_bytes_received = time.monotonic()

    def _read_soon(self) -> None:
        # The selector does not know of bytes that were received already.
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def _take(self, first: int, packet: memoryview) -> bool:
        """Whether it was a message."""
        kind = first & 0xF0
        if kind == PUBLISH and (message := read_publish(first, packet, version5=self._version5)) is not None:
            self.taken()
            self._on_publish(message)
        elif kind == PUBACK and (answer := read_puback(packet)) is not None:
            self._on_puback(*answer)
        else:
            self._lend_to_paho(whole(first, packet))
        return kind == PUBLISH

    def _lend_to_paho(self, packet: bytes | None) -> None:
        self._lent = packet
        self._client.loop_read()

    def _lend(self, size: int) -> bytes:
        """What paho calls to receive.

        Raises:
            BlockingIOError: there is nothing for it.
        """
        if self._lent is None:
            return b""
        if not self._lent:
            raise BlockingIOError
        part, self._lent = self._lent[:size], self._lent[size:]
        return part

    def _write(self) -> None:
        self._writing = False
        self._along = 0
        if self._later is not None:
            self._later.cancel()
            self._later = None
        sock = self._client.socket()
        if sock is None:
            return
        try:
            if self._client.want_write():
                self._client.loop_write()
            self._outbox.flush(self._send_now)
        except OSError as error:
            self._broken(str(error))
            return
        except Exception as error:  # noqa: BLE001  # as above
            _log.exception("writing to the broker")
            self._broken(repr(error))
            return
        fd = sock.fileno()
        if fd < 0:
            return
        if self._outbox or self._client.want_write():
            self._loop.add_writer(fd, self._write)
        else:
            self._loop.remove_writer(fd)

    def _gather(self, packet: bytes | bytearray) -> int:
        """What paho calls to send.

        Raises:
            BlockingIOError: the kernel takes no more now.
        """
        if packet[0] & 0xF0 != DISCONNECT:
            self._outbox.put(packet)
            return len(packet)
        # paho closes the socket as soon as this one has left.
        if not self._outbox.flush(self._send_now):
            raise BlockingIOError
        return self._send_now(packet)

    def _send_now(self, data: bytes | bytearray | memoryview) -> int:
        # Not paho's own, which asks for another turn at once where the kernel's buffer is full.
        sock: Any = self._client.socket()
        if sock is None:
            raise ConnectionError("no socket")
        assert isinstance(sock, socket.socket)
        try:
            return sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error
