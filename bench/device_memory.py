"""Memory of a device while it trains FedKeeper's CNN (582,026 parameters, batch 10): a real process, a real broker.

The device runs as it is installed, over mutual TLS, for some rounds; what is printed is the most that its process ever
held resident (VmHWM), sampled values while it trained, and the same for a device that waits. Beside it: a Flower 1.42
client, which holds a NumPy vector and trains nothing.

    python bench/device_memory.py --data ../shared/data/mnist.npz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
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
from fleetfed.shared.wire.messages import Optimizer, Training

TARGET_MB = 80.0
ANCHORS = (
    ("Flower 1.42 client, 1,000,000 float32 in a NumPy vector, no training", "222 MB"),
    ("Flower 1.42 idle client, two processes", "262 MB"),
)


def resident_mb(pid: int, key: str = "VmRSS") -> float:
    """``VmRSS`` (now) or ``VmHWM`` (most ever) of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(pid)


def write_data(path: Path, source: Path | None, examples: int) -> str:
    if source is None:
        rng = np.random.default_rng(0)
        np.savez(path, x=rng.integers(0, 256, (examples, 28, 28), dtype=np.uint8), y=rng.integers(0, 10, examples))
        return f"{examples} random images"
    with np.load(source) as mnist:
        # Two digits, as in FedKeeper's setting of two shards of labels per client.
        wanted = np.flatnonzero(mnist["y_train"] < 2)[:examples]
        np.savez(path, x=mnist["x_train"][wanted], y=mnist["y_train"][wanted])
    return f"{examples} images of MNIST"


def measure(
    directory: Path, *, source: Path | None, examples: int, rounds: int, model: str, split: bool
) -> dict[str, Any]:
    loaded = zoo.load(model)
    pki = FleetPki(directory / "pki")
    broker: Any = (Embedded if MOSQUITTO is None else Mosquitto)(directory / "broker", pki)
    authority = Authority()
    gateway = LoneGateway(broker.config("g-north", TlsRole.GATEWAY), authority)
    device = authority.member(Role.DEVICE, "d-1")
    what = write_data(directory / "data.npz", source, examples)
    settings = write_settings(directory, device, broker.config("d-1"), '[data]\npath = "data.npz"')
    manifest, blobs = manifest_of(loaded.data, loaded.card, version=1, sha256=hashlib.sha256(loaded.data).digest())
    program = Path(sys.executable).with_name("fleetfed-device")
    process = subprocess.Popen([program, "run", "--config", settings, "--log-level", "warning"])
    samples: list[float] = []
    try:
        gateway.wait(lambda: "d-1" in gateway.presence)
        waiting = resident_mb(process.pid)
        gateway.publish_model(manifest, blobs)
        for number in range(1, rounds + 1):
            training = Training(optimizer=Optimizer.ADAM if number % 2 else Optimizer.SGD, learning_rate=0.001)
            masks = {"split": gateway.split()} if split else {}
            plan = plan_for(loaded.card, manifest, round_=number, seconds=300, training=training, **masks)
            plan_hash = gateway.publish_plan(plan)
            if split:
                gateway.publish_cosign(plan, plan_hash)

            def answered(number: int = number) -> bool:
                samples.append(resident_mb(process.pid))
                return len(gateway.updates) >= number

            gateway.wait(answered, timeout=300)
            gateway.end_round(number, plan_hash)
        time.sleep(0.5)
        peak, after = resident_mb(process.pid, "VmHWM"), resident_mb(process.pid)
        process.terminate()
        process.wait(15)
        status = json.loads((directory / "state" / "status.json").read_text())
    finally:
        process.kill()
        gateway.close()
        broker.stop()
    return {
        "model": model,
        "mode": "split" if split else "plain",
        "parameters": loaded.card.parameters,
        "batch": loaded.card.batch,
        "data": what,
        "rounds": rounds,
        "steps": sum(row["steps"] for row in status["rounds"]),
        "seconds_per_round": round(
            sum(row["train_ended"] - row["train_started"] for row in status["rounds"]) / 1000 / rounds, 2
        ),
        "update_bytes_mean": round(float(np.mean([row["update_bytes"] for row in status["rounds"]]))),
        "waiting_mb": round(waiting, 1),
        "training_median_mb": round(float(np.median(samples)), 1),
        "peak_mb": round(peak, 1),
        "after_mb": round(after, 1),
        "status_rss_mb_max": status["rss_mb_max"],
        "target_mb": TARGET_MB,
        "met": peak <= TARGET_MB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="mnist.npz; random images without it")
    parser.add_argument("--examples", type=int, default=600, help="images on the device (600 as in FedKeeper)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="fedkeeper_cnn", choices=zoo.NAMES)
    parser.add_argument("--split", action="store_true", help="masked updates")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(
            Path(directory),
            source=options.data,
            examples=options.examples,
            rounds=options.rounds,
            model=options.model,
            split=options.split,
        )
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['model']}: {result['parameters']:,} parameters, batch {result['batch']}, {result['data']}, "
            f"{result['rounds']} {result['mode']} rounds (Adam and SGD in turn), {result['steps']} steps, "
            f"{result['seconds_per_round']} s and {result['update_bytes_mean']:,} bytes per round"
        )
        print(f"  waiting, without a model     {result['waiting_mb']:6.1f} MB")
        print(f"  during rounds, median        {result['training_median_mb']:6.1f} MB")
        print(f"  most ever                    {result['peak_mb']:6.1f} MB   (target {TARGET_MB:.0f} MB)")
        print(f"  after the rounds             {result['after_mb']:6.1f} MB")
        for name, value in ANCHORS:
            print(f"  {name}: {value}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
