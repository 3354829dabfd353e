"""Who may do what on RabbitMQ and NATS, tried with a member's own certificate and no code of the fleet in between."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from fleetfed_testing.engines import Nats, RabbitMq
from fleetfed_testing.local_fleet import LocalFleet, prepared
from fleetfed_testing.waiting import PATIENCE, eventually
from paho.mqtt.enums import CallbackAPIVersion

from fleetfed.cloud_coordinator.demo.layout import COORDINATOR
from fleetfed.shared.mqtt.tls import TlsFiles, client_context

pytestmark = pytest.mark.slow

PLAN = "ff1/demo/north/b/plan"
OWN = "ff1/demo/north/d/d-01"
OTHER = "ff1/demo/north/d/d-02"
NOT_AUTHORIZED = 0x87


@pytest.fixture(params=[RabbitMq, Nats], ids=["rabbitmq", "nats"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalFleet]:
    """A broker that knows a fleet of which nobody runs."""
    async with prepared(tmp_path, devices=2, engine=request.param()) as fleet:
        fleet.lay_out()
        await fleet.start_broker()
        # A cluster that elects its leaders listens already, and refuses; so does RabbitMQ while it reads who is who.
        for member in ("d-01", "d-02", "g-north"):
            await eventually(lambda member=member: comes_in(fleet, member))
        yield fleet


@dataclass
class Seen:
    """What a client was told."""

    client: paho.Client
    messages: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)
    grants: queue.Queue[bool] = field(default_factory=queue.Queue)
    codes: list[int] = field(default_factory=list)

    def listen(self, topic: str) -> bool:
        """Subscribe; returns whether it was granted, where a closed connection is a no."""
        self.client.subscribe(topic, qos=1)
        return self.grants.get(timeout=PATIENCE)

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain)

    def hear(self) -> tuple[str, bytes]:
        return self.messages.get(timeout=PATIENCE)


def tls_of(fleet: LocalFleet, name: str) -> ssl.SSLContext:
    folder = fleet.folder.keys / "identities" / name / "tls"
    return client_context(TlsFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem"))


@contextlib.contextmanager
def connected(fleet: LocalFleet, name: str, **changes: Any) -> Iterator[Seen]:
    """Connected with a member's certificate, or whatever else ``changes`` say."""
    version5 = changes.get("version5", False)
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=changes.get("client_id", name),
        protocol=paho.MQTTv5 if version5 else paho.MQTTv311,
        clean_session=None if version5 else False,
        reconnect_on_failure=False,
    )
    client.connect_timeout = PATIENCE
    client.tls_set_context(changes.get("context") or tls_of(fleet, name))
    if "username" in changes:
        client.username_pw_set(changes["username"], "")
    seen = Seen(client)
    accepted: queue.Queue[bool] = queue.Queue()

    def on_connect(_c: Any, _u: Any, _f: Any, code: Any, _p: Any) -> None:
        accepted.put(not code.is_failure)

    def on_disconnect(*_: Any) -> None:
        accepted.put(False)
        seen.grants.put(False)

    def on_subscribe(_c: Any, _u: Any, _m: Any, codes: Any, _p: Any) -> None:
        seen.codes.append(codes[0].value)
        seen.grants.put(not codes[0].is_failure)

    client.on_connect = on_connect
    client.on_disconnect = on_disconnect
    client.on_subscribe = on_subscribe
    client.on_message = lambda _c, _u, message: seen.messages.put((message.topic, message.payload))
    client.connect("127.0.0.1", fleet.port)
    client.loop_start()
    try:
        if not accepted.get(timeout=PATIENCE):
            raise ConnectionRefusedError(name)
        yield seen
    finally:
        client.disconnect()
        client.loop_stop()
        # They hold the client, which closes its sockets when nothing does.
        client.on_connect = client.on_disconnect = client.on_subscribe = client.on_message = None


async def test_a_device_speaks_and_hears_in_its_own_branch_alone(fleet: LocalFleet) -> None:
    for topic in (f"{OTHER}/dn/+", f"{OTHER}/up/state", "ff1/demo/north/d/+/dn/+", "#", "ff1/demo/_/b/plan"):
        with connected(fleet, "d-01") as sly:
            assert not sly.listen(topic), topic
    with connected(fleet, "d-02") as witness, connected(fleet, "g-north") as gateway:
        assert witness.listen(PLAN)
        assert witness.listen(f"{OTHER}/dn/+")
        for topic in (PLAN, f"{OTHER}/dn/receipt", f"{OTHER}/up/state"):
            with connected(fleet, "d-01") as sly:
                sly.say(topic, b"forged", retain=True)
        assert gateway.listen(f"{OTHER}/up/state")
        assert gateway.listen(f"{OWN}/up/state")
        with connected(fleet, "d-01") as honest:
            honest.say(f"{OWN}/up/state", b"here")
        assert gateway.hear() == (f"{OWN}/up/state", b"here"), "what was forged came before"
        gateway.say(PLAN, b"plan", retain=True)
        gateway.say(f"{OTHER}/dn/receipt", b"receipt")
        assert sorted([witness.hear(), witness.hear()]) == [(PLAN, b"plan"), (f"{OTHER}/dn/receipt", b"receipt")]


