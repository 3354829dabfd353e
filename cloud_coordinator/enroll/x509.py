"""The TLS certificates of enrolled devices: an authority of the service's own, which sites' brokers trust as well.

It is no child of the fleet's authorities, so that its key can be lost or taken away without theirs. It can make nothing
but clients: its own certificate says so (extended key usage, and a name constraint to the fleet's devices).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.files import write_atomic

CA_DAYS: Final = 10 * 365
_BACKDATED: Final = timedelta(minutes=5)
_UNIT: Final = "device"

DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Revoked:
    """A TLS certificate that is void: its serial number, and when it was revoked (unix milliseconds)."""

    serial: int
    at: int


class DeviceCa:
    """The authority in one folder: ``ca.crt`` and ``ca.key``."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self._fleet = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value

    @classmethod
    def create(cls, directory: Path, fleet: str, name: str, *, now: int) -> Self:
        """Make an authority.

        Args:
            directory: made where it is missing.
            fleet: its name.
            name: the service's id.
            now: unix milliseconds.

        Raises:
            ConfigError: there is one already.
        """
        if (directory / "ca.key").exists():
            raise ConfigError(f"{directory / 'ca.key'} exists already; keys are never overwritten")
        key = ec.generate_private_key(ec.SECP256R1())
        at = _datetime(now)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "authority"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} {name} CA"),
            ]
        )
        public = key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - _BACKDATED)
            .not_valid_after(at + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(
                x509.NameConstraints([x509.DirectoryName(x509.Name(_place(fleet)))], None),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_atomic(directory / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
        # Last: `open` begins with it.
        write_atomic(directory / "ca.key", pem, mode=0o600)
        return cls(certificate, key)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open what `create` made.

        Raises:
            ConfigError: there is none.
            StorageError: it is damaged.
        """
        try:
            key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; run `fleetfed-enroll init` first") from error
        except ValueError as error:
            raise StorageError(f"{directory}: the TLS authority is damaged: {error}; restore it") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise StorageError(f"{directory}: ca.key is not the key of ca.crt; restore both together")
        return cls(certificate, key)

    @property
    def pem(self) -> bytes:
        """The authority's certificate, for the brokers."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, name: str, key: DeviceKey, *, now: int, days: int) -> tuple[int, bytes]:
        """Issue a client's certificate; return its serial number and its DER.

        Args:
            name: the device's id.
            key: from `read_request`.
            now: unix milliseconds.
            days: validity.
        """
        at = _datetime(now)
        identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([*_place(str(self._fleet)), x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - _BACKDATED)
            # A certificate that outlives its authority would stop working without a warning.
            .not_valid_after(min(at + timedelta(days=days), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.serial_number, certificate.public_bytes(serialization.Encoding.DER)

    def crl(self, revoked: Iterable[Revoked], *, now: int, days: int) -> bytes:
        """The revocation list, PEM; whoever checks it refuses everybody once it is older than ``days``."""
        at = _datetime(now)
        identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(at - _BACKDATED)
            .next_update(at + timedelta(days=days))
            .add_extension(x509.CRLNumber(now), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(each.serial).revocation_date(_datetime(each.at)).build()
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(der: bytes) -> tuple[DeviceKey, bytes]:
    """The key that a PKCS#10 request is for, and its DER (SubjectPublicKeyInfo); its names are ignored.

    Raises:
        RemoteProtocolError: `MALFORMED`: it is none, or for another kind of key; `BAD_SIGNATURE`: not its own key's.
    """
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        proven = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RemoteProtocolError(RejectReason.MALFORMED, f"TLS request: {error}") from error
    allowed = isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    )
    if not allowed:
        raise RemoteProtocolError(RejectReason.MALFORMED, "TLS request: not for an Ed25519 or P-256 key")
    if not proven:
        raise RemoteProtocolError(RejectReason.BAD_SIGNATURE, "TLS request: not signed by the key in it")
    assert isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)
    return key, key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def pem_of(der: bytes) -> bytes:
    """A certificate as PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def _place(fleet: str) -> list[x509.NameAttribute[str]]:
    return [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, _UNIT),
    ]


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _datetime(now: int) -> datetime:
    return datetime.fromtimestamp(now / 1000, UTC)
