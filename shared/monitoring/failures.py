"""Every reason that there is, and the failure mode that it is a sign of: the one place that says so.

The modes are those that people who operate federated learning look for. A reason says exactly what happened, a mode
says which runbook to open. ``NONE`` is for what happens in a healthy fleet.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, cast

from fleetfed.shared.errors import RejectReason as R
from fleetfed.shared.wire.messages import DeclineReason as D


class Failure(StrEnum):
    """A failure mode."""

    NONE = "none"
    """Nothing is wrong."""
    DROPOUT = "dropout"
    """Somebody who was expected is not there in time."""
    DIVERGENCE = "divergence"
    """Training or the model runs away: values that are not finite, steps too large."""
    POISONING = "poisoning"
    """Somebody says what it may not say, or what does not look like what others say."""
    OVERLOAD = "overload"
    """A bound was reached."""
    PRIVACY = "privacy"
    """What was asked for would tell more than was promised."""
    CORRUPTION = "corruption"
    """Bytes are not what was sent or stored."""
    COMMUNICATION = "communication"
    """Connections break, or messages come twice or in the wrong order."""
    VERSION_SKEW = "version_skew"
    """Somebody works with something old, or with software that does not match."""


MODES: Final = tuple(mode for mode in Failure if mode is not Failure.NONE)
"""The modes that are counted."""

_F = Failure

REJECTED: Final[dict[R, Failure]] = {
    R.MALFORMED: _F.CORRUPTION,
    R.TRUNCATED: _F.CORRUPTION,
    R.TOO_LARGE: _F.OVERLOAD,
    R.UNKNOWN_VERSION: _F.VERSION_SKEW,
    R.BAD_SIGNATURE: _F.POISONING,
    R.BAD_CERTIFICATE: _F.POISONING,
    R.EXPIRED_CERTIFICATE: _F.VERSION_SKEW,
    R.REVOKED: _F.POISONING,
    R.WRONG_ROLE: _F.POISONING,
    R.WRONG_SENDER: _F.POISONING,
    R.WRONG_FLEET: _F.POISONING,
    R.WRONG_SITE: _F.POISONING,
    R.WRONG_ROUND: _F.VERSION_SKEW,
    R.WRONG_PLAN: _F.VERSION_SKEW,
    R.WRONG_MODEL: _F.VERSION_SKEW,
    R.WRONG_SHAPE: _F.VERSION_SKEW,
    R.NOT_SELECTED: _F.VERSION_SKEW,
    R.LATE: _F.DROPOUT,
    R.EXPIRED: _F.DROPOUT,
    # A device whose receipt was lost sends again; at QoS 1 the broker may, too.
    R.DUPLICATE: _F.NONE,
    R.REPLAYED: _F.COMMUNICATION,
    R.COHORT_FULL: _F.OVERLOAD,
    R.BODY_MISMATCH: _F.CORRUPTION,
    R.DECOMPRESSION: _F.CORRUPTION,
    R.OUT_OF_RANGE: _F.DIVERGENCE,
    R.NOT_PROPOSED: _F.COMMUNICATION,
    R.CONFLICT: _F.POISONING,
    R.BELOW_MINIMUM: _F.DROPOUT,
    R.BELOW_OWNERS: _F.PRIVACY,
    R.TOO_MANY_EXCLUDED: _F.PRIVACY,
    R.UNKNOWN_SUITE: _F.VERSION_SKEW,
    R.BAD_BOX: _F.POISONING,
    R.REUSED_SEED: _F.PRIVACY,
    R.BELOW_POLICY: _F.PRIVACY,
    R.LARGE_STEP: _F.DIVERGENCE,
    R.STALE_TRUST: _F.VERSION_SKEW,
    R.BAD_METADATA: _F.POISONING,
    R.BAD_NONCE: _F.POISONING,
    R.OUTLIER: _F.POISONING,
    R.QUARANTINED: _F.POISONING,
    R.BAD_TOKEN: _F.POISONING,
    R.SPENT_TOKEN: _F.POISONING,
    R.WRONG_OWNER: _F.POISONING,
    R.CLONED_KEY: _F.POISONING,
    R.NOT_ENROLLED: _F.VERSION_SKEW,
    R.OVERLOADED: _F.OVERLOAD,
}

DECLINED: Final[dict[D, Failure]] = {
    D.LABELS: _F.NONE,
    D.TOO_FEW_EXAMPLES: _F.NONE,
    D.NO_MODEL: _F.VERSION_SKEW,
    D.TRAINING_FAILED: _F.DROPOUT,
    D.DIVERGED: _F.DIVERGENCE,
    D.BUSY: _F.OVERLOAD,
    D.POLICY: _F.PRIVACY,
    D.SUITE: _F.VERSION_SKEW,
    D.PRIVACY_BUDGET: _F.PRIVACY,
    D.TOO_SOON: _F.PRIVACY,
}

OUTCOMES: Final[dict[str, Failure]] = {
    "accepted": _F.NONE,
    "refused": _F.NONE,
    "declined": _F.NONE,
    "unanswered": _F.COMMUNICATION,
    "void": _F.NONE,
    "conflict": _F.POISONING,
}
"""How a round ends for a device; for refused and declined the reason decides."""

ABORTS: Final[dict[str, Failure]] = {
    "step": _F.DIVERGENCE,
    "operator": _F.NONE,
}
"""Why a round was aborted, where it is no reject reason."""

BROKER: Final[dict[str, Failure]] = {
    "connections_refused": _F.OVERLOAD,
    "dropped_offline": _F.OVERLOAD,
    "dropped_qos0": _F.OVERLOAD,
    "dropped_too_large": _F.OVERLOAD,
    "expired": _F.NONE,
    "denied_publish": _F.POISONING,
    "denied_delivery": _F.NONE,
    "retained_refused": _F.OVERLOAD,
    "acknowledgements_delayed": _F.NONE,
    "stalled_disconnected": _F.OVERLOAD,
    "keepalive_timeouts": _F.COMMUNICATION,
    "protocol_errors": _F.CORRUPTION,
    "rate_limited": _F.OVERLOAD,
    "takeovers": _F.NONE,
    "theft_refused": _F.POISONING,
    "wills": _F.COMMUNICATION,
}
"""The embedded broker's counters of what it refused, dropped or delayed."""

OTHER: Final = "other"


def of_rejection(reason: str) -> tuple[str, Failure]:
    """A reject reason's label and mode; what somebody else made up is ``other``."""
    return _known(reason, REJECTED)


def of_decline(reason: str) -> tuple[str, Failure]:
    """A decline reason's label and mode; what somebody else made up is ``other``."""
    return _known(reason, DECLINED)


def of_abort(reason: str, *, step: bool) -> tuple[str, Failure]:
    """A label and a mode for an aborted round.

    Args:
        reason: of its record: a reject reason with details, or what an operator or an error said.
        step: whether the sum could not be applied.
    """
    if step:
        return "step", ABORTS["step"]
    label, mode = _known(reason.partition(":")[0], REJECTED)
    return ("operator", ABORTS["operator"]) if label == OTHER else (label, mode)


def _known(label: str, table: Mapping[R, Failure] | Mapping[D, Failure]) -> tuple[str, Failure]:
    # A reason equals its label, and has its hash.
    mode = cast("Mapping[str, Failure]", table).get(label)
    return (OTHER, Failure.NONE) if mode is None else (label, mode)
