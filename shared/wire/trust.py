"""The fleet's trust metadata as it travels: one retained message, each part of it signed for itself.

`fleetfed.shared.trust.metadata` verifies it; nothing here is to be believed before that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from fleetfed.shared.wire.codec import Length
from fleetfed.shared.wire.fields import Bytes32, Count
from fleetfed.shared.wire.limits import KIB

MAX_BUNDLE: Final = 120 * KIB
"""Bytes of a whole bundle; checked before anything is read."""
MAX_ROOT: Final = 32 * KIB
MAX_ROOTS: Final = 1024
MAX_PART: Final = 64 * KIB

Part = Annotated[bytes, Length(0, MAX_PART)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustBundle:
    """Everything that a member needs to bring its trust up to date, in TUF's own JSON.

    Attributes:
        roots: every version of the root, in order: ``roots[n]`` is version n + 1.
        targets: what the fleet's owners allow; signed by keys that are not online.
        snapshot, timestamp: what is current, and until when; empty only before the coordinator has signed them.
        devices: the enrolment service's own word; empty where no such service is delegated to.
        files: what ``targets`` and ``devices`` name by hash, such as the policy.
    """

    roots: Annotated[tuple[Annotated[bytes, Length(1, MAX_ROOT)], ...], Length(1, MAX_ROOTS)]
    targets: Annotated[bytes, Length(1, MAX_PART)]
    snapshot: Part = b""
    timestamp: Part = b""
    devices: Part = b""
    files: Annotated[dict[Annotated[str, Length(1, 64)], Part], Length(0, 16)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """What the enrolment service says of its log; ``devices`` names it by hash.

    Attributes:
        size, root: the head of the log of all certificates.
        revocations: version of the newest revocation list; whoever has an older one is being kept from it.
    """

    size: Count = 0
    root: Bytes32 = bytes(32)
    revocations: Count = 0