async def test_whoever_asks_again_is_given_what_is_retained_again(fleet: LocalFleet) -> None:
    """Members do, where a grant took long: see `fleetfed.shared.mqtt.granting`."""
    with connected(fleet, "g-north") as gateway, connected(fleet, "d-01") as device:
        assert device.listen(PLAN)
        gateway.say(PLAN, b"plan", retain=True)
        assert device.hear() == (PLAN, b"plan")
        # A cluster's nodes learn of what is retained a little later.
        await eventually(lambda: device.listen(PLAN) and not device.messages.empty())
        assert device.hear() == (PLAN, b"plan")


async def test_rabbitmq_that_speaks_mqtt_5_says_what_it_refuses(tmp_path: Path) -> None:
    engine = RabbitMq()
    if engine.version < (3, 13):
        pytest.skip("RabbitMQ speaks MQTT 5 since 3.13")
    async with prepared(tmp_path, devices=2, engine=engine) as fleet:
        fleet.lay_out()
        await fleet.start_broker()
        await eventually(lambda: comes_in(fleet, "d-01"))
        for topic in (f"{OTHER}/dn/+", "ff1/demo/north/d/+/dn/+", "#"):
            with connected(fleet, "d-01", version5=True) as sly:
                assert not sly.listen(topic), topic
                assert sly.codes == [NOT_AUTHORIZED]
        with connected(fleet, "d-01", version5=True) as sly:
            sly.say(f"{OTHER}/up/state", b"forged")
            assert sly.grants.get(timeout=PATIENCE) is False, "its connection is closed"
        with connected(fleet, "d-01", version5=True) as honest:
            assert honest.listen(f"{OWN}/dn/+")


async def test_nobody_comes_in_without_a_certificate_of_the_fleet(fleet: LocalFleet, tmp_path: Path) -> None:
    folder = fleet.folder.keys / "identities" / "d-01" / "tls"
    bare = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with pytest.raises((OSError, ConnectionRefusedError)), connected(fleet, "d-01", context=bare):
        pass
    with (
        pytest.raises((OSError, ConnectionRefusedError)),
        connected(fleet, "d-01", context=bare, username=COORDINATOR),
    ):
        pass


async def test_a_name_given_beside_the_certificate_counts_for_nothing(fleet: LocalFleet) -> None:
    assert not listens_as(fleet, "d-01", "ff1/demo/_/g/+/up/state", username=COORDINATOR)


async def test_the_client_id_of_another_brings_nothing_of_its_session(fleet: LocalFleet) -> None:
    with connected(fleet, "d-01") as device:
        assert device.listen(f"{OWN}/dn/+")
    with connected(fleet, "g-north") as gateway:
        assert gateway.listen("ff1/demo/_/b/plan")
        gateway.say(f"{OWN}/dn/receipt", b"for d-01")
    # RabbitMQ closes the connection; NATS leaves out what the thief may not hear.
    with contextlib.suppress(ConnectionRefusedError), connected(fleet, "d-02", client_id="d-01") as thief:
        thief.listen(f"{OTHER}/dn/+")
        assert thief.messages.empty()
    with connected(fleet, "d-01") as device:
        assert device.hear() == (f"{OWN}/dn/receipt", b"for d-01")


async def test_who_is_revoked_is_thrown_out(fleet: LocalFleet) -> None:
    assert isinstance(fleet.engine, RabbitMq | Nats)
    with connected(fleet, "d-01") as gone, connected(fleet, "d-02") as other:
        await asyncio.to_thread(fleet.engine.throw_out, fleet, "d-01")
        assert gone.grants.get(timeout=PATIENCE) is False, "its connection is closed"
        assert other.listen(f"{OTHER}/dn/+"), "and nobody else's"
    assert not comes_in(fleet, "d-01")


async def test_a_member_cannot_go_round_mqtt(tmp_path: Path) -> None:
    """NATS hands out everybody's messages under names that its own protocol could listen to."""
    engine = Nats()
    async with prepared(tmp_path, devices=2, engine=engine) as fleet:
        fleet.lay_out()
        await fleet.start_broker()
        await eventually(lambda: comes_in(fleet, "d-02"))
        with connected(fleet, "d-01") as sly:
            assert not sly.listen("$MQTT/sub/#")
        with socket.create_connection(("127.0.0.1", engine.plain_nats[0]), timeout=PATIENCE) as plain:
            assert plain.recv(4096).startswith(b"INFO ")
            with tls_of(fleet, "d-01").wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                secure.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB $MQTT.sub.> 1\r\nPING\r\n')
                assert b"-ERR 'Authorization Violation'" in secure.recv(4096)


def comes_in(fleet: LocalFleet, name: str) -> bool:
    """Whether a member gets a connection."""
    try:
        with connected(fleet, name):
            return True
    except ConnectionRefusedError:
        return False


def listens_as(fleet: LocalFleet, name: str, topic: str, **changes: Any) -> bool:
    """Whether a member that gives itself out as another may listen."""
    try:
        with connected(fleet, name, **changes) as sly:
            return sly.listen(topic)
    except ConnectionRefusedError:
        return False
