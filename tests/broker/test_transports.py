"""TLS over memory buffers: handshakes that fail or never end, versions, records cut anywhere."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.broker import transports
from fleetfed.broker.codec import encode
from fleetfed.broker.config import BrokerConfig, Limits
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.packets import ConnAck, Connect, PingReq, PingResp
from fleetfed.broker.transports import _pieces
from tests.broker.certificates import Authority
from tests.broker.rawclient import RawClient


async def start(authority: Authority, **limits: int) -> EmbeddedBroker:
    broker = EmbeddedBroker(BrokerConfig(tls=authority.server_files(), limits=Limits(**limits)))  # type: ignore[arg-type]
    await broker.start()
    return broker


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE) is not None
    except ConnectionError:
        return True


async def test_a_handshake_that_never_ends_is_cut(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_HANDSHAKE_SECONDS", 0.05)
    broker = await start(authority)
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    assert await ended(reader)
    writer.close()
    assert not broker._transports
    await broker.stop()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(100)])
async def test_what_is_no_handshake_is_cut(authority: Authority, data: bytes) -> None:
    broker = await start(authority)
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(data)
    assert await ended(reader)
    writer.close()
    assert broker.statistics()["connections"] == 0
    await broker.stop()


async def test_garbage_after_the_handshake_ends_that_connection_only(authority: Authority) -> None:
    broker = await start(authority)
    client = await RawClient.connect(broker.port, "a", tls=authority.client_context("a"))
    other = await RawClient.connect(broker.port, "b", tls=authority.client_context("b"))
    transport = client.writer.transport._ssl_protocol._transport  # type: ignore[attr-defined]
    transport.write(b"\x17\x03\x03\x00\x20" + bytes(32))
    await client.closed()
    await other.ping()
    await other.disconnect()
    await broker.stop()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_both_versions(authority: Authority, version: ssl.TLSVersion) -> None:
    broker = await start(authority, max_packet=4 * 2**20)
    context = authority.client_context("a")
    context.minimum_version = context.maximum_version = version
    client = await RawClient.connect(broker.port, "a", tls=context)
    await client.subscribe("t")
    payload = bytes(range(256)) * 12_000
    assert await client.publish("t", payload) == 0
    assert (await client.message()).payload == payload
    await client.disconnect()
    await broker.stop()


async def test_records_may_come_a_byte_at_a_time(authority: Authority) -> None:
    broker = await start(authority)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = authority.client_context("a").wrap_bio(incoming, outgoing, server_hostname="localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)

    async def dribble() -> None:
        for byte in outgoing.read():
            writer.write(bytes((byte,)))
            await asyncio.sleep(0)

    async def finish(action: object, *arguments: object) -> object:
        while True:
            try:
                result = action(*arguments)  # type: ignore[operator]
            except ssl.SSLWantReadError:
                await dribble()
                incoming.write(await asyncio.wait_for(reader.read(65_536), PATIENCE))
                continue
            await dribble()
            return result

    await finish(tls.do_handshake)
    tls.write(encode(Connect(version=4, client_id="a"), 4) + encode(PingReq(), 4))
    received = b""
    expected = encode(ConnAck(session_present=False, code=0), 4) + encode(PingResp(), 4)
    while len(received) < len(expected):
        received += await finish(tls.read, 100)  # type: ignore[operator]
    assert received == expected
    writer.close()
    await broker.stop()


async def test_handshakes_count_as_connections(authority: Authority) -> None:
    broker = await start(authority, max_connections=2)
    first = await asyncio.open_connection("127.0.0.1", broker.port)
    client = await RawClient.connect(broker.port, "a", tls=authority.client_context("a"))
    third = await asyncio.open_connection("127.0.0.1", broker.port)
    assert await ended(third[0])
    assert broker.statistics()["connections_refused"] == 1
    await client.ping()
    for _, writer in (first, third):
        writer.close()
    await client.disconnect()
    await broker.stop()


def test_small_buffers_are_joined_and_large_ones_are_not_copied() -> None:
    large = memoryview(bytes(100_000))
    pieces = _pieces([b"a", b"b", large, b"c"])
    assert pieces == [b"ab", large, b"c"]
    assert pieces[1] is large
    assert _pieces([]) == []
