"""A member's identity on disk, as `fleetfed keys issue` writes it.

::

    identity/
      fleet.toml        fleet name, member id, role, site, authority public key (hex); who else may certify devices
      signing.key       Ed25519 seed, 0600
      certificate.bin   the fleet certificate of that key
      tls/ca.pem  tls/cert.pem  tls/key.pem      for the broker's TLS
      trust/root.json           the pinned root of the fleet's trust metadata; without it certificates alone decide
      trust/bundle.bin          what the owners had signed when the identity was issued
      trust/*.key               coordinator only: the keys of timestamp and snapshot
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.certificates import Certificate, Role
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Signer
from fleetfed.shared.trust.verifier import Authority, Verifier

FLEET_FILE: Final = "fleet.toml"
KEY_FILE: Final = "signing.key"
CERTIFICATE_FILE: Final = "certificate.bin"
TLS_DIRECTORY: Final = "tls"
TRUST_DIRECTORY: Final = "trust"
ROOT_FILE: Final = "root.json"
BUNDLE_FILE: Final = "bundle.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One member: its key, its certificate and the authority that it trusts.

    Attributes:
        key: the signing key.
        certificate, encoded_certificate: of that key.
        authority_key: the offline authority's public key.
        issuer_key: who issued the certificate, where it was an enrolment service; else empty.
        enrollers: public keys of the enrolment services whose devices count here; trust metadata replaces them.
        spent: participations with which this member's privacy ledger begins (docs/enrolment.md).
        root: the pinned root of the fleet's trust metadata; empty where the fleet has none.
        bundle: what the owners had signed when the identity was issued.
    """

    key: SigningKey
    certificate: Certificate
    encoded_certificate: bytes
    authority_key: bytes
    issuer_key: bytes = b""
    enrollers: tuple[bytes, ...] = ()
    spent: int = 0
    root: bytes = b""
    bundle: bytes = b""

    @classmethod
    def load(cls, directory: Path, *, role: Role | None = None) -> Identity:
        """Read an identity folder and check that its parts fit each other.

        Raises:
            ConfigError: a file is missing, damaged, of another key, or not of the wanted ``role``.
        """
        try:
            fleet = tomllib.loads((directory / FLEET_FILE).read_text())
            encoded = (directory / CERTIFICATE_FILE).read_bytes()
            authority = bytes.fromhex(fleet["authority"])
            issuer = bytes.fromhex(fleet.get("issuer", ""))
            enrollers = tuple(bytes.fromhex(each) for each in fleet.get("enrollers", []))
            spent = int(fleet.get("spent", 0))
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; make it with `fleetfed keys issue`") from error
        except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{directory / FLEET_FILE}: {error}") from error
        key = SigningKey.load(directory / KEY_FILE)
        try:
            certificate = certificates.verify(encoded, issuer or authority)
        except RemoteProtocolError as error:
            raise ConfigError(f"{directory / CERTIFICATE_FILE}: {error}") from error
        if certificate.public_key != key.public:
            raise ConfigError(f"{directory}: the certificate is another key's; issue the identity again")
        if role is not None and certificate.role is not role:
            raise ConfigError(
                f"{directory}: {certificate.id} has the role {certificate.role.name.lower()}, "
                f"this program needs {role.name.lower()}"
            )
        if issuer and certificate.role is not Role.DEVICE:
            raise ConfigError(f"{directory}: an enrolment service may certify devices alone; issue the identity again")
        return cls(
            key=key,
            certificate=certificate,
            encoded_certificate=encoded,
            authority_key=authority,
            issuer_key=issuer,
            enrollers=enrollers,
            spent=spent,
            root=_optional(directory / TRUST_DIRECTORY / ROOT_FILE),
            bundle=_optional(directory / TRUST_DIRECTORY / BUNDLE_FILE),
        )

    def save(self, directory: Path) -> None:
        """Write the identity folder, less its TLS files."""
        certificate = self.certificate
        self.key.save(directory / KEY_FILE)
        write_atomic(directory / CERTIFICATE_FILE, self.encoded_certificate)
        lines = [
            f'fleet = "{certificate.fleet}"',
            f'id = "{certificate.id}"',
            f'role = "{certificate.role.name.lower()}"',
            f'site = "{certificate.site}"',
            f'authority = "{self.authority_key.hex()}"',
        ]
        if self.issuer_key:
            lines.append(f'issuer = "{self.issuer_key.hex()}"')
        if self.enrollers:
            # A list of texts is the same in TOML as in JSON.
            lines.append(f"enrollers = {json.dumps([each.hex() for each in self.enrollers])}")
        if self.spent:
            lines.append(f"spent = {self.spent}")
        if self.root:
            write_atomic(directory / TRUST_DIRECTORY / ROOT_FILE, self.root)
            write_atomic(directory / TRUST_DIRECTORY / BUNDLE_FILE, self.bundle)
        write_atomic(directory / FLEET_FILE, "\n".join((*lines, "")).encode())

    def signer(self, *, sequence: Callable[[], int], randomness: Callable[[int], bytes]) -> Signer:
        """A signer in this identity's name."""
        return Signer(self.key, self.certificate, self.encoded_certificate, sequence=sequence, randomness=randomness)

    def verifier(self) -> Verifier:
        """A verifier that trusts this identity's authority, and for devices the enrolment services that it names."""
        verifier = Verifier(self.certificate.fleet, self.authority_key)
        if self.enrollers:
            pinned = Authority(self.authority_key, frozenset(Role))
            verifier.trust([pinned, *(Authority(each, frozenset({Role.DEVICE})) for each in self.enrollers)])
        return verifier


def _optional(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
