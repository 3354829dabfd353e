"""Ed25519 keys (RFC 8032) as files that only their owner can read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey as _SodiumSigningKey
from nacl.signing import VerifyKey as _SodiumVerifyKey

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.wire.envelope import KeyId, key_id

_SEED_SIZE = 32


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key pair; its seed never appears in a repr or a log."""

    _key: _SodiumSigningKey

    def __repr__(self) -> str:
        return f"SigningKey({self.id.hex()})"

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's randomness."""
        return cls(_SodiumSigningKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """The key that a 32-byte seed stands for."""
        return cls(_SodiumSigningKey(seed))

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key that `save` wrote.

        Raises:
            ConfigError: it is missing, not a key, or readable by others.
        """
        try:
            seed = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; make keys with `fleetfed keys issue`") from error
        if len(seed) != _SEED_SIZE:
            raise ConfigError(f"{path}: {len(seed)} bytes are no Ed25519 seed of {_SEED_SIZE}")
        if mode & 0o077:
            raise ConfigError(f"{path}: others can read this key; run `chmod 600 {path}`")
        return cls.from_seed(seed)

    def save(self, path: Path) -> None:
        """Write the seed, readable by its owner alone; an existing file is replaced whole or not at all."""
        write_atomic(path, bytes(self._key), mode=0o600)

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return bytes(self._key.verify_key)

    @property
    def id(self) -> KeyId:
        """The id of the public key."""
        return key_id(self.public)

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, 64 bytes."""
        return self._key.sign(data).signature


def signature_is_good(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (64 bytes) over ``data`` was made with the key whose public half is given."""
    try:
        _SodiumVerifyKey(public_key).verify(data, signature)
    except (BadSignatureError, ValueError):
        return False
    return True
