"""Packets on their way to the kernel: what one turn of the loop says leaves in one TLS record and one system call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

_TOGETHER: Final = 16 * 1024
"""Bytes of one TLS record (RFC 8446, section 5.1): more together would save nothing."""


class Outbox:
    """See the module."""

    def __init__(self) -> None:
        self._small = bytearray()
        self._ready: deque[bytes] = deque()
        # Of the first that is ready: what has left.
        self._left = 0

    def __bool__(self) -> bool:
        return bool(self._small or self._ready)

    def put(self, packet: bytes | bytearray) -> None:
        """Queue a packet behind all others."""
        if len(packet) >= _TOGETHER:
            self._seal()
            self._ready.append(bytes(packet))
            return
        self._small += packet
        if len(self._small) >= _TOGETHER:
            self._seal()

    def flush(self, send: Callable[[memoryview], int]) -> bool:
        """Hand everything to the kernel, as far as it takes it; whether that was all.

        Args:
            send: takes bytes and returns how many have left, or raises `BlockingIOError` for none. After that it is
                given the same bytes again, as OpenSSL wants it.
        """
        self._seal()
        while self._ready:
            first = self._ready[0]
            try:
                self._left += send(memoryview(first)[self._left :])
            except BlockingIOError:
                return False
            if self._left == len(first):
                self._ready.popleft()
                self._left = 0
        return True

    def _seal(self) -> None:
        if self._small:
            self._ready.append(bytes(self._small))
            self._small.clear()
