"""The fleet's keys on the authority's machine: who was certified, with what serial numbers, and who no longer counts.

::

    keys/
      authority.key  authority.bin  authority.sequence   the fleet's authority; keep this folder offline
      fleet.toml        fleet name and authority public key (hex): what everybody may know
      members.json      every certificate ever issued
      enrollers/        certificates of the enrolment services, whose own certificates count for devices
      coordinators/     certificates of the coordinators, whose keys trust metadata names
      trust/            the owners' part of the trust metadata, see `fleetfed.cloud_coordinator.keys.owners`
      revocations.bin   the signed revocation list in force, as it is published
      tls/              the TLS authorities, see `fleetfed.cloud_coordinator.keys.pki`
      identities/ID/    one folder per member, as `fleetfed.shared.trust.identity` reads it

The register is written before an identity folder: a folder without an entry could never be revoked, an entry without
a folder harms nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from fleetfed.cloud_coordinator.keys import pki
from fleetfed.cloud_coordinator.keys.pki import Listener, Pki
from fleetfed.shared import config
from fleetfed.shared.config import Length, Range
from fleetfed.shared.errors import ConfigError, LocalProtocolError, RemoteProtocolError, StorageError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import certificates, enrolment
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.identity import TLS_DIRECTORY, Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.sequence import SequenceFile
from fleetfed.shared.trust.signer import Signer
from fleetfed.shared.trust.verifier import Authority
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageKind, open_body, parse_head
from fleetfed.shared.wire.messages import Revocations
from fleetfed.shared.wire.topics import CLOUD_SITE, check_id

_DAY: Final = 86_400_000
_AUTHORITY_DAYS: Final = 20 * 365
CRL_DAYS: Final = 90
"""Longer than a list that a server writes daily: this authority is kept offline."""
DEFAULT_DAYS: Final = 730


class MemberRole(StrEnum):
    """What an identity is for."""

    DEVICE = "device"
    GATEWAY = "gateway"
    OPERATOR = "operator"
    COORDINATOR = "coordinator"
    BROKER = "broker"
    """A broker's TLS server certificate; it signs no messages."""
    ENROLLER = "enroller"
    """Certifies devices for tokens, see `fleetfed.cloud_coordinator.enroll`."""
    BRIDGE = "bridge"
    """The TLS certificate with which a site's broker connects to the one above, for its gateway; signs no messages."""
    HELPER = "helper"
    """Holds mask seeds beside the coordinator, see `fleetfed.cloud_coordinator.helper`; run by somebody else."""

    @property
    def certified(self) -> Role | None:
        """The role in the fleet certificate; None for a broker and its bridge, which have none."""
        return None if self in (MemberRole.BROKER, MemberRole.BRIDGE) else Role[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMember:
    """What to certify.

    Attributes:
        id: also the common name, user name and client id.
        role: what for.
        site: where a device sends its updates, which site a gateway serves, or whose broker a bridge belongs to; ``_``
            for the others.
        upstream: the site that a gateway is a member of: ``_``, or the site of the gateway above it.
        owner: who answers for it; may be empty.
        days: validity.
        hosts: names and addresses for the server certificate of a broker or an enrolment service.
        listener: which clients a broker's port is for.
    """

    id: str
    role: MemberRole
    site: str = CLOUD_SITE
    upstream: str = CLOUD_SITE
    owner: str = ""
    days: Annotated[int, Range(1, 36_500)] = DEFAULT_DAYS
    hosts: Annotated[tuple[str, ...], Length(0, 64)] = ()
    listener: Listener = Listener.SITE

    def check(self) -> Self:
        """Return the wish if it can be granted.

        Raises:
            ConfigError: an id that a topic may not carry, or a site that does not fit the role.
        """
        try:
            check_id(self.id)
            check_id(self.site, "site")
            check_id(self.upstream, "upstream site")
            if self.owner:
                check_id(self.owner, "owner")
        except LocalProtocolError as error:
            raise ConfigError(str(error)) from error
        sited = self.role in (MemberRole.DEVICE, MemberRole.GATEWAY, MemberRole.BRIDGE)
        if sited and self.site == CLOUD_SITE:
            raise ConfigError(f"{self.id}: a {self.role} needs a site of its gateway's; give --site NAME")
        if not sited and self.site != CLOUD_SITE:
            raise ConfigError(f"{self.id}: a {self.role} belongs to the site {CLOUD_SITE!r}; leave --site out")
        if self.role is MemberRole.GATEWAY and self.upstream == self.site:
            raise ConfigError(f"{self.id}: a gateway cannot be above itself; give --upstream another site")
        if self.role is not MemberRole.GATEWAY and self.upstream != CLOUD_SITE:
            raise ConfigError(f"{self.id}: only a gateway has an upstream site")
        if self.role in (MemberRole.BROKER, MemberRole.ENROLLER) and not self.hosts:
            raise ConfigError(f"{self.id}: the certificate of its server names its host; give --host NAME")
        if not 1 <= self.days <= 36_500:
            raise ConfigError(f"{self.id}: {self.days} days: give 1 to 36500")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One issued identity.

    Attributes:
        serial: of the fleet certificate; a broker or a bridge, which has none, only has the number here.
        not_before, not_after: unix milliseconds.
        revoked: unix milliseconds; 0 for not revoked.

    The others are as in `NewMember`.
    """

    serial: int
    id: str
    role: MemberRole
    site: str
    upstream: str = CLOUD_SITE
    owner: str = ""
    not_before: int
    not_after: int
    revoked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Register:
    members: tuple[Member, ...] = ()


class Keyring:
    """An open key folder; `create` or `load` makes one. Several processes may use the same folder."""

    def __init__(self, directory: Path, fleet: str, authority: SigningKey) -> None:
        self.directory = directory
        self.fleet = fleet
        self._authority = authority

    @classmethod
    def create(cls, directory: Path, fleet: str, *, now: int) -> Self:
        """Make an authority with its TLS authority in a folder that has none.

        Args:
            directory: made where it is missing.
            fleet: the fleet's name.
            now: unix milliseconds.

        Raises:
            ConfigError: there are keys already, or the name may not stand in a topic.
        """
        try:
            check_id(fleet, "fleet")
        except LocalProtocolError as error:
            raise ConfigError(str(error)) from error
        taken = [name for name in ("authority.key", "fleet.toml", "members.json", "tls") if (directory / name).exists()]
        if taken:
            raise ConfigError(f"{directory} has {taken[0]} already; keys are never overwritten, choose another --dir")
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}") from error
        authority = SigningKey.generate()
        authority.save(directory / "authority.key")
        certificate = Certificate(
            serial=0,
            role=Role.AUTHORITY,
            fleet=fleet,
            id="authority",
            site=CLOUD_SITE,
            not_before=now,
            not_after=now + _AUTHORITY_DAYS * _DAY,
            public_key=authority.public,
        )
        write_atomic(directory / "authority.bin", certificates.issue(certificate, authority))
        Pki.create(directory / "tls", fleet, now=_datetime(now), days=_AUTHORITY_DAYS).write_crl(
            now=_datetime(now), days=CRL_DAYS
        )
        keyring = cls(directory, fleet, authority)
        keyring._write(())
        # Last, because `load` begins with it: half a folder is no key folder.
        text = f'fleet = "{fleet}"\nauthority = "{authority.public.hex()}"\n'
        write_atomic(directory / "fleet.toml", text.encode())
        return keyring

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open a key folder.

        Raises:
            ConfigError: it is none, or not this user's.
            StorageError: it is damaged.
        """
        path = directory / "fleet.toml"
        try:
            fleet = tomllib.loads(path.read_text())
            name, public = fleet["fleet"], bytes.fromhex(fleet["authority"])
        except FileNotFoundError:
            raise ConfigError(f"{directory} holds no keys; make them with `fleetfed keys init --fleet NAME`") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path}: {error}; restore it from a backup") from error
        authority = SigningKey.load(directory / "authority.key")
        if authority.public != public:
            raise StorageError(f"{directory}: authority.key is not the key in fleet.toml; restore both together")
        return cls(directory, name, authority)

    @property
    def authority_key(self) -> bytes:
        """The authority's public key."""
        return self._authority.public

    def crl_file(self, listener: Listener = Listener.SITE) -> Path:
        """The TLS revocation list (PEM) of a broker's port."""
        return self.directory / "tls" / f"crl-{listener}.pem"

    def write_crl(self, *, now: int, days: int = CRL_DAYS) -> None:
        """Write the TLS revocation lists again; a broker refuses everybody once its list is too old."""
        with self._locked():
            Pki.open(self.directory / "tls").write_crl(now=_datetime(now), days=days)

    @property
    def members(self) -> tuple[Member, ...]:
        """Everyone ever certified, in the order of the serial numbers.

        Raises:
            StorageError: the register is damaged.
        """
        path = self.directory / "members.json"
        try:
            table = json.loads(path.read_text())
            return config.build(_Register, table, where=str(path)).members
        except (OSError, ValueError, ConfigError) as error:
            raise StorageError(f"{path}: {error}; restore it from a backup, serial numbers must not repeat") from error

    def identity_folder(self, member: str) -> Path:
        """Where `issue` puts a member's folder."""
        return self.directory / "identities" / member

    def issue(
        self, wanted: Sequence[NewMember], *, now: int, progress: Callable[[Member], None] = lambda _: None
    ) -> tuple[Member, ...]:
        """Certify new members and write their identity folders.

        All are checked first; none is written if one cannot be granted.

        Args:
            wanted: who.
            now: unix milliseconds.
            progress: called after each folder.

        Raises:
            ConfigError: an id or site is taken, a folder is there already, or a wish cannot be granted.
            StorageError: the register is damaged.
        """
        with self._locked():
            members = self.members
            self._check_free(wanted, members)
            serial = max((member.serial for member in members), default=0) + 1
            issued = tuple(
                Member(
                    serial=number,
                    id=wish.id,
                    role=wish.role,
                    site=wish.site,
                    upstream=wish.upstream,
                    owner=wish.owner,
                    not_before=now,
                    not_after=now + wish.days * _DAY,
                )
                for number, wish in enumerate(wanted, start=serial)
            )
            authorities = Pki.open(self.directory / "tls")
            self._write((*members, *issued))
            enrollers = tuple(each.public_key for each in self._online(MemberRole.ENROLLER, members))
            for member, wish in zip(issued, wanted, strict=True):
                folder = self.identity_folder(member.id)
                self._write_signing_identity(member, folder, enrollers)
                self._write_tls_identity(authorities, wish, folder / TLS_DIRECTORY, now)
                progress(member)
        return issued

    def authorities(self) -> tuple[Authority, ...]:
        """Whose certificates count, for trust metadata: this authority's, and for devices the enrolment services'.

        Raises:
            StorageError: the register, or a certificate of a service, is damaged.
        """
        enrollers = (enrolment.enroller(each.public_key) for each in self.online(MemberRole.ENROLLER))
        return (Authority(self._authority.public, frozenset(Role)), *enrollers)

    def online(self, role: MemberRole) -> list[Certificate]:
        """The certificates, not revoked, of the coordinators or of the enrolment services.

        Raises:
            StorageError: the register, or one of them, is damaged.
        """
        return self._online(role, self.members)

    def _online(self, role: MemberRole, members: Sequence[Member]) -> list[Certificate]:
        found = []
        for member in members:
            if member.role is role and not member.revoked:
                path = self.directory / f"{role}s" / f"{member.serial}.bin"
                try:
                    found.append(certificates.verify(path.read_bytes(), self._authority.public))
                except FileNotFoundError:
                    # A crash came between the register and its folder: nobody has that key.
                    continue
                except (OSError, RemoteProtocolError) as error:
                    raise StorageError(f"{path}: {error}; restore it from a backup") from error
        return found

    def revoke(self, names: Sequence[str], *, now: int, in_force: Revocations | None = None) -> tuple[Member, ...]:
        """Make certificates void: the register, the signed list (`revocations`) and the TLS list follow.

        Args:
            names: ids, which stand for all certificates of that member, or serial numbers; none: only take over what
                ``in_force`` has.
            now: unix milliseconds.
            in_force: the list that the fleet obeys, where it is another one: what an enrolment service revoked stays.

        Raises:
            ConfigError: a name that stands for nobody, or nobody who is not revoked already.
            StorageError: the register is damaged.
        """
        with self._locked():
            members = self.members
            # What a crash between register and lists left behind.
            self._revocation_lists(members, now=now, in_force=in_force)
            chosen: set[int] = set()
            for name in names:
                known = [member for member in members if name in (member.id, str(member.serial))]
                if not known:
                    raise ConfigError(f"{name}: no such member or serial; see `fleetfed keys list`")
                live = [member.serial for member in known if not member.revoked]
                if not live:
                    raise ConfigError(f"{name} is revoked already")
                chosen.update(live)
            changed = tuple(replace(each, revoked=now) if each.serial in chosen else each for each in members)
            if chosen:
                self._write(changed)
                self._revocation_lists(changed, now=now, in_force=in_force)
        return tuple(member for member in changed if member.serial in chosen)

    def revocations(self) -> bytes | None:
        """The signed revocation list in force, as it is published; None where nobody was ever revoked."""
        try:
            return (self.directory / "revocations.bin").read_bytes()
        except FileNotFoundError:
            return None

    def _listed(self) -> Revocations | None:
        """The signed list on disk."""
        encoded = self.revocations()
        if encoded is None:
            return None
        head = parse_head(encoded)
        raw = open_body(head.header, memoryview(encoded)[head.size :])
        return codec.decode(Revocations, raw, limit=len(raw))

    def _revocation_lists(self, members: Sequence[Member], *, now: int, in_force: Revocations | None) -> None:
        """Make both lists say what the register says; a new signed one only where it would say something else."""
        void = [member for member in members if member.revoked]
        authorities = Pki.open(self.directory / "tls")
        for member in void:
            # A name has one live certificate at most: `issue` refuses a second.
            if not any(each.id == member.id and not each.revoked for each in members):
                authorities.revoke(member.id, now=_datetime(now))
        if void:
            authorities.write_crl(now=_datetime(now), days=CRL_DAYS)
        known = [each for each in (self._listed(), in_force) if each is not None]
        # An expired certificate needs no entry; a broker has no fleet certificate to revoke. Whoever else is on a list,
        # a service's device or a member that this register has lost, stays there.
        own = {m.serial for m in void if m.role.certified is not None and m.not_after > now}
        expired = {m.serial for m in members if m.not_after <= now}
        listed = {serial for each in known for serial in each.serials} - expired
        serials = tuple(sorted(own | listed))
        newest = max(known, key=lambda each: each.version, default=Revocations(version=1))
        if not void and not listed:
            return
        if self.revocations() is not None and newest == self._listed() and newest.serials == serials:
            return
        # Nobody takes a list twice: the version must be above every one that the fleet may have.
        version = newest.version + 1 if known else 1
        message = self._signer().sign(MessageKind.REVOCATIONS, Revocations(version=version, serials=serials), now=now)
        write_atomic(self.directory / "revocations.bin", message.encode())

    def _signer(self) -> Signer:
        encoded = (self.directory / "authority.bin").read_bytes()
        certificate = certificates.verify(encoded, self._authority.public)
        sequence = SequenceFile(self.directory / "authority.sequence")
        return Signer(self._authority, certificate, encoded, sequence=sequence, randomness=os.urandom)

    def _check_free(self, wanted: Sequence[NewMember], members: Sequence[Member]) -> None:
        live = {member.id for member in members if not member.revoked}
        served = {m.site: m.id for m in members if m.role is MemberRole.GATEWAY and not m.revoked}
        bridged = {m.site: m.id for m in members if m.role is MemberRole.BRIDGE and not m.revoked}
        for wish in wanted:
            wish.check()
            if wish.id in live:
                raise ConfigError(f"{wish.id} has an identity already; revoke it first, or choose another id")
            if wish.role is MemberRole.GATEWAY and wish.site in served:
                raise ConfigError(f"{wish.id}: site {wish.site} is served by {served[wish.site]} already")
            if wish.role is MemberRole.BRIDGE and wish.site in bridged:
                raise ConfigError(f"{wish.id}: site {wish.site} has the bridge {bridged[wish.site]} already")
            folder = self.identity_folder(wish.id)
            if folder.exists():
                raise ConfigError(f"{folder} exists; identities are never overwritten, move it away first")
            live.add(wish.id)
            if wish.role is MemberRole.GATEWAY:
                served[wish.site] = wish.id
            if wish.role is MemberRole.BRIDGE:
                bridged[wish.site] = wish.id

    def _write_signing_identity(self, member: Member, folder: Path, enrollers: tuple[bytes, ...]) -> None:
        role = member.role.certified
        if role is None:
            return
        key = SigningKey.generate()
        certificate = Certificate(
            serial=member.serial,
            role=role,
            fleet=self.fleet,
            id=member.id,
            site=member.site,
            owner=member.owner,
            not_before=member.not_before,
            not_after=member.not_after,
            public_key=key.public,
        )
        identity = Identity(
            key=key,
            certificate=certificate,
            encoded_certificate=certificates.issue(certificate, self._authority),
            authority_key=self._authority.public,
            enrollers=enrollers,
        )
        if member.role in (MemberRole.ENROLLER, MemberRole.COORDINATOR):
            path = self.directory / f"{member.role}s" / f"{member.serial}.bin"
            write_atomic(path, identity.encoded_certificate)
        identity.save(folder)

    def _write_tls_identity(self, authorities: Pki, wish: NewMember, folder: Path, now: int) -> None:
        at = _datetime(now)
        if wish.role is MemberRole.BROKER:
            files = authorities.issue_server(wish.id, list(wish.hosts), folder, now=at, days=wish.days)
            # A broker checks its clients, who come from other authorities than its own certificate.
            write_atomic(files.ca, authorities.bundle(wish.listener).read_bytes())
            write_atomic(folder / "crl.pem", authorities.crl(wish.listener).read_bytes())
        elif wish.role is MemberRole.ENROLLER:
            files = authorities.issue_server(wish.id, list(wish.hosts), folder, now=at, days=wish.days)
        else:
            files = authorities.issue_client(wish.id, pki.Role(wish.role), folder, now=at, days=wish.days)
        for source, name in ((files.ca, "ca.pem"), (files.cert, "cert.pem"), (files.key, "key.pem")):
            source.rename(folder / name)

    def _write(self, members: Sequence[Member]) -> None:
        rows: list[dict[str, Any]] = [asdict(member) for member in members]
        text = json.dumps({"members": rows}, indent=1)
        write_atomic(self.directory / "members.json", text.encode(), mode=0o600)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: two would hand out the same serial numbers."""
        descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _datetime(now: int) -> datetime:
    return datetime.fromtimestamp(now / 1000, UTC)
