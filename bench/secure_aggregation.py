"""What split mode costs, by the functions that ship, on one core; beside it what hardware and Flower's SecAgg+ need.

Every figure is processor time, the best of several repetitions: on a shared machine the median says more about the
neighbours. *Device* is everything after quantization: pack, mask, encrypt, seal, hash, sign. *Gateway* is one update's
hash, decryption and addition. *Coordinator* is a round: open all seeds and take away all masks; the verification of the
heads, which plain rounds pay too, is printed apart.

    python bench/secure_aggregation.py
    python bench/secure_aggregation.py --flower-python /tmp/flower/bin/python     # pip install flwr==1.42.* there
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.lanes import LaneLayout, Values, Words
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.secure import box, prg, split
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import Head, Header, MessageKind, digest
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX
from fleetfed.shared.wire.update import EXTENSION_SIZE, SPLIT, UpdateExtension, box_size

TARGETS = {"coordinator_s": 1.0, "gateway_ms": 6.0, "device_ms": 12.0, "device_vectors": 4.0}
META = 9


class Round:
    """Keys and shapes of the round that is measured."""

    def __init__(self, *, dimension: int, lane_bits: int, holders: int, suite: int) -> None:
        self.now = unix_ms()
        self.layout = LaneLayout(dimension, lane_bits, META)
        self.gateway = SealSecret.from_bytes(secrets.token_bytes(32), suite)
        readers = (Reader.COORDINATOR, Reader.HELPER)[:holders]
        self.holders = {reader: SealSecret.from_bytes(secrets.token_bytes(32), suite) for reader in readers}
        self.authority, self._key = SigningKey.generate(), SigningKey.generate()
        certificate = Certificate(
            serial=1,
            role=Role.DEVICE,
            fleet="bench",
            id="d-1",
            site="north",
            not_before=self.now - 1000,
            not_after=self.now + 86_400_000,
            public_key=self._key.public,
        )
        self.signer = Signer(
            self._key,
            certificate,
            issue(certificate, self.authority),
            sequence=lambda: 1,
            randomness=secrets.token_bytes,
        )
        self.verifier = Verifier("bench", self.authority.public)
        self.extension = UpdateExtension(
            mode=SPLIT,
            suite=suite,
            bits=8,
            lane_bits=lane_bits,
            dimension=dimension,
            meta_words=META,
            plan=digest(b"plan"),
            model_sha256=bytes(32),
        )

    def update(self, values: Values, meta: Words) -> Message:
        """All that a device does after quantization."""

        def fill(header: Header) -> tuple[bytes, bytes]:
            fixed = self.extension.fixed()
            body, boxes = split.mask(
                self.layout.pack(values, meta),
                split.binding(header, fixed),
                gateway_key=self.gateway.public,
                seed_keys=[(reader, secret.public) for reader, secret in self.holders.items()],
                randomness=secrets.token_bytes,
                hedge=bytes(32),
                suite=self.extension.suite,
            )
            return body, fixed + b"".join(boxes)

        return self.signer.sign_bound(
            MessageKind.UPDATE,
            fill,
            body_size=split.body_size(self.layout.n_words),
            extension_size=EXTENSION_SIZE + box_size(self.extension.suite) * (1 + len(self.holders)),
            now=self.now,
            round=1,
            lifetime=60_000,
        )

    def add(self, total: Words, update: Message) -> None:
        """All that a gateway does with a verified update."""
        np.add(
            total,
            split.open_words(update.head, update.body, secret=self.gateway, n_words=self.layout.n_words),
            out=total,
        )

    def unmask(self, total: Words, heads: list[Head], reader: Reader) -> None:
        """All that a seed holder does with verified heads."""
        secret = self.holders[reader]
        keys = [split.mask_key(split.open_seed(head, reader, secret), split.binding_of(head)) for head in heads]
        split.add_masks(total, keys, negate=True)


def best(action: Callable[[], object], *, repeat: int, times: int = 1) -> float:
    """Least processor seconds of one call."""
    found = float("inf")
    for _ in range(repeat):
        began = time.process_time_ns()
        for _ in range(times):
            action()
        found = min(found, (time.process_time_ns() - began) / times / 1e9)
    return found


def peak_vectors(action: Callable[[], object], vector: int) -> float:
    """Most memory that an action holds at once beyond what was there before, in vectors."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = action()
        peak = tracemalloc.get_traced_memory()[1]
        del result
    finally:
        tracemalloc.stop()
    return (peak - before) / vector


