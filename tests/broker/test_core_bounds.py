"""The broker without I/O: bounds and time, on a clock that the test turns."""

from __future__ import annotations

from fleetfed.broker.config import Limits
from fleetfed.broker.packets import (
    V5,
    ConnAck,
    Disconnect,
    PingReq,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    Will,
)
from fleetfed.broker.properties import Property
from tests.broker.world import KB, Peer, World, check

# ---------------------------------------------------------------------------------------------- bounds


def test_an_offline_queue_is_bounded_and_the_publisher_told() -> None:
    world = World(Limits(max_queued_messages=10))
    sleeper = world.peer("s", clean=False)
    sleeper.subscribe("t")
    sleeper.lose()
    publisher = world.peer("p", version=V5)
    for number in range(1, 16):
        publisher.publish("t", packet_id=number)
    assert [item.code for item in publisher.get(PubAck)] == [0] * 10 + [0x97] * 5
    assert world.statistics["dropped_offline"] == 5
    check(world)


def test_retained_messages_are_bounded_in_number_and_bytes() -> None:
    world = World(Limits(max_retained_messages=2, max_retained_bytes=10 * KB))
    publisher = world.peer("p", version=V5)
    for number, (topic, size) in enumerate([("a", 1), ("b", 1), ("c", 1), ("a", 20 * KB), ("a", 0), ("c", 1)], start=1):
        publisher.publish(topic, bytes(size), packet_id=number, retain=True)
    assert [item.code for item in publisher.get(PubAck)] == [0x10, 0x10, 0x97, 0x97, 0x10, 0x10]
    assert world.statistics["retained_messages"] == 2
    assert world.statistics["retained_refused"] == 2


def test_connections_and_sessions_are_bounded() -> None:
    world = World(Limits(max_connections=2, max_sessions=1))
    world.peer("a")
    refused = Peer(world, "b", version=V5)
    assert [item.code for item in refused.get(ConnAck)] == [0x97]
    assert world.broker.open(None, world.now).closing
    assert world.statistics["connections_refused"] == 2


def test_subscriptions_are_bounded() -> None:
    world = World(Limits(max_subscriptions=2))
    peer = world.peer("a", version=V5)
    peer.send(Subscribe(packet_id=1, subscriptions=tuple(Subscription(topic_filter=item) for item in "abc")))
    assert [item.codes for item in peer.get(SubAck)] == [(0, 0, 0x97)]


def test_a_client_over_its_rate_is_not_read_for_a_while() -> None:
    world = World(Limits(max_message_rate=10))
    peer = world.peer("a")
    for number in range(1, 103):
        peer.publish("t", packet_id=number)
    assert not peer.connection.wants_read
    assert world.statistics["rate_limited"] > 0
    world.pass_time(1)
    assert peer.connection.wants_read


def test_churn_leaves_nothing_behind(world: World) -> None:
    for number in range(200):
        peer = world.peer(f"c-{number}", clean=number % 2 == 0, keepalive=300)
        peer.subscribe(f"t/{number}")
        peer.publish(f"t/{number}")
        peer.lose()
    world.broker.take_dirty()
    assert len(world.broker.router.connections) == 0
    assert len(world.broker._timers) <= 110, "one timer for each of the hundred sessions that stay"
    world.pass_time(8 * 86_400)
    assert len(world.broker._sessions) == 0
    assert len(world.broker._timers) == 1
    assert world.broker.router._tree._root.is_empty()


# ---------------------------------------------------------------------------------------------- time


def test_a_silent_client_is_dropped_after_one_and_a_half_keepalives(world: World) -> None:
    watcher = world.peer("w")
    watcher.subscribe("state")
    silent = world.peer("s", keepalive=20, will=Will(topic="state", payload=b"lost"))
    talking = world.peer("t", keepalive=20)
    for _ in range(3):
        world.pass_time(9.5)
        talking.send(PingReq())
    assert not silent.connection.closing
    world.pass_time(3)
    assert silent.connection.closing
    assert not talking.connection.closing
    assert [item.payload for item in watcher.get(Publish)] == [b"lost"]
    assert world.statistics["keepalive_timeouts"] == 1


def test_version_5_is_told_a_shorter_keepalive(world: World) -> None:
    for asked in (0, 1000):
        peer = Peer(world, "a", version=V5, keepalive=asked)
        (connack,) = peer.get(ConnAck)
        assert connack.properties[Property.SERVER_KEEP_ALIVE] == 300
        world.pass_time(452)
        assert [item.code for item in peer.get(Disconnect)] == [0x8D]
        peer.lose()


def test_who_does_not_say_hello_is_cut_off(world: World) -> None:
    connection = world.broker.open(None, world.now)
    world.pass_time(9)
    assert not connection.closing
    world.pass_time(3)
    assert connection.closing
    connection.connection_lost(world.now)


def test_a_session_ends_when_it_said(world: World) -> None:
    options = {"version": V5, "properties": {Property.SESSION_EXPIRY: 100}, "clean": False}
    for absent, present in ((99, True), (101, False)):
        peer = world.peer("a", **options)
        peer.lose()
        world.pass_time(absent)
        peer = Peer(world, "a", **options)  # type: ignore[arg-type]
        assert [item.session_present for item in peer.get(ConnAck)] == [present]
        peer.lose()


def test_a_delayed_will_and_the_end_of_its_session(world: World) -> None:
    watcher = world.peer("w")
    watcher.subscribe("state")
    options = {"version": V5, "will": Will(topic="state", payload=b"lost", properties={Property.WILL_DELAY: 50})}
    world.peer("a", **options, properties={Property.SESSION_EXPIRY: 100}).lose()
    world.pass_time(49)
    assert watcher.get(Publish) == []
    world.pass_time(2)
    assert len(watcher.get(Publish)) == 1
    # The will does not outlive its session.
    world.peer("b", **options, properties={Property.SESSION_EXPIRY: 10}).lose()
    world.pass_time(11)
    assert len(watcher.get(Publish)) == 1
    # Neither does it come after a return.
    world.peer("c", **options, properties={Property.SESSION_EXPIRY: 100}).lose()
    back = world.peer("c", version=V5, clean=False)
    world.pass_time(200)
    assert watcher.get(Publish) == []
    back.lose()


def test_expired_messages_are_neither_delivered_nor_retained(world: World) -> None:
    publisher = world.peer("p", version=V5)
    packet = Publish(topic="t", payload=b"x", qos=1, packet_id=1, retain=True, properties={Property.MESSAGE_EXPIRY: 10})
    publisher.send(packet)
    world.pass_time(11)
    late = world.peer("l", version=V5)
    late.subscribe("t")
    assert late.get(Publish) == []
    world.pass_time(60)
    assert world.statistics["retained_messages"] == 0
