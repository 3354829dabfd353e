"""A thousand devices in one round, through one gateway and a coordinator, beside what the broker alone does.

    python bench/load.py [--mode plain|split] [--devices 1000] [--repeat 3] [--json FILE]

Everything is a process of its own and the real thing, but for the devices: Mosquitto, gateway and coordinator as they
ship, with TLS, client certificates, access list, signatures, journals and fsyncs. The devices are simulated in a few
processes (`load_devices.py`): each has its own identity, session, keys and random values, verifies what it is told and
signs what it says, but trains nothing. Their updates are signed before they start; TLS handshakes, which are counted
apart, are done by then as well.

Throughput is updates accepted, from the first publish to the last receipt, all devices sending at once; receipts are
verified, but only when all have come, since real devices have processors of their own. The broker alone is a second
Mosquitto with the same settings and as many sessions: the same devices publish the very same frames to it, and one
subscriber with the gateway's identity and window does nothing but receive; until its last message. Both take turns, and
medians count: a shared machine disturbs either. Between them stands a bare gateway (`load_peers.py`), which does with
the same frames what no gateway can leave out, and nothing else: what is left to win.

Each round must hold every device's update exactly once, by the coordinator's record of the committed messages and by
the sum of the devices' weights, all different.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import load_devices
import load_peers
import overhead
from load_client import cpu_seconds, peak_megabytes

from fleetfed.broker.config import BrokerConfig, Limits
from fleetfed.broker.mosquitto import MosquittoProcess
from fleetfed.cloud_coordinator.cli.broker import broker_tls
from fleetfed.cloud_coordinator.control.client import ControlClient
from fleetfed.cloud_coordinator.demo import layout, topology
from fleetfed.cloud_coordinator.demo.fleet import Fleet, stopping
from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR, FLEET, Folder, Settings
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.wire.topics import SiteTopics

GOAL_RATIO = 0.6
GOAL_RSS = 200.0
"""MB of the gateway."""
BITS = 8
_CALM = 0.3
"""Seconds before everybody starts at once."""


class Processes:
    """Child processes that are asked over pipes."""

    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._started: list[tuple[Any, Connection]] = []

    def start(self, target: Any, *arguments: Any) -> Connection:
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        self._started.append((process, ours))
        return ours

    def stop(self) -> None:
        for _, pipe in self._started:
            # One that died has said why.
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, _ in self._started:
            process.join(10)
            if process.is_alive():
                process.kill()


async def heard(pipe: Connection) -> Any:
    """The next answer of a child; `EOFError` where it died."""
    return await asyncio.get_running_loop().run_in_executor(None, pipe.recv)


async def ask(pipes: list[Connection], *command: Any) -> list[Any]:
    for pipe in pipes:
        pipe.send(command)
    return list(await asyncio.gather(*map(heard, pipes)))


class Brokers:
    """Two of a kind: the fleet's, and the one that is measured alone."""

    def __init__(self, ours: MosquittoProcess, alone: MosquittoProcess) -> None:
        self.ours, self.alone = ours, alone

    async def __aenter__(self) -> Brokers:
        await self.ours.start()
        await self.alone.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ours.stop()
        await self.alone.stop()


