"""Seals and opens what is said at enrolment: requests, answers, heads of the log.

A sealed thing names the key that signed it, and the signature covers all of it with a context of its own::

    magic (4) ‖ public key (32) ‖ signature (64) ‖ body (msgpack)

So a request proves that whoever asks has the key that it wants certified, before anything of it is parsed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.keys import SigningKey, signature_is_good
from fleetfed.shared.trust.verifier import Authority
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.enrolment import (
    MAX_ANSWER,
    MAX_HEAD,
    MAX_REQUEST,
    TOKEN_SIZE,
    EnrolAnswer,
    EnrolRequest,
    TreeHead,
)
from fleetfed.shared.wire.envelope import SIGNATURE_SIZE, Digest, digest

T = TypeVar("T")

_KEY_SIZE: Final = 32
_OVERHEAD: Final = 4 + _KEY_SIZE + SIGNATURE_SIZE


@dataclass(frozen=True, slots=True)
class Sealed(Generic[T]):
    """What was opened: the body, who signed it, and the digest of all its bytes."""

    body: T
    key: bytes
    digest: Digest


@dataclass(frozen=True, slots=True)
class Seal(Generic[T]):
    """One kind of sealed thing.

    Attributes:
        magic: 4 bytes that it begins with.
        cls: its body.
        limit: bytes of it all.
    """

    magic: bytes
    cls: type[T]
    limit: int

    def close(self, body: T, key: SigningKey) -> bytes:
        """Sign a body."""
        encoded = codec.encode(body)
        return self.magic + key.public + key.sign(self._signed(key.public, encoded)) + encoded

    def open(self, data: bytes, *, key: bytes | None = None) -> Sealed[T]:
        """Verify, then parse.

        Args:
            data: the bytes.
            key: whose it must be; None: whoever it names, whom the caller then has to judge.

        Raises:
            RemoteProtocolError: `TOO_LARGE`, `TRUNCATED`, `UNKNOWN_VERSION`, `BAD_CERTIFICATE` (another key's),
                `BAD_SIGNATURE`, or what `codec.decode` raises.
        """
        if len(data) > self.limit:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(data)} bytes, limit {self.limit}")
        if len(data) < _OVERHEAD:
            raise RemoteProtocolError(RejectReason.TRUNCATED, f"{len(data)} bytes")
        if data[:4] != self.magic:
            raise RemoteProtocolError(RejectReason.UNKNOWN_VERSION, f"begins with {data[:4]!r}, not {self.magic!r}")
        named = data[4 : 4 + _KEY_SIZE]
        if key is not None and named != key:
            raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "signed by another key than the one expected")
        signature, encoded = data[4 + _KEY_SIZE : _OVERHEAD], data[_OVERHEAD:]
        if not signature_is_good(named, self._signed(named, encoded), signature):
            raise RemoteProtocolError(RejectReason.BAD_SIGNATURE, "it was not signed by the key that it names")
        return Sealed(codec.decode(self.cls, encoded, limit=self.limit), named, digest(data))

    def _signed(self, key: bytes, encoded: bytes) -> bytes:
        return b"fleetfed/1 enrolment\0" + self.magic + key + encoded


REQUEST: Final[Seal[EnrolRequest]] = Seal(b"FFQ1", EnrolRequest, MAX_REQUEST)
ANSWER: Final[Seal[EnrolAnswer]] = Seal(b"FFA1", EnrolAnswer, MAX_ANSWER)
HEAD: Final[Seal[TreeHead]] = Seal(b"FFH1", TreeHead, MAX_HEAD)


def enroller(public_key: bytes) -> Authority:
    """What trust metadata says of an enrolment service: its certificates count, for devices and nobody else."""
    return Authority(public_key, frozenset({Role.DEVICE}))


def hardware_hash(owner: str, hardware: str) -> bytes:
    """What the public log says of a piece of hardware: that it is the same one again, not which."""
    return hashlib.blake2b(f"{owner}\0{hardware}".encode(), digest_size=16, person=b"ff-hardware").digest()


# --- Tokens ----------------------------------------------------------------------------------------------------------

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter looks like a digit."""
_LETTERS: Final = 26
_MARK: Final = "."


def format_token(owner: str, secret: bytes) -> str:
    """A token as people see it: ``owner.xxxxx-xxxxx-…``."""
    number = int.from_bytes(secret)
    text = "".join(_ALPHABET[number >> 5 * at & 31] for at in reversed(range(_LETTERS)))
    return owner + _MARK + "-".join(text[at : at + 5] for at in range(0, _LETTERS, 5))


def parse_token(text: str) -> tuple[str, bytes]:
    """Owner and secret of a token that a person typed.

    Raises:
        ValueError: it is none.
    """
    owner, mark, rest = text.strip().lower().rpartition(_MARK)
    letters = rest.replace("-", "").translate(str.maketrans("oil", "011"))
    if not mark or not owner or len(letters) != _LETTERS or set(letters) - set(_ALPHABET):
        raise ValueError("a token is OWNER.xxxxx-xxxxx-xxxxx-xxxxx-xxxxx-x; copy it whole")
    number = 0
    for letter in letters:
        number = number << 5 | _ALPHABET.index(letter)
    if number >> 8 * TOKEN_SIZE:
        raise ValueError("this token was mistyped")
    return owner, number.to_bytes(TOKEN_SIZE)


def token_hash(secret: bytes) -> bytes:
    """What the service keeps of a token. It is 128 random bits: no salt and no slow hash are needed."""
    return hashlib.blake2b(secret, digest_size=32, person=b"ff-token").digest()
