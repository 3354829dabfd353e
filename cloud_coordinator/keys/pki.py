"""The certificates with which brokers and their clients know each other.

Two authorities, both self-signed, neither above the other:

- ``infra`` issues brokers, gateways, the coordinator and operators,
- ``devices`` issues devices.

A site's broker trusts both, the cloud's broker ``infra`` alone, so a device's certificate does not even get a
connection there. One root above two intermediates would not separate them: OpenSSL trusts a chain by its root, and a
device would bring its own intermediate along.

These certificates carry the transport. What counts in a round is signed with the fleet's own keys, whatever a broker
lets through.

Files below the directory::

    infra.crt  infra.key  devices.crt  devices.key     the authorities; keys are 0600 and never overwritten
    ledger.jsonl                                       one line per certificate issued or revoked
    bundle-site.crt  bundle-cloud.crt                  what a listener trusts
    crl-site.pem  crl-cloud.pem                        what it refuses, once `Pki.write_crl` has run

Example::

    pki = Pki.create(Path("pki"), "demo", now=now)
    pki.issue_server("broker", ["broker.example", "10.0.0.5"], Path("broker"), now=now)
    pki.issue_client("d-07", Role.DEVICE, Path("d-07"), days=90, now=now)
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetfed.shared.errors import ConfigError, LocalProtocolError, StorageError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.wire.topics import check_id

CA_DAYS: Final = 10 * 365
CLIENT_DAYS: Final = 90
"""Renewed at two thirds of it."""
SERVER_DAYS: Final = 365
CRL_DAYS: Final = 7
"""A broker refuses everybody once its list has expired: write it daily."""

_BACKDATED: Final = timedelta(minutes=5)
"""Clocks of devices are late rather than early; a certificate must be valid at once."""


class Role(StrEnum):
    """Who a client is; decides which authority issues its certificate."""

    DEVICE = "device"
    GATEWAY = "gateway"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"
    HELPER = "helper"
    BRIDGE = "bridge"


class Listener(StrEnum):
    """Which clients a broker's port is for."""

    SITE = "site"
    """Devices and gateways; also a demonstration's one broker for all."""
    CLOUD = "cloud"
    """Gateways, bridges, the coordinator, operators and the helper."""


class _Authority(StrEnum):
    INFRA = "infra"
    DEVICES = "devices"


