"""Makes `secure.json`: rounds in split mode from fixed keys. Run after a change of how updates are masked.

The seals hold fresh ephemeral keys, which the libraries draw themselves, so every run makes other boxes around the same
keys.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.secure.buckets import commit_nonce, deal
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.envelope import Header, MessageId, MessageKind
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX
from fleetfed.shared.wire.update import EXTENSION_SIZE, SPLIT, UpdateExtension, box_size

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_wire = _load("make_wire")
HEDGE = bytes([0xDD]) * 32
RANDOMNESS = bytes(range(32))
SECRETS = {reader: SealSecret.from_bytes(reader.value * 32) for reader in Reader}
HYBRID_SECRETS = {reader: SealSecret.from_bytes(reader.value * 32, HYBRID) for reader in Reader}
LAYOUTS = {
    "16-bit, h = 1": (16, 1, SEALED_BOX),
    "16-bit, h = 2": (16, 2, SEALED_BOX),
    "21-bit, h = 2": (21, 2, SEALED_BOX),
    "16-bit, h = 2, suite 3": (16, 2, HYBRID),
}
DEVICES = 3
DIMENSION, META = 10, 3


def values(device: int) -> Any:
    return np.arange(-100, 150, 25) * (device + 1) - device


def meta(device: int) -> Any:
    return np.array([1, 3 + device, 1000 * device], dtype=np.uint64)


def update(device: int, lane_bits: int, holders: int, suite: int) -> bytes:
    """A signed and masked update of fixed keys."""
    secrets = HYBRID_SECRETS if suite == HYBRID else SECRETS
    layout = LaneLayout(DIMENSION, lane_bits, META)
    words = layout.pack(values(device), meta(device))
    extension = UpdateExtension(
        mode=SPLIT,
        suite=suite,
        bits=9,
        lane_bits=lane_bits,
        dimension=DIMENSION,
        meta_words=META,
        plan=make_wire.PLAN,
        model_sha256=b"s" * 32,
    )
    readers = (Reader.COORDINATOR, Reader.HELPER)[:holders]

    def fill(header: Header) -> tuple[bytes, bytes]:
        body, boxes = split.mask(
            words,
            split.binding(header, extension.fixed()),
            gateway_key=secrets[Reader.GATEWAY].public,
            seed_keys=[(reader, secrets[reader].public) for reader in readers],
            randomness=lambda size: RANDOMNESS[:size],
            hedge=HEDGE,
            suite=suite,
        )
        return body, extension.fixed() + b"".join(boxes)

    signer = make_wire.MEMBERS[Role.DEVICE].signer(
        sequence=lambda: 100 + device, randomness=lambda size: bytes([device]) * size
    )
    message = signer.sign_bound(
        MessageKind.UPDATE,
        fill,
        body_size=split.body_size(layout.n_words),
        extension_size=EXTENSION_SIZE + box_size(suite) * (1 + holders),
        now=make_wire.NOW,
        round=4,
        lifetime=60_000,
    )
    return bytes(message.encode())


def dealt() -> list[dict[str, Any]]:
    found = []
    for count, size, minimum in ((1, 4, 1), (7, 4, 1), (8, 4, 1), (11, 3, 1), (30, 3, 2), (12, 2, 3)):
        owners = {MessageId(bytes([i]) * 16): "big" if i % 4 else f"o{i}" for i in range(count)}
        coin = {"gateway_nonce": b"g" * 16, "coordinator_nonce": b"c" * 16}
        buckets = deal(owners, size, minimum_owners=minimum, **coin)
        found.append(
            {
                "size": size,
                "minimum_owners": minimum,
                "owners": {member.hex(): owner for member, owner in owners.items()},
                "buckets": [[member.hex() for member in bucket] for bucket in buckets],
            }
        )
    return found


def make() -> dict[str, Any]:
    return {
        "authority": make_wire.AUTHORITY.public.hex(),
        "hedge": HEDGE.hex(),
        "randomness": RANDOMNESS.hex(),
        "secrets": {reader.value.decode(): secret.encode().hex() for reader, secret in SECRETS.items()},
        "nonce": {"nonce": (b"g" * 16).hex(), "hash": commit_nonce(b"g" * 16).hex()},
        "dealt": dealt(),
        "rounds": {
            name: {
                "lane_bits": lane_bits,
                "holders": holders,
                "suite": suite,
                "updates": [update(device, lane_bits, holders, suite).hex() for device in range(DEVICES)],
                "values": [values(device).tolist() for device in range(DEVICES)],
                "meta": [meta(device).tolist() for device in range(DEVICES)],
            }
            for name, (lane_bits, holders, suite) in LAYOUTS.items()
        },
    }


if __name__ == "__main__":
    (HERE / "secure.json").write_text(json.dumps(make(), indent=1) + "\n")
