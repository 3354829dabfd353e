"""The control client against a scripted coordinator, over a real broker with TLS and its access list."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fleetfed_testing.brokers import free_port
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.embedded import EmbeddedBroker
from fleetfed.broker.render import render_acl
from fleetfed.cloud_coordinator.cli.broker import broker_tls
from fleetfed.cloud_coordinator.cli.round import follow
from fleetfed.cloud_coordinator.control.client import ControlClient, OperatorConfig
from fleetfed.cloud_coordinator.control.errors import NoAnswerError, RefusedError
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageId, MessageKind
from fleetfed.shared.wire.messages import Command, Life, Presence, Request, Response, Status
from fleetfed.shared.wire.topics import CLOUD_SITE, Broadcast, Kind, SiteTopics, Verb

TOPICS = SiteTopics("demo", CLOUD_SITE)
Script = Callable[[Request, MessageId], list[tuple[str, bytes]]]


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    keyring = Keyring.create(tmp_path_factory.mktemp("control") / "keys", "demo", now=unix_ms())
    keyring.issue(
        [
            NewMember(id="broker", role=MemberRole.BROKER, hosts=("127.0.0.1",)),
            NewMember(id="coordinator", role=MemberRole.COORDINATOR),
            NewMember(id="operator", role=MemberRole.OPERATOR),
            NewMember(id="mallory", role=MemberRole.OPERATOR),
        ],
        now=unix_ms(),
    )
    return keyring


@pytest.fixture
async def broker(keyring: Keyring, tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    acl = tmp_path / "acl"
    acl.write_text(render_acl(inventory_of(keyring)))
    broker = EmbeddedBroker(
        BrokerConfig(port=free_port(), tls=broker_tls(keyring.identity_folder("broker")), acl_file=acl, sys_interval=0)
    )
    await broker.start()
    yield broker
    await broker.stop()


@pytest.fixture
def operator(keyring: Keyring, broker: EmbeddedBroker) -> OperatorConfig:
    assert broker.port
    return OperatorConfig(
        identity=keyring.identity_folder("operator"), broker=Endpoint(host="127.0.0.1", port=broker.port)
    )


class Scripted:
    """A coordinator that verifies requests and says what a test tells it to."""

    def __init__(self, keyring: Keyring, port: int) -> None:
        folder = keyring.identity_folder("coordinator")
        self.identity = Identity.load(folder)
        numbers = itertools.count(1)
        self.signer = self.identity.signer(sequence=lambda: next(numbers), randomness=os.urandom)
        self.heard: list[tuple[Request, MessageId, bytes]] = []
        self.asked = asyncio.Event()
        self.script: Script = lambda request, message: [self.answer(message, result={"command": request.command.value})]
        tls = folder / "tls"
        self.session = Session(
            ConnectionConfig(
                host="127.0.0.1",
                port=port,
                client_id="coordinator",
                tls=TlsFiles(tls / "ca.pem", tls / "cert.pem", tls / "key.pem"),
                reconnect_cap=0.1,
            ),
            subscriptions=[TOPICS.all_up(Kind.OPERATOR, Verb.REQUEST)],
            on_connect=self._on_connect,
            on_message=self._on_message,
        )
        self.births = False

    async def _on_connect(self, session_present: bool) -> None:
        del session_present
        if self.births:
            await self.say(Broadcast.NODE, codec.encode(Presence(life=Life.READY, session=1)))

    async def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        assert not retained
        request, head, sender = self.identity.verifier().open(payload, Request, kind=MessageKind.REQUEST, now=unix_ms())
        assert topic == TOPICS.up(Kind.OPERATOR, sender.id, Verb.REQUEST)
        self.heard.append((request, head.header.message_id, payload))
        self.asked.set()
        for where, data in self.script(request, head.header.message_id):
            await self.session.publish(where, data)

    def answer(
        self, message: MessageId, *, error: str = "", detail: str = "", result: object = None
    ) -> tuple[str, bytes]:
        body = Response(request=message, error=error, detail=detail, result=dict(result or {}))  # type: ignore[call-overload]
        signed = self.signer.sign(MessageKind.RESPONSE, body, now=unix_ms())
        return TOPICS.down(Kind.OPERATOR, "operator", Verb.RESPONSE), signed.encode()

    async def say(self, what: Broadcast, data: bytes) -> None:
        await self.session.publish(TOPICS.broadcast(what), data, retain=True)

    async def status(self, status: Status) -> None:
        await self.say(Broadcast.STATUS, self.signer.sign(MessageKind.STATUS, status, now=unix_ms()).encode())


@pytest.fixture
async def coordinator(keyring: Keyring, broker: EmbeddedBroker) -> AsyncIterator[Scripted]:
    assert broker.port
    scripted = Scripted(keyring, broker.port)
    task = asyncio.create_task(scripted.session.run())
    await scripted.session.wait_connected()
    yield scripted
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_command_and_its_answer(operator: OperatorConfig, coordinator: Scripted) -> None:
    async with ControlClient(operator) as client:
        result = await client.request(Command.ROUND_START, {"rounds": 3, "training": {"epochs": 2}})
    assert result == {"command": "round.start"}
    assert coordinator.heard[0][0] == Request(
        command=Command.ROUND_START, arguments={"rounds": 3, "training": {"epochs": 2}}
    )


async def test_many_answers_find_their_own_questions(operator: OperatorConfig, coordinator: Scripted) -> None:
    held: list[tuple[str, bytes]] = []

    def backwards(request: Request, message: MessageId) -> list[tuple[str, bytes]]:
        held.insert(0, coordinator.answer(message, result={"command": request.command.value}))
        return held if len(held) == 3 else []

    coordinator.script = backwards
    commands = [Command.MODEL_LIST, Command.FLEET_LIST, Command.ROUND_STATUS]
    async with ControlClient(operator) as client:
        results = await asyncio.gather(*(client.request(command) for command in commands))
    assert [result["command"] for result in results] == [command.value for command in commands]


async def test_a_refusal_carries_its_label_and_words(operator: OperatorConfig, coordinator: Scripted) -> None:
    coordinator.script = lambda _, message: [coordinator.answer(message, error="no_model", detail="publish one first")]
    async with ControlClient(operator) as client:
        with pytest.raises(RefusedError, match="publish one first") as caught:
            await client.request(Command.ROUND_START)
    assert caught.value.label == "no_model"


async def test_answers_that_are_forged_or_broken_are_counted_and_change_nothing(
    operator: OperatorConfig, coordinator: Scripted, keyring: Keyring
) -> None:
    mallory = Identity.load(keyring.identity_folder("mallory"))
    signer = mallory.signer(sequence=lambda: 1, randomness=os.urandom)

    def forged(request: Request, message: MessageId) -> list[tuple[str, bytes]]:
        topic, good = coordinator.answer(message, result={"real": True})
        lie = signer.sign(MessageKind.RESPONSE, Response(request=message, result={"real": False}), now=unix_ms())
        flipped = good[:-1] + bytes([good[-1] ^ 1])
        return [(topic, b"nonsense"), (topic, lie.encode()), (topic, flipped), (topic, good)]

    coordinator.script = forged
    async with ControlClient(operator) as client:
        assert await client.request(Command.ROUND_STATUS) == {"real": True}
        assert client.rejected == {"truncated": 1, "wrong_role": 1, "body_mismatch": 1}


async def test_silence_of_a_coordinator_that_is_there(operator: OperatorConfig, coordinator: Scripted) -> None:
    await coordinator.say(Broadcast.NODE, codec.encode(Presence(life=Life.READY, session=1)))
    coordinator.script = lambda *_: []
    async with ControlClient(operator, timeout=PATIENCE) as client:
        await eventually(lambda: client.coordinator)
        with pytest.raises(NoAnswerError, match="although it is connected"):
            await client.request(Command.ROUND_STATUS, timeout=0.3)


async def test_silence_of_a_coordinator_that_was_never_there(operator: OperatorConfig) -> None:
    async with ControlClient(operator, timeout=PATIENCE) as client:
        with pytest.raises(NoAnswerError, match="never connected"):
            await client.request(Command.ROUND_STATUS, timeout=0.3)


async def test_silence_of_a_coordinator_that_was_lost(operator: OperatorConfig, coordinator: Scripted) -> None:
    await coordinator.say(Broadcast.NODE, codec.encode(Presence(life=Life.LOST, session=1)))
    coordinator.script = lambda *_: []
    async with ControlClient(operator, timeout=PATIENCE) as client:
        await eventually(lambda: client.coordinator)
        with pytest.raises(NoAnswerError, match="is lost; start it"):
            await client.request(Command.ROUND_STATUS, timeout=0.3)


async def test_no_broker(operator: OperatorConfig, broker: EmbeddedBroker) -> None:
    await broker.stop()
    with pytest.raises(NoAnswerError, match="is the broker running"):
        async with ControlClient(operator, timeout=0.3):
            pass


async def test_a_broker_of_another_fleet(operator: OperatorConfig, tmp_path: Path) -> None:
    other = Keyring.create(tmp_path / "other", "demo", now=unix_ms())
    other.issue([NewMember(id="operator", role=MemberRole.OPERATOR)], now=unix_ms())
    stranger = replace(operator, identity=other.identity_folder("operator"))
    with pytest.raises(NoAnswerError, match="not trusted"):
        async with ControlClient(stranger, timeout=0.5):
            pass


async def test_the_same_bytes_go_out_again_after_a_lost_connection(
    operator: OperatorConfig, coordinator: Scripted, broker: EmbeddedBroker
) -> None:
    coordinator.script = lambda *_: []
    async with ControlClient(operator, timeout=PATIENCE) as client:
        asked = asyncio.create_task(client.request(Command.ROUND_STATUS))
        await coordinator.asked.wait()
        coordinator.script = lambda _, message: [coordinator.answer(message, result={"late": True})]
        # The broker forgets everything: whoever of the two is back first, the command must get through.
        coordinator.births = True
        await broker.stop()
        await broker.start()
        assert await asked == {"late": True}
    assert len({payload for _, _, payload in coordinator.heard}) == 1
    assert len(coordinator.heard) >= 2


async def test_watching_sees_the_retained_status_and_each_change(
    operator: OperatorConfig, coordinator: Scripted
) -> None:
    first = Status(state="collecting", round=1, version=1, accepted=0, expected=2)
    second = replace(first, accepted=2)
    await coordinator.status(first)
    async with ControlClient(operator) as client:
        statuses = client.watch()
        assert await anext(statuses) == first
        await coordinator.status(second)
        assert await anext(statuses) == second


async def test_watching_until_idle_believes_no_status_of_a_coordinator_that_is_away(
    operator: OperatorConfig, coordinator: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Status(state="finished", round=3, version=4)
    seen: list[Status] = []
    coordinator.script = lambda request, message: []
    await coordinator.status(old)
    async with ControlClient(operator, timeout=PATIENCE) as client:
        watching = asyncio.create_task(follow(client, seen.append, until_idle=True, timeout=1.0))
        await eventually(lambda: len(coordinator.heard) == 2)
        assert seen == [old]
        assert "The coordinator is away" in capsys.readouterr().err
        # It is back, and takes the rounds up again.
        states = ["waiting", "finished"]
        coordinator.script = lambda request, message: [coordinator.answer(message, result={"state": states.pop(0)})]
        await coordinator.status(old)
        await eventually(lambda: states == ["finished"])
        assert not watching.done()
        await coordinator.status(replace(old, state="collecting", round=4))
        await coordinator.status(replace(old, round=4, version=5))
        await watching
    assert seen[-1].version == 5
    assert capsys.readouterr().err == ""


async def test_a_command_that_cannot_fit_is_not_sent(operator: OperatorConfig, coordinator: Scripted) -> None:
    async with ControlClient(operator) as client:
        with pytest.raises(ConfigError, match="fit"):
            await client.request(Command.MODEL_PUBLISH, {"data": os.urandom(70_000)})
    assert not coordinator.heard


async def test_numbers_never_repeat_over_runs(operator: OperatorConfig, coordinator: Scripted) -> None:
    from fleetfed.shared.wire.envelope import parse_head

    for _ in range(3):
        async with ControlClient(operator) as client:
            await client.request(Command.ROUND_STATUS)
    numbers = [parse_head(payload).header.sequence for _, _, payload in coordinator.heard]
    assert numbers == sorted(set(numbers))


async def test_an_identity_of_another_role_is_refused(operator: OperatorConfig, keyring: Keyring) -> None:
    wrong = replace(operator, identity=keyring.identity_folder("coordinator"))
    with pytest.raises(ConfigError, match="needs operator"):
        ControlClient(wrong)