_TRUSTED: Final[dict[Listener, tuple[_Authority, ...]]] = {
    Listener.SITE: (_Authority.INFRA, _Authority.DEVICES),
    Listener.CLOUD: (_Authority.INFRA,),
}


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate as the ledger knows it.

    Attributes:
        serial: the certificate's serial number.
        name: its common name.
        role: "server" or a `Role`.
        authority: "infra" or "devices".
        not_after: end of its validity.
        revoked: when it was revoked; None if it was not.
    """

    serial: int
    name: str
    role: str
    authority: str
    not_after: datetime
    revoked: datetime | None = None


class Pki:
    """The authorities of one fleet in one directory; open it in one process at a time."""

    def __init__(
        self,
        directory: Path,
        fleet: str,
        authorities: dict[_Authority, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]],
        ledger: dict[int, Issued],
    ) -> None:
        self.directory = directory
        self.fleet = fleet
        self._authorities = authorities
        self._ledger = ledger

    @classmethod
    def create(
        cls, directory: Path, fleet: str, *, now: datetime, days: int = CA_DAYS, overwrite: bool = False
    ) -> Self:
        """Make both authorities.

        Args:
            directory: made where it is missing, with mode 0700.
            fleet: the fleet's id; the organization in every certificate.
            now: the present, with time zone.
            days: how long the authorities are valid.
            overwrite: replace authorities that are there; every certificate issued by them becomes worthless.

        Raises:
            ConfigError: there are authorities in ``directory`` already.
            LocalProtocolError: ``fleet`` is not an id.
        """
        check_id(fleet, "fleet")
        for name in _Authority:
            path = directory / f"{name}.key"
            if path.exists() and not overwrite:
                raise ConfigError(
                    f"{path}: there is an authority already; replacing it would lock out every certificate that it "
                    "issued. Open it, or choose another directory"
                )
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        (directory / "ledger.jsonl").unlink(missing_ok=True)
        authorities = {}
        for name in _Authority:
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _authority(fleet, name, key, now, days)
            _write_key(directory / f"{name}.key", key)
            _write_pem(directory / f"{name}.crt", [certificate])
            authorities[name] = (certificate, key)
        pki = cls(directory, fleet, authorities, {})
        for listener in Listener:
            _write_pem(pki.bundle(listener), [authorities[each][0] for each in _TRUSTED[listener]])
        pki.write_crl(now=now)
        return pki

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open what `create` made.

        Raises:
            ConfigError: there are no authorities in ``directory``.
            StorageError: a file is damaged.
        """
        authorities = {}
        for name in _Authority:
            try:
                certificate = x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())
                key = serialization.load_pem_private_key((directory / f"{name}.key").read_bytes(), password=None)
            except OSError as error:
                raise ConfigError(
                    f"{error.filename}: {error.strerror}; make the fleet's authorities first, or correct the path"
                ) from error
            except ValueError as error:
                raise StorageError(f"{directory}: authority {name!r} is damaged: {error}") from error
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise StorageError(f"{directory}: the key of authority {name!r} is not an elliptic-curve key")
            authorities[name] = (certificate, key)
        organization = authorities[_Authority.INFRA][0].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        fleet = organization[0].value
        assert isinstance(fleet, str)
        return cls(directory, fleet, authorities, _read_ledger(directory / "ledger.jsonl"))

    def issue_server(
        self, name: str, hosts: list[str], out_dir: Path, *, now: datetime, days: int = SERVER_DAYS
    ) -> TlsFiles:
        """Issue a broker's certificate with a new key.

        Args:
            name: common name.
            hosts: names and addresses under which clients reach it; they check these.
            out_dir: receives ``{name}.crt``, ``{name}.key`` and ``ca.crt``.
            now: the present, with time zone.
            days: validity.

        Raises:
            LocalProtocolError: ``name`` is not an id, or there is no host.
        """
        check_id(name)
        if not hosts:
            raise LocalProtocolError("a server's certificate needs the names or addresses that clients connect to")
        alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(
            name,
            "server",
            _Authority.INFRA,
            key.public_key(),
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            alternatives=alternatives,
            now=now,
            days=days,
        )
        return self._write_identity(name, certificate, key, out_dir)

    def issue_client(self, name: str, role: Role, out_dir: Path, *, now: datetime, days: int = CLIENT_DAYS) -> TlsFiles:
        """Issue a client's certificate with a new key.

        Args:
            name: the member's id: common name, and so user name and client id at the broker.
            role: decides the authority.
            out_dir: receives ``{name}.crt``, ``{name}.key`` and ``ca.crt`` (what a broker is checked against).
            now: the present, with time zone.
            days: validity.

        Raises:
            LocalProtocolError: ``name`` is not an id.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._client(name, role, key.public_key(), now, days)
        return self._write_identity(name, certificate, key, out_dir)

    def sign_request(self, name: str, role: Role, request: bytes, *, now: datetime, days: int = CLIENT_DAYS) -> bytes:
        """Issue a client's certificate for a key that never left the client; returns it as PEM.

        Args:
            name: the member's id; whatever name the request carries is ignored.
            role: decides the authority.
            request: PEM of a certificate signing request for a P-256 key.
            now: the present, with time zone.
            days: validity.

        Raises:
            LocalProtocolError: ``name`` is not an id, or the request is malformed, not signed by its own key, or for
                another kind of key.
        """
        try:
            parsed = x509.load_pem_x509_csr(request)
            key = parsed.public_key()
        except ValueError as error:
            raise LocalProtocolError(f"request for {name!r}: {error}") from error
        if not parsed.is_signature_valid:
            raise LocalProtocolError(f"request for {name!r} is not signed by the key in it")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise LocalProtocolError(f"request for {name!r} is not for a P-256 key")
        return self._client(name, role, key, now, days).public_bytes(serialization.Encoding.PEM)

    def revoke(self, which: int | str, *, now: datetime) -> list[Issued]:
        """Revoke one serial number, or all valid certificates of one name; then call `write_crl`.

        Returns:
            What was revoked by this call; empty if everything was revoked or expired already.

        Raises:
            LocalProtocolError: no such certificate was issued here.
        """
        found = [each for each in self._ledger.values() if which in (each.serial, each.name)]
        if not found:
            raise LocalProtocolError(f"no certificate was issued here for {which!r}")
        revoked = []
        for each in found:
            if each.revoked is None and each.not_after > now:
                self._append({"revoked": f"{each.serial:x}", "at": now.isoformat()})
                revoked.append(self._ledger[each.serial])
        return revoked

    def write_crl(self, *, now: datetime, days: int = CRL_DAYS) -> dict[Listener, Path]:
        """Write the revocation list of every listener; a broker reads it when it is told to reload."""
        lists = {name: self._revocation_list(name, now, days) for name in _Authority}
        paths = {}
        for listener in Listener:
            paths[listener] = self.crl(listener)
            pem = b"".join(lists[each].public_bytes(serialization.Encoding.PEM) for each in _TRUSTED[listener])
            write_atomic(paths[listener], pem)
        return paths

    def bundle(self, listener: Listener) -> Path:
        """The file of authorities that ``listener`` trusts."""
        return self.directory / f"bundle-{listener}.crt"

    def crl(self, listener: Listener) -> Path:
        """The file of revocation lists for ``listener``, as `write_crl` wrote it last."""
        return self.directory / f"crl-{listener}.pem"

    @property
    def ca(self) -> Path:
        """What clients check a broker against."""
        return self.directory / f"{_Authority.INFRA}.crt"

    def issued(self) -> list[Issued]:
        """Every certificate ever issued, oldest first."""
        return list(self._ledger.values())

    def _client(
        self, name: str, role: Role, key: ec.EllipticCurvePublicKey, now: datetime, days: int
    ) -> x509.Certificate:
        check_id(name)
        authority = _Authority.DEVICES if role is Role.DEVICE else _Authority.INFRA
        return self._issue(
            name, role, authority, key, usage=ExtendedKeyUsageOID.CLIENT_AUTH, alternatives=None, now=now, days=days
        )

    def _issue(
        self,
        name: str,
        role: str,
        authority: _Authority,
        key: ec.EllipticCurvePublicKey,
        *,
        usage: x509.ObjectIdentifier,
        alternatives: x509.SubjectAlternativeName | None,
        now: datetime,
        days: int,
    ) -> x509.Certificate:
        issuer, issuer_key = self._authorities[authority]
        # A certificate that outlives its authority would stop working without a warning.
        not_after = min(now + timedelta(days=days), issuer.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(self.fleet, name, role))
            .issuer_name(issuer.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_authority_key(issuer), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        certificate = builder.sign(issuer_key, hashes.SHA256())
        # In the ledger before anybody can have it: what is out there can be revoked.
        self._append(
            {
                "issued": f"{certificate.serial_number:x}",
                "name": name,
                "role": role,
                "authority": authority,
                "until": certificate.not_valid_after_utc.isoformat(),
            }
        )
        return certificate

    def _write_identity(
        self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, out_dir: Path
    ) -> TlsFiles:
        files = TlsFiles(ca=out_dir / "ca.crt", cert=out_dir / f"{name}.crt", key=out_dir / f"{name}.key")
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_pem(files.ca, [self._authorities[_Authority.INFRA][0]])
        _write_key(files.key, key)
        _write_pem(files.cert, [certificate])
        return files

    def _revocation_list(self, authority: _Authority, now: datetime, days: int) -> x509.CertificateRevocationList:
        issuer, key = self._authorities[authority]
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + timedelta(days=days))
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
            .add_extension(_authority_key(issuer), critical=False)
        )
        for each in self._ledger.values():
            # RFC 5280 section 3.3: an expired certificate may leave the list; it is refused for its date.
            if each.revoked is not None and each.authority == authority and each.not_after > now - timedelta(days=1):
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder().serial_number(each.serial).revocation_date(each.revoked).build()
                )
        return builder.sign(key, hashes.SHA256())

    def _append(self, line: dict[str, Any]) -> None:
        path = self.directory / "ledger.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _apply(self._ledger, line)


def next_update(pem: bytes) -> datetime | None:
    """When the first of the revocation lists in a file will be too old; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    found = []
    mark = b"-----END X509 CRL-----"
    for part in pem.split(mark)[:-1]:
        update = x509.load_pem_x509_crl(part[part.index(b"-----BEGIN") :] + mark).next_update_utc
        if update is not None:
            found.append(update)
    return min(found, default=None)


