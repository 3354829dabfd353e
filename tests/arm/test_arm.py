"""A device and a gateway on other processors, in a fleet on this one: what they send and hold is the same to the bit.

Real roles and a real TFLite runtime, installed from wheels for that processor and run by emulation.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.enrolment import Bench
from fleetfed_testing.foreign import Foreign, program
from fleetfed_testing.local_fleet import LocalFleet, prepared

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.demo import sources
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.trust.identity import Identity

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("arch", ["arm64", "armhf"]),
]

SPLIT: dict[str, Any] = {"mode": "split", "minimum_cohort": 2, "minimum_owners": 1}


def learn_digits(fleet: LocalFleet) -> None:
    """Give a fleet a model that is really trained, and its devices examples."""
    ready = zoo.load("digits")
    fleet.model = fleet.folder.path / "digits.tflite"
    fleet.model.write_bytes(ready.data)
    fleet.model.with_suffix(".card").write_bytes(ready.card.encode())
    fleet.card = ready.card
    split = sources.load("digits", sources.Deal(devices=len(fleet.devices), per_device=64))
    for name, examples in zip(fleet.devices, split.devices, strict=True):
        examples.save(fleet.folder.path / f"{name}.npz")
    data = {name: {"path": str(fleet.folder.path / f"{name}.npz"), "holdout": 0.2} for name in fleet.devices}
    fleet.settings = dataclasses.replace(fleet.settings, model=fleet.model, data=data, device={})


async def start(fleet: LocalFleet, foreign: Foreign | None, *names: str) -> None:
    """Start a fleet, and those who are named in there."""
    await fleet.start(without=names if foreign else ())
    if foreign:
        for name in names:
            await foreign.start(fleet, name)


async def test_a_device_there_trains_and_is_counted(tmp_path: Path, arch: str) -> None:
    if arch == "arm64":
        pytest.skip("LiteRT's training crashes in QEMU's 64-bit ARM: docs/limits.md")
    foreign = Foreign(arch, tmp_path)
    async with prepared(tmp_path / "fleet", devices=2, rounds=SPLIT) as fleet:
        learn_digits(fleet)
        await start(fleet, foreign, "d-02")
        await fleet.begin()
        fact = await fleet.finished()
        assert (fact["outcome"], fact["contributors"]) == ("committed", 2)
        await fleet.held_by_all(2)
        (row,) = fleet.folder.status("d-02")["rounds"]
        assert row["outcome"] == "accepted"


async def models(path: Path, foreign: Foreign | None) -> list[str]:
    """SHA-256 of the model after each of two masked rounds, with one gateway and one device in there."""
    async with prepared(path, devices=2, trainer="repeatable", seed=7, rounds=SPLIT) as fleet:
        await start(fleet, foreign, "g-north")
        digests = []
        for number in (1, 2):
            await fleet.begin()
            assert (await fleet.finished(number))["contributors"] == 2
            digests.append(await fleet.held_by_all(number + 1))
        return digests


async def test_a_gateway_there_makes_the_same_models(tmp_path: Path, arch: str) -> None:
    foreign = Foreign(arch, tmp_path)
    assert await models(tmp_path / "there", foreign) == await models(tmp_path / "here", None)


def test_a_device_there_enrols(tmp_path: Path, arch: str) -> None:
    foreign = Foreign(arch, tmp_path)
    bench = Bench(tmp_path)
    command = (*program("device"), "enroll", "--identity", tmp_path / "identity")
    request, answer = tmp_path / "d.request", tmp_path / "d.answer"
    foreign.run(*command, "--hardware", "SN-1", "--token", "-", "--request", request, given=bench.token())
    answer.write_bytes(bench.enroller.answer(request.read_bytes(), now=unix_ms()))
    foreign.run(*command, "--response", answer)
    assert Identity.load(tmp_path / "identity").certificate.site == "north"