def measure(*, devices: int, dimension: int, lane_bits: int, holders: int, suite: int, repeat: int) -> dict[str, Any]:
    """The figures of one shape."""
    rnd = Round(dimension=dimension, lane_bits=lane_bits, holders=holders, suite=suite)
    layout, rng = rnd.layout, np.random.default_rng(0)
    values = rng.integers(-127, 128, dimension).astype(np.int8)
    meta = np.arange(META, dtype=np.uint64)
    plain = layout.pack(values, meta)
    update = rnd.update(values, meta)
    total = layout.zeros()
    rnd.add(total, update)
    for reader in rnd.holders:
        rnd.unmask(total, [update.head], reader)
    assert (total == plain).all(), "the sum is wrong"
    # One head many times over: what it costs to open does not depend on whose it is.
    heads = [update.head] * devices
    vector = 8 * layout.n_words
    body, key = memoryview(update.body), bytes(32)
    zeros = memoryview(bytes(vector))
    other = np.zeros_like(total)
    limits = {
        "chacha20": lambda: prg.add_mask(total, key),
        "aead": lambda: box.encrypt(zeros, key, digest(b"")),
        "blake2b": lambda: digest(body),
        "copy": lambda: np.copyto(other, total),
    }
    found = {
        "device_ms": 1e3 * best(lambda: rnd.update(values, meta), repeat=repeat, times=3),
        "device_vectors": peak_vectors(lambda: rnd.update(values, meta), vector),
        "pack_ms": 1e3 * best(lambda: layout.pack(values, meta), repeat=repeat, times=3),
        "gateway_ms": 1e3 * best(lambda: rnd.add(total, update), repeat=repeat, times=5),
        "coordinator_s": best(lambda: rnd.unmask(total, heads, Reader.COORDINATOR), repeat=repeat),
        "open_seeds_s": best(
            lambda: [split.open_seed(head, Reader.COORDINATOR, rnd.holders[Reader.COORDINATOR]) for head in heads],
            repeat=repeat,
        ),
        "seal_ms": 1e3
        * best(
            lambda: box.seal(key, Reader.COORDINATOR, digest(b""), rnd.gateway.public, suite), repeat=repeat, times=100
        ),
        "verify_heads_s": best(
            lambda: [rnd.verifier.head(head, kind=MessageKind.UPDATE, now=rnd.now) for head in heads], repeat=repeat
        ),
    }
    found |= {f"{name}_ms": 1e3 * best(action, repeat=repeat, times=5) for name, action in limits.items()}
    return found | {"raw_chacha20_ms": 1e3 * raw_chacha20(vector, repeat), "update_bytes": len(update.encode())}


def raw_chacha20(size: int, repeat: int) -> float:
    """Seconds for so much of OpenSSL's keystream alone, in pieces that fit the cache; NaN without `cryptography`."""
    if prg._library() is None:
        return float("nan")
    encryptor = prg._encryptor(bytes(32))
    piece = 1 << 17
    zeros, out = bytes(piece), bytearray(piece)
    return best(lambda: encryptor.update_into(zeros, out), repeat=repeat, times=50) * size / piece


