"""What is put in comes out, in order and whole, however little the kernel takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.mqtt.outbox import Outbox

PACKETS = st.lists(st.integers(1, 50_000).map(lambda size: b"packet" * (size // 6 + 1)), max_size=12)


class Kernel:
    """Takes so many bytes at a time; none, once, where it says 0."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.taken, self.calls = sizes, b"", 0
        self.refused: bytes | None = None

    def send(self, data: memoryview) -> int:
        self.calls += 1
        if self.refused is not None:
            # OpenSSL insists: what was refused is offered again.
            assert bytes(data[: len(self.refused)]) == self.refused[: len(data)]
            self.refused = None
        size = self.sizes.pop(0) if self.sizes else len(data)
        if not size:
            self.refused = bytes(data)
            raise BlockingIOError
        self.taken += bytes(data[:size])
        return min(size, len(data))


@given(turns=st.lists(PACKETS, max_size=5), sizes=st.lists(st.integers(0, 30_000), max_size=40))
def test_everything_leaves_in_order(turns: list[list[bytes]], sizes: list[int]) -> None:
    outbox, kernel = Outbox(), Kernel(sizes)
    for packets in turns:
        for packet in packets:
            outbox.put(packet)
        assert outbox.flush(kernel.send) is not bool(outbox)
    while not outbox.flush(kernel.send):
        assert outbox
    assert kernel.taken == b"".join(packet for packets in turns for packet in packets)
    assert not outbox


def test_small_packets_leave_together() -> None:
    outbox, kernel = Outbox(), Kernel([])
    for _ in range(100):
        outbox.put(b"\x40\x02\x00\x01")
    assert outbox.flush(kernel.send)
    assert kernel.calls == 1
