"""A whole fleet of real processes with TLS and authentication, to be killed and cut at will."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from fleetfed.cloud_coordinator.control.client import ControlClient
from fleetfed.cloud_coordinator.demo import layout, topology
from fleetfed.cloud_coordinator.demo.fleet import Fleet
from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR, HELPER, Folder, Settings
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.table import read_weights
from fleetfed.shared.wire.messages import Command, Status
from fleetfed_testing.brokers import free_port
from fleetfed_testing.cloud import write_model
from fleetfed_testing.trainers import BEGUN, HOLD
from fleetfed_testing.waiting import PATIENCE

SUPPORT = Path(__file__).parents[1]


class Engine(Protocol):
    """Some other broker than the embedded one.

    Attributes:
        ports: where it takes members; several for a cluster.
    """

    ports: list[int]

    def lay_out(self, folder: Path, keyring: Keyring) -> None:
        """Write its files into a folder of its own."""

    async def start(self, fleet: LocalFleet, name: str) -> None:
        """Start it as processes of the fleet's supervisor; ``name`` is `BROKER`, or one of its nodes."""

    def forget(self) -> None:
        """Lose what it had on its disk."""


class LocalFleet:
    """One fleet in one folder.

    Args:
        path: where everything is written.
        devices, gateways, tiers: as for `fleetfed demo`.
        trainer: one of `fleetfed_testing.trainers`.
        rounds: changes to the coordinator's ``[rounds]``.
        seed: the devices' ``run.seed``; 0 for none.
        helper: whether there is a second holder of mask seeds.
        engine: the broker; None for the embedded one.
        width: of the model, which has five times as many weights.
        metrics: whether everybody but the devices answers Prometheus, see `targets`.
    """

    def __init__(
        self,
        path: Path,
        *,
        devices: int,
        gateways: int = 1,
        tiers: int = 1,
        trainer: str = "one_hot",
        rounds: dict[str, Any] | None = None,
        seed: int = 0,
        helper: bool = False,
        engine: Engine | None = None,
        width: int = 12,
        metrics: bool = False,
    ) -> None:
        self.tree = topology.plan(devices=devices, gateways=gateways, tiers=tiers)
        self.folder = Folder(path)
        self.folder.prepare()
        self.helper = helper
        self.fleet = Fleet(self.folder, self.tree, broker="embedded", helper=helper, metrics=metrics)
        self.engine = engine
        self.port, *others = engine.ports if engine is not None else [free_port()]
        self.others = [f"{layout.HOST}:{port}" for port in others]
        self.model = write_model(self.folder.path / "model", width=width)
        self.card = ModelCard.decode(self.model.with_suffix(".card").read_bytes())
        self.settings = Settings(
            model=self.model,
            validation=None,
            data={place.id: {} for place in self.tree.devices},
            rounds={
                "weighting": "uniform",
                "error_feedback": False,
                "deadline": PATIENCE,
                "expires": 2 * PATIENCE,
                "start_when": devices,
                **(rounds or {}),
            },
            # 16 bits: what a device contributed is in the model almost to the bit.
            tables={"autostart": False, "clips": {"bits": 8, "first_bits": 8}, "patch": {"bits": 16}},
            device={"trainer": f"fleetfed_testing.trainers:{trainer}", "run": {"seed": seed}},
            listens=self.fleet.listens,
        )
        self.statuses: list[Status] = []
        self._client: ControlClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()

    @property
    def devices(self) -> list[str]:
        """Ids of all devices."""
        return [place.id for place in self.tree.devices]

    @property
    def targets(self) -> Path:
        """Where Prometheus finds everybody that it is to scrape."""
        return layout.write_targets(self.folder, self.tree, self.fleet.listens)

    def lay_out(self) -> Keyring:
        """Write keys and settings."""
        keyring = layout.make_keys(self.folder, self.tree, now=unix_ms(), helper=self.helper)
        if self.engine is None:
            layout.write_broker(self.folder, keyring, port=self.port, listen=self.fleet.listens.get(BROKER, ""))
        else:
            self.folder.role(BROKER).mkdir()
            self.engine.lay_out(self.folder.role(BROKER), keyring)
        layout.write_roles(
            self.folder, self.tree, self.settings, port=self.port, others=self.others, helper=self.helper
        )
        return keyring

    async def start(self, *, without: Iterable[str] = ()) -> None:
        """Start the broker and everybody but ``without``; return when the coordinator answers."""
        self.lay_out()
        await self.start_broker()
        names = [COORDINATOR, *(gateway.id for gateway in self.tree.gateways), *self.devices]
        names += [HELPER] if self.helper else []
        await asyncio.gather(*(self.fleet.start_role(name) for name in names if name not in without))
        await self.connect()

    async def start_broker(self, name: str = BROKER) -> None:
        """Start a broker on the port that everybody knows; also after it was killed."""
        if self.engine is not None:
            await self.engine.start(self, name)
            return
        config = self.folder.role(name) / "broker.toml"
        command = (sys.executable, "-P", "-m", "fleetfed.broker", "run", "--config", str(config))
        running = await self.fleet.supervisor.start(name, command, pipe=True)
        await self.fleet.supervisor.wait_line(running, "listening on ", timeout=PATIENCE)

    def forget_broker_state(self) -> None:
        """What a broker without persistence does when it is killed."""
        if self.engine is not None:
            self.engine.forget()
            return
        shutil.rmtree(self.folder.role(BROKER) / "state")

    async def connect(self) -> None:
        """Connect an operator and follow the coordinator's status."""
        config = self.fleet.operator(layout.OPERATOR, self.port, self.others)
        self._client = ControlClient(config, timeout=PATIENCE)
        await self._client.__aenter__()
        self._watching = asyncio.create_task(self._watch(self._client))

    async def _watch(self, client: ControlClient) -> None:
        async for status in client.watch():
            async with self._news:
                self.statuses.append(status)
                self._news.notify_all()

    async def stop(self) -> None:
        """Stop all that still runs."""
        if self._watching is not None:
            self._watching.cancel()
        if self._client is not None:
            await self._client.__aexit__(None, None, None)
        await self.fleet.stop()
        await self.fleet.supervisor.stop()
        self.folder.release()

    async def kill(self, name: str) -> None:
        """kill -9."""
        await self.fleet.supervisor.kill(name)

    async def start_again(self, name: str) -> None:
        """Start who was killed or stopped."""
        await (self.start_broker() if name == BROKER else self.fleet.start_role(name))

    async def begin(self, rounds: int = 1, **settings: Any) -> None:
        """Ask for rounds."""
        assert self._client is not None
        await self._client.request(Command.ROUND_START, {"rounds": rounds, **settings})

    async def ask(self, command: Command, **arguments: Any) -> dict[str, Any]:
        """Ask the coordinator for something."""
        assert self._client is not None
        return await self._client.request(command, arguments)

    async def until(self, condition: Any) -> Status:
        """Return the first status, from the last one on, for which ``condition(status)`` holds."""
        at = max(0, len(self.statuses) - 1)
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    async with self._news:
                        while at >= len(self.statuses):
                            await self._news.wait()
                    if condition(self.statuses[at]):
                        return self.statuses[at]
                    at += 1
        except TimeoutError:
            last = self.statuses[-1] if self.statuses else None
            if last is not None:
                last = dataclasses.replace(last, history=last.history[-1:])
            raise AssertionError(f"did not come about; last status {last}\n{self.logs()}") from None

    async def answered(self, count: int) -> None:
        """Wait until the gateways say that so many devices have answered."""
        await self.until(lambda status: status.state == "collecting" and status.accepted >= count)

    async def finished(self, rounds: int = 1) -> dict[str, Any]:
        """Wait for the end of a round; return the coordinator's facts about it."""
        status = await self.until(lambda status: any(int(e["round"]) == rounds for e in status.history))
        (entry,) = (entry for entry in status.history if int(entry["round"]) == rounds)
        return entry

    def hold(self, *names: str) -> None:
        """Keep devices from finishing their training; without names, all."""
        for folder in [self.folder.role(name) for name in names] or [self.folder.path]:
            (folder / HOLD).touch()

    def release(self, *names: str) -> None:
        """Let them finish."""
        for folder in [self.folder.role(name) for name in names] or [self.folder.path]:
            (folder / HOLD).unlink()

    async def training(self, name: str) -> None:
        """Wait until a device has begun to train."""
        async with asyncio.timeout(PATIENCE):
            while not (self.folder.role(name) / BEGUN).exists():  # noqa: ASYNC110 - another process tells by a file
                await asyncio.sleep(0.005)

    async def has_update_in_outbox(self, name: str) -> None:
        """Wait until a device has an update that waits for its receipt."""
        async with asyncio.timeout(PATIENCE):
            while not any((self.folder.role(name) / "state" / "answers").glob("*.bin")):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def has_a_receipt(self, name: str) -> None:
        """Wait until a device has sent its update and has been told that it was accepted."""
        async with asyncio.timeout(PATIENCE):
            while self._outcome(name) != "accepted":  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def _outcome(self, name: str) -> str:
        rounds = self.folder.status(name).get("rounds", [])
        return str(rounds[-1]["outcome"]) if rounds else ""

    async def held_by_all(self, version: int) -> str:
        """Wait until every device holds a version; return its SHA-256."""
        async with asyncio.timeout(PATIENCE):
            while True:
                held = [self.folder.status(name) for name in (COORDINATOR, *self.devices)]
                if all(status.get("model_version") == version for status in held):
                    (digest,) = {status["model_sha256"] for status in held}
                    return str(digest)
                await asyncio.sleep(0.01)

    async def weights(self, version: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weights of a version as every device holds it; of the first model for 0."""
        file = self.model.read_bytes()
        if version:
            digest = await self.held_by_all(version)
            file = (self.folder.role(self.devices[0]) / "state" / "models" / f"{digest}.tflite").read_bytes()
        return read_weights(file, self.card.table)

    def logs(self) -> str:
        """The ends of all logs."""
        parts = []
        for path in sorted(self.folder.logs.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            parts.append("\n".join((f"--- {path.name}", *lines)))
        return "\n".join(parts)


@contextlib.asynccontextmanager
async def prepared(path: Path, **settings: Any) -> AsyncIterator[LocalFleet]:
    """A fleet of which nothing is started; what was is stopped at the end."""
    fleet = LocalFleet(path, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH")))))
        try:
            yield fleet
        finally:
            await fleet.stop()


@contextlib.asynccontextmanager
async def running(path: Path, *, without: Iterable[str] = (), **settings: Any) -> AsyncIterator[LocalFleet]:
    """A started fleet, less those ``without`` whom it starts."""
    async with prepared(path, **settings) as fleet:
        await fleet.start(without=without)
        yield fleet
