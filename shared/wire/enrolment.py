"""What is said at enrolment: a device's request, the answer to it, and the log of all answers.

None of it travels over MQTT: a device that enrols has no certificate yet. `fleetfed.shared.trust.enrolment` signs and
opens these bodies; `docs/enrolment.md` tells the story.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.envelope import MAX_CERTIFICATE
from fleetfed.shared.wire.fields import Bytes16, Bytes32, Count, Id, Millis
from fleetfed.shared.wire.limits import KIB, MAX_ID
from fleetfed.shared.wire.trust import MAX_BUNDLE, MAX_ROOT

MAX_REQUEST: Final = 4 * KIB
"""Bytes of a request; checked before anything is read."""
MAX_ANSWER: Final = 256 * KIB
MAX_HEAD: Final = KIB
MAX_ENTRY: Final = 2 * KIB
TOKEN_SIZE: Final = 16

SPENT_ALL: Final = 1 << 32
"""More participations than any plan allows: a ledger that begins here takes part in no round that is counted."""


class Purpose(StrEnum):
    """What a request asks for."""

    ENROL = "enrol"
    """A first certificate, for a token."""
    RENEW = "renew"
    """A certificate with a later end for a key that has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolRequest:
    """What a device asks for, signed by the key that is to be certified.

    Attributes:
        purpose: enrol or renew.
        fleet: its name; empty where the device cannot know it yet.
        owner: who answers for the device.
        hardware: what its maker calls this piece of hardware: a serial number, a machine id.
        tls_request: PKCS#10 (DER) for the key that logs in at the broker.
        token: given to the owner, good for one device; empty to renew.
        nonce: random, so that two requests are never the same by accident.
        issued_at: unix milliseconds; 0 from a device without a clock.
    """

    purpose: Purpose
    fleet: Annotated[str, Length(0, MAX_ID)] = ""
    owner: Id
    hardware: Annotated[str, Length(1, 200)]
    tls_request: Annotated[bytes, Length(1, 2 * KIB)]
    token: Annotated[bytes, Length(0, TOKEN_SIZE)] = b""
    nonce: Bytes16
    issued_at: Millis = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolAnswer:
    """What a device needs to join its fleet, signed by the issuer.

    Attributes:
        request: `digest` of the request that is answered.
        fleet, id, site, owner: as in the certificate.
        authority: the offline authority's public key, which the device pins.
        certificate: the fleet certificate of the device's key.
        tls_certificate: PEM, for the broker's login; its common name is the id.
        tls_authorities: PEM, what the device checks the broker and this service against.
        spent: participations that the device's privacy ledger begins with.
        root, bundle: the fleet's trust metadata, for the device to pin; empty where the fleet has none.
        index, entry, head, proof: where the certificate stands in the log, the whole entry, and the proof that it
            does.
    """

    request: Bytes32
    fleet: Id
    id: Id
    site: Id
    owner: Id
    authority: Bytes32
    certificate: Annotated[bytes, Length(1, MAX_CERTIFICATE)]
    tls_certificate: Annotated[bytes, Length(1, 8 * KIB)]
    tls_authorities: Annotated[bytes, Length(1, 32 * KIB)]
    spent: Annotated[int, Range(0, SPENT_ALL)] = 0
    root: Annotated[bytes, Length(0, MAX_ROOT)] = b""
    bundle: Annotated[bytes, Length(0, MAX_BUNDLE)] = b""
    index: Count
    entry: Annotated[bytes, Length(1, MAX_ENTRY)]
    head: Annotated[bytes, Length(1, MAX_HEAD)]
    proof: Annotated[tuple[Bytes32, ...], Length(0, 64)] = ()


class EntryKind(StrEnum):
    """What the log records."""

    ENROLLED = "enrolled"
    RENEWED = "renewed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One line of the log, whose encoding is a leaf of the tree.

    Attributes:
        kind: what happened.
        at: unix milliseconds.
        certificate: the fleet certificate that was issued; empty for a revocation.
        tls_sha256: SHA-256 of the TLS certificate that went with it (DER); empty for a revocation.
        hardware: `hardware_hash`; equal ones are one piece of hardware. Empty for a revocation.
        serials: that were revoked.
    """

    kind: EntryKind
    at: Millis
    certificate: Annotated[bytes, Length(0, MAX_CERTIFICATE)] = b""
    tls_sha256: Annotated[bytes, Length(0, 32)] = b""
    hardware: Annotated[bytes, Length(0, 16)] = b""
    serials: Annotated[tuple[Count, ...], Length(0, 100)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeHead:
    """What the log is at one time; signed by the issuer, who can never again say that it was otherwise.

    Attributes:
        fleet: its name.
        size: entries.
        root: of the tree over them (`fleetfed.shared.trust.merkle`).
        at: unix milliseconds.
        revocations: version of the last revocation list that the issuer signed; 0 for none.
    """

    fleet: Id
    size: Count
    root: Bytes32
    at: Millis
    revocations: Count = 0
