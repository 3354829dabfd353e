"""The broker without I/O: flow control and identity."""

from __future__ import annotations

import pytest

from fleetfed.broker.acl import parse_acl
from fleetfed.broker.codec import encode
from fleetfed.broker.config import Limits
from fleetfed.broker.connection import Connection
from fleetfed.broker.packets import (
    V3,
    V5,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    Will,
)
from fleetfed.broker.properties import Property
from fleetfed.broker.sessions import Message
from tests.broker.world import KB, Peer, World, check

# ---------------------------------------------------------------------------------------------- flow control


def test_a_thousand_publishers_burst_at_one_slow_subscriber_and_nothing_is_dropped() -> None:
    world = World(Limits(high_water=4 * 2**20, memory_high_water=16 * 2**20, max_inflight=20))
    slow = world.peer("gateway")
    slow.subscribe("up/+")
    publishers = [world.peer(f"d-{number}") for number in range(1000)]
    payload = bytes(100 * KB)
    in_sockets = dict(enumerate(publishers))
    got: set[str] = set()
    for _ in range(1000):
        for number, publisher in list(in_sockets.items()):
            if publisher.connection.wants_read:
                publisher.publish(f"up/{number}", payload)
                del in_sockets[number]
        assert world.statistics["queued_bytes"] <= 16 * 2**20 + 101 * KB
        batch = slow.get(Publish)
        if not batch:
            break
        got |= {item.topic for item in batch}
        slow.send(*(PubAck(packet_id=item.packet_id) for item in batch))
    assert len(got) == 1000
    assert not in_sockets
    assert all(item.get(PubAck) for item in publishers), "all are acknowledged in the end"
    statistics = world.statistics
    assert statistics["dropped"] == 0
    assert statistics["queued_bytes"] == 0
    assert statistics["acknowledgements_delayed"] > 500
    check(world)


def test_above_the_memory_mark_pure_publishers_are_not_read_and_later_go_on() -> None:
    world = World(Limits(high_water=100 * KB, memory_high_water=300 * KB, receive_maximum=100))
    slow = world.peer("s")
    slow.subscribe("t")
    fast = world.peer("p", version=V5)
    stream = b"".join(
        encode(Publish(topic="t", payload=bytes(10 * KB), qos=1, packet_id=number), V5) for number in range(1, 91)
    )
    fast.connection.receive_data(stream, world.now)
    assert not fast.connection.wants_read
    assert world.statistics["queued_bytes"] < 320 * KB
    taken = 0
    while batch := slow.get(Publish):
        taken += len(batch)
        slow.send(*(PubAck(packet_id=item.packet_id) for item in batch))
        if fast.connection.wants_read:
            fast.connection.resume_reading(world.now)
        assert world.statistics["queued_bytes"] < 320 * KB
    assert taken == 90
    assert [item.packet_id for item in fast.get(PubAck)] == list(range(1, 91)), "in the order of the messages"
    check(world)


def test_who_must_acknowledge_is_read_even_when_memory_is_short() -> None:
    world = World(Limits(high_water=10 * KB, memory_high_water=20 * KB))
    a, b = world.peer("a"), world.peer("b")
    a.subscribe("to/a")
    b.subscribe("to/b")
    for number in range(1, 8):
        a.publish("to/b", bytes(5 * KB), packet_id=number)
        b.publish("to/a", bytes(5 * KB), packet_id=number)
        for peer in (a, b):
            peer.read()
    for peer in (a, b):
        messages = [item for item in peer.received if isinstance(item, Publish)]
        peer.send(*(PubAck(packet_id=item.packet_id) for item in messages))
    for _ in range(20):
        for peer in (a, b):
            if peer.connection.wants_read:
                peer.connection.resume_reading(world.now)
            peer.send(*(PubAck(packet_id=item.packet_id) for item in peer.get(Publish)))
    for peer in (a, b):
        peer.read()
        assert len([item for item in peer.received if isinstance(item, PubAck)]) == 7
    assert world.statistics["queued_bytes"] == 0
    check(world)