def _name(fleet: str, name: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _authority(fleet: str, name: str, key: ec.EllipticCurvePrivateKey, now: datetime, days: int) -> x509.Certificate:
    subject = _name(fleet, f"{fleet} {name} CA", "authority")
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pem(path: Path, certificates: list[x509.Certificate]) -> None:
    write_atomic(path, b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(path, pem, mode=0o600)


def _read_ledger(path: Path) -> dict[int, Issued]:
    ledger: dict[int, Issued] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if lines[-1]:
        # Torn by a crash, before its certificate was written anywhere; the next line must not continue it.
        os.truncate(path, path.stat().st_size - len(lines[-1]))
    for number, line in enumerate(lines[:-1], start=1):
        try:
            _apply(ledger, json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: line {number} is damaged: {error!r}") from error
    return ledger


def _apply(ledger: dict[int, Issued], line: dict[str, Any]) -> None:
    if "issued" in line:
        serial = int(line["issued"], 16)
        ledger[serial] = Issued(
            serial, line["name"], line["role"], line["authority"], datetime.fromisoformat(line["until"])
        )
        return
    old = ledger[int(line["revoked"], 16)]
    at = datetime.fromisoformat(line["at"]).astimezone(UTC)
    ledger[old.serial] = Issued(old.serial, old.name, old.role, old.authority, old.not_after, at)
