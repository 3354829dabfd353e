"""Decides whether a message may be believed: the order of checks is fixed, and nothing is parsed before them.

1. the head parses and is of this fleet;
2. the certificate is the authority's, for this key, valid now, not revoked;
3. its role may say this kind of thing, and the topic's identity is its own;
4. the signature covers these exact bytes;
5. the message has not expired;
6. the body has the signed hash; only then is it decompressed and decoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.keys import signature_is_good
from fleetfed.shared.trust.policy import Policy, check_plan
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import (
    Head,
    KeyId,
    MessageKind,
    fleet_id,
    key_id,
    open_body,
    parse_head,
    signed_bytes,
)
from fleetfed.shared.wire.limits import MAX_REVOKED
from fleetfed.shared.wire.messages import Manifest, Plan, Revocations
from fleetfed.shared.wire.trust import Directory

T = TypeVar("T")

SPEAKERS: Final[dict[MessageKind, frozenset[Role]]] = {
    MessageKind.UPDATE: frozenset({Role.DEVICE}),
    MessageKind.DECLINE: frozenset({Role.DEVICE}),
    MessageKind.RECEIPT: frozenset({Role.GATEWAY, Role.COORDINATOR}),
    MessageKind.PROPOSE: frozenset({Role.GATEWAY}),
    MessageKind.COMMIT: frozenset({Role.COORDINATOR}),
    MessageKind.REVEAL: frozenset({Role.GATEWAY}),
    MessageKind.MANIFEST: frozenset({Role.COORDINATOR}),
    MessageKind.PLAN: frozenset({Role.COORDINATOR}),
    MessageKind.ROUND_END: frozenset({Role.COORDINATOR}),
    MessageKind.CENSUS: frozenset({Role.GATEWAY}),
    MessageKind.REQUEST: frozenset({Role.OPERATOR}),
    MessageKind.RESPONSE: frozenset({Role.COORDINATOR}),
    MessageKind.STATUS: frozenset({Role.COORDINATOR}),
    MessageKind.REVOCATIONS: frozenset({Role.AUTHORITY, Role.ENROLLER}),
    MessageKind.COSIGN: frozenset({Role.GATEWAY}),
    MessageKind.SEAL_KEY: frozenset({Role.HELPER}),
    MessageKind.MASK_REQUEST: frozenset({Role.COORDINATOR}),
    MessageKind.MASK_SUMS: frozenset({Role.HELPER}),
}
"""Which roles may sign which kind."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A key whose certificates count.

    Attributes:
        public_key: Ed25519, 32 bytes.
        roles: which roles it may certify; an enrolment service certifies devices alone.
    """

    public_key: bytes
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What verified trust metadata says (`fleetfed.shared.trust.metadata`).

    Attributes:
        policy: the floor under every plan.
        authorities: whose certificates count; empty for the pinned authority's alone.
        coordinators: the keys that may speak as coordinator.
        directory: what the enrolment service says; None without one.
        versions, expiries: of each role, in unix milliseconds the latter.
        expires: when the first of them expires; 0 where nothing says that this is current.
        issued: when the timestamp was signed.
    """

    policy: Policy = field(default_factory=Policy)
    authorities: tuple[Authority, ...] = ()
    coordinators: frozenset[KeyId] = frozenset()
    directory: Directory | None = None
    versions: dict[str, int] = field(default_factory=dict)
    expiries: dict[str, int] = field(default_factory=dict)
    expires: int = 0
    issued: int = 0

    def outdated(self) -> Trust:
        """The same, but known to be no longer current."""
        return replace(self, expires=0)


MAX_VERSION_STEP: Final = 1 << 20
"""By how much an enrolment service may raise the version of the one revocation list: whoever stole its key could
otherwise count to the end at once, and nobody, not even it, could ever be revoked again."""
_CLOCK_SKEW: Final = 5 * 60 * 1000
"""Milliseconds by which clocks may differ before a certificate counts as not yet valid."""