@dataclasses.dataclass
class Bed:
    """What stands while rounds are measured."""

    fleet: Fleet
    folder: Folder
    brokers: Brokers
    workers: list[Connection]
    peer: Connection
    devices: int

    def pids(self) -> dict[str, int]:
        supervisor = self.fleet.supervisor
        return {
            "gateway": supervisor.pid("g-north"),
            COORDINATOR: supervisor.pid(COORDINATOR),
            BROKER: self.brokers.ours.pid or 0,
        }

    async def ours(self) -> dict[str, Any]:
        before = {name: cpu_seconds(pid) for name, pid in self.pids().items()}
        found = await ask(self.workers, "ours", time.monotonic() + _CALM)
        after = {name: cpu_seconds(pid) for name, pid in self.pids().items()}
        seconds = max(each["last"] for each in found) - min(each["first"] for each in found)
        delays = sorted(delay for each in found for delay in each["delays"])
        return {
            "per_second": self.devices / seconds,
            "seconds": seconds,
            "receipt_p50": delays[len(delays) // 2],
            "receipt_p99": delays[len(delays) * 99 // 100],
            "resent": sum(each["resent"] for each in found),
            "overloaded": sum(each["overloaded"] for each in found),
            "cpu": {name: after[name] - before[name] for name in before}
            | {"devices": sum(each["cpu"] for each in found)},
            "load": os.getloadavg()[0],
            "ids": [message_id for each in found for message_id in each["ids"]],
        }

    async def alone(self, frames: int, *, answered: bool = False) -> dict[str, Any]:
        self.peer.send(("answer" if answered else "listen", frames))
        assert await heard(self.peer) == "listening"
        before = cpu_seconds(self.brokers.alone.pid or 0)
        found = await ask(self.workers, "answered" if answered else "alone", time.monotonic() + _CALM)
        ended, size, cpu = await heard(self.peer)
        if answered:
            ended = max(each["last"] for each in found)
        seconds = ended - min(each["first"] for each in found)
        return {
            "per_second": self.devices / seconds,
            "seconds": seconds,
            "megabytes_per_second": size / seconds / 1e6,
            "cpu": {
                "peer": cpu,
                BROKER: cpu_seconds(self.brokers.alone.pid or 0) - before,
                "devices": sum(each["cpu"] for each in found),
            },
            "load": os.getloadavg()[0],
        }

    def check(self, number: int, ids: list[bytes], weights: int) -> None:
        """Every update is in the round once, and nothing else.

        Raises:
            AssertionError: it is not so.
        """
        state = self.folder.role(COORDINATOR) / "state"
        store = Store(f"sqlite:///{state / 'coordinator.db'}", BlobStore(state / "blobs"))
        try:
            record = store.round(number)
            committed = [bytes(each.message_id) for exchange in store.exchanges(number) for each in exchange.members]
        finally:
            store.close()
        assert record is not None
        assert sorted(committed) == sorted(ids), f"{len(set(committed))} of {len(ids)} updates were committed"
        assert record.participants == len(ids), f"{record.participants} participants of {len(ids)}"
        assert record.weight == weights, f"a weight of {record.weight} where the devices' is {weights}"


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    devices, mode = options.devices, options.mode
    lanes = 64 // choose_lane_bits(BITS, devices)
    values = options.kilobytes * 1000 if mode == "plain" else options.kilobytes * 1000 // 8 * lanes
    tree = topology.plan(devices=devices, gateways=1, tiers=1)
    folder, children = Folder(directory), Processes()
    folder.prepare()
    try:
        began = time.monotonic()
        keyring = layout.make_keys(folder, tree, now=unix_ms())
        issued = time.monotonic() - began
        layout.write_broker(folder, keyring)
        brokers = Brokers(
            *(
                MosquittoProcess(_broker(options, folder, keyring, name), folder.path / name)
                for name in ("ours", "alone")
            )
        )
        async with brokers:
            fleet = Fleet(folder, tree, broker="mosquitto")
            async with stopping(fleet):
                overhead.write_model(folder.path / "model.tflite", values)
                rounds = {
                    "rounds": options.repeat + 1,
                    "start_when": devices,
                    "quorum_minimum": devices,
                    "cohort_cap": devices,
                    "weight_cap": devices,
                    "deadline": 3000.0,
                    "expires": 3600.0,
                    "mode": mode,
                }
                settings = Settings(
                    model=folder.path / "model.tflite",
                    validation=None,
                    data={},
                    rounds=rounds,
                    tables={"clips": {"bits": BITS, "first_bits": BITS}},
                )
                layout.write_roles(folder, dataclasses.replace(tree, devices=()), settings, port=brokers.ours.port)
                await fleet.start_role(COORDINATOR)
                await fleet.start_role("g-north")
                try:
                    return await _measure(options, fleet, folder, children, brokers, values=values, issued=issued)
                finally:
                    children.stop()
    finally:
        folder.release()


def _broker(options: argparse.Namespace, folder: Folder, keyring: Keyring, name: str) -> BrokerConfig:
    return BrokerConfig(
        host=layout.HOST,
        port=0,
        limits=Limits(max_queued_bytes=options.queue * 1024 * 1024),
        tls=broker_tls(keyring.identity_folder(BROKER)),
        acl_file=folder.role(BROKER) / "acl",
        persistence_dir=folder.path / name / "state",
        sys_interval=0,
    )


async def _measure(
    options: argparse.Namespace,
    fleet: Fleet,
    folder: Folder,
    children: Processes,
    brokers: Brokers,
    *,
    values: int,
    issued: float,
) -> dict[str, Any]:
    devices = options.devices
    names = [place.id for place in fleet.topology.devices]
    weights = {name: number + 1 for number, name in enumerate(names)}
    site, identities = "north", folder.keys / "identities"
    sizes = (values - values // 10, values // 10)
    workers = [
        children.start(
            load_devices.simulate,
            load_devices.Crew(
                fleet=FLEET,
                site=site,
                members=tuple((name, weights[name]) for name in names[number :: options.processes]),
                identities=identities,
                sizes=sizes,
                state=folder.path / f"crew-{number}",
            ),
        )
        for number in range(options.processes)
    ]
    peer = children.start(
        load_peers.stand_in, brokers.alone.port, identities / "g-north", SiteTopics(FLEET, site), folder.path
    )
    assert await heard(peer) == "ready"
    bed = Bed(fleet, folder, brokers, workers, peer, devices)
    handshakes = max(await ask(workers, "connect", brokers.ours.port, False))
    await ask(workers, "connect", brokers.alone.port, True)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "bare": [], "alone": []}
    async with ControlClient(fleet.operator(layout.WATCHER, brokers.ours.port)) as client:
        statuses = client.watch()
        for number in range(options.repeat + 1):
            prepared = await ask(workers, "prepare")
            frames = sum(each["frames"] for each in prepared)
            runs["alone"].append(await bed.alone(frames))
            if frames == devices:
                # It takes messages of one chunk only.
                runs["bare"].append(await bed.alone(frames, answered=True))
            run = await bed.ours()
            async for status in statuses:
                if any(int(entry["round"]) == prepared[0]["round"] for entry in status.history):
                    break
            bed.check(prepared[0]["round"], run.pop("ids"), sum(weights.values()))
            runs["ours"].append(run)
            _say(number, runs)
        runs["alone"].append(await bed.alone(frames))
    pids = bed.pids()
    journal = folder.status("g-north").get("journal_commits", 0)
    return {
        "mode": options.mode,
        "devices": devices,
        "processes": options.processes,
        "body_bytes": round(sum(each["bytes"] for each in prepared) / devices),
        "frames": frames,
        "issue_seconds": issued,
        "handshake_seconds": handshakes,
        "journal_commits": journal,
        # The first of each warms up.
        "ours": runs["ours"][1:],
        "bare": runs["bare"][1:],
        "alone": runs["alone"][1:],
        "rss_mb": {name: peak_megabytes(pid) for name, pid in pids.items()}
        | {"the broker alone": peak_megabytes(brokers.alone.pid or 0)},
    }


def _say(number: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    titles = (("ours", "ours"), ("bare gateway", "bare"), ("broker alone", "alone"))
    rates = ", ".join(f"{title} {runs[name][-1]['per_second']:.0f}/s" for title, name in titles if runs[name])
    last = runs["ours"][-1]
    print(
        f"  round {number}{' (warm-up)' if not number else ''}: {rates}, load {last['load']:.1f}, "
        f"sent again {last['resent']}",
        flush=True,
    )


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(float(each[key]) for each in runs)


def show(result: dict[str, Any]) -> bool:
    """Print the result; return whether the goals are met."""
    ours, bare, alone = result["ours"], result["bare"], result["alone"]
    result["ratio"] = ratio = _median(ours, "per_second") / _median(alone, "per_second")
    rss = result["rss_mb"]
    print(
        f"{result['devices']} devices, {result['mode']} mode, bodies of {result['body_bytes']:,} bytes in "
        f"{result['frames']} messages; {len(ours)} rounds, medians"
    )
    print(f"  {'FleetFed, first publish to last receipt':<44}{_median(ours, 'per_second'):8.0f} updates/s")
    print(f"  {'the broker alone, to one that only receives':<44}{_median(alone, 'per_second'):8.0f} updates/s")
    print(f"  {'ratio':<44}{ratio:8.2f}   (goal {GOAL_RATIO}: {'met' if ratio >= GOAL_RATIO else 'MISSED'})")
    if bare:
        print(
            f"  {'a bare gateway, first publish to last answer':<44}{_median(bare, 'per_second'):8.0f} updates/s: "
            f"ratio {_median(bare, 'per_second') / _median(alone, 'per_second'):.2f}"
        )
    print(f"  receipts after: p50 {_median(ours, 'receipt_p50'):.2f} s, p99 {_median(ours, 'receipt_p99'):.2f} s")
    for title, runs in (("ours", ours), ("a bare gateway", bare), ("the broker alone", alone)):
        if not runs:
            continue
        cpu = ", ".join(
            f"{name} {statistics.median(each['cpu'][name] for each in runs):.2f}" for name in runs[0]["cpu"]
        )
        print(f"  processor seconds, {title}: {cpu}; load {_median(runs, 'load'):.1f}")
    small = rss["gateway"] <= GOAL_RSS
    print(f"  most resident MB: {', '.join(f'{name} {value:.0f}' for name, value in rss.items())}", end="")
    print(f"   (goal {GOAL_RSS:.0f} for the gateway: {'met' if small else 'MISSED'})")
    print(
        f"  sent again {sum(each['resent'] for each in ours)}, overloaded {sum(each['overloaded'] for each in ours)}; "
        f"every update was committed once; before: {result['issue_seconds']:.1f} s to issue all identities, "
        f"{result['handshake_seconds']:.1f} s for all sessions"
    )
    return small and ratio >= GOAL_RATIO


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("plain", "split"), action="append", help="both by default")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--kilobytes", type=int, default=100, help="of one update's body (100)")
    parser.add_argument("--processes", type=int, default=2, help="that simulate devices (2)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that are measured, after one that is not (3)")
    parser.add_argument("--queue", type=int, default=256, help="MiB that a broker may queue for one session (256)")
    parser.add_argument("--dir", type=Path, help="where temporary files go; a real disk, or fsync costs nothing")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    results, good = [], True
    for mode in options.mode or ["plain", "split"]:
        options.mode = mode
        with tempfile.TemporaryDirectory(prefix="fleetfed-load-", dir=options.dir) as temporary:
            result = asyncio.run(measure(options, Path(temporary)))
        good &= show(result)
        results.append(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
