"""Throughput of the embedded broker beside Mosquitto's, in the same run: QoS 1, publishers to one subscriber.

    python bench/broker.py [--quick] [--repeat 3] [--json FILE]

Each broker is a process of its own, the client another one. The client's packets are encoded beforehand and its
answers are made without decoding, so that the broker is what is measured. Brokers take turns and the median counts;
CPU time per message is the figure that a busy machine disturbs least. Mosquitto runs as FleetFed configures it and
with its own default for Nagle's algorithm; the better of both is the anchor. Goal: at least half of it at each size.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fleetfed.broker.codec import encode  # noqa: E402
from fleetfed.broker.config import BrokerConfig, Limits  # noqa: E402
from fleetfed.broker.mosquitto import MosquittoProcess, find_mosquitto  # noqa: E402
from fleetfed.broker.packets import Connect, Publish, Subscribe, Subscription  # noqa: E402
from tests.broker.certificates import Authority  # noqa: E402

KB, MB = 1024, 1024 * 1024
WINDOW = 20
GOAL = 0.5
NAGLE = "mosq. Nagle"
"""Mosquitto with its default ``set_tcp_nodelay false``: less work for small messages, and pauses of 40 ms."""
JOINED = 16 * KB
PACKET_ID_AT_END = 2


@dataclass(frozen=True)
class Load:
    """What is sent: ``count`` messages of ``size`` bytes by ``publishers`` together."""

    name: str
    size: int
    publishers: int
    count: int


LOADS = (
    Load("1 KB", KB, 10, 60_000),
    Load("100 KB", 100 * KB, 10, 3_000),
    Load("1 MB", MB, 10, 400),
)


@dataclass(frozen=True)
class Result:
    """One run."""

    broker: str
    transport: str
    load: str
    messages_per_second: float
    megabytes_per_second: float
    cpu_microseconds_per_message: float
    rss_megabytes: float


# ---------------------------------------------------------------------------------------------- the client


class Subscriber(asyncio.BufferedProtocol):
    """Acknowledges packets that all have one size, by slices."""

    def __init__(self, packet_size: int, id_at: int, count: int) -> None:
        self.packet_size, self.id_at, self.count = packet_size, id_at, count
        self.buffer = memoryview(bytearray(max(4 * packet_size, MB)))
        self.filled = 0
        self.taken = 0
        self.ready = asyncio.Event()
        self.done = asyncio.Event()
        self.greeting = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(
            encode(Connect(version=4, client_id="bench-sub"), 4)
            + encode(Subscribe(packet_id=1, subscriptions=(Subscription(topic_filter="bench", qos=1),)), 4)
        )

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer[self.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self.filled += nbytes
        if not self.ready.is_set():
            if self.filled >= 9:  # CONNACK and SUBACK
                self.filled = 0
                self.ready.set()
            return
        size = self.packet_size
        count = self.filled // size
        if not count:
            return
        end = count * size
        acks = bytearray(4 * count)
        acks[0::4] = b"\x40" * count
        acks[1::4] = b"\x02" * count
        data = self.buffer[:end]
        acks[2::4] = bytes(data[self.id_at :: size])
        acks[3::4] = bytes(data[self.id_at + 1 :: size])
        rest = self.filled - end
        if rest:
            self.buffer[:rest] = bytes(self.buffer[end : self.filled])
        self.filled = rest
        self.transport.write(acks)
        self.taken += count
        if self.taken >= self.count:
            self.done.set()


class Publisher(asyncio.Protocol):
    """Keeps its window full; every acknowledgement has four bytes."""

    def __init__(self, packets: list[bytes], count: int) -> None:
        self.packets, self.left = packets, count
        self.ready = asyncio.Event()
        self.sent = 0
        self.bytes = 0
        self.acknowledged = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(encode(Connect(version=4, client_id=f"bench-{id(self)}"), 4))

    def data_received(self, data: bytes) -> None:
        self.bytes += len(data)
        if not self.ready.is_set():
            if self.bytes >= 4:
                self.bytes = 0
                self.ready.set()
            return
        # Half a window at a time, so that the client's system calls are not what is measured.
        if self.bytes >= 2 * WINDOW:
            count, self.bytes = divmod(self.bytes, 4)
            self.send(count)

    def send(self, count: int) -> None:
        count = min(count, self.left)
        self.left -= count
        first = self.sent % WINDOW
        self.sent += count
        packets = (self.packets[first:] + self.packets[:first])[:count]
        if packets and len(packets[0]) < JOINED:
            packets = [b"".join(packets)]
        for packet in packets:
            self.transport.write(packet)


async def drive(port: int, load: Load, context: list[tuple[str, str, str]] | None) -> float:
    loop = asyncio.get_running_loop()
    each = load.count // load.publishers
    payload = os.urandom(load.size)
    packets = [encode(Publish(topic="bench", payload=payload, qos=1, packet_id=n), 4) for n in range(1, WINDOW + 1)]
    id_at = len(packets[0]) - load.size - PACKET_ID_AT_END

    def tls(index: int) -> dict[str, object]:
        if context is None:
            return {}
        ca, cert, key = context[index]
        made = ssl.create_default_context(cafile=ca)
        made.load_cert_chain(cert, key)
        return {"ssl": made, "server_hostname": "localhost"}

    _, subscriber = await loop.create_connection(
        lambda: Subscriber(len(packets[0]), id_at, each * load.publishers),
        "127.0.0.1",
        port,
        **tls(0),  # type: ignore[arg-type]
    )
    await subscriber.ready.wait()
    publishers = []
    for index in range(load.publishers):
        _, publisher = await loop.create_connection(
            lambda: Publisher(packets, each),
            "127.0.0.1",
            port,
            **tls(index + 1),  # type: ignore[arg-type]
        )
        publishers.append(publisher)
        await publisher.ready.wait()
    gc.disable()
    started = time.perf_counter()
    for publisher in publishers:
        publisher.send(WINDOW)
    await asyncio.wait_for(subscriber.done.wait(), 30)
    elapsed = time.perf_counter() - started
    for item in (subscriber, *publishers):
        item.transport.abort()
    await asyncio.sleep(0)
    return elapsed


def client(
    port: int, load: Load, context: list[tuple[str, str, str]] | None, out: multiprocessing.Queue[float]
) -> None:
    """The client process."""
    out.put(asyncio.run(drive(port, load, context)))


# ---------------------------------------------------------------------------------------------- the brokers


class Server(AbstractContextManager["Server"]):
    """One broker process, embedded or Mosquitto, with a TLS and a plain listener."""

    def __init__(self, kind: str, authority: Authority, folder: Path) -> None:
        self.kind = kind
        # Mosquitto acknowledges at once and drops what its queue does not hold, so it is given room for everything.
        limits = Limits(max_packet=2 * MB, max_inflight=64, max_queued_bytes=2000 * MB, max_queued_messages=1_000_000)
        self.config = BrokerConfig(tls=authority.server_files(), plain_port=0, limits=limits)
        self.folder = folder
        self.pid = self.port = self.plain_port = 0

    def __enter__(self) -> Server:
        self.folder.mkdir(exist_ok=True)
        if self.kind != "embedded":
            self.loop = asyncio.new_event_loop()
            self.mosquitto = MosquittoProcess(self.config, self.folder, nodelay=self.kind == "mosquitto")
            self.loop.run_until_complete(self.mosquitto.start())
            self.pid = self.mosquitto.pid or 0
            self.port, self.plain_port = self.mosquitto.port, self.mosquitto.plain_port or 0
            return self
        tls, limits = self.config.tls, self.config.limits
        assert tls is not None
        path = self.folder / "broker.toml"
        path.write_text(
            f'plain_port = 0\n[tls]\nca = "{tls.ca}"\ncert = "{tls.cert}"\nkey = "{tls.key}"\n'
            f"[limits]\nmax_packet = {limits.max_packet}\nmax_inflight = {limits.max_inflight}\n"
        )
        command = [sys.executable, "-m", "fleetfed.broker", "run", "--config", str(path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])
        self.plain_port = int(self.process.stdout.readline().rpartition(":")[2])
        self.pid = self.process.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.kind != "embedded":
            self.loop.run_until_complete(self.mosquitto.stop())
            self.loop.close()
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_megabytes(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        return 0.0


def measure(kind: str, load: Load, *, tls: bool, authority: Authority, folder: Path) -> Result:
    names = [authority.issue(f"bench-{index}") for index in range(load.publishers + 1)]
    context = [(str(authority.ca), str(cert), str(key)) for cert, key in names] if tls else None
    with Server(kind, authority, folder) as server:
        before = server.cpu_seconds()
        spawn = multiprocessing.get_context("spawn")
        out = spawn.Queue()
        process = spawn.Process(target=client, args=(server.port if tls else server.plain_port, load, context, out))
        process.start()
        elapsed = out.get(timeout=40)
        process.join(30)
        cpu = server.cpu_seconds() - before
        count = load.count // load.publishers * load.publishers
        return Result(
            broker=kind,
            transport="TLS" if tls else "plain",
            load=load.name,
            messages_per_second=count / elapsed,
            megabytes_per_second=count * load.size / elapsed / 1e6,
            cpu_microseconds_per_message=cpu / count * 1e6,
            rss_megabytes=server.peak_megabytes(),
        )


def median(results: list[Result]) -> Result:
    first = results[0]
    return Result(
        first.broker,
        first.transport,
        first.load,
        statistics.median(item.messages_per_second for item in results),
        statistics.median(item.megabytes_per_second for item in results),
        statistics.median(item.cpu_microseconds_per_message for item in results),
        statistics.median(item.rss_megabytes for item in results),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Embedded broker against Mosquitto, QoS 1.")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts (3)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages")
    parser.add_argument("--only", choices=["plain", "tls"], help="one transport")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    options = parser.parse_args()
    kinds = ["embedded"]
    if find_mosquitto() is None:
        print("mosquitto is not installed: only the embedded broker is measured")
    else:
        kinds += ["mosquitto", NAGLE]
    medians: list[Result] = []
    worst = float("inf")
    head = f"{'':14}{'broker':13}{'messages/s':>12}{'MB/s':>9}{'CPU us/msg':>12}{'peak RSS MB':>13}{'ratio':>8}"
    print(head)
    with tempfile.TemporaryDirectory(prefix="fleetfed-bench-") as name:
        folder = Path(name)
        authority = Authority(folder / "pki")
        for tls in (False, True):
            if options.only not in (None, "tls" if tls else "plain"):
                continue
            for load in LOADS:
                if options.quick:
                    load = Load(load.name, load.size, load.publishers, load.count // 10)
                runs: dict[str, list[Result]] = {kind: [] for kind in kinds}
                for turn in range(options.repeat):
                    for kind in kinds:
                        where = folder / f"{kind}-{tls}-{load.size}-{turn}"
                        runs[kind].append(measure(kind, load, tls=tls, authority=authority, folder=where))
                found = {kind: median(items) for kind, items in runs.items()}
                medians += found.values()
                anchor = max((found[kind].messages_per_second for kind in kinds[1:]), default=float("nan"))
                for kind, item in found.items():
                    ratio = item.messages_per_second / anchor
                    if kind == "embedded":
                        worst = min(worst, ratio)
                    print(
                        f"{item.transport + ' ' + item.load:14}{kind:13}{item.messages_per_second:12,.0f}"
                        f"{item.megabytes_per_second:9.1f}{item.cpu_microseconds_per_message:12.1f}"
                        f"{item.rss_megabytes:13.1f}{ratio:8.2f}",
                        flush=True,
                    )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(item) for item in medians], indent=2) + "\n")
    if len(kinds) > 1:
        print(f"worst ratio {worst:.2f}, goal {GOAL}: {'reached' if worst >= GOAL else 'MISSED'}")
        return 0 if worst >= GOAL else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
