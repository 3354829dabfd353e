"""The asyncio session against real brokers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest
from fleetfed_testing.brokers import Embedded, FleetPki, Mosquitto, RunningBroker, free_port
from fleetfed_testing.mqtt_peer import MakePeer
from fleetfed_testing.proxies import Proxy
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.cloud_coordinator.keys.pki import Role
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.mqtt import granting
from fleetfed.shared.mqtt.config import Will
from fleetfed.shared.mqtt.errors import PublishRefusedError, SessionLostError
from fleetfed.shared.mqtt.session import Session


async def test_messages_arrive_in_order_and_in_the_handlers_one_at_a_time(
    any_broker: RunningBroker, peer: MakePeer
) -> None:
    one = await peer(any_broker.config("d-1"), "news/#")
    two = await peer(any_broker.config("d-2"))
    payloads = [b"%d" % number for number in range(50)]
    await asyncio.gather(*(two.session.publish("news/today", each) for each in payloads))
    await one.until(lambda: len(one.messages) == 50)
    assert one.payloads == payloads
    assert {topic for topic, _, _ in one.messages} == {"news/today"}
    assert one.connects == [False]
    assert one.session.statistics().version5


async def test_burst_of_500_loses_nothing(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"), "burst")
    two = await peer(any_broker.config("d-2"))
    payloads = [os.urandom(8) + bytes(2000) for _ in range(500)]
    await asyncio.gather(*(two.session.publish("burst", each) for each in payloads))
    await one.until(lambda: len(one.messages) == 500)
    assert one.payloads == payloads
    assert two.session.statistics().published == 500


async def test_retained_message_comes_marked(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"))
    await one.session.publish("plan", b"7", retain=True)
    two = await peer(any_broker.config("d-2"), "plan")
    await two.until(lambda: two.messages)
    assert two.messages == [("plan", b"7", True)]


async def test_a_broker_that_took_long_to_grant_is_asked_again_for_what_it_keeps(
    any_broker: RunningBroker, peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granting, "SLOW", 0.0)
    one = await peer(any_broker.config("d-1"))
    for topic in ("plan", "state/d-1"):
        await one.session.publish(topic, b"7", retain=True)
    two = await peer(any_broker.config("d-2"), "plan", "state/+")
    await two.until(lambda: len(two.messages) == 3)
    assert sorted(two.messages) == [("plan", b"7", True), ("plan", b"7", True), ("state/d-1", b"7", True)]


async def test_round_trip_has_no_hidden_delay(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"), "echo")
    times = []
    for number in range(30):
        began = time.perf_counter()
        await one.session.publish("echo", b"x" * 500)
        await one.until(lambda count=number + 1: len(one.messages) == count)
        times.append(time.perf_counter() - began)
    # Nagle with delayed acknowledgements costs 40 ms, a loop that polls 50 or more; the path itself costs 0.2.
    assert sorted(times)[15] < 0.02


async def test_offline_messages_come_after_reconnect(
    any_broker: RunningBroker, peer: MakePeer, fleet_pki: FleetPki
) -> None:
    with Proxy(any_broker.port) as proxy:
        one = await peer(any_broker.config("d-1", port=proxy.port), "news")
        two = await peer(any_broker.config("d-2"))
        target, proxy.target = proxy.target, free_port()
        proxy.cut()
        await one.until(lambda: one.losses)
        for number in range(5):
            await two.session.publish("news", b"%d" % number)
        assert not one.session.connected
        with pytest.raises(SessionLostError):
            await one.session.publish("news", b"never")
        proxy.target = target
        await one.until(lambda: len(one.messages) == 5)
        assert one.payloads == [b"0", b"1", b"2", b"3", b"4"]
        assert one.connects == [False, True]


async def test_the_next_node_is_taken_where_one_is_gone(
    embedded_broker: Callable[..., Embedded], peer: MakePeer
) -> None:
    nodes = [embedded_broker(), embedded_broker()]
    others = tuple(f"127.0.0.1:{port}" for port in (nodes[0].port, nodes[1].port))
    one = await peer(nodes[0].config("d-1", port=free_port(), others=others), "news")
    first = one.session.config.port
    (here,) = [node for node in nodes if node.port == first]
    here.stop()
    await one.until(lambda: len(one.connects) == 2)
    assert one.session.config.port == next(node.port for node in nodes if node is not here)
    await one.session.publish("news", b"still here")
    await one.until(lambda: one.payloads == [b"still here"])


async def test_events_alternate_and_precede_their_messages(any_broker: RunningBroker, peer: MakePeer) -> None:
    with Proxy(any_broker.port) as proxy:
        one = await peer(any_broker.config("d-1", port=proxy.port), "plan")
        await one.session.publish("plan", b"1", retain=True)
        for count in (2, 3):
            proxy.cut()
            await one.until(lambda expected=count: len(one.connects) == expected)
        assert len(one.losses) == 2


async def test_denied_publish_raises_with_the_brokers_reason(
    start_any_broker: Callable[..., RunningBroker], peer: MakePeer
) -> None:
    broker = start_any_broker(acl="pattern write own/%u/#\n")
    one = await peer(broker.config("d-1"))
    await one.session.publish("own/d-1/state", b"mine")
    with pytest.raises(PublishRefusedError) as caught:
        await one.session.publish("own/d-2/state", b"not mine")
    assert caught.value.code == 0x87
    assert caught.value.topic == "own/d-2/state"
    assert one.session.statistics().refused == 1
    assert one.session.connected


async def test_slow_handler_holds_the_broker_back(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1", receive_maximum=10), "work")
    two = await peer(any_broker.config("d-2"))
    one.gate.clear()
    payloads = [b"%d" % number for number in range(300)]
    await asyncio.gather(*(two.session.publish("work", each) for each in payloads))
    await asyncio.sleep(0.1)
    assert one.session.statistics().queue_messages_high <= 10
    one.gate.set()
    await one.until(lambda: len(one.messages) == 300)
    assert one.payloads == payloads
    # Mosquitto goes beyond the window that it was told once confirmations come in numbers.
    assert one.session.statistics().queue_messages_high <= 20
    assert one.session.statistics().pauses == 0


async def test_handler_may_publish_while_its_window_is_full(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1", receive_maximum=2), "work")
    two = await peer(any_broker.config("d-2"), "answer")
    one.on_each = lambda payload: one.session.publish("answer", payload)
    await asyncio.gather(*(two.session.publish("work", b"%d" % number) for number in range(100)))
    await two.until(lambda: len(two.messages) == 100)
    assert two.payloads == [b"%d" % number for number in range(100)]


async def test_messages_leave_in_the_order_of_the_calls_whatever_their_quality(
    any_broker: RunningBroker, peer: MakePeer
) -> None:
    one = await peer(any_broker.config("d-1"))
    two = await peer(any_broker.config("d-2"), "work")
    payloads = [b"%d" % number for number in range(20)]
    await asyncio.gather(*(one.session.publish("work", each, qos=number % 2) for number, each in enumerate(payloads)))
    await two.until(lambda: len(two.messages) == len(payloads))
    assert two.payloads == payloads


async def test_will_is_sent_after_a_cut_and_not_after_a_goodbye(any_broker: RunningBroker, peer: MakePeer) -> None:
    watcher = await peer(any_broker.config("d-9"), "state/+")
    with Proxy(any_broker.port) as proxy:
        one = await peer(
            any_broker.config("d-1", port=proxy.port, reconnect_cap=0.0),
            will=Will(topic="state/d-1", payload=b"lost", retain=False),
        )
        proxy.cut()
        await watcher.until(lambda: watcher.messages)
        assert watcher.messages == [("state/d-1", b"lost", False)]
        await one.until(lambda: len(one.connects) == 2)
        await one.stop()
        await eventually(lambda: proxy.idle)
    await watcher.session.publish("state/d-9", b"marker")
    await watcher.until(lambda: b"marker" in watcher.payloads)
    assert watcher.payloads == [b"lost", b"marker"]


async def test_unhandled_message_comes_again_after_a_crash(any_broker: RunningBroker, peer: MakePeer) -> None:
    class Crash(Exception):
        pass

    async def crash(payload: bytes) -> None:
        raise Crash

    one = await peer(any_broker.config("d-1"), "work")
    two = await peer(any_broker.config("d-2"))
    one.on_each = crash
    await two.session.publish("work", b"precious")
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(one.task, PATIENCE)
    assert caught.group_contains(Crash, depth=1)
    again = await peer(any_broker.config("d-1"), "work")
    await again.until(lambda: again.messages)
    assert again.payloads == [b"precious"]
    assert again.connects == [True]


@pytest.mark.mosquitto
async def test_kill_of_the_broker_loses_loudly_and_sends_no_ghost(
    mosquitto_broker: Callable[..., Mosquitto], peer: MakePeer
) -> None:
    broker = mosquitto_broker(durable=True)
    one = await peer(broker.config("d-1"), "work")
    two = await peer(broker.config("d-2", max_inflight=4))
    broker.freeze()
    waiting = [asyncio.create_task(two.session.publish("work", b"ghost-%d" % number)) for number in range(10)]
    await asyncio.sleep(0.05)
    assert two.session.statistics().awaiting == 4
    broker.kill()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE)
    assert all(isinstance(result, SessionLostError) for result in results)
    broker.start()
    await one.until(lambda: len(one.connects) == 2)
    await asyncio.wait_for(two.session.wait_connected(), PATIENCE)
    await two.session.publish("work", b"marker")
    await one.until(lambda: b"marker" in one.payloads)
    assert one.payloads == [b"marker"]


@pytest.mark.mosquitto
async def test_frozen_broker_is_noticed_by_keepalive(
    mosquitto_broker: Callable[..., Mosquitto], peer: MakePeer
) -> None:
    broker = mosquitto_broker()
    one = await peer(broker.config("d-1", keepalive=1, connect_timeout=1.0))
    broker.freeze()
    await one.until(lambda: one.losses)
    broker.thaw()
    await one.until(lambda: len(one.connects) == 2)


async def test_restart_of_the_broker_is_survived(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"), "work")
    await asyncio.to_thread(any_broker.restart)
    await one.until(lambda: len(one.connects) == 2)
    await one.session.publish("work", b"after")
    await one.until(lambda: one.messages)
    assert one.payloads == [b"after"]


async def test_meter_sees_what_a_counting_proxy_saw(any_broker: RunningBroker, peer: MakePeer) -> None:
    with Proxy(any_broker.port) as proxy:
        one = await peer(any_broker.config("d-1", port=proxy.port), "work")
        for size in (10, 5_000, 120_000):
            await one.session.publish("work", os.urandom(size))
        await one.until(lambda: len(one.messages) == 3)
        # Its confirmation comes after ours of the three, which would come again otherwise.
        await one.session.publish("nobody/listens", b"")
        proxy.cut()
        await one.until(lambda: len(one.connects) == 2)
        await one.session.publish("work", bytes(1000))
        await one.until(lambda: len(one.messages) == 4)
        await one.stop()
        await eventually(lambda: proxy.idle)
        count = one.session.meter.snapshot()
    assert one.session.meter.payload().sent == one.session.meter.payload().received == 126_010
    # The last confirmation may have been on its way when the line was cut, and a FIN counts as a byte.
    assert abs(count.sent - proxy.sent) <= 200
    assert abs(count.received - proxy.received) <= 200
    assert 126_010 < count.sent < 126_010 + 12_000


async def test_message_that_is_too_large_is_refused_here(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"), "work")
    with pytest.raises(PublishRefusedError) as caught:
        await one.session.publish("work", bytes(300_000))
    assert caught.value.code == 0x95
    with pytest.raises(LocalProtocolError):
        await one.session.publish("work/#", b"")
    await one.session.publish("work", b"fine")
    await one.until(lambda: one.messages)
    assert one.losses == []


async def test_subscriptions_change_and_survive(any_broker: RunningBroker, peer: MakePeer) -> None:
    with Proxy(any_broker.port) as proxy:
        one = await peer(any_broker.config("d-1", port=proxy.port), "a", "b")
        two = await peer(any_broker.config("d-2"))
        await one.session.subscribe(["c"] + [f"many/{number}" for number in range(20)])
        await one.session.unsubscribe(["a"])
        target, proxy.target = proxy.target, free_port()
        proxy.cut()
        await one.until(lambda: one.losses)
        with pytest.raises(SessionLostError):
            await one.session.unsubscribe(["b"])
        with pytest.raises(SessionLostError):
            await one.session.subscribe(["d"])
        proxy.target = target
        await one.until(lambda: len(one.connects) == 2)
        for topic in ("a", "b", "c", "d", "many/19"):
            await two.session.publish(topic, topic.encode())
        await one.until(lambda: b"many/19" in one.payloads)
        assert one.payloads == [b"c", b"d", b"many/19"]


async def test_publishes_leave_in_the_order_of_the_calls(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1", max_inflight=3), "work")
    payloads = [b"%d" % number for number in range(200)]
    await asyncio.gather(*(one.session.publish("work", each) for each in payloads))
    await one.until(lambda: len(one.messages) == 200)
    assert one.payloads == payloads


@pytest.mark.mosquitto
async def test_no_file_stays_open(mosquitto_broker: Callable[..., Mosquitto], peer: MakePeer) -> None:
    broker = mosquitto_broker()
    first = await peer(broker.config("d-1"), "work")
    await first.stop()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        one = await peer(broker.config("d-1"), "work")
        await one.stop()
    assert len(os.listdir("/proc/self/fd")) == files


async def test_missing_key_is_told_before_anything_starts(any_broker: RunningBroker, fleet_pki: FleetPki) -> None:
    config = any_broker.config("d-1")
    assert config.tls is not None
    broken = config.with_defaults(
        tls=type(config.tls)(config.tls.ca, config.tls.cert, config.tls.key.with_name("no.key"))
    )
    with pytest.raises(ConfigError, match=r"no\.key"):
        Session(broken)


async def test_gateway_certificate_works_too(any_broker: RunningBroker, peer: MakePeer) -> None:
    gateway = await peer(any_broker.config("g-1", Role.GATEWAY), "work")
    await gateway.session.publish("work", b"x")
    await gateway.until(lambda: gateway.messages)


async def test_qos_0_returns_when_it_left(any_broker: RunningBroker, peer: MakePeer) -> None:
    one = await peer(any_broker.config("d-1"), "beat")
    await asyncio.gather(*(one.session.publish("beat", b"%d" % number, qos=0) for number in range(100)))
    await one.until(lambda: len(one.messages) == 100)
    assert one.session.statistics().awaiting == 0
