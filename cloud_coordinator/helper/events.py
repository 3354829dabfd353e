"""What can happen to a helper, and what it can be told to do."""

from __future__ import annotations

from dataclasses import dataclass

from fleetfed.shared.errors import RejectReason
from fleetfed.shared.wire.envelope import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One of the helper's keys, less its secret.

    Attributes:
        public: its public half, of the suite that the helper serves.
        message: the signed `SealKey`, as plans carry it.
        issued, expires: unix milliseconds; a round must be over before it expires.
    """

    public: bytes
    message: bytes
    issued: int
    expires: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a verified request wants, as far as deciding about it goes.

    Attributes:
        question: hash of the request's body: the same request again has the same.
        round, plan: of the plan; its head hash.
        gateway: whose committed set it is.
        key: the helper's public key that the plan names.
        devices: of the set.
    """

    question: Digest
    round: int
    plan: Digest
    gateway: str
    key: bytes
    devices: frozenset[str]


# --- Events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """What is on the disk was taken up."""


@dataclass(frozen=True, slots=True)
class KeyStored:
    """A new key is durable."""

    key: Key


@dataclass(frozen=True, slots=True)
class Connected:
    """There is a connection; the broker may have lost what it retained for us."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the coordinator is here, whole and signed; what is in it is not verified."""

    question: Digest


@dataclass(frozen=True, slots=True)
class Verified:
    """Everything in a request holds by itself; whether it may be answered depends on what was answered before."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class AnswerStored:
    """The answer, and that it was given, is durable."""

    claim: Claim


# --- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeKey:
    """Draw a key, sign and store it; `KeyStored` follows."""

    issued: int
    expires: int


@dataclass(frozen=True, slots=True)
class DestroyKeys:
    """Delete the secrets of these public keys, and the answers that were given with them, for good."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PublishKey:
    """Publish the signed key, retained."""

    message: bytes


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify the request; `Verified` follows, or a refusal."""

    question: Digest


@dataclass(frozen=True, slots=True)
class Answer:
    """Add the masks up, sign and store the answer with the claim; `AnswerStored` follows."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Send:
    """Send the stored answer."""

    round: int
    gateway: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Give no masks, and say why."""

    question: Digest
    reason: RejectReason
    detail: str
