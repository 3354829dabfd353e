"""The asyncio session against servers that misbehave in one particular way."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fleetfed_testing.brokers import Embedded, FleetPki, Mosquitto, RunningBroker
from fleetfed_testing.mqtt_peer import MakePeer
from fleetfed_testing.proxies import BreakingBroker, LegacyProxy, Proxy, RawBroker, publish_packet
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.errors import SessionLostError


@pytest.mark.parametrize(
    ("answer", "remembered"),
    [
        pytest.param(b"\x20\x03\x00\x84\x00", True, id="connack-0x84"),
        pytest.param(b"\x20\x02\x00\x01", True, id="connack-0x01"),
        pytest.param(b"", False, id="closes"),
    ],
)
async def test_old_broker_gets_311(
    answer: bytes, remembered: bool, any_plain_broker: RunningBroker, peer: MakePeer
) -> None:
    with LegacyProxy(any_plain_broker.port, answer) as proxy:
        one = await peer(any_plain_broker.config("d-1", port=proxy.port), "news")
        await one.session.publish("news", b"hello")
        await one.until(lambda: one.messages)
        assert not one.session.statistics().version5
        assert proxy.versions == [5, 4]
        proxy.cut()
        await one.until(lambda: len(one.connects) == 2)
        assert one.connects == [False, True]
        assert proxy.versions == ([5, 4, 4] if remembered else [5, 4, 5, 4])


async def test_reading_stops_for_a_broker_that_ignores_the_window(peer: MakePeer) -> None:
    flood = [publish_packet(b"work", b"%05d" % number + bytes(5000), mid=number) for number in range(1, 3001)]
    with RawBroker(flood) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", queue_messages=32, receive_maximum=8
        )
        one = await peer(config, "work")
        one.gate.clear()
        await asyncio.sleep(0.2)
        stopped = one.session.statistics()
        assert stopped.pauses == 1
        assert stopped.queue_messages_high == 32
        one.gate.set()
        await one.until(lambda: len(one.messages) == 3000)
        assert [int(payload[:5]) for payload in one.payloads] == list(range(1, 3001))
        assert one.session.statistics().queue_messages_high == 32
        await eventually(lambda: broker.confirmed == 3000)


async def test_handler_may_publish_while_reading_is_stopped(peer: MakePeer) -> None:
    flood = [publish_packet(b"work", bytes(5000), mid=number) for number in range(1, 301)]
    with RawBroker(flood) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", queue_messages=8, receive_maximum=8
        )
        one = await peer(config, "work", connected=False)
        one.on_each = lambda payload: one.session.publish("answer", b"x")
        await one.until(lambda: len(one.messages) == 300)
        assert one.session.statistics().published == 300


async def test_a_flood_of_confirmations_leaves_others_their_turn(peer: MakePeer) -> None:
    noise = [b"\xd0\x00" * 50_000] * 20
    with RawBroker([*noise, publish_packet(b"work", b"after", mid=1)]) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1")
        one = await peer(config, "work", connected=False)
        turns = 0
        while not one.messages:
            await asyncio.sleep(0)
            turns += 1
        # A million packets, at most some hundreds in one turn of the loop.
        assert turns > 1000
        assert one.payloads == [b"after"]


async def test_a_number_that_waits_for_its_confirmation_is_not_given_again(peer: MakePeer) -> None:
    with RawBroker([], confirms=False) as broker:
        one = await peer(ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1"))
        waiting = [asyncio.create_task(one.session.publish("work", b"1"))]
        await eventually(lambda: one.session.statistics().awaiting == 1)
        link = one.session._link
        # As after 65535 others.
        link._client._last_mid = next(iter(link._unconfirmed)) - 1
        waiting.append(asyncio.create_task(one.session.publish("work", b"2")))
        await eventually(lambda: one.session.statistics().awaiting == 2)
        await one.stop()
        assert all(
            isinstance(each, SessionLostError) for each in await asyncio.gather(*waiting, return_exceptions=True)
        )


@pytest.mark.parametrize(
    "answer",
    [None, b"\x20\xff\xff\xff\xff\xff\xff", b"\x30\xff\xff\xff\x7f", b"\x00\x00"],
    ids=["a reset", "a length without end", "a packet beyond measure", "no packet of MQTT"],
)
async def test_a_broker_that_breaks_before_it_answers_is_tried_again(peer: MakePeer, answer: bytes | None) -> None:
    with BreakingBroker(answer) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", reconnect_cap=0.05)
        one = await peer(config, connected=False)
        await eventually(lambda: broker.connections > 4 or one.task.done())
        assert not one.task.done()
        assert one.session.statistics().failed_connects >= 4


async def test_a_certificate_that_the_broker_refuses_is_tried_again(tmp_path: Path, peer: MakePeer) -> None:
    ours, theirs = FleetPki(tmp_path / "ours"), FleetPki(tmp_path / "theirs")
    stranger = theirs.client("d-1")
    broker = Mosquitto(tmp_path / "broker", ours)
    try:
        tls = dataclasses.replace(ours.client("d-1"), cert=stranger.cert, key=stranger.key)
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", tls=tls, connect_timeout=5.0, reconnect_cap=0.05
        )
        one = await peer(config, connected=False)
        await eventually(lambda: one.session.statistics().failed_connects > 8 or one.task.done())
        assert not one.task.done()
    finally:
        broker.stop()


async def test_full_queue_drops_qos_0_and_counts_it(peer: MakePeer) -> None:
    flood = [publish_packet(b"beat", b"%d" % number) for number in range(100)]
    flood.append(publish_packet(b"work", b"kept", mid=1))
    with RawBroker(flood) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", queue_messages=20, receive_maximum=8
        )
        one = await peer(config, "beat", connected=False)
        one.gate.clear()
        await asyncio.wait_for(one.session.wait_connected(), PATIENCE)
        await asyncio.sleep(0.1)
        one.gate.set()
        await one.until(lambda: b"kept" in one.payloads)
        dropped = one.session.statistics().dropped_qos0
        assert dropped + len(one.messages) == 101
        assert len(one.messages) >= 20


async def test_topic_that_is_not_text_is_confirmed_and_counted(peer: MakePeer) -> None:
    with RawBroker([publish_packet(b"\xff\xfe", b"?", mid=1), publish_packet(b"work", b"fine", mid=2)]) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1")
        one = await peer(config, "work")
        await one.until(lambda: one.messages)
        assert one.session.statistics().malformed == 1
        await eventually(lambda: broker.confirmed == 2)


async def test_cancelled_publish_keeps_its_place_in_the_window(peer: MakePeer) -> None:
    with RawBroker([], confirms=False) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", max_inflight=2)
        one = await peer(config)
        tasks = [asyncio.create_task(one.session.publish("work", b"x")) for _ in range(4)]
        await eventually(lambda: one.session.statistics().awaiting == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert one.session.statistics().awaiting == 2
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.session.publish("work", b"y"), 0.05)


async def test_server_that_never_answers_is_given_up(peer: MakePeer) -> None:
    with RawBroker([], silent=True) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", connect_timeout=0.1, reconnect_cap=0.01
        )
        one = await peer(config, connected=False)
        await eventually(lambda: broker.accepted >= 3)
        await one.stop()
        assert one.session.statistics().failed_connects >= 2


async def test_nobody_listening_is_retried_until_somebody_does(
    embedded_broker: Callable[..., Embedded], peer: MakePeer
) -> None:
    broker = embedded_broker()
    broker.stop()
    one = await peer(broker.config("d-1", reconnect_cap=0.05), connected=False)
    await eventually(lambda: one.session.statistics().failed_connects >= 2)
    broker.start()
    await one.until(lambda: one.connects)


async def test_server_with_another_name_is_not_trusted(any_broker: RunningBroker, peer: MakePeer) -> None:
    # Also this machine, and not in the broker's certificate.
    with socket.create_server(("127.0.0.2", 0)) as listener, Proxy(any_broker.port) as proxy:
        proxy.attach(listener)
        config = any_broker.config("d-1", port=listener.getsockname()[1]).with_defaults(host="127.0.0.2")
        one = await peer(config, connected=False)
        await eventually(lambda: one.session.statistics().failed_connects >= 2)
        assert not one.connects
        assert one.session.meter.snapshot().total > 0
