"""What a round costs when nobody trains: real processes, TLS, signatures, journals and fsyncs on.

Every device answers with the model plus noise, 100,000 float32. A round's time is from the opening of one round to the
opening of the next, so it holds everything: plan, updates, receipts, proposal, commit, sum, step, new version,
publishing it, and every device's patching of its file for the next round. The median of 10 rounds after 2 is printed
beside what others need for the same on such a machine (2 cores, loopback, NumPy clients that do nothing else).

    python bench/overhead.py --devices 2 --devices 10
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.cloud_coordinator.control.client import ControlClient
from fleetfed.cloud_coordinator.demo import layout, topology
from fleetfed.cloud_coordinator.demo.fleet import Fleet, stopping
from fleetfed.cloud_coordinator.demo.layout import Folder, Settings
from fleetfed.cloud_coordinator.demo.report import RoundFacts, facts, overhead
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.model.card import Initializer, InitializerKind, ModelCard
from fleetfed.shared.model.table import FLOAT32, TensorSlot, WeightTable

_ENGINE = "Flower 1.42, deployment engine"
_LEGACY = "its legacy gRPC stream (no TLS, no signature, no disk)"
ANCHORS = {
    2: ((_ENGINE, "6.3 s"), (_LEGACY, "0.009 s")),
    10: ((_ENGINE, "12 to 16 s"), (_LEGACY, "0.043 s")),
    20: ((_ENGINE, "30 s"), (_LEGACY, "0.098 s")),
}
TARGETS = {2: 0.1, 10: 0.25}
WARM_UP = 2


def write_model(path: Path, parameters: int) -> None:
    """A file with weights at fixed offsets and its card: all that a round without training needs of a model."""
    head = 4096
    sizes = (parameters - parameters // 10, parameters // 10)
    slots = (
        TensorSlot(name="noise/kernel", shape=(sizes[0],), dtype=FLOAT32, offset=head),
        TensorSlot(name="noise/bias", shape=(sizes[1],), dtype=FLOAT32, offset=head + 4 * sizes[0]),
    )
    rng = np.random.default_rng(0)
    # The identifier is all of the format that anybody looks at before training.
    data = b"\0\0\0\0TFL3" + rng.bytes(head - 8) + rng.normal(0, 0.05, parameters).astype("<f4").tobytes()
    none = Initializer(kind=InitializerKind.NONE, fan_in=1, fan_out=1)
    card = ModelCard(
        name="noise",
        builder="bench/overhead.py",
        file_bytes=len(data),
        input_shape=(1,),
        classes=2,
        softmax=True,
        batch=1,
        tensors=slots,
        initializers=(none, none),
        layout=WeightTable(tensors=slots).layout_hash(),
    )
    path.write_bytes(data)
    path.with_suffix(".card").write_bytes(card.encode())


async def measure(
    *, devices: int, gateways: int, tiers: int, rounds: int, parameters: int, broker: str, directory: Path
) -> dict[str, Any]:
    tree = topology.plan(devices=devices, gateways=gateways, tiers=tiers)
    folder = Folder(directory)
    folder.prepare()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    try:
        fleet = Fleet(folder, tree, broker=broker)
        async with stopping(fleet):
            keyring = layout.make_keys(folder, tree, now=unix_ms())
            port = await fleet.start_broker(keyring)
            write_model(folder.path / "model.tflite", parameters)
            settings = Settings(
                model=folder.path / "model.tflite",
                validation=None,
                data={place.id: {} for place in tree.devices},
                rounds={"rounds": rounds + WARM_UP + 1, "start_when": devices, "quorum_minimum": devices},
                device={"trainer": "noop_device:factory"},
            )
            layout.write_roles(folder, tree, settings, port=port)
            await fleet.start_roles()
            found: list[RoundFacts] = []
            cpu = {}
            async with ControlClient(fleet.operator(layout.WATCHER, port)) as client:
                async for status in client.watch():
                    for entry in status.history:
                        if not found or int(entry["round"]) > found[-1].round:
                            found.append(facts(entry))
                    if len(found) >= WARM_UP and not cpu:
                        cpu, began = seconds(fleet), time.monotonic()
                    if status.state == "finished":
                        break
            used = {name: (value - cpu[name]) / rounds for name, value in seconds(fleet).items()}
            elapsed = time.monotonic() - began
        statuses = fleet.statuses("devices")
        made = [each for each in found if each.version]
        assert [each.participants for each in made] == [devices] * (rounds + WARM_UP + 1), "a device was left out"
        measured = made[WARM_UP:]
        periods = [(b.opened - a.opened) / 1000 for a, b in itertools.pairwise(measured)]
        trained = [
            (int(row["train_started"]), int(row["train_ended"]))
            for status in statuses.values()
            for row in status["rounds"]
        ]
        return {
            "devices": devices,
            "gateways": len(tree.gateways),
            "parameters": parameters,
            "rounds": len(periods),
            "broker": broker,
            "round_seconds_median": statistics.median(periods),
            "round_seconds": periods,
            "open_to_version_median": statistics.median(each.seconds for each in measured),
            "without_training_median": statistics.median(overhead(measured, trained)),
            "update_bytes": round(statistics.fmean(each.update_bytes / each.participants for each in measured)),
            "patch_bytes": round(statistics.fmean(each.patch_bytes for each in measured)),
            "device_rss_mb_max": max(float(status["rss_mb_max"]) for status in statuses.values()),
            "cpu_seconds_per_round": by_role(used),
            "elapsed": elapsed,
        }
    finally:
        folder.release()


def seconds(fleet: Fleet) -> dict[str, float]:
    """Processor seconds of every process so far."""
    used = {}
    for name in fleet.supervisor.names():
        fields = Path(f"/proc/{fleet.supervisor.pid(name)}/stat").read_text().rpartition(")")[2].split()
        used[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def by_role(used: dict[str, float]) -> dict[str, float]:
    roles: dict[str, float] = {}
    for name, value in used.items():
        role = "devices" if name.startswith("d-") else "gateways" if name.startswith("g-") else name
        roles[role] = roles.get(role, 0.0) + value
    return {role: round(value, 4) for role, value in sorted(roles.items())}


def show(result: dict[str, Any]) -> None:
    devices, period = result["devices"], result["round_seconds_median"]
    target = TARGETS.get(devices)
    verdict = "" if target is None else f"   (target {target:g} s: {'met' if period <= target else 'MISSED'})"
    cpu = ", ".join(f"{role} {value:.3f}" for role, value in result["cpu_seconds_per_round"].items())
    print(
        f"{devices} devices, {result['gateways']} gateways, {result['parameters']:,} float32, {result['broker']} broker"
    )
    print(f"  {'FleetFed, a whole round':<58}{period:.3f} s{verdict}")
    print(f"  {'FleetFed, from the plan to the new version':<58}{result['open_to_version_median']:.3f} s")
    for name, value in ANCHORS.get(devices, ()):
        print(f"  {name:<58}{value}")
    print(f"  processor seconds per round: {cpu}")
    print(
        f"  an update {result['update_bytes']} bytes, a patch {result['patch_bytes']} bytes, "
        f"device RSS {result['device_rss_mb_max']:.0f} MB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, action="append", help="may be repeated; 2 and 10 by default")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--tiers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded")
    parser.add_argument("--dir", type=Path, help="keep the files here; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    results = []
    for devices in options.devices or [2, 10]:
        with tempfile.TemporaryDirectory(prefix="fleetfed-overhead-") as temporary:
            result = asyncio.run(
                measure(
                    devices=devices,
                    gateways=options.gateways,
                    tiers=options.tiers,
                    rounds=options.rounds,
                    parameters=options.parameters,
                    broker=options.broker,
                    directory=options.dir or Path(temporary),
                )
            )
        show(result)
        results.append(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
