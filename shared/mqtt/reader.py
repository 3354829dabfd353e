"""Cuts what a broker sends into control packets (MQTT 5 section 2.1), in place.

paho reads the two to five bytes before a packet one at a time, each through TLS, and then grows the packet piece by
piece.
"""

from __future__ import annotations

import socket
from typing import Final

from fleetfed.shared.mqtt.frames import LONGEST_LENGTH, read_length

_BUFFER: Final = 256 * 1024
"""Bytes that are always held; a larger packet gets memory of its own for as long as it takes."""
_ROOM: Final = 32 * 1024
"""Bytes to ask for at least; TLS hands out half of it at a time."""


class StreamError(Exception):
    """What came is no MQTT, or larger than was agreed: the connection is of no use."""


class PacketReader:
    """See the module.

    Args:
        most: bytes of the largest packet that the broker was told to send; it need not have listened.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._own = memoryview(bytearray(_BUFFER))
        self._buffer = self._own
        # What was received and not handed on: from here to there.
        self._start = self._end = 0

    def receive(self, sock: socket.socket) -> bool:
        """Receive once; False at the end of the stream. Only after `next` had nothing more.

        Raises:
            OSError: as of the socket; `BlockingIOError` and `ssl.SSLWantReadError` where nothing is here.
        """
        count = sock.recv_into(self._buffer[self._end :])
        self._end += count
        return count > 0

    def next(self) -> tuple[int, memoryview] | None:
        """The next whole packet: its first byte, and what follows the remaining length, valid until the next call.

        Raises:
            StreamError: see there.
        """
        where = self._whole()
        if where is None:
            return None
        first, (at, end) = self._buffer[self._start], where
        self._start = end
        return first, self._buffer[at:end]

    def _whole(self) -> tuple[int, int] | None:
        """Where the next packet's content begins and ends; None, with room for the rest of it, if it is not whole."""
        buffer, start, end = self._buffer, self._start, self._end
        if start == end:
            self._move(_BUFFER)
            return None
        found = read_length(buffer[start + 1 : min(start + 1 + LONGEST_LENGTH, end)])
        if found is None:
            if end - start > LONGEST_LENGTH:
                raise StreamError("a packet's length takes more than four bytes")
            self._move(_BUFFER)
            return None
        length, size = found
        at = start + 1 + size
        if at + length - start > self._most:
            raise StreamError(f"a packet of {at + length - start} bytes where {self._most} were agreed")
        if at + length <= end:
            return at, at + length
        self._move(at + length - start)
        return None

    def _move(self, size: int) -> None:
        """Make room for more of a packet of ``size`` bytes; back in the own buffer where that will do."""
        start, left = self._start, self._end - self._start
        # Memory grows with what has come, not with what was announced.
        wanted = max(min(size, max(2 * left, _BUFFER)), left + _ROOM)
        if wanted <= _BUFFER and self._buffer is not self._own:
            target = self._own
        elif start + wanted <= len(self._buffer):
            return
        else:
            target = self._own if wanted <= _BUFFER else memoryview(bytearray(wanted))
        # A copy first: the two places may overlap.
        target[:left] = bytes(self._buffer[start : self._end])
        self._buffer, self._start, self._end = target, 0, left
