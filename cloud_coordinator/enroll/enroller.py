"""Decides who is certified: tokens in, certificates and log entries out. No sockets; time is an argument.

1. A request is signed by the key that it is for. It is verified before it is parsed.
2. The same request again gets the same answer, whatever has happened since: an answer may be lost on its way.
3. A token serves one device of one owner at one site, until it expires. It is spent in the transaction that writes the
   certificate, its entry in the log and the answer.
4. A key, signing or TLS, is enrolled once, ever; a piece of hardware has one device that is not revoked.
5. A renewal is signed by the device's key and needs no token; it changes nothing but the end of the validity. Revoked
   devices renew nothing.
6. What was refused changes nothing and is counted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fleetfed.cloud_coordinator.enroll.config import EnrollConfig
from fleetfed.cloud_coordinator.enroll.lists import list_of
from fleetfed.cloud_coordinator.enroll.store import Device, Issued, Store, Token
from fleetfed.cloud_coordinator.enroll.x509 import DeviceCa, DeviceKey, Revoked, pem_of, read_request
from fleetfed.shared.errors import ConfigError, LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust import certificates, enrolment
from fleetfed.shared.trust.certificates import SERIALS, Certificate, Role
from fleetfed.shared.trust.enrolment import ANSWER, HEAD, REQUEST, Sealed
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.merkle import Tree
from fleetfed.shared.trust.verifier import Authority
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.enrolment import (
    SPENT_ALL,
    TOKEN_SIZE,
    EnrolAnswer,
    EnrolRequest,
    EntryKind,
    LogEntry,
    Purpose,
    TreeHead,
)
from fleetfed.shared.wire.envelope import MessageKind, key_id
from fleetfed.shared.wire.limits import MAX_REVOKED
from fleetfed.shared.wire.messages import Revocations
from fleetfed.shared.wire.topics import CLOUD_SITE, check_id
from fleetfed.shared.wire.trust import Directory

DAY: Final = 86_400_000
CRL_DAYS: Final = 30
"""The running service writes the list every day."""
DEVICE_PREFIX: Final = "d-"
"""What the id of an enrolled device begins with, so that no token can stand for a gateway."""
_RENEWABLE: Final = 4
"""A certificate is not renewed before a quarter of its life has passed."""
_ENTRY_SERIALS: Final = 100


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token as it is shown once: the text that the device needs, and what is known of it."""

    text: str
    token: Token


