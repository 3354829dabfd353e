"""What a connected, waiting device costs on the wire per day: counted on the socket, extrapolated.

A real device process takes part in one round, then waits. A proxy between device and broker counts every byte of the
TCP stream in both directions, TLS included. With the true keep-alive of 60 s the window covers ``--pings`` pings; a
shorter ``--keepalive`` makes the window shorter, and each ping costs the same, so the day is ``86400 / 60`` pings
either way. TCP and IP headers (40 bytes per segment) are printed too. A second device tells how it fares, a minute
after its round, within the window: what it sends beyond pings is counted 24 times.

    python bench/idle.py                     # 2 pings at the true 60 s: about 5 minutes
    python bench/idle.py --keepalive 3 --pings 21
"""

from __future__ import annotations

import argparse
import hashlib
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from fleetfed_testing.brokers import MOSQUITTO, Embedded, FleetPki, Mosquitto
from fleetfed_testing.lone_gateway import Authority, LoneGateway, manifest_of, plan_for, write_settings

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.keys.pki import Role as TlsRole
from fleetfed.shared.trust.certificates import Role

TARGET_MB = 0.5
FLOWER_MB = 32.6
DEFAULT_KEEPALIVE = 60
_TELLINGS = 24
_HEADERS = 40
_DAY = 86_400


class CountingProxy:
    """Passes one TCP connection after another on to ``port`` and counts bytes and segments."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.up = self.down = self.segments = self.connections = 0
        self.times: list[float] = []
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def counts(self) -> tuple[int, int, int]:
        """Bytes up, bytes down, segments that carried them."""
        return self.up, self.down, self.segments

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self.connections += 1
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(("127.0.0.1", self._port)) as broker,
            selectors.DefaultSelector() as ready,
        ):
            for each in (client, broker):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ready.register(client, selectors.EVENT_READ, broker)
            ready.register(broker, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select():
                    source: Any = key.fileobj
                    try:
                        data = source.recv(65536)
                    except ConnectionResetError:
                        return
                    if not data:
                        return
                    if source is client:
                        self.up += len(data)
                    else:
                        self.down += len(data)
                    self.segments += -(-len(data) // 1448)
                    self.times.append(time.monotonic())
                    key.data.sendall(data)


def measure(directory: Path, *, keepalive: int, pings: int) -> dict[str, Any]:
    """What a device costs in a day that tells how it fares, from one that does not and one that does."""
    quiet = _wait(directory / "quiet", keepalive=keepalive, pings=pings, telemetry=False)
    telling = _wait(directory / "telling", keepalive=keepalive, pings=pings, telemetry=True)
    per_ping = (quiet["up"] + quiet["down"]) / max(quiet["moments"], 1)
    told = telling["up"] + telling["down"] - (telling["moments"] - 1) * per_ping
    headers = 2 * _HEADERS * quiet["segments"] / max(quiet["moments"], 1)
    each = _DAY / DEFAULT_KEEPALIVE
    per_day = per_ping * each + _TELLINGS * told
    return {
        "keepalive": keepalive,
        "window_seconds": quiet["window"],
        "bytes_up": quiet["up"],
        "bytes_down": quiet["down"],
        "pings": quiet["moments"],
        "bytes_per_ping": round(per_ping, 1),
        "bytes_per_telling": round(told),
        "mb_per_day": round(per_day / 1e6, 3),
        # Each segment is answered by a bare acknowledgement at worst.
        "mb_per_day_with_headers": round((per_day + headers * each + 2 * _HEADERS * _TELLINGS) / 1e6, 3),
        "target_mb_per_day": TARGET_MB,
        "flower_mb_per_day": FLOWER_MB,
        "met": quiet["moments"] >= 1 and told > 0 and per_day / 1e6 <= TARGET_MB,
    }


def _wait(directory: Path, *, keepalive: int, pings: int, telemetry: bool) -> dict[str, Any]:
    directory.mkdir()
    loaded = zoo.load("digits")
    pki = FleetPki(directory / "pki")
    broker: Any = (Embedded if MOSQUITTO is None else Mosquitto)(directory / "broker", pki)
    proxy = CountingProxy(broker.port)
    authority = Authority()
    gateway = LoneGateway(broker.config("g-north", TlsRole.GATEWAY), authority)
    rng = np.random.default_rng(0)
    np.savez(directory / "data.npz", x=rng.random((100, 8, 8, 1), dtype=np.float32), y=rng.integers(0, 10, 100))
    connection = broker.config("d-1").with_defaults(port=proxy.port)
    text = f'[data]\npath = "data.npz"\n[run]\ntelemetry = {str(telemetry).lower()}\n'
    settings = write_settings(directory, authority.member(Role.DEVICE, "d-1"), connection, text)
    if keepalive != DEFAULT_KEEPALIVE:
        settings.write_text(settings.read_text() + f"keepalive = {keepalive}\n")
    manifest, blobs = manifest_of(loaded.data, loaded.card, version=1, sha256=hashlib.sha256(loaded.data).digest())
    program = Path(sys.executable).with_name("fleetfed-device")
    process = subprocess.Popen([program, "run", "--config", settings, "--log-level", "warning"])
    try:
        gateway.publish_model(manifest, blobs)
        plan_hash = gateway.publish_plan(plan_for(loaded.card, manifest))
        gateway.wait(lambda: gateway.updates)
        gateway.end_round(1, plan_hash)
        gateway.turn(1.0)
        time.sleep(1.0)
        before, seen = proxy.counts(), len(proxy.times)
        began = time.monotonic()
        # A window of whole pings: it ends just before the one after the last would come.
        time.sleep(keepalive * (pings + 0.5))
        window = time.monotonic() - began
        up, down, segments = (now - then for now, then in zip(proxy.counts(), before, strict=True))
        moments = sum(
            1 for a, b in zip([began, *proxy.times[seen:]], proxy.times[seen:], strict=False) if b - a > keepalive / 4
        )
        if proxy.connections != 1:
            raise RuntimeError(f"{proxy.connections} connections: the device did not just wait")
        process.terminate()
        process.wait(15)
    finally:
        process.kill()
        gateway.close()
        broker.stop()
    return {"window": round(window, 1), "up": up, "down": down, "segments": segments, "moments": moments}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keepalive", type=int, default=DEFAULT_KEEPALIVE)
    parser.add_argument("--pings", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), keepalive=options.keepalive, pings=options.pings)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"waiting for {result['window_seconds']} s at keep-alive {result['keepalive']} s over TLS: "
            f"{result['bytes_up']} bytes up, {result['bytes_down']} down in {result['pings']} pings"
        )
        print(f"  one telling                  {result['bytes_per_telling']:6d} bytes, {_TELLINGS} a day")
        print(f"  per day at keep-alive {DEFAULT_KEEPALIVE} s  {result['mb_per_day']:6.3f} MB  (target {TARGET_MB} MB)")
        print(f"  with TCP and IP headers      {result['mb_per_day_with_headers']:6.3f} MB")
        print(f"  Flower 1.42 idle client      {FLOWER_MB:6.1f} MB")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