def test_a_3_1_1_publisher_is_not_read_beyond_its_window() -> None:
    world = World(Limits(high_water=KB, receive_maximum=5))
    slow, fast = world.peer("s"), world.peer("p")
    slow.subscribe("t")
    stream = b"".join(encode(Publish(topic="t", payload=bytes(KB), qos=1, packet_id=n), V3) for n in range(1, 51))
    fast.connection.receive_data(stream, world.now)
    assert not fast.connection.wants_read
    assert world.statistics["messages_received"] < 10
    taken = 0
    while batch := slow.get(Publish):
        taken += len(batch)
        slow.send(*(PubAck(packet_id=item.packet_id) for item in batch))
        fast.connection.resume_reading(world.now)
    assert taken == 50
    assert len(fast.get(PubAck)) == 50


def test_a_version_5_publisher_beyond_the_receive_maximum_is_disconnected() -> None:
    world = World(Limits(high_water=KB, receive_maximum=5))
    slow, fast = world.peer("s"), world.peer("p", version=V5)
    slow.subscribe("t")
    for number in range(1, 12):
        fast.publish("t", bytes(KB), packet_id=number)
    assert [item.code for item in fast.get(Disconnect)] == [0x93]


def test_a_stalled_subscriber_is_disconnected_and_releases_its_publishers() -> None:
    world = World(Limits(high_water=100 * KB, stall_timeout=30, max_queued_bytes=50 * KB))
    dead = world.peer("dead", version=V5, properties={Property.SESSION_EXPIRY: 3600})
    dead.subscribe("t")
    publisher = world.peer("p")
    for number in range(1, 31):
        publisher.publish("t", bytes(10 * KB), packet_id=number)
    before = len(publisher.get(PubAck))
    assert before < 30
    world.pass_time(29)
    assert publisher.get(PubAck) == []
    world.pass_time(2)
    assert [item.code for item in dead.get(Disconnect)] == [0x97]
    assert before + len(publisher.get(PubAck)) == 30
    statistics = world.statistics
    assert statistics["stalled_disconnected"] == 1
    assert statistics["offline_bytes"] <= 50 * KB, "its queue obeys the bounds of an offline session now"
    assert statistics["dropped_offline"] > 0
    assert statistics["queued_bytes"] == 0
    check(world)


def test_a_slow_but_living_subscriber_is_not_disconnected() -> None:
    world = World(Limits(high_water=100 * KB, stall_timeout=30, max_inflight=5))
    slow = world.peer("slow")
    slow.subscribe("t")
    publisher = world.peer("p")
    for number in range(1, 31):
        publisher.publish("t", bytes(10 * KB), packet_id=number)
    for _ in range(30):
        world.pass_time(20)
        batch = slow.get(Publish)
        slow.send(*(PubAck(packet_id=item.packet_id) for item in batch[:1]))
    assert world.statistics["stalled_disconnected"] == 0
    assert not slow.connection.closing


def test_memory_is_bounded_with_many_slow_subscribers(world: World) -> None:
    subscribers = [world.peer(f"s-{number}") for number in range(100)]
    for subscriber in subscribers:
        subscriber.subscribe("t")
        subscriber.connection.pause_writing()
    publisher = world.peer("p")
    for number in range(1, 11):
        publisher.publish("t", bytes(120 * KB), packet_id=number)
    assert world.statistics["queued_bytes"] < 10 * 121 * KB, "a message is held once, however many wait for it"


def test_qos_0_for_a_slow_subscriber_is_dropped_and_counted() -> None:
    world = World(Limits(high_water=20 * KB))
    slow = world.peer("s")
    slow.subscribe("t", qos=0)
    slow.connection.pause_writing()
    publisher = world.peer("p")
    for _ in range(30):
        publisher.publish("t", bytes(KB), qos=0)
    assert world.statistics["dropped_qos0"] > 0
    assert world.statistics["queued_bytes"] <= 22 * KB
    slow.connection.resume_writing(world.now)
    assert len(slow.get(Publish)) + world.statistics["dropped_qos0"] == 30
    check(world)