def show(found: dict[str, Any], *, devices: int, dimension: int, holders: int) -> None:
    print(
        f"{devices} devices, {dimension:,} coordinates, {holders} seed holder(s), "
        f"an update of {found['update_bytes']:,} bytes"
    )

    def line(name: str, key: str, unit: str, scale: float = 1.0, note: str = "") -> None:
        target = TARGETS.get(key)
        verdict = "" if target is None else f"   (target {target:g}: {'met' if found[key] <= target else 'MISSED'})"
        print(f"  {name:<66}{scale * found[key]:8.3f} {unit}{verdict}{note}")

    line("coordinator: open all seeds, take away all masks", "coordinator_s", "s")
    line("  of it the seeds", "open_seeds_s", "s")
    line("coordinator: verify all heads (plain rounds do this too)", "verify_heads_s", "s")
    line("gateway: hash, decrypt and add one update", "gateway_ms", "ms")
    line("device: pack, mask, encrypt, seal, hash and sign", "device_ms", "ms")
    line("  of it packing (plain updates pack their own way)", "pack_ms", "ms")
    line("  of it one seal", "seal_ms", "ms")
    line("device: memory at the peak beyond the integers", "device_vectors", "vectors")
    print("  limits, for one vector of this size:")
    all_s = found["raw_chacha20_ms"] * devices / 1e3
    line("  ChaCha20 keystream alone (OpenSSL)", "raw_chacha20_ms", "ms", note=f"   x {devices} = {all_s:.3f} s")
    line("  one mask: keystream and addition", "chacha20_ms", "ms")
    line("  ChaCha20-Poly1305", "aead_ms", "ms")
    line("  BLAKE2b-256", "blake2b_ms", "ms")
    line("  copy", "copy_ms", "ms")


def flower(python: Path, found: dict[str, Any], *, clients: int, devices: int, dimension: int) -> None:
    """Print what Flower's SecAgg+ needs, measured by its own interpreter, and what we need for as many."""
    script = Path(__file__).with_name("flower_secagg.py")
    command = [str(python), str(script), "--clients", str(clients), "--parameters", str(dimension)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Flower was not measured: {python} says: {done.stderr.strip().splitlines()[-1:]}")
        return
    result = json.loads(done.stdout.splitlines()[-1])
    each_ms = found["gateway_ms"] + 1e3 * (found["coordinator_s"] + found["verify_heads_s"]) / devices
    print(
        f"{clients} clients, {dimension:,} coordinates; no network, no training, nobody drops out. "
        f"Flower {result['version']}:\nits SecAggPlusWorkflow and secaggplus_mod in one process, "
        f"{result['shares']} shares per key as in its own example"
    )
    rows = (
        ("one client, all four stages / one device", 1e3 * result["client_s"], found["device_ms"], "ms"),
        ("server / gateway and coordinator", 1e3 * result["server_s"], each_ms * clients, "ms"),
        ("sent by one client / device", result["bytes_up"] / 1e6, found["update_bytes"] / 1e6, "MB"),
        ("stages in which every client must be awake", 4.0, 1.0, ""),
    )
    for name, theirs, ours, unit in rows:
        print(f"  {name:<48} Flower {theirs:10.2f} {unit:<3} FleetFed {ours:8.2f} {unit}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=1 << 20)
    parser.add_argument("--lane-bits", type=int, default=16)
    parser.add_argument("--holders", type=int, choices=(1, 2), default=1)
    parser.add_argument("--suite", type=int, choices=(SEALED_BOX, HYBRID), default=SEALED_BOX)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without-cryptography", action="store_true", help="libsodium alone, as on a small device")
    parser.add_argument("--flower-python", type=Path, help="an interpreter that has flwr 1.42")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.without_cryptography:
        prg._library = box._library = lambda: None  # type: ignore[assignment]
    found = measure(
        devices=options.devices,
        dimension=options.dimension,
        lane_bits=options.lane_bits,
        holders=options.holders,
        suite=options.suite,
        repeat=options.repeat,
    )
    show(found, devices=options.devices, dimension=options.dimension, holders=options.holders)
    if options.flower_python:
        flower(options.flower_python, found, clients=10, devices=options.devices, dimension=options.dimension)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