class Enroller:
    """One service. Its methods may be called from any thread.

    Args:
        settings: ``enroll.toml``.
        store: open.
        identity: the service's own.
        authority: the TLS authority.
        randomness: returns so many unpredictable bytes.

    Attributes:
        refused: how often, by reason, since the start.
        issued: certificates since the start.
    """

    def __init__(
        self,
        settings: EnrollConfig,
        store: Store,
        identity: Identity,
        authority: DeviceCa,
        *,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        assert identity.certificate.role is Role.ENROLLER
        self.settings = settings
        self.identity = identity
        self.refused: Counter[RejectReason] = Counter()
        self.issued = 0
        self._fleet = identity.certificate.fleet
        self._store = store
        self._authority = authority
        self._randomness = randomness
        self._tls_authorities = (settings.identity / "tls" / "ca.pem").read_bytes()
        self._tree = Tree()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: EnrollConfig) -> Enroller:
        """Open the service's folders.

        Raises:
            ConfigError: a file is missing or is not what it should be.
            StorageError: the register is damaged.
        """
        identity = Identity.load(settings.identity, role=Role.ENROLLER)
        if not (settings.state / "enroll.sqlite").exists():
            raise ConfigError(f"{settings.state}: no register here; run `fleetfed-enroll init` first")
        authority = DeviceCa.open(settings.state)
        try:
            return cls(settings, Store(settings.state / "enroll.sqlite"), identity, authority)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; issue the identity again") from error

    def close(self) -> None:
        """Close the register."""
        with self._lock:
            self._store.close()

    def entry(self) -> Authority:
        """What trust metadata says of this service."""
        return enrolment.enroller(self.identity.key.public)

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def create_token(
        self, *, owner: str, site: str, lifetime: int, now: int, device: str = "", spent: int | None = None
    ) -> NewToken:
        """Make a token.

        Args:
            owner: who answers for the device.
            site: which site it belongs to.
            lifetime: milliseconds until the token is void.
            now: unix milliseconds.
            device: the id that it stands for; empty: the id comes from the device's key.
            spent: participations that the device's ledger begins with; None: all, where the hardware is known.

        Raises:
            ConfigError: an id that may not be.
        """
        try:
            check_id(owner, "owner")
            check_id(site, "site")
            if device:
                check_id(device)
        except LocalProtocolError as error:
            raise ConfigError(str(error)) from error
        if site == CLOUD_SITE:
            raise ConfigError(f"a device cannot belong to the site {CLOUD_SITE!r}; give the site of its gateway")
        if device and not device.startswith(DEVICE_PREFIX):
            raise ConfigError(f"{device}: the id of an enrolled device begins with {DEVICE_PREFIX!r}")
        secret = self._randomness(TOKEN_SIZE)
        token = Token(
            label=enrolment.token_hash(secret)[:5].hex(),
            owner=owner,
            site=site,
            device=device,
            spent_rounds=spent,
            created=now,
            expires=now + lifetime,
            used=0,
            used_by="",
            revoked=0,
        )
        with self._writing():
            if device and self._store.device(id=device) is not None:
                raise ConfigError(f"{device} was enrolled before; an id is never given out twice")
            self._store.add_token(enrolment.token_hash(secret), token)
        return NewToken(enrolment.format_token(owner, secret), token)

    def tokens(self) -> list[Token]:
        """All tokens, newest first."""
        with self._lock:
            return self._store.tokens()

    def revoke_token(self, label: str, *, now: int) -> None:
        """Take a token back that was not used yet.

        Raises:
            ConfigError: there is none.
        """
        with self._writing():
            if not self._store.revoke_token(label, now):
                raise ConfigError(f"{label}: no unused token; see `fleetfed-enroll token list`")

    # --- Requests -----------------------------------------------------------------------------------------------------

    def answer(self, data: bytes, *, now: int, purpose: Purpose | None = None) -> bytes:
        """Answer a request.

        Args:
            data: the request, as sealed by the device.
            now: unix milliseconds.
            purpose: what it must be for; None: whatever it is for.

        Raises:
            RemoteProtocolError: it is refused, and counted; nothing has changed.
            StorageError: the register cannot be written.
        """
        try:
            request = REQUEST.open(data)
            if purpose is not None and request.body.purpose is not purpose:
                raise RemoteProtocolError(RejectReason.MALFORMED, f"a request to {request.body.purpose}")
            key, tls_key = read_request(request.body.tls_request)
            with self._writing():
                kept = self._store.answer(request.digest)
                if kept is not None:
                    return kept
                if request.body.fleet not in ("", self._fleet):
                    raise RemoteProtocolError(RejectReason.WRONG_FLEET, request.body.fleet)
                if request.body.purpose is Purpose.ENROL:
                    answer = self._enrol(request, key, tls_key, now)
                else:
                    answer = self._renew(request, key, tls_key, now)
        except RemoteProtocolError as error:
            self.refused[error.reason] += 1
            raise
        self.issued += 1
        return answer

    def _enrol(self, request: Sealed[EnrolRequest], key: DeviceKey, tls_key: bytes, now: int) -> bytes:
        ask = request.body
        token = self._token(ask, now)
        id_ = token.device or DEVICE_PREFIX + key_id(request.key).hex()[:20]
        if self._store.device(public_key=request.key) is not None or self._store.knows_tls_key(tls_key):
            raise RemoteProtocolError(
                RejectReason.CLONED_KEY, "this key was enrolled before: two devices would share it; make new keys"
            )
        if self._store.device(id=id_) is not None:
            raise RemoteProtocolError(RejectReason.CLONED_KEY, f"{id_} was enrolled before; get another token")
        hardware = enrolment.hardware_hash(ask.owner, ask.hardware)
        earlier = self._store.hardware(hardware)
        for each in earlier:
            if not each.revoked:
                raise RemoteProtocolError(
                    RejectReason.CLONED_KEY,
                    f"this hardware is enrolled as {each.id}; if its keys are lost, revoke that one first",
                )
        # A device whose keys were lost may have lost its ledger too: nobody knows what it has spent.
        spent = token.spent_rounds if token.spent_rounds is not None else (SPENT_ALL if earlier else 0)
        device = Device(
            id=id_,
            public_key=request.key,
            tls_key=tls_key,
            owner=token.owner,
            site=token.site,
            hardware=hardware,
            spent_rounds=spent,
            enrolled=now,
            revoked=0,
        )
        self._store.add_device(device)
        self._store.use_token(token.label, id_, now)
        return self._issue(EntryKind.ENROLLED, device, request, key, hardware, now)

    def _token(self, ask: EnrolRequest, now: int) -> Token:
        wanted = enrolment.token_hash(ask.token)
        found = self._store.token(wanted)
        if found is None or not hmac.compare_digest(found[0], wanted):
            raise RemoteProtocolError(RejectReason.BAD_TOKEN, "no such token")
        token = found[1]
        if token.revoked:
            raise RemoteProtocolError(RejectReason.BAD_TOKEN, f"token {token.label} was taken back")
        if token.used:
            raise RemoteProtocolError(RejectReason.SPENT_TOKEN, f"token {token.label} was used by {token.used_by}")
        if now >= token.expires:
            raise RemoteProtocolError(RejectReason.EXPIRED, f"token {token.label}")
        if ask.owner != token.owner:
            raise RemoteProtocolError(RejectReason.WRONG_OWNER, f"token {token.label} is not {ask.owner}'s")
        return token

    def _renew(self, request: Sealed[EnrolRequest], key: DeviceKey, tls_key: bytes, now: int) -> bytes:
        ask = request.body
        device = self._store.device(public_key=request.key)
        if device is None:
            raise RemoteProtocolError(RejectReason.NOT_ENROLLED, "no certificate of this key; enrol with a token")
        if device.revoked:
            raise RemoteProtocolError(RejectReason.REVOKED, device.id)
        if ask.owner != device.owner:
            raise RemoteProtocolError(RejectReason.WRONG_OWNER, f"{device.id} is not {ask.owner}'s")
        if tls_key != device.tls_key:
            raise RemoteProtocolError(RejectReason.CLONED_KEY, f"{device.id} logs in at the broker with another key")
        newest = self._store.certificates(device.id)[-1]
        if now > newest.not_after + self.settings.grace_days * DAY:
            raise RemoteProtocolError(RejectReason.NOT_ENROLLED, f"{device.id} ended too long ago; enrol it anew")
        hardware = enrolment.hardware_hash(ask.owner, ask.hardware)
        if now < newest.not_before + (newest.not_after - newest.not_before) // _RENEWABLE:
            # Its last answer was lost, or its clock is wrong: no reason to issue another one.
            return self._answer(device, newest, request, now)
        return self._issue(EntryKind.RENEWED, device, request, key, hardware, now)

    def _issue(
        self,
        kind: EntryKind,
        device: Device,
        request: Sealed[EnrolRequest],
        key: DeviceKey,
        hardware: bytes,
        now: int,
    ) -> bytes:
        """Certify, log, answer; within a transaction."""
        days = self.settings.days
        last = self._store.last_serial()
        base = self.identity.certificate.serial * SERIALS
        certificate = Certificate(
            serial=base + 1 if last is None else last + 1,
            role=Role.DEVICE,
            fleet=self._fleet,
            id=device.id,
            site=device.site,
            owner=device.owner,
            not_before=now,
            not_after=now + days * DAY,
            public_key=device.public_key,
        )
        assert base < certificate.serial < base + SERIALS
        encoded = certificates.issue(certificate, self.identity.key)
        tls_serial, tls = self._authority.sign(device.id, key, now=now, days=days)
        index = self._append(
            LogEntry(kind=kind, at=now, certificate=encoded, tls_sha256=hashlib.sha256(tls).digest(), hardware=hardware)
        )
        issued = Issued(
            serial=certificate.serial,
            device=device.id,
            not_before=certificate.not_before,
            not_after=certificate.not_after,
            encoded=encoded,
            tls=tls,
            tls_serial=f"{tls_serial:x}",
            entry=index,
        )
        self._store.add_certificate(issued)
        answer = self._answer(device, issued, request, now)
        self._store.add_answer(request.digest, answer, issued.serial)
        return answer

    def _answer(self, device: Device, issued: Issued, request: Sealed[EnrolRequest], now: int) -> bytes:
        return ANSWER.close(
            EnrolAnswer(
                request=request.digest,
                fleet=self._fleet,
                id=device.id,
                site=device.site,
                owner=device.owner,
                authority=self.identity.authority_key,
                certificate=issued.encoded,
                tls_certificate=pem_of(issued.tls),
                tls_authorities=self._tls_authorities,
                spent=device.spent_rounds,
                root=self.identity.root,
                bundle=self.identity.bundle,
                index=issued.entry,
                entry=self._store.leaves(issued.entry, 1)[0],
                head=self._head(now),
                proof=self._tree.inclusion(issued.entry),
            ),
            self.identity.key,
        )

    # --- Revocation ---------------------------------------------------------------------------------------------------

    def revoke(
        self, names: list[str], *, now: int, others: tuple[Revocations, ...] = ()
    ) -> tuple[list[Device], bytes | None]:
        """Make devices void; return them, and the signed list that says so.

        Args:
            names: ids or serial numbers, which stand for all that a device has; none: only sign what others revoked.
            now: unix milliseconds.
            others: lists that are in force elsewhere: what they have stays on the new one.

        Raises:
            ConfigError: a name that stands for nobody, or nobody who is not revoked already; or the list is full.
        """
        with self._writing():
            chosen = {}
            for name in names:
                id_ = self._store.device_of(int(name)) if name.isdecimal() else name
                device = self._store.device(id=id_) if id_ is not None else None
                if device is None:
                    raise ConfigError(f"{name}: not enrolled here; see `fleetfed-enroll list`")
                if device.revoked:
                    raise ConfigError(f"{name} is revoked already")
                chosen[device.id] = device
            serials: list[int] = []
            for device in chosen.values():
                self._store.revoke_device(device.id, now)
                serials += [each.serial for each in self._store.certificates(device.id) if each.not_after > now]
            for at in range(0, len(serials), _ENTRY_SERIALS):
                self._append(LogEntry(kind=EntryKind.REVOKED, at=now, serials=tuple(serials[at : at + _ENTRY_SERIALS])))
            message = self._sign_list(serials, others, now)
        return list(chosen.values()), message

    def revocations(self) -> bytes | None:
        """The list that was signed last."""
        with self._lock:
            return self._store.fact("revocations")

    def _sign_list(self, new: list[int], others: tuple[Revocations, ...], now: int) -> bytes | None:
        own = self._store.fact("revocations")
        last = None if own is None else list_of(own)
        known = [*others, *([] if last is None else [last])]
        serials = tuple(sorted({*new, *(serial for each in known for serial in each.serials)}))
        newest = max((each.version for each in known), default=0)
        if not serials or (last is not None and last.version == newest and last.serials == serials):
            return own
        if len(serials) > MAX_REVOKED:
            raise ConfigError(f"{len(serials)} revoked serials: a list holds {MAX_REVOKED}")
        signer = self.identity.signer(sequence=lambda: self._count("sequence"), randomness=self._randomness)
        message = signer.sign(
            MessageKind.REVOCATIONS, Revocations(version=newest + 1, serials=serials), now=now
        ).encode()
        self._store.put_fact("revocations", message)
        return message

    def _count(self, name: str) -> int:
        number = int(self._store.fact(name) or b"0") + 1
        self._store.put_fact(name, str(number).encode())
        return number

    def crl(self, *, now: int, days: int = CRL_DAYS) -> bytes:
        """The TLS revocation list of devices enrolled here, PEM."""
        with self._lock:
            void = {each.id: each.revoked for each in self._store.devices() if each.revoked}
            # RFC 5280 section 3.3: an expired certificate may leave the list; it is refused for its date.
            revoked = [
                Revoked(int(each.tls_serial, 16), void[each.device])
                for each in self._store.certificates()
                if each.device in void and each.not_after > now - DAY
            ]
            return self._authority.crl(revoked, now=now, days=days)

    @property
    def tls_authority(self) -> bytes:
        """The certificate that brokers trust for devices enrolled here, PEM."""
        return self._authority.pem

    # --- Reading ------------------------------------------------------------------------------------------------------

    def devices(self) -> list[tuple[Device, Issued]]:
        """All devices with their newest certificates, oldest first."""
        with self._lock:
            newest = {each.device: each for each in self._store.certificates()}
            return [(device, newest[device.id]) for device in self._store.devices()]

    def log(self, start: int = 0, limit: int = -1) -> list[bytes]:
        """Leaves of the log."""
        with self._lock:
            return self._store.leaves(start, limit)

    def head(self, *, now: int) -> bytes:
        """The log's head, signed."""
        with self._writing():
            return self._head(now)

    def directory(self) -> Directory:
        """What the ``devices`` part of the trust metadata says of this service."""
        with self._writing():
            return Directory(size=len(self._tree), root=self._tree.root(), revocations=self._version())

    def next_directory(self) -> int:
        """The version of the next signed directory; never the same twice."""
        with self._writing():
            return self._count("directory")

    def tidy(self, *, now: int) -> None:
        """Forget answers that are of no use to anybody any more."""
        with self._writing():
            self._store.forget_answers(now)

    # --- Inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction, with the tree as the log is when it begins."""
        with self._lock:
            size = 0
            try:
                with self._store.transaction():
                    for leaf in self._store.leaves(len(self._tree)):
                        self._tree.append(leaf)
                    size = len(self._tree)
                    yield
            except BaseException:
                if len(self._tree) != size:
                    # It has a leaf that the log has not.
                    self._tree = Tree()
                raise

    def _append(self, entry: LogEntry) -> int:
        leaf = codec.encode(entry)
        index = self._tree.append(leaf)
        self._store.append(index, leaf)
        return index

    def _version(self) -> int:
        own = self._store.fact("revocations")
        return 0 if own is None else list_of(own).version

    def _head(self, now: int) -> bytes:
        head = TreeHead(
            fleet=self._fleet, size=len(self._tree), root=self._tree.root(), at=now, revocations=self._version()
        )
        return HEAD.close(head, self.identity.key)