# ---------------------------------------------------------------------------------------------- identity


def test_the_certificate_names_the_client_whatever_it_says(world: World) -> None:
    victim = world.peer("ignored", identity="d-1", clean=False)
    victim.subscribe("t")
    thief = world.peer("d-1", identity="d-2")
    assert not victim.connection.closing
    thief.publish("t", b"for d-1")
    assert [item.payload for item in victim.get(Publish)] == [b"for d-1"]
    assert {item.client_id for item in world.broker._sessions.values()} == {"d-1", "d-2"}


def test_on_a_plain_listener_another_user_does_not_take_a_session_over(world: World) -> None:
    owner = world.peer("shared")
    thief = Peer(world, "unused", version=V5)
    assert thief.get(ConnAck)
    thief = Peer.__new__(Peer)
    thief.world, thief.version, thief.received, thief.buffer = world, V5, [], b""
    thief.connection = world.broker.open(None, world.now)
    thief.send(Connect(version=V5, client_id="shared", username="mallory"))
    assert [item.code for item in thief.get(ConnAck)] == [0x85]
    assert not owner.connection.closing
    assert world.statistics["theft_refused"] == 1


def test_a_client_without_an_id_is_given_one(world: World) -> None:
    peer = Peer(world, "", version=V5)
    (connack,) = peer.get(ConnAck)
    assert connack.properties[Property.ASSIGNED_CLIENT_ID] == "made-1"
    refused = Peer(world, "", version=V3, clean=False)
    assert [item.code for item in refused.get(ConnAck)] == [2]


@pytest.mark.parametrize(
    "packets",
    [
        [PingReq()],
        [Connect(version=V3, client_id="a"), Connect(version=V3, client_id="a")],
        [Connect(version=V3, client_id="a"), SubAck(packet_id=1, codes=(0,))],
    ],
)
def test_what_no_client_may_say_ends_the_connection(world: World, packets: list[Packet]) -> None:
    connection: Connection = world.broker.open(None, world.now)
    connection.receive_data(b"".join(encode(item, V3) for item in packets), world.now)
    assert connection.closing
    assert world.statistics["protocol_errors"] == 1


def test_many_half_full_stalled_subscribers_cannot_hold_the_publishers_for_ever() -> None:
    world = World(Limits(high_water=100 * KB, memory_high_water=200 * KB, stall_timeout=30))
    dead = [world.peer(f"s-{number}") for number in range(10)]
    for number, peer in enumerate(dead):
        peer.subscribe(f"t/{number}")
    publisher, bystander = world.peer("p"), world.peer("b")
    for number in range(10):
        publisher.publish(f"t/{number}", bytes(30 * KB), packet_id=number + 1)
    assert not publisher.connection.wants_read
    assert not bystander.connection.wants_read
    # Whoever gets something to acknowledge is read again.
    world.broker.router.deliver(world.broker._sessions["b"], _message("x"), 1, False)
    assert bystander.connection.wants_read
    bystander.send(*(PubAck(packet_id=item.packet_id) for item in bystander.get(Publish)))
    world.pass_time(28)
    assert not publisher.connection.wants_read
    world.pass_time(4)
    assert publisher.connection.wants_read
    assert world.statistics["stalled_disconnected"] > 0
    check(world)


def _message(topic: str) -> Message:
    return Message(topic, b"x", 1)


def test_a_will_is_punctual_although_a_timer_of_an_earlier_absence_is_under_way(world: World) -> None:
    watcher = world.peer("w")
    watcher.subscribe("state")
    lasting = {Property.SESSION_EXPIRY: 3600}
    world.peer("a", version=V5, properties=lasting).lose()
    world.pass_time(1)
    will = Will(topic="state", payload=b"lost", properties={Property.WILL_DELAY: 5})
    world.peer("a", version=V5, properties=lasting, clean=False, will=will).lose()
    world.pass_time(6)
    assert len(watcher.get(Publish)) == 1
    world.pass_time(3700)
    assert world.statistics["sessions"] == 1


