"""Large signed messages (updates, proposals, partials) cut into chunks that every broker accepts.

A chunk is ``frame (28 bytes) ‖ data``; the frame names the message, the chunk's place and the message's size.
Chunks carry no integrity of their own: the hash in the signed head covers the body. `Assembler` therefore verifies
the head, which chunk 0 always holds whole, before it reserves memory for the rest.

>>> frames = split(b"m" * 16, bytes(300_000))
>>> [len(frame) for frame in frames]
[122908, 122908, 54268]
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.envelope import MAX_HEAD, Head, MessageId, parse_head

_MAGIC: Final = b"FFC1"
_FRAME: Final = struct.Struct("<4s16sHHI")
FRAME_SIZE: Final = _FRAME.size

assert limits.CHUNK_DATA >= MAX_HEAD


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a message of ``size`` bytes in ``count`` chunks."""

    message_id: MessageId
    index: int
    count: int
    size: int
    data: memoryview


def split(message_id: bytes, message: bytes, *, chunk: int = limits.CHUNK_DATA) -> list[bytes]:
    """Cut a message into frames of at most ``chunk`` bytes of data each.

    Raises:
        LocalProtocolError: the message needs more than `limits.MAX_CHUNKS` chunks.
    """
    count = max(1, -(-len(message) // chunk))
    if count > limits.MAX_CHUNKS:
        raise LocalProtocolError(f"{len(message)} bytes need {count} chunks, more than {limits.MAX_CHUNKS}")
    view = memoryview(message)
    return [
        _FRAME.pack(_MAGIC, message_id, index, count, len(message)) + view[index * chunk : (index + 1) * chunk]
        for index in range(count)
    ]


def parse_chunk(frame: bytes) -> Chunk:
    """Parse one frame.

    Raises:
        RemoteProtocolError: `TRUNCATED`, `MALFORMED` or `TOO_LARGE`.
    """
    if len(frame) < FRAME_SIZE:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(frame)} bytes are no chunk")
    magic, message_id, index, count, size = _FRAME.unpack_from(frame)
    if magic != _MAGIC or not 0 <= index < count:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"magic {magic!r}, chunk {index} of {count}")
    if count > limits.MAX_CHUNKS:
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{count} chunks")
    data = memoryview(frame)[FRAME_SIZE:]
    last = index == count - 1
    if count == 1:
        fits = len(data) == size
    else:
        # All chunks but the last have one length, so that any chunk tells where it belongs.
        stride = len(data) if not last else (size - len(data)) // (count - 1)
        fits = 0 < stride <= limits.CHUNK_DATA and (count - 1) * stride < size <= count * stride
        fits = fits and (not last or size - len(data) == (count - 1) * stride)
    if not fits:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"chunk {index} of {count}: {len(data)} of {size} bytes")
    return Chunk(MessageId(message_id), index, count, size, data)


class Assembler:
    """Puts one sender's chunks together, one message at a time.

    A sender that starts another message abandons the one before. Chunks may repeat; a chunk of a message whose
    chunk 0 was not admitted is ignored, because the sender sends all of them again until its receipt.

    Args:
        admit: called with the parsed head as soon as chunk 0 is here; raises `RemoteProtocolError` to refuse the
            message before anything is reserved for it.
    """

    __slots__ = ("_admit", "_buffer", "_count", "_head", "_message_id", "_missing", "_stride")

    def __init__(self, admit: Callable[[Head], None]) -> None:
        self._admit = admit
        self.clear()

    def clear(self) -> None:
        """Forget the message in progress and free its memory."""
        self._message_id: MessageId | None = None
        self._head: Head | None = None
        self._buffer = bytearray()
        self._missing: set[int] = set()
        self._count = 0
        self._stride = 0

    @property
    def reserved(self) -> int:
        """Bytes held for the message in progress."""
        return len(self._buffer)

    def feed(self, frame: bytes) -> tuple[Head, memoryview] | None:
        """Take one chunk; return ``(head, body)`` when it completes its message.

        The body is not yet checked against the head's hash (`envelope.open_body` does). After a return the
        assembler holds nothing.

        Raises:
            RemoteProtocolError: the chunk or its head is refused; the message in progress is forgotten.
        """
        try:
            chunk = parse_chunk(frame)
            if chunk.count == 1 and chunk.message_id != self._message_id:
                # Whole as it is: no memory need be reserved.
                head = self._admitted(chunk)
                return head, chunk.data[head.size :]
            if chunk.index == 0 and chunk.message_id != self._message_id:
                self._begin(chunk)
            if chunk.message_id != self._message_id or self._head is None:
                return None
            return self._place(chunk)
        except RemoteProtocolError:
            self.clear()
            raise

    def _admitted(self, chunk: Chunk) -> Head:
        """The head in chunk 0, once it was admitted."""
        self.clear()
        head = parse_head(chunk.data)
        if head.header.message_id != chunk.message_id:
            raise RemoteProtocolError(RejectReason.MALFORMED, "the chunk and the head name two messages")
        if chunk.size < head.message_size:
            raise RemoteProtocolError(RejectReason.TRUNCATED, f"{chunk.size} of {head.message_size} bytes")
        if chunk.size > head.message_size:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"{chunk.size - head.message_size} bytes too many")
        self._admit(head)
        return head

    def _begin(self, chunk: Chunk) -> None:
        head = self._admitted(chunk)
        self._message_id = chunk.message_id
        self._head = head
        self._count = chunk.count
        self._stride = len(chunk.data)
        self._missing = set(range(chunk.count))
        self._buffer = bytearray(chunk.size)

    def _place(self, chunk: Chunk) -> tuple[Head, memoryview] | None:
        start = chunk.index * self._stride
        expected = min(self._stride, len(self._buffer) - start)
        if chunk.count != self._count or chunk.size != len(self._buffer) or len(chunk.data) != expected:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"chunk {chunk.index} does not fit its message")
        self._buffer[start : start + expected] = chunk.data
        self._missing.discard(chunk.index)
        if self._missing:
            return None
        head, buffer = self._head, self._buffer
        assert head is not None
        self.clear()
        return head, memoryview(buffer)[head.size :]
