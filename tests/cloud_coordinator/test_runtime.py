"""The whole coordinator over a real broker, with gateways that answer by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.cloud import Fleet, ScriptedGateway, SiteTopics, small_model, write_model
from fleetfed_testing.lone_gateway import FLEET
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.cloud_coordinator.config import CoordinatorConfig, ModelConfig, RoundSettings
from fleetfed.cloud_coordinator.keys.pki import Role as TlsRole
from fleetfed.cloud_coordinator.runtime import run_coordinator
from fleetfed.cloud_coordinator.training.step import ring_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.blobs import part_count, unwrap
from fleetfed.shared.wire.chunks import Assembler, split
from fleetfed.shared.wire.envelope import MessageKind, parse_head
from fleetfed.shared.wire.messages import Commit, Life, Manifest, Plan, Presence, Receipt, Status
from fleetfed.shared.wire.topics import BlobTopic, Broadcast, BroadcastTopic, Kind, MemberTopic, Verb, parse


class LiveGateway:
    """Answers plans with proposals and commits with reveals, over a real connection."""

    def __init__(self, broker: Any, fleet: Fleet, name: str, devices: list[str]) -> None:
        self.script = ScriptedGateway(fleet, name, devices)
        self.topics = SiteTopics(FLEET, "_")
        self.verifier: Verifier = fleet.member(Role.GATEWAY, name, name).verifier()
        self.manifests: list[Manifest] = []
        self.plans: dict[bytes, Plan] = {}
        self.receipts: list[Receipt] = []
        self.node: list[Life] = []
        self.statuses: list[Status] = []
        self.chunks: dict[tuple[bytes, int], bytes] = {}
        self._assembler = Assembler(lambda head: None)
        self.session = Session(
            broker.config(name, TlsRole.GATEWAY),
            subscriptions=[
                self.topics.all_down(Kind.GATEWAY, name),
                *(self.topics.broadcast(what) for what in Broadcast),
            ],
            on_connect=self._hello,
            on_message=self._message,
        )

    async def say(self, verb: Verb, payload: bytes, *, retain: bool = False) -> None:
        await self.session.publish(self.topics.up(Kind.GATEWAY, self.script.name, verb), payload, retain=retain)

    async def fetch(self, manifest: Manifest) -> bytes:
        """The whole file that the manifest names, from the broker."""
        wanted = [self.topics.blob(manifest.full.digest, i) for i in range(part_count(manifest.full))]
        await self.session.subscribe(wanted)
        key = manifest.full.digest[:16]
        await eventually(lambda: sum(digest == key for digest, _ in self.chunks) == len(wanted))
        return unwrap(manifest.full, b"".join(self.chunks[key, i] for i in range(len(wanted))))

    async def _hello(self, session_present: bool) -> None:
        del session_present
        await self.say(Verb.STATE, self.script.presence(), retain=True)
        await self.say(Verb.CENSUS, self.script.census(now=unix_ms()), retain=True)

    async def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        del retained
        now = unix_ms()
        match parse(topic):
            case BroadcastTopic(what=Broadcast.MODEL):
                self.manifests.append(self.verifier.open(payload, Manifest, kind=MessageKind.MANIFEST, now=now)[0])
            case BroadcastTopic(what=Broadcast.NODE):
                self.node.append(codec.decode(Presence, payload, limit=1000).life)
            case BroadcastTopic(what=Broadcast.STATUS):
                self.statuses.append(self.verifier.open(payload, Status, kind=MessageKind.STATUS, now=now)[0])
            case BroadcastTopic(what=Broadcast.PLAN):
                if parse_head(payload).header.kind is MessageKind.PLAN:
                    await self._propose(payload)
            case BlobTopic(digest=digest, index=index):
                if payload:
                    self.chunks[digest, index] = payload
            case MemberTopic(verb=Verb.COMMIT):
                whole = self._assembler.feed(payload)
                if whole is not None:
                    await self._reveal(whole[0].encode() + bytes(whole[1]))
            case MemberTopic(verb=Verb.RECEIPT):
                self.receipts.append(self.verifier.open(payload, Receipt, kind=MessageKind.RECEIPT, now=now)[0])

    async def _propose(self, payload: bytes) -> None:
        plan, head, _ = self.verifier.open(payload, Plan, kind=MessageKind.PLAN, now=unix_ms())
        self.plans[head.hash] = plan
        updates = self.script.train(plan, head.hash, ring_of(plan, small_model()[1]), seed=plan.round)
        message = self.script.propose(plan, head.hash, [update.message.head.encode() for update in updates])
        for frame in split(message.id, message.encode()):
            await self.say(Verb.PROPOSE, frame)

    async def _reveal(self, payload: bytes) -> None:
        commit, head, _ = self.verifier.open(payload, Commit, kind=MessageKind.COMMIT, now=unix_ms())
        plan = self.plans[commit.plan]
        message = self.script.reveal(plan, ring_of(plan, small_model()[1]), commit, head.hash)
        for frame in split(message.id, message.encode()):
            await self.say(Verb.REVEAL, frame)


def config_of(directory: Path, broker: Any, fleet: Fleet, **changes: Any) -> CoordinatorConfig:
    fleet.member(Role.COORDINATOR, "coordinator", "_").save(directory / "identity")
    connection = broker.config("coordinator", TlsRole.COORDINATOR)
    tls: dict[str, Any] = {"tls": False}
    if connection.tls is not None:
        tls = {"ca": connection.tls.ca, "cert": connection.tls.cert, "key": connection.tls.key}
    values: dict[str, Any] = {
        "identity": directory / "identity",
        "state": directory / "state",
        "broker": Endpoint(host=connection.host, port=connection.port, reconnect_cap=0.1, **tls),
        "model": ModelConfig(file=write_model(directory / "model")),
        "rounds": RoundSettings(rounds=3, start_when=5, weight_cap=50),
        "autostart": True,
    }
    return CoordinatorConfig(**{**values, **changes})


@contextlib.asynccontextmanager
async def running(config: CoordinatorConfig) -> AsyncIterator[asyncio.Task[int]]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_coordinator(config, stop=stop))
    try:
        yield task
    finally:
        stop.set()
        assert await task == 0


@contextlib.asynccontextmanager
async def connected(*gateways: LiveGateway) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(gateway.session.run()) for gateway in gateways]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_rounds_over_a_real_broker(tmp_path: Path, any_broker: Any) -> None:
    fleet = Fleet()
    north = LiveGateway(any_broker, fleet, "north", ["a", "b", "c"])
    south = LiveGateway(any_broker, fleet, "south", ["d", "e"])
    config = config_of(tmp_path, any_broker, fleet)
    async with connected(north, south):
        async with running(config):
            await eventually(lambda: any(status.state == "finished" for status in north.statuses))
        await eventually(lambda: Life.DISCONNECTED in north.node)
    newest = north.manifests[-1]
    assert newest.version == 4
    assert [row["contributors"] for row in north.statuses[-1].history] == [5, 5, 5]
    assert [receipt.reason for receipt in north.receipts] == [None] * 3
    written = json.loads((tmp_path / "state" / "status.json").read_text())
    assert written["model_sha256"] == newest.sha256.hex()
    assert written["model_version"] == 4
    assert written["wire"]["sent"] > 0


async def test_a_restart_goes_on_and_a_newcomer_gets_everything(tmp_path: Path, any_broker: Any) -> None:
    fleet = Fleet()
    config = config_of(tmp_path, any_broker, fleet)
    north = LiveGateway(any_broker, fleet, "north", ["a", "b", "c", "d", "e"])
    async with connected(north):
        for _ in range(2):
            async with running(config):
                await eventually(lambda: any(status.state == "finished" for status in north.statuses))
    assert north.manifests[-1].version == 4
    # Mosquitto and the embedded broker were both told everything anew: a broker that forgot has all of it.
    late = LiveGateway(any_broker, fleet, "late", [])
    async with running(config), connected(late):
        await eventually(lambda: late.manifests)
        manifest = late.manifests[-1]
        file = await late.fetch(manifest)
        assert len(file) == manifest.size


async def test_a_broker_that_forgets_is_told_again(tmp_path: Path, embedded_broker: Callable[..., Any]) -> None:
    broker = embedded_broker(tls=False)
    fleet = Fleet()
    config = config_of(tmp_path, broker, fleet, autostart=False)
    async with running(config):
        first = LiveGateway(broker, fleet, "first", [])
        async with connected(first):
            await eventually(lambda: first.manifests)
        await asyncio.to_thread(broker.restart)
        second = LiveGateway(broker, fleet, "second", [])
        async with connected(second):
            await eventually(lambda: second.manifests)
            # The session says again what the broker may have forgotten, and so does the coordinator of one that did.
            assert all(each == first.manifests[0] for each in second.manifests)
            assert len(await second.fetch(second.manifests[0])) == second.manifests[0].size


async def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    class Nowhere:
        def config(self, name: str, role: TlsRole) -> Any:
            from fleetfed.shared.mqtt.config import ConnectionConfig

            return ConnectionConfig(host="localhost", port=1, client_id=name)

    fleet = Fleet()
    missing = config_of(tmp_path, Nowhere(), fleet, model=ModelConfig(file=tmp_path / "none.tflite"))
    with pytest.raises(ConfigError, match=r"none\.tflite: No such file"):
        await run_coordinator(missing, stop=asyncio.Event())
    (tmp_path / "state" / "coordinator.db").write_bytes(b"noise" * 1000)
    with pytest.raises(StorageError, match="database"):
        await run_coordinator(config_of(tmp_path, Nowhere(), fleet), stop=asyncio.Event())


async def test_a_stop_at_any_moment_of_the_start_ends_it(tmp_path: Path, embedded_broker: Callable[..., Any]) -> None:
    config = config_of(tmp_path, embedded_broker(tls=False), Fleet())
    for moment in range(25):
        async with asyncio.timeout(PATIENCE), running(config):
            await asyncio.sleep(0.0015 * moment)


async def test_one_state_folder_serves_one_coordinator(tmp_path: Path, embedded_broker: Callable[..., Any]) -> None:
    config = config_of(tmp_path, embedded_broker(tls=False), Fleet())
    async with running(config):
        await eventually((config.state / "coordinator.db").exists)
        with pytest.raises(ConfigError, match="in use by another process"):
            await run_coordinator(config, stop=asyncio.Event())
    async with running(config):
        pass


def test_importing_the_coordinator_imports_no_tensorflow_and_no_terminal() -> None:
    program = (
        "import sys, fleetfed.cloud_coordinator.runtime; "
        "print([m for m in ('tensorflow', 'keras', 'click', 'rich', 'ai_edge_litert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
