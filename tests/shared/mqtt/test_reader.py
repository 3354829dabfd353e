"""A stream of packets is cut where it should be, however the network cuts it."""

from __future__ import annotations

import socket
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.mqtt.frames import whole
from fleetfed.shared.mqtt.reader import PacketReader, StreamError

CONTENTS = st.one_of(st.binary(max_size=200), st.integers(0, 600_000).map(lambda size: b"large" * (size // 5)))
PACKETS = st.lists(st.tuples(st.integers(0, 255), CONTENTS), max_size=8)


class Cut:
    """A socket that hands out a stream in pieces of the given sizes."""

    def __init__(self, stream: bytes, sizes: list[int]) -> None:
        self.stream, self.sizes = stream, sizes

    def recv_into(self, buffer: memoryview) -> int:
        assert len(buffer), "nothing was asked for"
        size = min(self.sizes.pop(0) if self.sizes else 16_384, len(buffer), len(self.stream))
        buffer[:size] = self.stream[:size]
        self.stream = self.stream[size:]
        return size


def read_all(reader: PacketReader, sock: Cut) -> list[tuple[int, bytes]]:
    found = []
    while reader.receive(cast(socket.socket, sock)):
        while (packet := reader.next()) is not None:
            found.append((packet[0], bytes(packet[1])))
    return found


@given(packets=PACKETS, sizes=st.lists(st.integers(1, 40_000), max_size=60))
def test_packets_come_out_as_they_went_in(packets: list[tuple[int, bytes]], sizes: list[int]) -> None:
    stream = b"".join(whole(first, rest) for first, rest in packets)
    assert read_all(PacketReader(1 << 28), Cut(stream, sizes)) == packets


@given(packets=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), min_size=1, max_size=8))
def test_one_byte_at_a_time_is_enough(packets: list[tuple[int, bytes]]) -> None:
    stream = b"".join(whole(first, rest) for first, rest in packets)
    assert read_all(PacketReader(1 << 28), Cut(stream, [1] * len(stream))) == packets


def test_memory_for_a_large_packet_is_given_back() -> None:
    reader, large = PacketReader(1 << 28), (0x30, bytes(3_000_000))
    stream = whole(*large) + whole(0x40, b"\0\1") * 3
    assert read_all(reader, Cut(stream, [])) == [large, *[(0x40, b"\0\1")] * 3]
    assert len(reader._buffer) < 1 << 20


def test_a_packet_that_is_larger_than_agreed_is_refused_before_it_is_read() -> None:
    reader = PacketReader(1000)
    sock = Cut(whole(0x30, bytes(998))[:5], [])
    assert reader.receive(cast(socket.socket, sock))
    with pytest.raises(StreamError, match="1001 bytes where 1000 were agreed"):
        reader.next()


def test_a_length_without_end_is_refused() -> None:
    reader = PacketReader(1000)
    assert reader.receive(cast(socket.socket, Cut(b"\x30\xff\xff\xff\xff\x01", [])))
    with pytest.raises(StreamError, match="more than four bytes"):
        reader.next()


def test_memory_grows_with_what_has_come_and_not_with_what_was_announced() -> None:
    reader, packet = PacketReader(1 << 28), whole(0x30, bytes(1 << 24))
    sock, most = Cut(packet, [6]), 0.0
    while reader.receive(cast(socket.socket, sock)):
        received = len(packet) - len(sock.stream)
        if reader.next() is None:
            most = max(most, len(reader._buffer) / max(received, 1 << 18))
    assert most <= 2.5
