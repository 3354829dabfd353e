"""zstd with the output size known beforehand, so that no frame can make a peer allocate more than the plan implies.

One frame, no dictionary, its content size in its header, nothing after it. The frame's blocks are walked before the
decoder runs: a cut frame is told from a damaged one, and trailing bytes are refused.
"""

from __future__ import annotations

from typing import Final

import zstandard

from fleetfed.shared.errors import RejectReason, RemoteProtocolError

_MAGIC: Final = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1
_BLOCK_HEADER: Final = 3
_RLE_BLOCK: Final = 1
_CHECKSUM: Final = 4
_BYTES_PER_BLOCK: Final = 1024
_SPARE_BLOCKS: Final = 64
_MIN_WINDOW: Final = 1 << 20


def compress(data: bytes | bytearray | memoryview, *, level: int | None = None) -> bytes:
    """Return ``data`` as one zstd frame that states its content size and carries no checksum.

    A checksum would be redundant: whatever travels is hashed and signed.

    Args:
        data: the content.
        level: zstd's; None sets the match finder for noise with runs in it, which is what quantized deltas are. On
            symbols of 1.5 bits that is 1 to 3 % above the entropy where level 9 is 16 to 20 % above, because short
            chance matches cost more than the symbols that they replace; and it needs the least time and memory.
    """
    if level is not None:
        return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(data)
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_DFAST,
        window_log=18,
        hash_log=6,
        chain_log=6,
        min_match=7,
        write_content_size=True,
        write_checksum=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def max_compressed(size: int) -> int:
    """Return more bytes than any frame of ``size`` bytes needs: check a message against it before reading on."""
    return size + (size >> 8) + 64


def decompress(frame: bytes | bytearray | memoryview, *, size: int) -> bytes:
    """Return the ``size`` bytes that the frame holds, using memory of O(size) whatever the frame claims.

    Args:
        frame: exactly one zstd frame.
        size: the content size that the caller derives from what is already trusted.

    Raises:
        RemoteProtocolError: TOO_LARGE (the frame is longer than such content can need), TRUNCATED (it ends early),
            DECOMPRESSION (not zstd, another content size, a dictionary, too many blocks, damaged), MALFORMED (bytes
            after the frame).
    """
    if len(frame) > max_compressed(size):
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(frame)} compressed bytes for {size}")
    raw = memoryview(frame)
    if len(raw) < 6:
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(raw)} bytes are no zstd frame")
    if bytes(raw[:4]) != _MAGIC:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, "not a zstd frame")
    try:
        header = zstandard.frame_header_size(raw)
        if len(raw) < header:
            raise RemoteProtocolError(RejectReason.TRUNCATED, "the frame ends in its header")
        parameters = zstandard.get_frame_parameters(raw)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, f"frame header: {error}") from error
    if parameters.content_size != size:
        raise RemoteProtocolError(
            RejectReason.DECOMPRESSION, f"the frame holds {parameters.content_size} bytes, expected {size}"
        )
    if parameters.dict_id:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, "the frame needs a dictionary")
    _check_blocks(raw, header, parameters.has_checksum, _SPARE_BLOCKS + size // _BYTES_PER_BLOCK)
    if size == 0:
        return b""
    try:
        content = zstandard.ZstdDecompressor(max_window_size=max(size, _MIN_WINDOW)).decompress(
            raw, max_output_size=size
        )
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, str(error)) from error
    if len(content) != size:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, f"{len(content)} bytes came out, expected {size}")
    return content


def _check_blocks(raw: memoryview, at: int, checksum: bool, most: int) -> None:
    """Follow the block headers (RFC 8878, 3.1.1.2) to the frame's end and compare it with the end of the bytes."""
    for _ in range(most):
        if at + _BLOCK_HEADER > len(raw):
            raise RemoteProtocolError(RejectReason.TRUNCATED, "the frame ends between blocks")
        head = int.from_bytes(raw[at : at + _BLOCK_HEADER], "little")
        last, kind, length = head & 1, head >> 1 & 3, head >> 3
        at += _BLOCK_HEADER + (1 if kind == _RLE_BLOCK else length)
        if last:
            break
    else:
        raise RemoteProtocolError(RejectReason.DECOMPRESSION, f"more than {most} blocks")
    at += _CHECKSUM if checksum else 0
    if at > len(raw):
        raise RemoteProtocolError(RejectReason.TRUNCATED, f"the frame needs {at} bytes, {len(raw)} are here")
    if at < len(raw):
        raise RemoteProtocolError(RejectReason.MALFORMED, f"{len(raw) - at} bytes after the frame")
