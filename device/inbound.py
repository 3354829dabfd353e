"""From what the broker delivers to events: topic, size, signature and identity are checked here, in that order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from fleetfed.device.events import (
    ChunkArrived,
    CosignArrived,
    ManifestArrived,
    NodeBorn,
    PlanArrived,
    ReceiptArrived,
    RoundEnded,
    Verdict,
)
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import Digest, MessageKind, parse_head
from fleetfed.shared.wire.masking import Cosign, SealKey, suite_of
from fleetfed.shared.wire.messages import Life, Manifest, Mode, Plan, Presence, Receipt, Revocations, RoundEnd
from fleetfed.shared.wire.topics import BlobTopic, Broadcast, BroadcastTopic, MemberTopic, Verb, parse

_KEPT_SIGNERS: Final = 4
Whose = Literal["GATEWAY", "COORDINATOR", "HELPER"]


class Inbound:
    """Turns messages into events for one device.

    Args:
        verifier: trusts the fleet's authority.
        certificate: this device's own.
        keep_revocations: makes a new revocation list durable, as signed.
        take_trust: takes a bundle of trust metadata.
    """

    def __init__(
        self,
        verifier: Verifier,
        certificate: Certificate,
        *,
        keep_revocations: Callable[[bytes], None],
        take_trust: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        self._verifier = verifier
        self._own = certificate
        self._keep_revocations = keep_revocations
        self._take_trust = take_trust
        self._signers: dict[bytes, bytes] = {}
        self.manifest_signer = b""
        """Key of the coordinator that signed the last manifest."""

    def event(self, topic: str, payload: bytes, now: int, *, retained: bool = False) -> Any | None:
        """The event that a message is; None where there is nothing to do.

        Args:
            topic: what it came on.
            payload: as received.
            now: unix milliseconds.
            retained: whether it is a copy that the broker had kept.

        Raises:
            RemoteProtocolError: the message is refused, and why.
        """
        where = parse(topic)
        if where.fleet != self._own.fleet:
            raise RemoteProtocolError(RejectReason.WRONG_FLEET, topic)
        if where.site != self._own.site:
            raise RemoteProtocolError(RejectReason.WRONG_SITE, topic)
        # An empty payload clears a retained message.
        if not payload and not isinstance(where, BlobTopic):
            return None
        if len(payload) > limits.MAX_PACKET:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(payload)} bytes on {topic}")
        match where:
            case BlobTopic(digest=digest, index=index):
                return ChunkArrived(digest, index, payload)
            case BroadcastTopic(what=Broadcast.MODEL):
                return self._manifest(payload, now)
            case BroadcastTopic(what=Broadcast.PLAN):
                return self._plan(payload, now)
            case BroadcastTopic(what=Broadcast.COSIGN):
                return self._cosign(payload, now)
            case BroadcastTopic(what=Broadcast.NODE):
                presence = codec.decode(Presence, payload, limit=limits.MAX_SMALL_MESSAGE)
                return NodeBorn(retained) if presence.life is Life.READY else None
            case BroadcastTopic(what=Broadcast.REVOKED):
                self.revocations(payload, now)
            case BroadcastTopic(what=Broadcast.TRUST):
                self._take_trust(payload)
            case MemberTopic(member=member, verb=Verb.RECEIPT) if member == self._own.id:
                return self._receipt(payload, now)
        return None

    def revocations(self, payload: bytes, now: int) -> None:
        """Take a revocation list.

        Raises:
            RemoteProtocolError: it is refused, and why.
        """
        lists, _, by = self._verifier.open(payload, Revocations, kind=MessageKind.REVOCATIONS, now=now)
        if self._verifier.revoke(lists, by=by):
            self._keep_revocations(payload)

    def restore_revocations(self, kept: bytes, now: int) -> None:
        """Put the list in force again that was kept last; also before the clock is right.

        Raises:
            RemoteProtocolError: it is damaged.
        """
        self._verifier.restore(kept, now=now)

    def _manifest(self, payload: bytes, now: int) -> ManifestArrived:
        manifest, head, _ = self._verifier.open(payload, Manifest, kind=MessageKind.MANIFEST, now=now)
        self._verifier.check_manifest(manifest)
        self.manifest_signer = head.header.sender
        return ManifestArrived(manifest)

    def signer(self, plan_hash: Digest) -> bytes:
        """Key of the coordinator that signed a plan of late; empty where that is forgotten."""
        return self._signers.get(plan_hash, b"")

    def _plan(self, payload: bytes, now: int) -> PlanArrived | RoundEnded:
        head = parse_head(payload)
        if head.header.kind is MessageKind.ROUND_END:
            end, _, _ = self._verifier.open(payload, RoundEnd, kind=MessageKind.ROUND_END, now=now)
            return RoundEnded(end)
        plan, head, _ = self._verifier.open(payload, Plan, kind=MessageKind.PLAN, now=now)
        if not plan.opened <= plan.deadline <= plan.expires:
            raise RemoteProtocolError(RejectReason.MALFORMED, f"plan {plan.round}: its times are out of order")
        self._signers = {**dict(list(self._signers.items())[1 - _KEPT_SIGNERS :]), head.hash: head.header.sender}
        return PlanArrived(plan, head.hash, self.judge(plan, now), head.header.sender)

    def _cosign(self, payload: bytes, now: int) -> CosignArrived:
        cosign, head, certificate = self._verifier.open(payload, Cosign, kind=MessageKind.COSIGN, now=now)
        if certificate.site != self._own.site:
            raise RemoteProtocolError(RejectReason.WRONG_SITE, f"a cosignature of the gateway of {certificate.site}")
        # Whether it is of the plan's suite is seen when both are here; a suite without its library, in the plan.
        try:
            _check_key(cosign.seal_key, "GATEWAY", suite_of(cosign.seal_key))
        except RemoteProtocolError as error:
            if error.reason is not RejectReason.UNKNOWN_SUITE:
                raise
        header = head.header
        return CosignArrived(round=header.round, plan=cosign.plan, seal_key=cosign.seal_key, expires=header.expires_at)

    def judge(self, plan: Plan, now: int) -> Verdict:
        """What the pinned policy, and the keys that the plan names, say of a verified plan."""
        floor = self._verifier.policy.privacy
        try:
            self._verifier.check_plan(plan, now=now)
            _check_privacy(plan)
            return Verdict(helper_key=self._split_keys(plan, now), floor=floor)
        except RemoteProtocolError as error:
            return Verdict(reason=error.reason, detail=error.detail, floor=floor)

    def _split_keys(self, plan: Plan, now: int) -> bytes:
        """Check what a plan says of masks; return the helper's key, empty where it has none.

        Raises:
            RemoteProtocolError: it makes no sense, or its helper is not to be trusted.
        """
        split = plan.split
        if (plan.mode is Mode.SPLIT) != (split is not None):
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"mode {plan.mode} {'without' if split is None else 'with'} masks"
            )
        if split is None:
            return b""
        _check_key(split.seal_key, "COORDINATOR", split.suite)
        if not split.helper:
            return b""
        try:
            word, _, certificate = self._verifier.open(split.helper, SealKey, kind=MessageKind.SEAL_KEY, now=now)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, f"the helper's key: {error}") from error
        if word.helper != certificate.id:
            detail = f"helper {certificate.id} signs the key of {word.helper}"
            raise RemoteProtocolError(RejectReason.WRONG_SENDER, detail)
        _check_key(word.seal_key, "HELPER", split.suite)
        return word.seal_key

    def _receipt(self, payload: bytes, now: int) -> ReceiptArrived:
        receipt, _, certificate = self._verifier.open(payload, Receipt, kind=MessageKind.RECEIPT, now=now)
        if certificate.role is Role.GATEWAY and certificate.site != self._own.site:
            raise RemoteProtocolError(RejectReason.WRONG_SITE, f"a receipt of the gateway of {certificate.site}")
        return ReceiptArrived(receipt)


def _check_privacy(plan: Plan) -> None:
    """Refuse a plan whose promise of differential privacy cannot be what it says, before anything is spent for it.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`.
    """
    if plan.privacy is None:
        return
    # Imported late: a device in plain rounds carries nothing of this.
    from fleetfed.shared.privacy.mechanism import check_privacy

    try:
        check_privacy(plan)
    except ValueError as error:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, str(error)) from error


def _check_key(public_key: bytes, whose: Whose, suite: int) -> None:
    """Refuse a key that nothing can be sealed to, before a device trains for it.

    Raises:
        RemoteProtocolError: `BAD_BOX` or `UNKNOWN_SUITE`.
    """
    # Imported late: a device in plain rounds carries nothing of this.
    from fleetfed.shared.secure.box import Reader, check_suite, seal

    check_suite(suite)
    seal(bytes(32), Reader[whose], Digest(bytes(32)), public_key, suite)
