from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.compression import compress, decompress, max_compressed

DATA = bytes(range(256)) * 40 + b"\0" * 5000


@given(st.binary(max_size=2000), st.sampled_from([None, 1, 3, 9, 19]))
def test_round_trip(data: bytes, level: int | None) -> None:
    frame = compress(data, level=level)
    assert len(frame) <= max_compressed(len(data))
    assert decompress(frame, size=len(data)) == data


def refused(frame: bytes, size: int) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as error:
        decompress(frame, size=size)
    return error.value.reason


@pytest.mark.parametrize("data", [DATA, b"", b"x", bytes(200_000)])
def test_every_cut_frame_is_truncated_and_nothing_else(data: bytes) -> None:
    frame = compress(data, level=3)
    for length in range(len(frame)):
        assert refused(frame[:length], len(data)) is RejectReason.TRUNCATED, length


def test_trailing_bytes_and_second_frames_are_refused() -> None:
    frame = compress(DATA, level=3)
    assert refused(frame + b"\0", len(DATA)) is RejectReason.MALFORMED
    assert refused(frame + frame, len(DATA)) is RejectReason.MALFORMED


def test_a_frame_for_another_size_is_refused() -> None:
    frame = compress(DATA, level=3)
    assert refused(frame, len(DATA) - 1) is RejectReason.DECOMPRESSION
    assert refused(frame, len(DATA) + 1) is RejectReason.DECOMPRESSION
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(DATA)
    assert refused(unsized, len(DATA)) is RejectReason.DECOMPRESSION


def test_a_bomb_is_refused_before_it_grows() -> None:
    bomb = compress(bytes(100_000_000), level=19)
    assert len(bomb) < 20_000
    assert refused(bomb, 1_000_000) is RejectReason.DECOMPRESSION
    # The same frame with a lie in its content size field (4 bytes after the descriptor and window byte, if any).
    lying = bytearray(bomb)
    at = bomb.index((100_000_000).to_bytes(4, "little"))
    lying[at : at + 4] = (1_000_000).to_bytes(4, "little")
    assert refused(bytes(lying), 1_000_000) is RejectReason.DECOMPRESSION


def test_what_is_longer_than_such_content_can_be_is_refused_unread() -> None:
    assert refused(b"\xff" * 2000, 1000) is RejectReason.TOO_LARGE


def test_skippable_frames_dictionaries_and_junk_are_refused() -> None:
    assert refused(b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 4) is RejectReason.DECOMPRESSION
    assert refused(b"not zstd at all", 4) is RejectReason.DECOMPRESSION
    dictionary = zstandard.train_dictionary(1024, [bytes([i, i + 1, i * 2 % 256]) * 20 for i in range(200)])
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(DATA)
    assert refused(frame, len(DATA)) is RejectReason.DECOMPRESSION


def test_thousands_of_empty_blocks_are_refused() -> None:
    # RFC 8878: descriptor 0xa0 = single segment, 4-byte content size; a raw block of 0 bytes is three zero bytes.
    frame = b"\x28\xb5\x2f\xfd\xa0" + (100_000).to_bytes(4, "little") + b"\0\0\0" * 30_000
    assert refused(frame, 100_000) is RejectReason.DECOMPRESSION


@given(st.integers(0, 60), st.integers(1, 255))
def test_a_damaged_frame_gives_a_documented_error_or_other_content(at: int, flip: int) -> None:
    frame = bytearray(compress(DATA, level=3))
    frame[at % len(frame)] ^= flip
    refusal = None
    try:
        assert len(decompress(bytes(frame), size=len(DATA))) == len(DATA)
    except RemoteProtocolError as error:
        refusal = error.reason
    assert refusal in {None, RejectReason.DECOMPRESSION, RejectReason.TRUNCATED, RejectReason.MALFORMED}