def test_qos_0_that_nobody_waits_for_is_no_quota_matter(world: World) -> None:
    sleeper = world.peer("s", clean=False)
    sleeper.subscribe("t", qos=0)
    sleeper.lose()
    publisher = world.peer("p", version=V5)
    publisher.publish("t")
    assert [item.code for item in publisher.get(PubAck)] == [0]
    assert world.statistics["offline_bytes"] == 0


def test_subscribing_over_and_over_without_reading_is_bounded() -> None:
    world = World(Limits(max_queued_messages=100))
    publisher = world.peer("p")
    for number in range(50):
        publisher.publish(f"t/{number}", retain=True)
    greedy = world.peer("g", version=V5)
    items = (Subscription(topic_filter="#", qos=1),) * 1000
    greedy.send(Subscribe(packet_id=1, subscriptions=items))
    assert [item.code for item in greedy.get(Disconnect)] == [0x97]
    assert world.statistics["queued_bytes"] == 0


def test_a_name_change_on_a_plain_listener_does_not_inherit_rights() -> None:
    world = World(acl=parse_acl("user alice\ntopic write t\n"))
    codes = []
    for username in ("alice", "mallory"):
        connection = world.broker.open(None, world.now)
        connection.receive_data(
            encode(Connect(version=V5, client_id="x", username=username), V5)
            + encode(Publish(topic="t", payload=b"", qos=1, packet_id=1), V5),
            world.now,
        )
        codes.append(b"".join(connection.data_to_send())[-1])
        connection.connection_lost(world.now)
    assert codes == [0x10, 0x87]


def test_acknowledgements_keep_the_order_of_the_messages() -> None:
    world = World(Limits(high_water=KB))
    takers = {name: world.peer(name) for name in "abc"}
    for name, taker in takers.items():
        taker.subscribe(name)
    publisher = world.peer("p")
    for packet_id, (name, size) in enumerate([("a", 2 * KB), ("b", 2 * KB), ("c", 1)], start=1):
        publisher.publish(name, bytes(size), packet_id=packet_id)
    assert publisher.get(PubAck) == [], "c has room, but its message came last"

    def drain(name: str) -> list[int]:
        taker = takers[name]
        taker.send(*(PubAck(packet_id=item.packet_id) for item in taker.get(Publish)))
        return [item.packet_id for item in publisher.get(PubAck)]

    assert drain("b") == []
    assert drain("a") == [1, 2, 3]
    check(world)


def test_a_shared_group_spares_its_slow_and_absent_members() -> None:
    world = World(Limits(high_water=10 * KB))
    slow, fast, absent = (world.peer(name, clean=False) for name in ("slow", "fast", "absent"))
    for peer in (slow, fast, absent):
        peer.subscribe("$share/g/t")
    absent.lose()
    slow.subscribe("own")
    publisher = world.peer("p")
    publisher.publish("own", bytes(20 * KB))
    for packet_id in range(2, 12):
        publisher.publish("t", packet_id=packet_id)
    assert len(fast.get(Publish)) == 10
    check(world)


def test_qos_2_counts_once_towards_the_receive_maximum() -> None:
    world = World(Limits(high_water=KB, receive_maximum=10))
    slow, publisher = world.peer("s"), world.peer("p", version=V5)
    slow.subscribe("t", qos=2)
    for packet_id in range(1, 11):
        publisher.publish("t", bytes(KB), qos=2, packet_id=packet_id)
    assert publisher.get(Disconnect) == []
    publisher.publish("t", qos=2, packet_id=11)
    assert [item.code for item in publisher.get(Disconnect)] == [0x93]
