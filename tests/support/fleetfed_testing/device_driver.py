"""Drives the device's machine by hand; its invariants are checked after every event."""

from __future__ import annotations

from typing import Any

from fleetfed.device import events as e
from fleetfed.device.events import Answer, AnswerKind, HeldModel
from fleetfed.device.state import DeviceMachine, DeviceState, Facts
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.blobs import Publishable, publishable
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.messages import Manifest, PatchRef, Plan, Quantization, Receipt

CARD = publishable(b"card")
FILE = publishable(b"".join(i.to_bytes(2, "big") for i in range(500)), chunk=200)
LARGEST = 1 << 20
NOTHING = Facts()
NO_OBJECTION = e.Verdict()


def sha(version: int) -> bytes:
    return bytes([version]) * 32


def held(version: int) -> HeldModel:
    return HeldModel(version=version, sha256=sha(version), card=CARD.ref.digest)


def plan(round_: int = 1, version: int = 1, **changes: Any) -> Plan:
    whole = {
        "round": round_,
        "model_version": version,
        "model_sha256": sha(version),
        "dimension": 10,
        "quantization": Quantization(bits=4, lane_bits=16, clips=(1.0,), weight_cap=10),
        "opened": 1000,
        "deadline": 60_000,
        "expires": 90_000,
        "nonce": bytes(16),
    }
    return Plan(**{**whole, **changes})


def hash_of(round_: int) -> Digest:
    return Digest(b"p" + bytes([round_]) * 31)


def answer(round_: int = 1, kind: AnswerKind = AnswerKind.UPDATE, **changes: Any) -> Answer:
    whole = {
        "round": round_,
        "plan": hash_of(round_),
        "kind": kind,
        "message_id": bytes([round_]) * 16,
        "head": bytes([round_]) * 32,
        "expires": 90_000,
        "size": 100,
        "reason": "labels" if kind is AnswerKind.DECLINE else "",
    }
    return Answer(**{**whole, **changes})


def receipt(round_: int = 1, reason: RejectReason | None = None, **changes: Any) -> e.ReceiptArrived:
    return e.ReceiptArrived(
        Receipt(**{"message_id": bytes([round_]) * 16, "head": bytes([round_]) * 32, "reason": reason, **changes})
    )


class Driver:
    """Feeds a machine and checks it after each event."""

    def __init__(self, facts: Facts = NOTHING, labels: dict[str, str] | None = None) -> None:
        self.machine = DeviceMachine(device="d-1", labels=labels or {}, facts=facts, largest=LARGEST)
        self.now = 2000

    @property
    def state(self) -> DeviceState:
        return self.machine.state

    def __call__(self, *events: Any, now: int | None = None) -> list[Any]:
        self.now = self.now if now is None else now
        out: list[Any] = []
        for event in events:
            out += self.machine.handle(event, self.now)
            self.machine.validate()
        return out

    def plan(
        self, round_: int = 1, version: int = 1, *, verdict: e.Verdict = NO_OBJECTION, **changes: Any
    ) -> list[Any]:
        return self(e.PlanArrived(plan(round_, version, **changes), hash_of(round_), verdict))

    def train_and_store(self, round_: int = 1) -> list[Any]:
        self(e.TrainingDone(hash_of(round_)))
        return self(e.AnswerStored(answer(round_)))


def kinds(instructions: list[Any]) -> list[str]:
    return [type(each).__name__ for each in instructions]


def patch_blob(target: int) -> Publishable:
    return publishable(f"patch to {target}".encode())


def patch(base: int, target: int) -> PatchRef:
    return PatchRef(
        base_version=base,
        base_sha256=sha(base),
        target_version=target,
        target_sha256=sha(target),
        blob=patch_blob(target).ref,
    )


def manifest(version: int, *patches: PatchRef, full_version: int | None = None, **changes: Any) -> Manifest:
    full = version if full_version is None else full_version
    whole = {
        "version": version,
        "parent": version - 1,
        "name": "m",
        "sha256": sha(version),
        "size": FILE.ref.raw_size,
        "card": CARD.ref,
        "full": FILE.ref,
        "full_version": full,
        "full_sha256": sha(full),
        "patches": patches,
    }
    return Manifest(**{**whole, **changes})
