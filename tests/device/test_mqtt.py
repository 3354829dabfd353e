"""The device's session against real brokers, and against servers that misbehave in one particular way."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from fleetfed_testing.brokers import Embedded, Mosquitto, RunningBroker, free_port
from fleetfed_testing.proxies import LegacyProxy, Proxy, RawBroker, publish_packet
from fleetfed_testing.waiting import PATIENCE, wait_until

from fleetfed.device.mqtt import Connected, DeviceSession, Disconnected, Event, PublishDone, Received
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.mqtt import granting
from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.errors import SessionBusyError
from fleetfed.shared.mqtt.tls import TlsFiles

E = TypeVar("E")
WILL = Will(topic="state/d-1", payload=b"lost", retain=False)


class Device:
    """A session and its inbox."""

    def __init__(self, config: ConnectionConfig, *subscriptions: str, size: int = 1000, **options: Any) -> None:
        self.inbox: queue.Queue[Event] = queue.Queue(size)
        self.session = DeviceSession(
            config, inbox=self.inbox, subscriptions=subscriptions, rng=random.Random(1), **options
        )
        self.session.start()

    def get(self, kind: type[E], *, ack: bool = True) -> E:
        """The next event, which must be of ``kind``."""
        event = self.inbox.get(timeout=PATIENCE)
        assert isinstance(event, kind), event
        if ack and isinstance(event, Received):
            self.session.ack(event)
        return event

    def collect(self, count: int, *, ack: bool = True) -> list[bytes]:
        """Payloads of the next ``count`` messages; other events are passed over."""
        payloads: list[bytes] = []
        while len(payloads) < count:
            event = self.inbox.get(timeout=PATIENCE)
            if isinstance(event, Received):
                payloads.append(event.payload)
                if ack:
                    self.session.ack(event)
        return payloads

    def confirmed(self, token: int) -> int | None:
        """Wait for the end of ``token``; returns the code."""
        while True:
            event = self.inbox.get(timeout=PATIENCE)
            if isinstance(event, PublishDone) and event.token == token:
                return event.refused_code


MakeDevice = Callable[..., Device]


@pytest.fixture
def device() -> Iterator[MakeDevice]:
    """Starts sessions and closes them; no thread may be left."""
    made: list[Device] = []

    def start(config: ConnectionConfig, *subscriptions: str, connected: bool = True, **options: Any) -> Device:
        made.append(Device(config, *subscriptions, **options))
        if connected:
            made[-1].get(Connected)
        return made[-1]

    yield start
    for each in made:
        each.session.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mqtt-")]


def test_round_trip(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1"), "news/#", connected=False)
    assert one.get(Connected) == Connected(session_present=False)
    token = one.session.publish("news/today", b"hello", retain=True)
    events = [one.inbox.get(timeout=PATIENCE) for _ in range(2)]
    assert PublishDone(token) in events
    received = next(event for event in events if isinstance(event, Received))
    assert (received.topic, received.payload, received.retained) == ("news/today", b"hello", False)
    two = device(any_broker.config("d-2"), "news/#")
    assert two.get(Received).retained
    assert one.session.statistics().version5


def test_a_broker_that_took_long_to_grant_is_asked_again_for_what_it_keeps(
    any_broker: RunningBroker, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granting, "SLOW", 0.0)
    one = device(any_broker.config("d-1"))
    one.session.publish("plan", b"7", retain=True)
    one.get(PublishDone)
    two = device(any_broker.config("d-2"), "plan")
    copies = [two.get(Received) for _ in range(2)]
    assert [(copy.payload, copy.retained) for copy in copies] == [(b"7", True), (b"7", True)]


def test_burst_loses_nothing_and_keeps_order(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1", receive_maximum=8), "burst")
    two = device(any_broker.config("d-2"), max_queued=500)
    payloads = [b"%d" % number + bytes(1000) for number in range(500)]
    tokens = [two.session.publish("burst", each) for each in payloads]
    assert one.collect(500) == payloads
    assert [two.get(PublishDone) for _ in tokens] == [PublishDone(token) for token in tokens]


def test_round_trip_has_no_hidden_delay(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1"), "echo")
    times = []
    for _ in range(30):
        began = time.perf_counter()
        one.session.publish("echo", bytes(500))
        one.collect(1)
        times.append(time.perf_counter() - began)
    assert sorted(times)[15] < 0.02


def test_the_next_node_is_taken_where_one_is_gone(embedded_broker: Callable[..., Embedded], device: MakeDevice) -> None:
    nodes = [embedded_broker(), embedded_broker()]
    others = tuple(f"127.0.0.1:{node.port}" for node in nodes)
    one = device(nodes[0].config("d-1", port=free_port(), others=others), "news")
    (here,) = [node for node in nodes if node.port == one.session.config.port]
    here.stop()
    one.get(Disconnected)
    one.get(Connected)
    assert one.session.config.port == next(node.port for node in nodes if node is not here)
    assert one.confirmed(one.session.publish("news", b"still here")) is None


def test_qos_0_is_done_when_it_left(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1"))
    assert one.confirmed(one.session.publish("beat", b"1", qos=0)) is None


def test_offline_messages_come_after_reconnect(any_broker: RunningBroker, device: MakeDevice) -> None:
    with Proxy(any_broker.port) as proxy:
        one = device(any_broker.config("d-1", port=proxy.port), "news", "dropped")
        two = device(any_broker.config("d-2"))
        target, proxy.target = proxy.target, free_port()
        proxy.cut()
        one.get(Disconnected)
        lost = one.session.publish("news", b"never")
        one.session.unsubscribe("dropped")
        one.session.subscribe("added")
        for number in range(5):
            assert two.confirmed(two.session.publish("news", b"%d" % number)) is None
        proxy.target = target
        assert one.get(Connected) == Connected(session_present=True)
        assert one.collect(5) == [b"0", b"1", b"2", b"3", b"4"]
        for topic in ("dropped", "added"):
            wait_until(lambda: not one.session._commands)
            two.confirmed(two.session.publish(topic, topic.encode()))
        assert one.collect(1) == [b"added"]
        assert one.session.statistics().lost == 1
        assert one.confirmed(one.session.publish("other", b"")) is None
        assert lost not in {each.token for each in list(one.inbox.queue) if isinstance(each, PublishDone)}


def test_unhandled_message_comes_again(any_broker: RunningBroker, device: MakeDevice) -> None:
    with Proxy(any_broker.port) as proxy:
        one = device(any_broker.config("d-1", port=proxy.port), "work")
        two = device(any_broker.config("d-2"))
        two.session.publish("work", b"precious")
        stale = one.get(Received, ack=False)
        proxy.cut()
        one.get(Disconnected)
        one.get(Connected)
        assert one.get(Received, ack=False).payload == b"precious"
        # The confirmation of a copy from a connection that is gone must not confirm anything on this one.
        one.session.ack(stale)
        wait_until(lambda: not one.session._commands)
        proxy.cut()
        one.get(Disconnected)
        one.get(Connected)
        assert one.get(Received).payload == b"precious"
        two.session.publish("work", b"next")
        assert one.get(Received).payload == b"next"


def test_slow_consumer_holds_the_broker_back(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1", receive_maximum=8), "work", size=4)
    two = device(any_broker.config("d-2"), max_queued=200)
    for number in range(200):
        two.session.publish("work", b"%d" % number)
    for _ in range(200):
        two.get(PublishDone)
    time.sleep(0.1)
    assert one.session.statistics().received == 8
    assert one.session.statistics().backlog == 4
    assert one.collect(200) == [b"%d" % number for number in range(200)]


def test_full_inbox_drops_qos_0_and_counts_it(device: MakeDevice) -> None:
    flood = [publish_packet(b"beat", b"%d" % number) for number in range(50)]
    with RawBroker([*flood, publish_packet(b"work", b"kept", mid=1)]) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1")
        one = device(config, "beat", size=10, connected=False)
        wait_until(lambda: one.session.statistics().received == 51)
        one.get(Connected)
        assert one.collect(10) == [*(b"%d" % number for number in range(9)), b"kept"]
        assert one.session.statistics().dropped_qos0 == 41
        wait_until(lambda: broker.confirmed == 1)


def test_consumer_that_is_stuck_loses_the_connection_and_no_message(device: MakeDevice) -> None:
    flood = [publish_packet(b"work", b"%d" % number, mid=number) for number in range(1, 2001)]
    with RawBroker(flood) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", reconnect_cap=0.0
        )
        one = device(config, "work", size=4, connected=False)
        wait_until(lambda: one.session.statistics().backlog > 1000 and not one.session.statistics().connected)
        # Not before the inbox has room again.
        time.sleep(0.1)
        assert broker.accepted == 1
        assert one.session.statistics().backlog < 1500
        one.get(Connected)
        first: list[bytes] = []
        while not isinstance(event := one.inbox.get(timeout=PATIENCE), Disconnected):
            assert isinstance(event, Received)
            first.append(event.payload)
        assert first == [b"%d" % number for number in range(1, len(first) + 1)]
        wait_until(lambda: broker.accepted == 2)


def test_denied_publish_reports_the_brokers_reason(
    start_any_broker: Callable[..., RunningBroker], device: MakeDevice
) -> None:
    broker = start_any_broker(acl="pattern write own/%u/#\n")
    one = device(broker.config("d-1"))
    assert one.confirmed(one.session.publish("own/d-1/state", b"mine")) is None
    assert one.confirmed(one.session.publish("own/d-2/state", b"not mine")) == 0x87
    assert one.confirmed(one.session.publish("own/d-1/state", bytes(300_000))) == 0x95
    assert one.session.statistics().refused == 2


@pytest.mark.parametrize(
    ("answer", "remembered"),
    [
        pytest.param(b"\x20\x03\x00\x84\x00", True, id="connack-0x84"),
        pytest.param(b"\x20\x02\x00\x01", True, id="connack-0x01"),
        pytest.param(b"", False, id="closes"),
    ],
)
def test_old_broker_gets_311(
    answer: bytes, remembered: bool, any_plain_broker: RunningBroker, device: MakeDevice
) -> None:
    with LegacyProxy(any_plain_broker.port, answer) as proxy:
        one = device(any_plain_broker.config("d-1", port=proxy.port), "news")
        assert one.confirmed(one.session.publish("news", b"hello")) is None
        assert not one.session.statistics().version5
        proxy.cut()
        while not isinstance(event := one.inbox.get(timeout=PATIENCE), Connected):
            pass
        assert event.session_present
        assert proxy.versions == ([5, 4, 4] if remembered else [5, 4, 5, 4])


def test_will_is_sent_after_a_cut_and_the_last_word_after_close(any_broker: RunningBroker, device: MakeDevice) -> None:
    watcher = device(any_broker.config("d-9"), "state/+")
    with Proxy(any_broker.port) as proxy:
        one = device(any_broker.config("d-1", port=proxy.port), will=WILL)
        proxy.cut()
        assert watcher.collect(1) == [b"lost"]
        one.get(Disconnected)
        one.get(Connected)
        one.session.close(b"gone")
        assert watcher.collect(1) == [b"gone"]
        wait_until(lambda: proxy.idle)
    watcher.session.publish("state/d-9", b"marker")
    assert watcher.collect(1) == [b"marker"]


@pytest.mark.mosquitto
def test_kill_of_the_broker_ends_tokens_and_sends_no_ghost(
    mosquitto_broker: Callable[..., Mosquitto], device: MakeDevice
) -> None:
    broker = mosquitto_broker(durable=True)
    one = device(broker.config("d-1"), "work")
    two = device(broker.config("d-2", max_inflight=4))
    broker.freeze()
    for number in range(10):
        two.session.publish("work", b"ghost-%d" % number)
    time.sleep(0.05)
    broker.kill()
    two.get(Disconnected)
    broker.start()
    two.get(Connected)
    one.get(Disconnected)
    one.get(Connected)
    two.session.publish("work", b"marker")
    assert one.collect(1) == [b"marker"]
    assert two.session.statistics().lost == 10
    assert two.session.statistics().queued <= 1


@pytest.mark.mosquitto
def test_frozen_broker_is_noticed_by_keepalive(mosquitto_broker: Callable[..., Mosquitto], device: MakeDevice) -> None:
    broker = mosquitto_broker()
    one = device(broker.config("d-1", keepalive=1, connect_timeout=1.0))
    broker.freeze()
    one.get(Disconnected)
    broker.thaw()
    one.get(Connected)


def test_restart_of_the_broker_is_survived(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1"), "work")
    any_broker.restart()
    one.get(Disconnected)
    one.get(Connected)
    one.session.publish("work", b"after")
    assert one.collect(1) == [b"after"]


def test_meter_sees_what_a_counting_proxy_saw(any_broker: RunningBroker, device: MakeDevice) -> None:
    with Proxy(any_broker.port) as proxy:
        one = device(any_broker.config("d-1", port=proxy.port), "work")
        for size in (10, 5_000, 120_000):
            one.session.publish("work", os.urandom(size))
        one.collect(3)
        one.session.publish("nobody/listens", b"")
        wait_until(lambda: one.session.statistics().published == 4)
        proxy.cut()
        wait_until(lambda: one.session.statistics().connects == 2)
        one.session.publish("work", bytes(1000))
        one.collect(1)
        one.session.close()
        wait_until(lambda: proxy.idle)
        count = one.session.meter.snapshot()
    assert one.session.meter.payload().received == 126_010
    assert abs(count.sent - proxy.sent) <= 200
    assert abs(count.received - proxy.received) <= 200
    assert count.sent > 126_010


def test_idle_connection_costs_a_ping_per_keepalive(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1", keepalive=1), "work")
    time.sleep(0.3)
    before = one.session.meter.snapshot()
    time.sleep(3)
    cost = one.session.meter.snapshot() - before
    # 24 bytes of TLS record each way per ping; a check may fall just inside or outside.
    assert 2 * 24 <= cost.sent <= 3 * 24
    assert 2 * 24 <= cost.received <= 3 * 24
    # At 60 s, with 52 bytes of TCP and IP headers on ping, answer and acknowledgement: under half a megabyte a day.
    assert 86400 / 60 * (cost.total / 2 + 3 * 52) < 500_000


def test_too_many_waiting_is_told(device: MakeDevice) -> None:
    with RawBroker([], confirms=False) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1", max_inflight=2)
        one = device(config, max_queued=5)
        for _ in range(5):
            one.session.publish("work", b"")
        with pytest.raises(SessionBusyError):
            one.session.publish("work", b"")
        broker.cut()
        one.get(Disconnected)
        one.get(Connected)
        one.session.publish("work", b"")
        assert one.session.statistics().queued == 1


def test_server_that_never_answers_is_given_up(device: MakeDevice) -> None:
    with RawBroker([], silent=True) as broker:
        config = ConnectionConfig(
            host="127.0.0.1", port=broker.port, client_id="d-1", connect_timeout=0.1, reconnect_cap=0.01
        )
        device(config, connected=False)
        wait_until(lambda: broker.accepted >= 3)


def test_close_without_a_connection_is_prompt(device: MakeDevice) -> None:
    config = ConnectionConfig(host="127.0.0.1", port=free_port(), client_id="d-1")
    one = device(config, connected=False)
    wait_until(lambda: one.session.statistics().failed_connects >= 1)
    began = time.monotonic()
    one.session.close(b"gone", timeout=PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2


def test_close_does_not_wait_for_a_frozen_broker(device: MakeDevice) -> None:
    with RawBroker([], confirms=False) as broker:
        config = ConnectionConfig(host="127.0.0.1", port=broker.port, client_id="d-1", protocol="3.1.1")
        one = device(config, will=WILL)
        began = time.monotonic()
        one.session.close(b"gone", timeout=0.1)
        assert time.monotonic() - began < PATIENCE / 2


def test_topic_that_is_none_is_refused_by_us(any_broker: RunningBroker, device: MakeDevice) -> None:
    one = device(any_broker.config("d-1"))
    for topic in ("work/#", "work/+/x", "", "x" * 2000, "nul\0"):
        with pytest.raises(LocalProtocolError):
            one.session.publish(topic, b"")
    assert one.confirmed(one.session.publish("work", b"")) is None


def test_missing_key_is_told_before_anything_starts(any_broker: RunningBroker) -> None:
    config = any_broker.config("d-1")
    assert config.tls is not None
    broken = TlsFiles(config.tls.ca, config.tls.cert, config.tls.key.with_name("no.key"))
    with pytest.raises(ConfigError, match=r"no\.key"):
        DeviceSession(config.with_defaults(tls=broken), inbox=queue.Queue())