class Verifier:
    """Trusts one fleet's authority and whoever it certified, less whom it revoked.

    Args:
        fleet: the fleet's name.
        authority_key: the authority's Ed25519 public key, pinned at enrolment.
        cache: how many verified certificates to remember; a signature check costs about 50 µs.
    """

    def __init__(self, fleet: str, authority_key: bytes, *, cache: int = 4096) -> None:
        self.fleet = fleet
        self._fleet_id = fleet_id(fleet)
        self._pinned = Authority(authority_key, frozenset(Role))
        self._authorities = {key_id(authority_key): self._pinned}
        self._known: OrderedDict[bytes, Certificate] = OrderedDict()
        self._cache = cache
        self._revocations = Revocations(version=1)
        self._revoked: frozenset[int] = frozenset()
        self._have_list = False
        self.policy = Policy()
        self._trust: Trust | None = None

    @property
    def has_list(self) -> bool:
        """Whether any revocation list was ever taken."""
        return self._have_list

    @property
    def revocations(self) -> Revocations:
        """The list in force."""
        return self._revocations

    def revoke(self, revocations: Revocations, *, by: Certificate | None = None) -> bool:
        """Take a verified list; return whether it is news.

        Args:
            revocations: the list.
            by: who signed it. The list of an enroller only adds to the one in force: nobody comes back by it.

        Raises:
            RemoteProtocolError: `REPLAYED`: older than the list in force; `TOO_LARGE`: it would add too many;
                `OUT_OF_RANGE`: an enroller's version leaves none for those that follow.
        """
        if self._have_list:
            if revocations.version < self._revocations.version:
                raise RemoteProtocolError(
                    RejectReason.REPLAYED, f"revocations {revocations.version} after {self._revocations.version}"
                )
            if revocations.version == self._revocations.version:
                return False
        if by is not None and by.role is Role.ENROLLER:
            if revocations.version - self._revocations.version > MAX_VERSION_STEP:
                raise RemoteProtocolError(
                    RejectReason.OUT_OF_RANGE, f"revocations {revocations.version} after {self._revocations.version}"
                )
            every = self._revoked.union(revocations.serials)
            if len(every) > 2 * MAX_REVOKED:
                raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(every)} revoked serials in all")
            revocations = replace(revocations, serials=tuple(sorted(every)))
        self._revocations = revocations
        self._revoked = frozenset(revocations.serials)
        self._have_list = True
        return True

    def restore(self, data: bytes, *, now: int) -> None:
        """Put a list in force again that was verified when it was kept.

        It is checked as of its issue: whether the clock is right yet, or the authority's certificate has expired since,
        says nothing about those whom it revoked.

        Args:
            data: the message, as signed.
            now: unix milliseconds; for a list that does not say when it was issued.

        Raises:
            RemoteProtocolError: it is damaged, or another fleet's.
        """
        issued = parse_head(data).header.issued_at
        revocations, _, by = self.open(data, Revocations, kind=MessageKind.REVOCATIONS, now=issued or now)
        self.revoke(revocations, by=by)

    def certificate(self, encoded: bytes, *, now: int) -> Certificate:
        """Verify a certificate: authority, fleet, time, revocation.

        Raises:
            RemoteProtocolError: `BAD_CERTIFICATE`, `WRONG_FLEET`, `EXPIRED_CERTIFICATE` or `REVOKED`.
        """
        certificate = self._known.get(encoded)
        if certificate is None:
            certificate = self._issued(encoded)
            if certificate.fleet != self.fleet:
                raise RemoteProtocolError(RejectReason.WRONG_FLEET, certificate.fleet)
            self._known[encoded] = certificate
            if len(self._known) > self._cache:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(encoded)
        if not certificate.not_before - _CLOCK_SKEW <= now <= certificate.not_after:
            raise RemoteProtocolError(RejectReason.EXPIRED_CERTIFICATE, f"{certificate.id} at {now}")
        if certificate.serial in self._revoked:
            raise RemoteProtocolError(RejectReason.REVOKED, certificate.id)
        return certificate

    def check_plan(self, plan: Plan, *, now: int) -> None:
        """Refuse a plan that is weaker than the pinned policy, or that comes when what pins it has expired.

        Args:
            plan: verified.
            now: unix milliseconds.

        Raises:
            RemoteProtocolError: `BELOW_POLICY` or `STALE_TRUST`.
        """
        if self._trust is not None:
            if now >= self._trust.expires:
                raise RemoteProtocolError(
                    RejectReason.STALE_TRUST, f"trust metadata was current until {self._trust.expires}, now {now}"
                )
            directory = self._trust.directory
            if directory is not None and self._revocations.version < directory.revocations:
                raise RemoteProtocolError(
                    RejectReason.STALE_TRUST, f"revocation list {directory.revocations} is being held back"
                )
        check_plan(plan, self.policy)

    def check_manifest(self, manifest: Manifest) -> None:
        """Refuse a model whose architecture the pinned policy does not name.

        Raises:
            RemoteProtocolError: `BELOW_POLICY`.
        """
        if self.policy.cards and manifest.card.digest not in self.policy.cards:
            raise RemoteProtocolError(
                RejectReason.BELOW_POLICY, f"the policy does not allow card {manifest.card.digest.hex()}"
            )

    def install(self, trust: Trust) -> None:
        """Put in force what verified trust metadata says."""
        self._trust = trust
        self.policy = trust.policy
        self.trust(trust.authorities)

    def is_coordinator(self, key: KeyId) -> bool:
        """Whether trust metadata lets this key speak as coordinator; without any, certificates alone decide."""
        return self._trust is None or key in self._trust.coordinators

    def trust(self, authorities: Iterable[Authority]) -> None:
        """Replace the authorities by those that verified trust metadata names; none brings the pinned one back."""
        named = {key_id(each.public_key): each for each in authorities}
        now_trusted = named if named else {key_id(self._pinned.public_key): self._pinned}
        if now_trusted != self._authorities:
            # What an authority that is gone has signed does not count any more.
            self._known.clear()
        self._authorities = now_trusted

    def _issued(self, encoded: bytes) -> Certificate:
        issuer = certificates.issuer(encoded)
        authority = self._authorities.get(issuer)
        if authority is None:
            raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "issued by an authority that is not trusted")
        certificate = certificates.verify(encoded, authority.public_key)
        if certificate.role not in authority.roles:
            raise RemoteProtocolError(
                RejectReason.BAD_CERTIFICATE, f"its authority may not certify a {certificate.role.name}"
            )
        return certificate

    def head(self, head: Head, *, kind: MessageKind, now: int, sender: str | None = None) -> Certificate:
        """Verify a head; return the certificate of whoever signed it.

        Args:
            head: as parsed.
            kind: what the topic carries; anything else is refused.
            now: unix milliseconds.
            sender: the identity that the topic names, where it names one.

        Raises:
            RemoteProtocolError: the first check that fails.
        """
        header = head.header
        if header.kind is not kind:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"{header.kind.name} where {kind.name} is expected")
        if header.fleet != self._fleet_id:
            raise RemoteProtocolError(RejectReason.WRONG_FLEET)
        certificate = self.certificate(head.certificate, now=now)
        if certificate.key_id != header.sender:
            raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "the certificate is another key's")
        if certificate.role not in SPEAKERS[kind]:
            raise RemoteProtocolError(RejectReason.WRONG_ROLE, f"{certificate.role.name} says {kind.name}")
        if certificate.role is Role.COORDINATOR and not self.is_coordinator(certificate.key_id):
            raise RemoteProtocolError(
                RejectReason.WRONG_ROLE, f"trust metadata does not list {certificate.id} as a coordinator"
            )
        if sender is not None and sender != certificate.id:
            raise RemoteProtocolError(RejectReason.WRONG_SENDER, f"{certificate.id} on the topic of {sender}")
        if not signature_is_good(certificate.public_key, signed_bytes(kind, head.signed), head.signature):
            raise RemoteProtocolError(RejectReason.BAD_SIGNATURE, certificate.id)
        if header.expires_at and now > header.expires_at:
            raise RemoteProtocolError(RejectReason.EXPIRED, f"at {header.expires_at}, now {now}")
        return certificate

    def open(
        self, data: bytes, cls: type[T], *, kind: MessageKind, now: int, sender: str | None = None
    ) -> tuple[T, Head, Certificate]:
        """Verify a whole message and decode its body as ``cls``.

        Raises:
            RemoteProtocolError: the first check that fails.
        """
        head = parse_head(data)
        certificate = self.head(head, kind=kind, now=now, sender=sender)
        raw = open_body(head.header, memoryview(data)[head.size :])
        return codec.decode(cls, raw, limit=len(raw)), head, certificate
