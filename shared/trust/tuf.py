"""TUF's metadata format as FleetFed uses it: Ed25519 through libsodium, one name per key, nothing else.

TUF lets key ids be any text. Here a key's id *is* the id of its bytes, so one key under two names can never count twice
towards a threshold.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, Key, Signature
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import BaseFile, Metadata, MetaFile, Role, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError, SerializationError

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.keys import SigningKey, signature_is_good
from fleetfed.shared.wire.envelope import SIGNATURE_SIZE, KeyId, key_id

__all__ = ["MetaFile", "Metadata", "Role", "Root", "Snapshot", "TargetFile", "Targets", "Timestamp"]

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)

ED25519: Final = "ed25519"
NAME: Final = "x-fleetfed-name"
"""Field of a key: what people call it."""
ISSUED: Final = "x-fleetfed-issued"
"""Field of a timestamp: when it was signed, in unix milliseconds."""
TARGETS_META: Final = "targets.json"
DEVICES_META: Final = "devices.json"
ROUNDS: Final = "rounds"
"""The delegation whose keys are the coordinators'."""
DEVICES: Final = "devices"
"""The delegation whose keys are the enrolment services'."""

_MAX_VERSION: Final = 2**63 - 1


def bad(detail: str) -> RemoteProtocolError:
    """What to raise for metadata that breaks a rule."""
    return RemoteProtocolError(RejectReason.BAD_METADATA, detail)


class Ed25519Key(Key):
    """A public key that libsodium checks with.

    securesystemslib's own class would fall back to Ed25519 in pure Python on a device, which takes seconds.
    """

    @classmethod
    def of(cls, public: bytes, name: str) -> Ed25519Key:
        """The key of these 32 bytes."""
        return cls(key_id(public).hex(), ED25519, ED25519, {"public": public.hex()}, {NAME: name})

    @classmethod
    def from_dict(cls, keyid: str, key_dict: dict[str, Any]) -> Ed25519Key:
        """TUF's way to make one.

        Raises:
            ValueError: the id is not that of the bytes.
        """
        keytype, scheme, keyval = cls._from_dict(key_dict)
        key = cls(keyid, keytype, scheme, keyval, key_dict)
        if len(key.public) != 32 or keyid != key_id(key.public).hex():
            raise ValueError(f"{keyid} is not the id of its key")
        return key

    def to_dict(self) -> dict[str, Any]:
        """TUF's way to write it."""
        return self._to_dict()

    @property
    def public(self) -> bytes:
        """The key's 32 bytes."""
        return bytes.fromhex(self.keyval["public"])

    @property
    def id(self) -> KeyId:
        """The key's id, as certificates have it."""
        return key_id(self.public)

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.unrecognized_fields.get(NAME, self.keyid[:8]))

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        """TUF's way to check a signature."""
        try:
            raw = bytes.fromhex(signature.signature)
        except (ValueError, TypeError):
            raw = b""
        if len(raw) != SIGNATURE_SIZE or not signature_is_good(self.public, data, raw):
            raise UnverifiedSignatureError(f"not signed by {self.keyid}")


KEY_FOR_TYPE_AND_SCHEME[ED25519, ED25519] = Ed25519Key


def parse(cls: type[S], data: bytes) -> Metadata[S]:
    """Read metadata of one type; no signature is checked.

    Raises:
        RemoteProtocolError: `BAD_METADATA`.
    """
    try:
        metadata = cast("Metadata[S]", Metadata.from_bytes(data))
    except DeserializationError as error:
        raise bad(f"{cls.type}: {error.__cause__ or error}") from error
    signed = metadata.signed
    if type(signed) is not cls:
        raise bad(f"{signed.type} where {cls.type} is expected")
    metas: list[MetaFile] = []
    keys: dict[str, Key] = {}
    if isinstance(signed, Timestamp):
        metas = [signed.snapshot_meta]
    elif isinstance(signed, Snapshot):
        metas = list(signed.meta.values())
    elif isinstance(signed, Root):
        keys = signed.keys
    elif isinstance(signed, Targets) and signed.delegations is not None:
        keys = signed.delegations.keys
    # JSON has numbers of any size and kind, and TUF any kind of key.
    for version in (signed.version, *(meta.version for meta in metas)):
        if type(version) is not int or not 1 <= version <= _MAX_VERSION:
            raise bad(f"{cls.type}: version {version!r:.40}")
    for each in keys.values():
        if type(each) is not Ed25519Key:
            raise bad(f"{cls.type}: key {each.keyid!r:.40} is no Ed25519 key")
    return metadata


def verify(metadata: Metadata[S], by: Root | Targets, role: str) -> None:
    """Check that enough keys of ``role`` signed.

    Raises:
        RemoteProtocolError: `BAD_METADATA`.
    """
    try:
        by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, SerializationError, ValueError, TypeError, AttributeError) as error:
        raise bad(f"{role} {metadata.signed.version}: {error}") from error


def check_file(file: BaseFile, data: bytes, what: str) -> None:
    """Check that ``data`` has the length and the hashes that ``file`` promises; both must be there.

    Raises:
        RemoteProtocolError: `BAD_METADATA`.
    """
    assert isinstance(file, MetaFile | TargetFile)
    try:
        if file.length is None or not file.hashes or "sha256" not in file.hashes:
            raise bad(f"{what}: named without length and SHA-256")
        file.verify_length_and_hashes(data)
    except (RepositoryError, ValueError, TypeError) as error:
        raise bad(f"{what}: {error}") from error


def millis(moment: datetime) -> int:
    """Unix milliseconds."""
    return int(moment.timestamp()) * 1000


def moment(at: int) -> datetime:
    """The time that so many unix milliseconds stand for, cut to seconds as TUF has it."""
    return datetime.fromtimestamp(at // 1000, UTC)


def sign(metadata: Metadata[S], *keys: SigningKey) -> None:
    """Add the signatures of ``keys``."""
    payload = metadata.signed_bytes
    for key in keys:
        name = key.id.hex()
        metadata.signatures[name] = Signature(name, key.sign(payload).hex())


def keys_of(owner: Root | Targets, role: str) -> dict[KeyId, Ed25519Key]:
    """The keys of a role, by id; none where there is no such role."""
    try:
        ids = owner.get_delegated_role(role).keyids
        keys = [owner.get_key(each) for each in ids]
    except ValueError:
        return {}
    return {key.id: key for key in keys if isinstance(key, Ed25519Key)}
