"""Every exception that FleetFed raises on purpose.

::

    FleetFedError
    ├── ConfigError              a setting or a file that a person wrote is wrong; the message says what to do
    ├── LocalProtocolError       we asked for something that the protocol forbids: a fault of ours
    │   └── IllegalTransitionError   a state machine met an event that its table does not allow
    ├── RemoteProtocolError      bytes from a peer break a rule; carries a `RejectReason`
    └── StorageError             durable state is missing or damaged

One bad message is not an exception path of the program: whoever receives bytes catches `RemoteProtocolError`,
counts its `reason` and goes on. Everything else stops the work at hand.
"""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """Why a message was refused: the stable label in receipts, counters, logs and documentation."""

    MALFORMED = "malformed"
    """The bytes do not parse: wrong magic, wrong length, trailing bytes, bad msgpack."""
    TRUNCATED = "truncated"
    """Fewer bytes than the header promises."""
    TOO_LARGE = "too_large"
    """Larger than the limit for its kind, before or after decompression."""
    UNKNOWN_VERSION = "unknown_version"
    """A message version that this program does not speak."""
    BAD_SIGNATURE = "bad_signature"
    """The signature does not match the signed bytes."""
    BAD_CERTIFICATE = "bad_certificate"
    """The certificate is not signed by the fleet's authority, or does not fit its bearer."""
    EXPIRED_CERTIFICATE = "expired_certificate"
    """The certificate is not valid at this time."""
    REVOKED = "revoked"
    """The certificate's serial number is on the revocation list."""
    WRONG_ROLE = "wrong_role"
    """The sender's role may not say this."""
    WRONG_SENDER = "wrong_sender"
    """The topic's identity is not the signer's."""
    WRONG_FLEET = "wrong_fleet"
    """Signed for another fleet."""
    WRONG_SITE = "wrong_site"
    """The certificate is scoped to another site."""
    WRONG_ROUND = "wrong_round"
    """For a round that is not open here."""
    WRONG_PLAN = "wrong_plan"
    """For another plan of this round."""
    WRONG_MODEL = "wrong_model"
    """Computed from another model than the plan names."""
    WRONG_SHAPE = "wrong_shape"
    """Dimension, lanes or mode differ from the plan's."""
    NOT_SELECTED = "not_selected"
    """The plan's fraction does not select this device."""
    LATE = "late"
    """The round, or this tier's part of it, is closed."""
    EXPIRED = "expired"
    """Past the expiry that the message itself carries."""
    DUPLICATE = "duplicate"
    """This sender already has another update in this round; the first one counts."""
    REPLAYED = "replayed"
    """An old message of this sender, not newer than what was already accepted."""
    COHORT_FULL = "cohort_full"
    """The plan's cohort limit is reached."""
    BODY_MISMATCH = "body_mismatch"
    """The body's hash is not the one that was signed."""
    DECOMPRESSION = "decompression"
    """The body does not decompress to the size that was signed."""
    OUT_OF_RANGE = "out_of_range"
    """A value lies outside the range that the plan allows (this is where NaN and infinity end)."""
    NOT_PROPOSED = "not_proposed"
    """A commit or reveal names what was never proposed."""
    CONFLICT = "conflict"
    """A second, different message where the protocol allows one."""
    BELOW_MINIMUM = "below_minimum"
    """Fewer contributors than the plan's minimum."""
    BELOW_OWNERS = "below_owners"
    """Fewer distinct owners among the contributors than the plan's minimum."""
    TOO_MANY_EXCLUDED = "too_many_excluded"
    """A commit leaves out more of a masked proposal than two, or one in twenty."""
    UNKNOWN_SUITE = "unknown_suite"
    """An encryption suite that this program does not know, or for which a library is missing."""
    BAD_BOX = "bad_box"
    """A sealed key or an encrypted body does not open, or was made for another message."""
    REUSED_SEED = "reused_seed"
    """Another update has the same mask seed: a copied or broken random generator."""
    BELOW_POLICY = "below_policy"
    """A plan that is weaker than the policy which the fleet's owners pinned offline."""
    LARGE_STEP = "large_step"
    """A version whose weights are further from those of the version before than the policy allows."""
    STALE_TRUST = "stale_trust"
    """The signed metadata that says what is current has expired; somebody may be holding back newer."""
    BAD_METADATA = "bad_metadata"
    """Trust metadata without enough good signatures, or that breaks one of the rules of its update."""
    BAD_NONCE = "bad_nonce"
    """A nonce that its commitment does not open to."""
    OUTLIER = "outlier"
    """A plain update that the gateway's robustness rule leaves out."""
    QUARANTINED = "quarantined"
    """The device was set aside after repeated outliers; an operator can lift that."""
    BAD_TOKEN = "bad_token"  # noqa: S105 - no password
    """An enrolment token that was never given out, or that was taken back."""
    SPENT_TOKEN = "spent_token"  # noqa: S105
    """An enrolment token that somebody has used already."""
    WRONG_OWNER = "wrong_owner"
    """The enrolment token was given to another owner."""
    CLONED_KEY = "cloned_key"
    """The key, or the id, has been enrolled before: two devices would share it."""
    NOT_ENROLLED = "not_enrolled"
    """No certificate of this key is there to be renewed, or it ended too long ago."""
    OVERLOADED = "overloaded"
    """A bounded queue or journal is full; try again later."""


class FleetFedError(Exception):
    """The root of everything raised on purpose."""


class ConfigError(FleetFedError):
    """A setting or a file that a person wrote is wrong; the message says what to do about it."""


class LocalProtocolError(FleetFedError):
    """We asked for something that the protocol forbids."""


class IllegalTransitionError(LocalProtocolError):
    """A state machine met an event that its table does not allow in its state.

    Attributes:
        machine: name of the machine.
        state: the state it is in.
        event: the event's type name.
        story: the last events that the machine handled, oldest first.
    """

    def __init__(self, machine: str, state: str, event: str, story: tuple[str, ...]) -> None:
        self.machine = machine
        self.state = state
        self.event = event
        self.story = story
        super().__init__(machine, state, event, story)

    def __str__(self) -> str:
        lines = "".join(f"\n  {line}" for line in self.story)
        return f"{self.machine}: {self.event} is not allowed in state {self.state}; its story:{lines or ' (none)'}"


class RemoteProtocolError(FleetFedError):
    """Bytes from a peer break a rule.

    Attributes:
        reason: the stable label to count and, where a receipt is due, to send back.
        detail: what exactly was wrong, for the local log only.
    """

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class StorageError(FleetFedError):
    """Durable state is missing or damaged."""
