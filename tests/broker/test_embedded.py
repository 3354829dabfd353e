"""Sockets and TLS of the embedded broker: who gets in, how they are put out, and real clients."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiomqtt
import paho.mqtt.client as paho
import pytest
from fleetfed_testing.waiting import PATIENCE

from fleetfed.broker.config import BrokerConfig, Limits
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.tls import revoked_serials
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles
from tests.broker.certificates import Authority
from tests.broker.conftest import KINDS, serve
from tests.broker.rawclient import RawClient


@pytest.fixture
async def broker(authority: Authority) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(BrokerConfig(tls=authority.server_files()))
    await broker.start()
    yield broker
    await broker.stop()


async def refused(port: int, context: ssl.SSLContext | None) -> bool:
    """Whether a CONNECT over this TLS gets no CONNACK."""
    try:
        client = await asyncio.wait_for(RawClient.connect(port, "x", tls=context), PATIENCE)
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return True
    await client.disconnect()
    return False


@pytest.mark.parametrize("certified", [True, False])
async def test_small_messages_do_not_wait_for_acknowledgements(certified: bool, authority: Authority) -> None:
    broker = EmbeddedBroker(BrokerConfig(tls=authority.server_files() if certified else None))
    await broker.start()
    client = await RawClient.connect(broker.port, "d-1", tls=authority.client_context("d-1") if certified else None)
    (served,) = broker._clients.values()
    assert served._transport is not None
    sock = served._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "Nagle's algorithm is on"
    await client.disconnect()
    await broker.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_only_certificates_of_the_fleet_get_in(
    kind: str, authority: Authority, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    strangers = Authority(tmp_path / "strangers", name="strangers")
    stranger = strangers.client_context("d-1")
    stranger.load_verify_locations(authority.ca)
    old = authority.client_context("d-1")
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with serve(kind, BrokerConfig(tls=authority.server_files()), authority, tmp_path) as running:
        assert not await refused(running.port, authority.client_context("d-1"))
        assert await refused(running.port, authority.client_context(None)), "no certificate"
        assert await refused(running.port, stranger), "another authority"
        assert await refused(running.port, old), "TLS 1.1"
        assert await refused(running.port, None), "no TLS"
        assert not await refused(running.port, authority.client_context("d-2")), "it is still there"


async def test_a_revoked_client_is_put_out_and_stays_out(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue("d-1")
    files = authority.server_files(authority.crl())
    broker = EmbeddedBroker(BrokerConfig(tls=files))
    await broker.start()
    thief = await RawClient.connect(broker.port, "d-1", version=5, tls=authority.client_context("d-1"))
    honest = await RawClient.connect(broker.port, "d-2", version=5, tls=authority.client_context("d-2"))
    authority.crl("d-1")
    await broker.reload()
    assert await thief.closed() == 0x87
    assert await refused(broker.port, authority.client_context("d-1"))
    await honest.ping()
    # A reload keeps the port and lets new clients in.
    assert not await refused(broker.port, authority.client_context("d-3"))
    files.crl.write_text("no list")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="revocation list"):
        await broker.reload()
    assert not await refused(broker.port, authority.client_context("d-3")), "as it was"
    await honest.disconnect()
    thief.abort()
    await broker.stop()


def test_the_serials_of_a_revocation_list(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert revoked_serials(authority.crl()) == frozenset()
    authority.issue("a")
    authority.issue("b")
    authority.issue("c")
    assert revoked_serials(authority.crl("a", "c")) == {authority._serials["a"], authority._serials["c"]}
    path = tmp_path / "crl.pem"
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], text[1][:40], text[-1]]))
    with pytest.raises(ConfigError, match="revocation list"):
        revoked_serials(path)


async def test_a_dead_handshake_costs_nothing_but_its_socket(broker: EmbeddedBroker) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    assert broker.statistics()["connections"] == 0
    writer.close()


@pytest.mark.parametrize("version", [aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5])
async def test_aiomqtt(broker: EmbeddedBroker, authority: Authority, version: aiomqtt.ProtocolVersion) -> None:
    async with aiomqtt.Client(
        "localhost",
        broker.port,
        identifier="g-1",
        protocol=version,
        tls_context=authority.client_context("g-1"),
        will=aiomqtt.Will("w", b"lost", qos=1),
    ) as client:
        await client.subscribe("a/#", qos=2)
        for qos in (0, 1, 2):
            await client.publish(f"a/{qos}", bytes(100_000), qos=qos)
        found = []
        async for message in client.messages:
            found.append((str(message.topic), len(bytes(message.payload)), message.qos))  # type: ignore[arg-type]
            if len(found) == 3:
                break
        assert found == [(f"a/{qos}", 100_000, qos) for qos in (0, 1, 2)]


@pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5])
async def test_paho(broker: EmbeddedBroker, authority: Authority, version: int) -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="d-1", protocol=version)
    client.tls_set_context(authority.client_context("d-1"))
    subscribed, arrived = threading.Event(), threading.Event()
    found: list[bytes] = []
    client.on_connect = lambda c, *_: c.subscribe("b", qos=1)
    client.on_subscribe = lambda *_: subscribed.set()

    def on_message(_client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        found.append(message.payload)
        arrived.set()

    client.on_message = on_message
    client.connect_async("localhost", broker.port)
    client.loop_start()
    assert await asyncio.to_thread(subscribed.wait, 10)
    client.publish("b", b"x" * 200_000, qos=1)
    assert await asyncio.to_thread(arrived.wait, 10)
    assert found == [b"x" * 200_000]
    client.disconnect()
    await asyncio.to_thread(client.loop_stop)


async def test_a_subscriber_that_does_not_read_is_slow_not_lossy(authority: Authority) -> None:
    limits = Limits(high_water=2**20, memory_high_water=4 * 2**20)
    broker = EmbeddedBroker(BrokerConfig(tls=authority.server_files(), limits=limits))
    await broker.start()
    slow = await RawClient.connect(broker.port, "slow", tls=authority.client_context("slow"))
    await slow.subscribe("up/#")
    publishers = [
        await RawClient.connect(broker.port, f"p-{n}", tls=authority.client_context(f"p-{n}")) for n in range(20)
    ]
    work = [asyncio.create_task(_publish_many(client, f"up/{n}")) for n, client in enumerate(publishers)]
    await asyncio.sleep(0.5)
    assert not all(item.done() for item in work)
    assert broker.statistics()["queued_bytes"] < 8 * 2**20
    topics = [message.topic for message in await slow.messages(200)]
    assert {topics.count(f"up/{n}") for n in range(20)} == {10}
    await asyncio.gather(*work)
    assert broker.statistics()["dropped"] == 0
    for client in (slow, *publishers):
        await client.disconnect()
    await broker.stop()


async def _publish_many(client: RawClient, topic: str) -> None:
    for _ in range(10):
        assert await client.publish(topic, bytes(100 * 1024)) == 0


async def test_connections_leave_nothing_behind(broker: EmbeddedBroker, authority: Authority) -> None:
    context = authority.client_context("d-1")
    for _ in range(20):
        client = await RawClient.connect(broker.port, "d-1", tls=context)
        client.abort()
    for _ in range(200):
        if not broker._clients:
            break
        await asyncio.sleep(0.01)
    gc.collect()
    assert not broker._clients
    assert broker.statistics()["sessions"] == 0


async def test_a_second_listener_is_plain_and_local(authority: Authority) -> None:
    broker = EmbeddedBroker(BrokerConfig(tls=authority.server_files(), plain_port=0))
    await broker.start()
    assert broker.plain_port is not None
    assert not await refused(broker.plain_port, None)
    await broker.stop()


async def test_what_cannot_start_says_why(authority: Authority, tmp_path: Path) -> None:
    files = authority.server_files()
    first = EmbeddedBroker(BrokerConfig())
    await first.start()
    wrong: list[tuple[BrokerConfig, str]] = [
        (BrokerConfig(port=first.port), "cannot listen"),
        (BrokerConfig(acl_file=tmp_path / "none"), "ACL file"),
        (BrokerConfig(tls=replace(files, key=tmp_path / "none")), "TLS certificate"),
        (BrokerConfig(tls=TlsFiles(tmp_path / "none", files.cert, files.key)), "TLS authority"),
        (BrokerConfig(tls=replace(files, crl=tmp_path / "none")), "revocation list"),
    ]
    for config, message in wrong:
        with pytest.raises(ConfigError, match=message):
            await EmbeddedBroker(config).start()
    await first.stop()
