"""Makes `wire.json`: an example or more of every signed message, from fixed keys. Run after a change of the format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.wire import masking
from fleetfed.shared.wire import messages as m
from fleetfed.shared.wire.blobs import publishable
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.privacy import Mechanism, Privacy
from fleetfed.shared.wire.update import BOX_SIZE, SPLIT, UpdateExtension

NOW = 1_790_000_000_000
AUTHORITY = SigningKey.from_seed(bytes(range(32)))


def identity(role: Role, name: str, site: str, serial: int) -> Identity:
    key = SigningKey.from_seed(bytes([serial]) * 32)
    certificate = Certificate(
        serial=serial,
        role=role,
        fleet="vectors",
        id=name,
        site=site,
        owner="someone",
        not_before=NOW - 1000,
        not_after=NOW + 10_000_000,
        public_key=key.public,
    )
    return Identity(
        key=key,
        certificate=certificate,
        encoded_certificate=issue(certificate, AUTHORITY),
        authority_key=AUTHORITY.public,
    )


MEMBERS = {
    Role.AUTHORITY: identity(Role.AUTHORITY, "authority", "_", 1),
    Role.COORDINATOR: identity(Role.COORDINATOR, "cloud", "_", 2),
    Role.GATEWAY: identity(Role.GATEWAY, "g-north", "north", 3),
    Role.DEVICE: identity(Role.DEVICE, "d-07", "north", 4),
    Role.OPERATOR: identity(Role.OPERATOR, "o-ann", "_", 5),
    Role.HELPER: identity(Role.HELPER, "h-two", "_", 6),
}

BLOB = publishable(b"a model file" * 40, chunk=32).ref
PLAN = bytes(range(32))
_ROUND: dict[str, Any] = {
    "round": 4,
    "model_version": 3,
    "model_sha256": b"s" * 32,
    "dimension": 120,
    "quantization": m.Quantization(bits=4, lane_bits=16, clips=(0.25, 0.5), weight_cap=600),
    "opened": NOW,
    "deadline": NOW + 60_000,
    "expires": NOW + 120_000,
    "nonce": b"n" * 16,
}
BODIES: dict[MessageKind, tuple[Role, Any]] = {
    MessageKind.UPDATE: (Role.DEVICE, b"quantized integers"),
    MessageKind.DECLINE: (Role.DEVICE, m.Decline(plan=PLAN, reason=m.DeclineReason.LABELS, detail="arm: v7")),
    MessageKind.RECEIPT: (Role.GATEWAY, m.Receipt(message_id=b"i" * 16, head=b"h" * 32)),
    MessageKind.PROPOSE: (
        Role.GATEWAY,
        m.Proposal(plan=PLAN, heads=(b"head one", b"head two"), declined={"busy": 1}),
    ),
    MessageKind.COMMIT: (
        Role.COORDINATOR,
        m.Commit(plan=PLAN, gateway="g-north", proposal=b"p" * 32, members=b"a" * 16 + b"b" * 16),
    ),
    MessageKind.REVEAL: (Role.GATEWAY, m.Reveal(plan=PLAN, commit=b"c" * 32, count=2, words=bytes(range(64)) * 12)),
    MessageKind.MANIFEST: (
        Role.COORDINATOR,
        m.Manifest(
            version=3,
            parent=2,
            name="digits",
            sha256=b"s" * 32,
            size=480,
            card=BLOB,
            full=BLOB,
            full_version=2,
            full_sha256=b"b" * 32,
            patches=(
                m.PatchRef(base_version=2, base_sha256=b"b" * 32, target_version=3, target_sha256=b"s" * 32, blob=BLOB),
            ),
            created=NOW,
            metrics={"accuracy": 0.5},
        ),
    ),
    MessageKind.PLAN: (Role.COORDINATOR, m.Plan(**_ROUND)),
    MessageKind.ROUND_END: (
        Role.COORDINATOR,
        m.RoundEnd(round=4, plan=PLAN, outcome=m.Outcome.COMMITTED, version=4),
    ),
    MessageKind.CENSUS: (
        Role.GATEWAY,
        m.Census(
            site="north",
            level=0,
            devices=2,
            ready=1,
            sleeping=1,
            lost=0,
            members=(m.MemberSummary(id="d-07", site="north", life=m.Life.READY, since=NOW),),
        ),
    ),
    MessageKind.REQUEST: (
        Role.OPERATOR,
        m.Request(command=m.Command.ROUND_START, arguments={"rounds": -3, "fraction": 0.5, "note": None}),
    ),
    MessageKind.RESPONSE: (Role.COORDINATOR, m.Response(request=b"q" * 16, result={"round": 4, "ok": True})),
    MessageKind.STATUS: (Role.COORDINATOR, m.Status(state="collecting", round=4, version=3)),
    MessageKind.REVOCATIONS: (Role.AUTHORITY, m.Revocations(version=2, serials=(9, 70_000, 5_000_000_000))),
    MessageKind.COSIGN: (Role.GATEWAY, masking.Cosign(plan=PLAN, seal_key=b"k" * 32)),
    MessageKind.SEAL_KEY: (Role.HELPER, masking.SealKey(helper="h-two", seal_key=b"k" * 32)),
    MessageKind.MASK_REQUEST: (
        Role.COORDINATOR,
        masking.MaskRequest(
            plan=b"a plan", proposal=b"a proposal", commit=b"a commit", nonces={"north": b"n" * 16, "east": b"e" * 16}
        ),
    ),
    MessageKind.MASK_SUMS: (
        Role.HELPER,
        masking.MaskSums(plan=PLAN, commit=b"c" * 32, gateway="g-north", sums=(bytes(range(8)), bytes(range(8, 16)))),
    ),
}
SPLIT_MODE: dict[str, tuple[MessageKind, Role, Any]] = {
    "plan_split": (
        MessageKind.PLAN,
        Role.COORDINATOR,
        m.Plan(
            **_ROUND,
            mode=m.Mode.SPLIT,
            split=masking.Split(seal_key=b"k" * 32, helper=b"a seal key", minimum_cohort=3, minimum_owners=2, bucket=4),
            privacy=Privacy(
                mechanism=Mechanism.SPLIT_CENTRAL,
                clip=100.0,
                noise_multiplier=5.0,
                max_participations=50,
                min_separation=2,
                epsilon=7.25,
                delta=2.0**-20,
            ),
            policy=7,
        ),
    ),
    "update_split": (MessageKind.UPDATE, Role.DEVICE, b"masked words"),
    "propose_buckets": (
        MessageKind.PROPOSE,
        Role.GATEWAY,
        m.Proposal(plan=PLAN, heads=(b"head one",), nonces=(masking.NonceHash(site="north", hash=b"h" * 32),)),
    ),
    "reveal_buckets": (
        MessageKind.REVEAL,
        Role.GATEWAY,
        m.Reveal(
            plan=PLAN,
            commit=b"c" * 32,
            count=5,
            words=b"",
            buckets=tuple(
                masking.Bucket(site="north", nonce=b"n" * 16, index=index, count=2 + index, words=bytes(range(8)))
                for index in (0, 1)
            ),
        ),
    ),
    "reveal_refused": (
        MessageKind.REVEAL,
        Role.GATEWAY,
        m.Reveal(
            plan=PLAN,
            commit=b"c" * 32,
            count=0,
            words=b"",
            reason=RejectReason.BELOW_MINIMUM,
            detail="2 of 3 contributors",
        ),
    ),
}
"""What else split mode says, by the name of the vector."""
EXAMPLES = {kind.name.lower(): (kind, *BODIES[kind]) for kind in MessageKind} | SPLIT_MODE


def make() -> dict[str, Any]:
    """The vectors, by name: the kind's, or one of `SPLIT_MODE`."""
    found: dict[str, Any] = {"authority": AUTHORITY.public.hex(), "messages": {}}
    for name, (kind, role, body) in EXAMPLES.items():
        counter = itertools.count(100)
        signer = MEMBERS[role].signer(
            sequence=lambda counter=counter: next(counter),  # type: ignore[misc]
            randomness=lambda size, kind=kind: bytes([kind]) * size,  # type: ignore[misc]
        )
        extension = b""
        if kind is MessageKind.UPDATE:
            masked = name == "update_split"
            extension = UpdateExtension(
                mode=SPLIT if masked else 0,
                suite=masking.SEALED_BOX if masked else 0,
                bits=4,
                lane_bits=16,
                dimension=120,
                meta_words=9,
                plan=PLAN,
                model_sha256=b"s" * 32,
                boxes=tuple(bytes([reader]) * BOX_SIZE for reader in b"GCH") if masked else (),
            ).encode()
        sent = signer.sign(kind, body, now=NOW, round=4, lifetime=60_000, extension=extension)
        found["messages"][name] = sent.encode().hex()
    return found


if __name__ == "__main__":
    Path(__file__).with_name("wire.json").write_text(json.dumps(make(), indent=1) + "\n")
