"""What a gateway's machines are told in a test: updates, proposals and commits of one plan, by the names of devices."""

from __future__ import annotations

from typing import Any

from fleetfed.gateway import events as ev
from fleetfed.shared.wire.envelope import MessageId, digest
from fleetfed_testing.signed_fleet import SignedFleet

FLEET = SignedFleet()
PLAN, MESSAGE = FLEET.plan(1, tiers=2)
MASKED, _ = FLEET.plan(1, tiers=2, split=FLEET.split(minimum_cohort=2))
HASH = MESSAGE.head.hash


def name_of(text: str) -> MessageId:
    return MessageId(digest(text.encode())[:16])


def update(device: str, *, version: int = 0, plan: bytes = HASH, size: int = 100) -> ev.UpdateArrived:
    text = f"{device}/{version}"
    return ev.UpdateArrived(
        device=device,
        serial=int.from_bytes(device.encode(), "big"),
        plan=plan,
        message_id=name_of(text),
        head=digest(text.encode()),
        size=size,
    )


def child(gateway: str, *members: str, version: int = 0) -> ev.ChildProposed:
    text = f"{gateway}/{version}"
    return ev.ChildProposed(
        gateway=gateway,
        plan=HASH,
        message_id=name_of(text),
        head=digest(text.encode()),
        members=tuple(name_of(f"{member}/0") for member in members),
        declined={},
        rejected={},
        raw=text.encode(),
    )


def child_reveal(gateway: str, count: int, *, commit: bytes, version: int = 0) -> ev.ChildRevealed:
    text = f"{gateway}/reveal/{version}"
    return ev.ChildRevealed(
        gateway=gateway,
        plan=HASH,
        commit=commit,
        message_id=name_of(text),
        head=digest(text.encode()),
        count=count,
        raw=text.encode(),
    )


def commit(*members: str, gateway: str = "g", proposal: bytes | None = None, version: int = 0) -> ev.CommitArrived:
    text = f"commit/{version}/{sorted(members)}"
    return ev.CommitArrived(
        plan=HASH,
        gateway=gateway,
        proposal=digest(b"proposal") if proposal is None else proposal,
        head=digest(text.encode()),
        members=frozenset(name_of(f"{member}/0") for member in members),
        raw=text.encode(),
    )


MADE = ev.ProposalMade(message_id=name_of("proposal"), head=digest(b"proposal"), raw=b"proposal")


def revealed(by: ev.CommitArrived) -> ev.RevealMade:
    return ev.RevealMade(plan=HASH, commit=by.head, message_id=name_of("reveal"), raw=b"reveal")


def kinds(instructions: list[Any]) -> list[str]:
    return [type(instruction).__name__ for instruction in instructions]
