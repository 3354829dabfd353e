"""A fleet of real processes with a Prometheus beside it, and what may happen to such a fleet."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.demo import sources
from fleetfed.cloud_coordinator.demo.layout import BROKER
from fleetfed.cloud_coordinator.keys.equip import follow
from fleetfed.cloud_coordinator.keys.keyring import Keyring, NewMember
from fleetfed.cloud_coordinator.keys.owners import Owners
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.wire.messages import Command
from fleetfed.shared.wire.topics import Verb
from fleetfed_testing.impostor import impostor
from fleetfed_testing.local_fleet import LocalFleet
from fleetfed_testing.prometheus import ALERTS, Prometheus, hurried, prometheus
from fleetfed_testing.proxies import Proxy
from fleetfed_testing.scraping import scrape
from fleetfed_testing.trainers import WAY
from fleetfed_testing.waiting import PATIENCE

FACTOR: Final = 120.0
"""How many times shorter rules wait and look back: half an hour is 15 s."""
LEAST: Final = 3.0
"""Seconds that they wait and look back at least: three scrapes."""


@contextlib.asynccontextmanager
async def watched(fleet: LocalFleet, *names: str) -> AsyncIterator[Prometheus]:
    """A Prometheus beside the fleet, or beside these of its processes."""
    if names:
        fleet.fleet.listens = {name: fleet.fleet.listens[name] for name in names}
    rules = hurried(ALERTS.read_text(), factor=FACTOR, least=LEAST)
    async with prometheus(fleet.folder.path / "prometheus", fleet.targets, rules) as found:
        yield found


def instance(fleet: LocalFleet, name: str) -> dict[str, str]:
    """The label of a process."""
    return {"instance": fleet.fleet.listens[name]}


def digits(fleet: LocalFleet) -> None:
    """Give a fleet a model that can be evaluated, and the coordinator something to evaluate it on."""
    ready = zoo.load("digits")
    fleet.model = fleet.folder.path / "digits.tflite"
    fleet.model.write_bytes(ready.data)
    fleet.model.with_suffix(".card").write_bytes(ready.card.encode())
    fleet.card = ready.card
    validation = fleet.folder.path / "validation.npz"
    sources.load("digits", sources.Deal(devices=1)).validation.save(validation)
    fleet.settings = dataclasses.replace(fleet.settings, model=fleet.model, validation=validation)


def wayward(fleet: LocalFleet, way: str, *names: str) -> None:
    """Say how devices train from now on (`fleetfed_testing.trainers.Wayward`), empty for well; without names, all."""
    for folder in [fleet.folder.role(name) for name in names] or [fleet.folder.path]:
        if way:
            (folder / WAY).write_text(way)
        else:
            (folder / WAY).unlink()


def silence(fleet: LocalFleet, name: str) -> None:
    """Take a member's right to say anything away, as a wrong access list does."""
    path = fleet.folder.role(BROKER) / "acl"
    own = re.compile(rf"(?ms)^user {name}$.*?(?=^user |\Z)")
    text, count = own.subn(lambda found: re.sub(r"(?m)^topic write .*\n", "", found[0]), path.read_text())
    assert count == 1
    path.write_text(text)


def through(fleet: LocalFleet, name: str, port: int) -> None:
    """Let somebody reach the broker by another port, and be quick to try again."""
    path = fleet.folder.config(name)
    text = path.read_text().replace(f"port = {fleet.port}", f"port = {port}").replace("_cap = 2.0", "_cap = 0.2")
    path.write_text(text)


async def reissue(fleet: LocalFleet, keyring: Keyring, name: str, *, days: int) -> None:
    """Give a gateway another certificate, and start it with that."""
    (before,) = (each for each in keyring.members if each.id == name and not each.revoked)
    keyring.revoke([name], now=unix_ms())
    shutil.rmtree(keyring.identity_folder(name))
    wish = NewMember(id=name, role=before.role, site=before.site, upstream=before.upstream, days=days)
    follow(keyring, keyring.issue([wish], now=unix_ms()), now=unix_ms())
    await fleet.kill(name)
    await fleet.start_again(name)


async def publish(fleet: LocalFleet, *, days: int, seconds: int = 0) -> None:
    """What the owners do, with all keys at hand: say again what holds, for so long."""
    owners = Owners(fleet.folder.keys / "trust")
    owners.stage_targets(now=unix_ms() + 1000 * seconds, days=days)
    assert owners.sign() == []
    await fleet.ask(Command.KEYS_PUBLISH, bundle=owners.bundle())


async def flood(fleet: LocalFleet, name: str) -> None:
    """Say 55 MB to a gateway that is not there."""
    async with impostor(fleet.folder.keys / "identities" / name, fleet.port) as thief:
        await thief.say(Verb.UPDATE, bytes(250_000), times=220)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 16 MB in a folder."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def cut(fleet: LocalFleet, name: str, line: Proxy, *, times: int) -> None:
    """Break a gateway's connection again and again, each time once it has one."""
    port = int(fleet.fleet.listens[name].rpartition(":")[2])

    def connects() -> float:
        return scrape(port).value("fleetfed_connects_total", side="site") or 0

    before = connects()
    for number in range(1, times + 1):
        line.cut()
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(connects) < before + number:  # noqa: ASYNC110 - only a scrape tells
                await asyncio.sleep(0.05)
