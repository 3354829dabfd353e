"""What survives: the store alone, and a broker process killed in the middle of its work."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.broker.codec import encode
from fleetfed.broker.config import BrokerConfig, Limits
from fleetfed.broker.core import Broker
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.mosquitto import MosquittoProcess, find_mosquitto
from fleetfed.broker.packets import V5, Connect, PubAck, Publish, Subscribe, Subscription
from fleetfed.broker.persistence import SqliteStore
from fleetfed.broker.properties import Property
from fleetfed.shared.errors import StorageError
from tests.broker.certificates import Authority
from tests.broker.rawclient import RawClient


def hello(name: str) -> bytes:
    return encode(
        Connect(version=V5, client_id=name, clean_start=False, properties={Property.SESSION_EXPIRY: 1000}), V5
    )


def make(path: Path, now: float) -> tuple[Broker, SqliteStore]:
    store = SqliteStore(path)
    return Broker(limits=Limits(), acl=None, make_id=lambda: "made", now=now, store=store), store


def test_sessions_queues_and_retained_come_back_on_another_clock(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    broker, store = make(path, 1000.0)
    taker = broker.open(None, 1000.0)
    taker.receive_data(hello("taker"), 1000.0)
    items = (Subscription(topic_filter="t/+", qos=1), Subscription(topic_filter="$share/g/s", qos=1))
    taker.receive_data(encode(Subscribe(packet_id=1, subscriptions=items), V5), 1000.0)
    publisher = broker.open(None, 1000.0)
    publisher.receive_data(hello("publisher"), 1000.0)

    def publish(topic: str, payload: bytes, expiry: int = 0, retain: bool = False) -> None:
        properties = {Property.MESSAGE_EXPIRY: expiry} if expiry else {}
        packet = Publish(topic=topic, payload=payload, qos=1, packet_id=1, retain=retain, properties=properties)
        publisher.receive_data(encode(packet, V5), 1000.0)

    publish("t/1", b"first, in flight and acknowledged")
    taker.data_to_send()
    taker.receive_data(encode(PubAck(packet_id=1), V5), 1000.0)
    publish("t/1", b"in flight")
    taker.data_to_send()
    publish("t/2", b"queued", expiry=100)
    publish("t/3", b"kept", retain=True)
    publish("t/4", b"kept shortly", retain=True, expiry=100)
    publish("t/5", b"kept and cleared", retain=True)
    publish("t/5", b"", retain=True)
    publish("s", b"shared")
    broker.commit()
    store._db.close()  # as a crash leaves it

    broker, store = make(path, 5.0)
    assert broker.statistics()["offline_bytes"] > 0
    taker = broker.open(None, 5.0)
    taker.receive_data(hello("taker"), 5.0)
    output = b"".join(taker.data_to_send())
    for payload in (b"in flight", b"queued", b"kept", b"kept shortly", b"shared"):
        assert payload in output
    assert b"acknowledged" not in output
    assert broker.statistics()["retained_messages"] == 2
    for packet_id in range(1, 10):
        taker.receive_data(encode(PubAck(packet_id=packet_id), V5), 5.0)
    broker.commit()
    assert store._db.execute("SELECT count(*) FROM delivery").fetchone() == (0,)
    assert store._db.execute("SELECT count(*) FROM message").fetchone() == (0,)
    store.close()


def test_what_has_expired_meanwhile_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    broker, store = make(path, 0.0)
    taker = broker.open(None, 0.0)
    taker.receive_data(hello("taker"), 0.0)
    taker.receive_data(encode(Subscribe(packet_id=1, subscriptions=(Subscription(topic_filter="t"),)), V5), 0.0)
    packet = Publish(topic="t", payload=b"x", qos=1, packet_id=1, retain=True, properties={Property.MESSAGE_EXPIRY: 50})
    taker.receive_data(encode(packet, V5), 0.0)
    broker.commit()
    store._db.execute("UPDATE session SET expires_at = 1")
    store._db.execute("UPDATE retained SET expires_at = 1")
    store.close()
    broker, store = make(path, 0.0)
    assert broker.statistics()["sessions"] == 0
    assert broker.statistics()["retained_messages"] == 0
    for table in ("session", "subscription", "delivery", "message", "retained"):
        assert store._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    store.close()


def test_a_session_that_ends_leaves_no_rows(tmp_path: Path) -> None:
    broker, store = make(tmp_path / "broker.sqlite", 0.0)
    taker = broker.open(None, 0.0)
    taker.receive_data(hello("taker"), 0.0)
    items = (Subscription(topic_filter="t", qos=1),)
    taker.receive_data(encode(Subscribe(packet_id=1, subscriptions=items), V5), 0.0)
    taker.receive_data(encode(Publish(topic="t", payload=b"x", qos=1, packet_id=1), V5), 0.0)
    taker.connection_lost(0.0)
    broker.commit()
    assert store._db.execute("SELECT count(*) FROM delivery").fetchone() == (1,)
    again = broker.open(None, 0.0)
    again.receive_data(encode(Connect(version=V5, client_id="taker", clean_start=True), V5), 0.0)
    broker.commit()
    for table in ("session", "subscription", "delivery", "message"):
        assert store._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    store.close()


def test_a_damaged_or_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    path.write_bytes(b"this is not a database at all, and long enough to be looked at" * 20)
    with pytest.raises(StorageError, match=r"broker\.sqlite"):
        SqliteStore(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StorageError, match="schema 99"):
        SqliteStore(path)


# ---------------------------------------------------------------------------------------------- kill -9


class EmbeddedProcess:
    """``python -m fleetfed.broker run`` as somebody would start it."""

    def __init__(self, folder: Path, authority: Authority, extra: str = "") -> None:
        self.path = folder / "broker.toml"
        files = authority.server_files()
        self.extra = extra
        self.port = 0
        self.files = files
        self.process: asyncio.subprocess.Process | None = None

    def write(self) -> None:
        self.path.write_text(
            f'port = {self.port}\npersistence_dir = "state"\n{self.extra}\n'
            f'[tls]\nca = "{self.files.ca}"\ncert = "{self.files.cert}"\nkey = "{self.files.key}"\n'
        )

    async def start(self) -> None:
        self.write()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fleetfed.broker", "run", "--config", str(self.path), stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)).decode()
        assert line.startswith("listening on 127.0.0.1:"), line
        self.port = int(line.rpartition(":")[2])

    async def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        _, code = await self.process.communicate(), await self.process.wait()
        return code

    async def kill(self) -> None:
        await self.end(signal.SIGKILL)

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            assert await self.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("kind", ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)])
async def test_kill_9_keeps_retained_and_queued(kind: str, tmp_path: Path, authority: Authority) -> None:
    if kind == "mosquitto":
        if find_mosquitto() is None:
            pytest.skip("mosquitto is not installed (Debian package `mosquitto`)")
        config = BrokerConfig(tls=authority.server_files(), persistence_dir=tmp_path / "state")
        broker: EmbeddedProcess | MosquittoProcess = MosquittoProcess(config, tmp_path)
    else:
        broker = EmbeddedProcess(tmp_path, authority)
    await broker.start()
    try:
        lasting = {"version": V5, "clean": False, "properties": {Property.SESSION_EXPIRY: 1000}}
        tls = {name: authority.client_context(name) for name in ("taker", "giver")}
        taker = await RawClient.connect(broker.port, "taker", tls=tls["taker"], **lasting)
        await taker.subscribe("queued/#")
        await taker.disconnect()
        giver = await RawClient.connect(broker.port, "giver", tls=tls["giver"])
        await giver.publish("kept", b"manifest", retain=True)
        for number in range(50):
            await giver.publish(f"queued/{number}", b"%d" % number * 1000)
        if kind == "mosquitto":
            # It saves every other second; the embedded broker before each PUBACK.
            saved = tmp_path / "state" / "mosquitto.db"
            await eventually(lambda: saved.exists() and b"queued/49" in saved.read_bytes())
        await broker.kill()
        giver.abort()
        await broker.start()
        taker = await RawClient.connect(broker.port, "taker", tls=tls["taker"], **lasting)
        assert taker.connack is not None
        assert taker.connack.session_present
        found = [message.topic for message in await taker.messages(50)]
        assert found == [f"queued/{number}" for number in range(50)]
        await taker.subscribe("kept")
        assert (await taker.message()).payload == b"manifest"
        assert await taker.waiting() == []
        await taker.disconnect()
    finally:
        await broker.stop()


async def test_sigterm_ends_gracefully_and_sighup_reloads(tmp_path: Path, authority: Authority) -> None:
    acl = tmp_path / "acl"
    acl.write_text("user device\ntopic write a\n")
    broker = EmbeddedProcess(tmp_path, authority, 'acl_file = "acl"')
    await broker.start()
    device = await RawClient.connect(broker.port, "device", version=V5, tls=authority.client_context("device"))
    assert await device.publish("b") == 0x87
    acl.write_text("user device\ntopic write b\n")
    assert broker.process is not None
    os.kill(broker.process.pid, signal.SIGHUP)
    for _ in range(200):
        if await device.publish("b") == 0x10:
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("SIGHUP changed nothing")
    # A broken file changes nothing and stops nothing.
    acl.write_text("nonsense\n")
    os.kill(broker.process.pid, signal.SIGHUP)
    for _ in range(10):
        assert await device.publish("b") == 0x10
    await broker.stop()
    assert await device.closed() == 0x8B, "it was told that the server shuts down"


async def test_stop_and_start_in_one_process_keep_the_state(tmp_path: Path) -> None:
    config = BrokerConfig(persistence_dir=tmp_path)
    for expected in (False, True):
        broker = EmbeddedBroker(config)
        await broker.start()
        client = await RawClient.connect(broker.port, "a", clean=False)
        assert client.connack is not None
        assert client.connack.session_present is expected
        await broker.stop()
        client.abort()


async def test_what_cannot_be_written_is_not_acknowledged_and_ends_the_broker(tmp_path: Path) -> None:
    broker = EmbeddedBroker(BrokerConfig(persistence_dir=tmp_path))
    await broker.start()
    client = await RawClient.connect(broker.port, "a", clean=False)
    await client.subscribe("t")
    assert broker._store is not None
    broker._store._db.execute("PRAGMA query_only=1")  # as a full disk would
    await client.send(Publish(topic="t", payload=b"x", qos=1, packet_id=7))
    await asyncio.wait_for(broker.failed.wait(), PATIENCE)
    await client.closed()
    assert not [item for item in client.inbox if isinstance(item, PubAck)]
    assert isinstance(broker.failure, StorageError)
    await broker.stop()


async def test_a_restarted_broker_is_found_where_it_was(tmp_path: Path) -> None:
    broker = EmbeddedBroker(BrokerConfig(persistence_dir=tmp_path))
    await broker.start()
    port = broker.port
    await broker.stop()
    await broker.start()
    assert broker.port == port
    client = await RawClient.connect(port, "a")
    await client.disconnect()
    await broker.stop()
