"""`open_socket` and `ByteMeter` over a real connection, with the kernel's counters and without them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from fleetfed_testing.brokers import Embedded, FleetPki
from fleetfed_testing.proxies import Proxy
from fleetfed_testing.waiting import PATIENCE, wait_until

from fleetfed.shared.mqtt import meter as meter_module
from fleetfed.shared.mqtt import sockets
from fleetfed.shared.mqtt.meter import ByteCount, ByteMeter
from fleetfed.shared.mqtt.sockets import close_socket, open_socket
from fleetfed.shared.mqtt.tls import client_context


@pytest.fixture
def echo() -> Iterator[int]:
    """A plain TCP server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(ConnectionError):
                while data := client.recv(65536):
                    client.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(PATIENCE)


@pytest.fixture(params=["kernel", "wrapper"])
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way: str = request.param
    if way == "wrapper":
        monkeypatch.setattr(meter_module, "kernel_count", lambda sock: None)
        monkeypatch.setattr(sockets, "kernel_count", lambda sock: None)
    return way


def _exchange(sock: socket.socket, size: int) -> None:
    left = size
    while left:
        left -= sock.send(bytes(left))
    while size:
        size -= len(sock.recv(size))


def test_plain_connection_is_counted_exactly(echo: int, counting: str) -> None:
    meter = ByteMeter()
    sock = open_socket("127.0.0.1", echo, timeout=5, context=None, meter=meter)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.gettimeout() == 5
    _exchange(sock, 100_000)
    assert meter.snapshot() == ByteCount(100_000, 100_000)
    close_socket(sock, meter)
    assert meter.snapshot() == ByteCount(100_000, 100_000)


def test_connections_add_up(echo: int) -> None:
    meter = ByteMeter()
    first = open_socket("127.0.0.1", echo, timeout=5, context=None, meter=meter)
    second = open_socket("127.0.0.1", echo, timeout=5, context=None, meter=meter)
    _exchange(first, 10)
    close_socket(first, meter)
    close_socket(first, meter)
    _exchange(second, 1)
    assert meter.snapshot() == ByteCount(11, 11)
    close_socket(second, meter)
    assert meter.snapshot().total == 22


def test_handshake_counts(embedded_broker: type[Embedded], fleet_pki: FleetPki) -> None:
    broker = embedded_broker()
    meter = ByteMeter()
    with Proxy(broker.port) as proxy:
        context = client_context(fleet_pki.client("d-1"))
        sock = open_socket("127.0.0.1", proxy.port, timeout=5, context=context, meter=meter)
        assert isinstance(sock, ssl.SSLSocket)
        wait_until(lambda: meter.snapshot().sent == proxy.sent)
        assert meter.snapshot().sent > 1000
        close_socket(sock, meter)


def test_wrapper_counts_inside_tls(
    embedded_broker: type[Embedded], fleet_pki: FleetPki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "kernel_count", lambda sock: None)
    broker = embedded_broker()
    meter = ByteMeter()
    context = client_context(fleet_pki.client("d-1"))
    sock = open_socket("127.0.0.1", broker.port, timeout=5, context=context, meter=meter)
    sock.send(bytes.fromhex("101000044d5154540402003c0004") + b"d-1x")
    assert sock.recv(4) == b"\x20\x02\x00\x00"
    monkeypatch.setattr(meter_module, "kernel_count", lambda sock: None)
    assert meter.snapshot() == ByteCount(18, 4)
    close_socket(sock, meter)


def test_failed_handshake_is_counted_and_closed(echo: int, fleet_pki: FleetPki) -> None:
    meter = ByteMeter()
    context = client_context(fleet_pki.client("d-1"))
    with pytest.raises(OSError):
        open_socket("127.0.0.1", echo, timeout=5, context=context, meter=meter)
    assert meter.snapshot().sent > 100


def test_counts_subtract() -> None:
    assert ByteCount(5, 7) - ByteCount(2, 3) == ByteCount(3, 4)
    meter = ByteMeter()
    meter.add_payload(sent=3)
    meter.add_payload(received=4)
    assert meter.payload() == ByteCount(3, 4)
    assert meter.snapshot() == ByteCount()
