"""What clients may rely on, asked of the embedded broker and of Mosquitto: both must give the same answer.

Everything goes over TLS with client certificates; each probe has topics and clients of its own.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from fleetfed.broker.packets import PubAck, Publish, PubRec, PubRel, SubAck, Subscribe, Subscription, Will
from fleetfed.broker.properties import Property
from tests.broker.conftest import Running

V3, V5 = 4, 5
_numbers = itertools.count(1)


@pytest.fixture
def topic() -> str:
    return f"probe/{next(_numbers)}"


@pytest.fixture
def name() -> str:
    return f"c{next(_numbers)}"


@pytest.fixture
def other() -> str:
    return f"c{next(_numbers)}"


# ---------------------------------------------------------------------------------------------- MQTT 3.1.1


@pytest.mark.parametrize("version", [V3, V5])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_message_arrives_once_with_its_qos(
    probed: Running, topic: str, name: str, version: int, qos: int
) -> None:
    client = await probed.client(name, version=version)
    assert await client.subscribe(topic, qos=2) == (2,)
    assert await client.publish(topic, b"payload", qos=qos) == 0
    message = await client.message()
    assert (message.topic, message.payload, message.qos, message.retain) == (topic, b"payload", qos, False)
    assert await client.waiting() == []
    await client.disconnect()


async def test_the_lower_qos_wins(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(topic, qos=0)
    await client.publish(topic, qos=1)
    assert (await client.message()).qos == 0
    await client.disconnect()


async def test_retained_is_kept_replaced_and_cleared(probed: Running, topic: str, name: str, other: str) -> None:
    publisher = await probed.client(name)
    await publisher.publish(topic, b"one", retain=True)
    await publisher.publish(topic, b"two", retain=True)
    late = await probed.client(other)
    await late.subscribe(topic)
    message = await late.message()
    assert (message.payload, message.retain) == (b"two", True)
    await publisher.publish(topic, b"", retain=True)
    assert (await late.message()).payload == b""
    await late.unsubscribe(topic)
    await late.subscribe(topic)
    assert await late.waiting() == []
    await late.disconnect()
    await publisher.disconnect()


async def test_a_live_retained_message_is_not_flagged(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(topic)
    await client.publish(topic, b"now", retain=True)
    assert not (await client.message()).retain
    await client.publish(topic, b"", retain=True)
    await client.disconnect()


async def test_who_subscribes_nothing_receives_nothing(probed: Running, topic: str, name: str, other: str) -> None:
    publisher = await probed.client(name)
    await publisher.publish(topic, b"kept", retain=True)
    watcher = await probed.client(name + "-w")
    await watcher.subscribe("#")
    silent = await probed.client(other)
    await publisher.publish(topic, b"live")
    assert await silent.waiting() == []
    await publisher.publish(topic, b"", retain=True)
    for client in (silent, watcher, publisher):
        await client.disconnect()


@pytest.mark.parametrize("count", [100, 1500])
async def test_messages_wait_for_an_offline_session(
    probed: Running, topic: str, name: str, other: str, count: int
) -> None:
    sleeper = await probed.client(name, clean=False)
    await sleeper.subscribe(topic)
    await sleeper.disconnect()
    publisher = await probed.client(other)
    for number in range(count):
        await publisher.send(Publish(topic=topic, payload=b"%d" % number, qos=1, packet_id=number % 60_000 + 1))
    for _ in range(count):
        await publisher.expect(PubAck)
    await publisher.publish(topic, b"qos 0 does not wait", qos=0)
    sleeper = await probed.client(name, clean=False)
    assert sleeper.connack is not None
    assert sleeper.connack.session_present
    payloads = [message.payload for message in await sleeper.messages(count)]
    assert payloads == [b"%d" % number for number in range(count)]
    assert await sleeper.waiting() == []
    await sleeper.disconnect()
    await (await probed.client(name)).disconnect()
    await publisher.disconnect()


@pytest.mark.parametrize("version", [V3, V5])
async def test_what_was_not_acknowledged_comes_again(
    probed: Running, topic: str, name: str, other: str, version: int
) -> None:
    properties = {Property.SESSION_EXPIRY: 60} if version == V5 else {}
    taker = await probed.client(name, clean=False, version=version, properties=properties)
    await taker.subscribe(topic)
    publisher = await probed.client(other)
    for number in range(5):
        await publisher.publish(topic, b"%d" % number)
    first = await taker.messages(5, ack=False)
    assert not any(message.dup for message in first)
    taker.abort()
    taker = await probed.client(name, clean=False, version=version, properties=properties)
    again = await taker.messages(5)
    assert [(message.payload, message.dup) for message in again] == [(b"%d" % number, True) for number in range(5)]
    assert [message.packet_id for message in again] == [message.packet_id for message in first]
    await taker.ping()
    await taker.disconnect()
    taker = await probed.client(name, clean=False, version=version, properties=properties)
    assert await taker.waiting() == []
    await taker.disconnect()
    await publisher.disconnect()


async def test_qos_2_resumes_at_its_release(probed: Running, topic: str, name: str, other: str) -> None:
    taker = await probed.client(name, clean=False)
    await taker.subscribe(topic, qos=2)
    publisher = await probed.client(other)
    await publisher.publish(topic, b"once", qos=2)
    message = await taker.message(ack=False)
    await taker.send(PubRec(packet_id=message.packet_id))
    await taker.expect(PubRel)
    taker.abort()
    taker = await probed.client(name, clean=False)
    assert (await taker.expect(PubRel)).packet_id == message.packet_id
    assert await taker.waiting() == []
    await taker.disconnect()
    await publisher.disconnect()


async def test_a_qos_2_duplicate_is_not_routed_twice(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(topic)
    packet = Publish(topic=topic, payload=b"once", qos=2, packet_id=9)
    await client.send(packet)
    await client.expect(PubRec)
    await client.send(Publish(topic=topic, payload=b"once", qos=2, packet_id=9, dup=True))
    await client.expect(PubRec)
    await client.send(PubRel(packet_id=9))
    assert (await client.message()).payload == b"once"
    assert await client.waiting() == []
    await client.disconnect()


async def test_the_will_is_sent_when_the_connection_breaks(probed: Running, topic: str, name: str, other: str) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    dying = await probed.client(name, will=Will(topic=topic, payload=b"lost", qos=1, retain=True))
    dying.abort()
    assert (await watcher.message()).payload == b"lost"
    await watcher.unsubscribe(topic)
    await watcher.subscribe(topic)
    assert (await watcher.message()).retain
    await watcher.publish(topic, b"", retain=True)
    await watcher.disconnect()


async def test_no_will_after_a_goodbye(probed: Running, topic: str, name: str, other: str) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    leaving = await probed.client(name, will=Will(topic=topic, payload=b"lost", qos=1))
    await leaving.disconnect()
    assert await watcher.waiting() == []
    await watcher.disconnect()


async def test_a_takeover_closes_the_old_and_sends_its_will(probed: Running, topic: str, name: str, other: str) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    old = await probed.client(name, will=Will(topic=topic, payload=b"taken", qos=1))
    new = await probed.client(name)
    await old.closed()
    assert (await watcher.message()).payload == b"taken"
    await new.ping()
    await new.disconnect()
    await watcher.disconnect()


async def test_many_retained_reach_one_wildcard(probed: Running, topic: str, name: str, other: str) -> None:
    count = 3000
    publisher = await probed.client(name)
    packets = [
        Publish(topic=f"{topic}/{number}", payload=b"%d" % number, qos=1, retain=True, packet_id=number + 1)
        for number in range(count)
    ]
    for start in range(0, count, 20):
        await publisher.send(*packets[start : start + 20])
        for _ in packets[start : start + 20]:
            await publisher.expect(PubAck)
    taker = await probed.client(other)
    await taker.subscribe(f"{topic}/+")
    found = {message.topic for message in await taker.messages(count)}
    assert len(found) == count
    await publisher.send(*(Publish(topic=packet.topic, payload=b"", retain=True) for packet in packets))
    await publisher.disconnect()
    await taker.disconnect()


async def test_overlapping_subscriptions_give_a_copy_each_at_most(probed: Running, topic: str, name: str) -> None:
    """MQTT 3.1.1 section 3.3.5: Mosquitto gives one in all, and since 2.1 one for each."""
    client = await probed.client(name)
    await client.subscribe(f"{topic}/+", qos=0)
    await client.subscribe(f"{topic}/#", qos=1)
    await client.publish(f"{topic}/a", qos=1)
    assert len(await client.waiting()) in ((1,) if probed.kind == "embedded" else (1, 2))
    await client.disconnect()


async def test_hash_selects_the_parent_and_not_system_topics(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(f"{topic}/#")
    await client.publish(topic, b"parent")
    assert (await client.message()).payload == b"parent"
    await client.unsubscribe(f"{topic}/#")
    await client.subscribe("#", "+/broker/uptime")
    assert not [message for message in await client.waiting() if message.topic.startswith("$")]
    await client.disconnect()


async def test_system_topics_say_how_many_are_connected(probed: Running, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe("$SYS/broker/clients/connected")
    assert int(bytes((await client.message()).payload)) >= 0
    await client.disconnect()


async def test_unsubscribed_means_silence(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(topic)
    await client.unsubscribe(topic)
    await client.publish(topic)
    assert await client.waiting() == []
    await client.disconnect()


async def test_a_clean_session_forgets(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, clean=False)
    await client.subscribe(topic)
    await client.disconnect()
    client = await probed.client(name, clean=True)
    assert client.connack is not None
    assert not client.connack.session_present
    await client.publish(topic)
    assert await client.waiting() == []
    await client.disconnect()


async def test_a_large_message_passes(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name)
    await client.subscribe(topic)
    payload = bytes(range(256)) * 4096
    await client.publish(topic, payload)
    assert (await client.message()).payload == payload
    await client.disconnect()


@pytest.mark.parametrize("version", [V3, V5])
async def test_a_packet_over_the_limit_ends_the_connection(
    probed: Running, topic: str, name: str, version: int
) -> None:
    client = await probed.client(name, version=version)
    # Only the header: the broker must not wait for the rest.
    client.writer.write(b"\x30\xff\xff\xff\x7f")
    code = await client.closed()
    if version == V5 and probed.kind == "embedded":
        assert code == 0x95
    client.abort()


async def test_invalid_filters_are_refused(probed: Running, name: str) -> None:
    client = await probed.client(name)
    bad = ("a/#/b", "a+", "#a")
    await client.send(Subscribe(packet_id=1, subscriptions=tuple(Subscription(topic_filter=item) for item in bad)))
    # Mosquitto refuses by closing, the embedded broker one by one.
    if probed.kind == "embedded":
        assert (await client.expect(SubAck)).codes == (0x80, 0x80, 0x80)
    else:
        await client.closed()
    client.abort()


@pytest.mark.slow
async def test_a_silent_client_is_dropped_and_its_will_sent(probed: Running, topic: str, name: str, other: str) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    await probed.client(name, keepalive=2, will=Will(topic=topic, payload=b"lost", qos=1))
    # Mosquitto needs up to nine seconds for this.
    assert (await watcher.message()).payload == b"lost"
    await watcher.disconnect()


# ---------------------------------------------------------------------------------------------- MQTT 5


async def test_connack_says_what_the_broker_takes(probed: Running, name: str) -> None:
    client = await probed.client(name, version=V5)
    assert client.connack is not None
    assert client.connack.properties[Property.MAXIMUM_PACKET_SIZE] == 2 * 2**20
    await client.disconnect()


async def test_a_session_lives_as_long_as_it_asked(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5, properties={Property.SESSION_EXPIRY: 60})
    await client.subscribe(topic)
    await client.disconnect()
    client = await probed.client(name, version=V5, clean=False, properties={Property.SESSION_EXPIRY: 60})
    assert client.connack is not None
    assert client.connack.session_present
    # The client may end it early.
    await client.disconnect(properties={Property.SESSION_EXPIRY: 0})
    client = await probed.client(name, version=V5, clean=False)
    assert client.connack is not None
    assert not client.connack.session_present
    await client.disconnect()
    # Without an expiry there is nothing to come back to.
    client = await probed.client(name, version=V5, clean=False)
    assert client.connack is not None
    assert not client.connack.session_present
    await client.disconnect()


async def test_a_message_expires_in_the_queue(probed: Running, topic: str, name: str, other: str) -> None:
    lasting = {Property.SESSION_EXPIRY: 60}
    client = await probed.client(name, version=V5, properties=lasting)
    await client.subscribe(topic)
    await client.disconnect()
    publisher = await probed.client(other, version=V5)
    await publisher.publish(topic, b"short", properties={Property.MESSAGE_EXPIRY: 1})
    await publisher.publish(topic, b"long", properties={Property.MESSAGE_EXPIRY: 100})
    await asyncio.sleep(2.1)
    client = await probed.client(name, version=V5, clean=False, properties=lasting)
    message = await client.message()
    assert message.payload == b"long"
    left = message.properties[Property.MESSAGE_EXPIRY]
    assert isinstance(left, int)
    assert 95 <= left <= 99
    assert await client.waiting() == []
    await client.disconnect()
    await publisher.disconnect()


async def test_properties_are_forwarded_unaltered(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5)
    await client.subscribe(topic)
    properties = {
        Property.PAYLOAD_FORMAT: 1,
        Property.CONTENT_TYPE: "text/plain",
        Property.RESPONSE_TOPIC: "answer/here",
        Property.CORRELATION_DATA: b"\0\1\2",
        Property.USER_PROPERTY: (("a", "1"), ("b", "2"), ("a", "3")),
    }
    await client.publish(topic, b"x", properties=properties)
    assert dict((await client.message()).properties) == properties
    await client.disconnect()


async def test_no_local(probed: Running, topic: str, name: str, other: str) -> None:
    client = await probed.client(name, version=V5)
    await client.subscribe(topic, no_local=True)
    another = await probed.client(other, version=V5)
    await client.publish(topic, b"own")
    await another.publish(topic, b"other")
    assert [message.payload for message in await client.waiting()] == [b"other"]
    await client.disconnect()
    await another.disconnect()


async def test_retain_as_published(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5)
    await client.subscribe(topic, retain_as_published=True)
    await client.publish(topic, b"x", retain=True)
    assert (await client.message()).retain
    await client.publish(topic, b"", retain=True)
    await client.disconnect()


async def test_retain_handling(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5)
    await client.publish(topic, b"kept", retain=True)
    await client.subscribe(topic, retain_handling=2)
    assert await client.waiting() == []
    await client.subscribe(topic, retain_handling=1)
    assert await client.waiting() == [], "it was subscribed already"
    await client.unsubscribe(topic)
    await client.subscribe(topic, retain_handling=1)
    assert (await client.message()).payload == b"kept"
    await client.subscribe(topic, retain_handling=0)
    assert (await client.message()).payload == b"kept"
    await client.publish(topic, b"", retain=True)
    await client.disconnect()


async def test_the_clients_packet_limit_holds(probed: Running, topic: str, name: str, other: str) -> None:
    client = await probed.client(name, version=V5, properties={Property.MAXIMUM_PACKET_SIZE: 1000})
    await client.subscribe(topic)
    publisher = await probed.client(other, version=V5)
    await publisher.publish(topic, bytes(2000))
    await publisher.publish(topic, b"small")
    assert [bytes(message.payload) for message in await client.waiting()] == [b"small"]
    await client.disconnect()
    await publisher.disconnect()


async def test_receive_maximum_bounds_what_is_in_flight(probed: Running, topic: str, name: str, other: str) -> None:
    client = await probed.client(name, version=V5, properties={Property.RECEIVE_MAXIMUM: 3})
    await client.subscribe(topic)
    publisher = await probed.client(other, version=V5)
    for number in range(10):
        await publisher.publish(topic, b"%d" % number)
    first = await client.waiting()
    assert [bytes(message.payload) for message in first] == [b"0", b"1", b"2"]
    await client.send(*(PubAck(packet_id=message.packet_id) for message in first))
    rest = await client.messages(7)
    assert [bytes(message.payload) for message in rest] == [b"%d" % number for number in range(3, 10)]
    await client.disconnect()
    await publisher.disconnect()


async def test_a_delayed_will_comes_late_and_not_after_a_return(
    probed: Running, topic: str, name: str, other: str
) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    options = {
        "version": V5,
        "properties": {Property.SESSION_EXPIRY: 60},
        "will": Will(topic=topic, payload=b"late", qos=1, properties={Property.WILL_DELAY: 1}),
    }
    dying = await probed.client(name, **options)
    dying.abort()
    assert await watcher.waiting() == []
    back = await probed.client(name, clean=False, **options)
    await asyncio.sleep(2.2)
    assert await watcher.waiting() == [], "it came back in time"
    back.abort()
    message = await watcher.message()
    assert message.payload == b"late"
    assert Property.WILL_DELAY not in message.properties
    await watcher.disconnect()


async def test_disconnect_can_ask_for_the_will(probed: Running, topic: str, name: str, other: str) -> None:
    watcher = await probed.client(other)
    await watcher.subscribe(topic)
    leaving = await probed.client(name, version=V5, will=Will(topic=topic, payload=b"lost", qos=1))
    await leaving.disconnect(code=4)
    assert (await watcher.message()).payload == b"lost"
    await watcher.disconnect()


async def test_nobody_listening_is_told(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5)
    assert await client.publish(topic) == 0x10
    await client.subscribe(topic)
    assert await client.publish(topic) == 0
    await client.disconnect()


async def test_a_shared_subscription_gives_each_message_to_one(
    probed: Running, topic: str, name: str, other: str
) -> None:
    members = [await probed.client(f"{name}-{index}", version=V5) for index in range(2)]
    for member in members:
        await member.subscribe(f"$share/group/{topic}")
    publisher = await probed.client(other, version=V5)
    for number in range(10):
        await publisher.publish(topic, b"%d" % number)
    shares = [await member.waiting() for member in members]
    assert sorted(int(bytes(message.payload)) for share in shares for message in share) == list(range(10))
    assert all(shares), "both get some"
    for client in (*members, publisher):
        await client.disconnect()


async def test_unsubscribing_nothing_is_told(probed: Running, topic: str, name: str) -> None:
    client = await probed.client(name, version=V5)
    assert await client.unsubscribe(topic) == (0x11,)
    await client.disconnect()


# ---------------------------------------------------------------------------------------------- identity


async def test_another_device_cannot_steal_a_session(probed: Running, topic: str, name: str, other: str) -> None:
    victim = await probed.client(name, clean=False)
    await victim.subscribe(topic)
    await victim.disconnect()
    publisher = await probed.client(other)
    await publisher.publish(topic, b"command")
    thief = await type(victim).connect(probed.port, name, tls=probed.tls(other + "-t"), clean=False)
    assert thief.connack is not None
    assert not thief.connack.session_present
    assert await thief.waiting() == []
    victim = await probed.client(name, clean=False)
    assert (await victim.message()).payload == b"command"
    for client in (thief, victim, publisher):
        await client.disconnect()
