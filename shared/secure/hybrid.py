"""Suite 3: keys sealed with HPKE over ML-KEM-768 and X25519 together, against who records now and decrypts later.

A box opens only to whoever breaks both. The key encapsulation is X-Wing (draft-connolly-cfrg-xwing-kem), as HPKE's
number 0x647A: the key pair of a 32-byte secret is SHAKE256 of it, 64 bytes for ML-KEM (FIPS 203) and 32 for X25519; the
public key is ML-KEM's and then X25519's. Key schedule HKDF-SHA256, encryption ChaCha20-Poly1305 (RFC 9180, base mode),
and what a box is bound to is HPKE's ``info``. So it is as large as that of every other update.

The library is `cryptography` from 47 on. Who has an older one, or none, can do everything but this.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, Final

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.masking import HYBRID

HOW_TO_INSTALL: Final = "pip install 'fleetfed[hybrid]'"
_ML_KEM_SEED: Final = 64
_ML_KEM_KEY: Final = 1184
_X25519: Final = 32


def check_available() -> None:
    """Refuse what this installation cannot do.

    Raises:
        RemoteProtocolError: `UNKNOWN_SUITE`, with what to install.
    """
    if _library() is None:
        raise RemoteProtocolError(
            RejectReason.UNKNOWN_SUITE, f"suite {HYBRID} needs cryptography 47 or newer: {HOW_TO_INSTALL}"
        )


def key_pair(secret: bytes) -> tuple[Any, bytes]:
    """The private key of a 32-byte secret, for `decrypt`, and the public one, 1216 bytes.

    Raises:
        RemoteProtocolError: as `check_available`.
    """
    check_available()
    library = _library()
    expanded = hashlib.shake_256(secret).digest(_ML_KEM_SEED + _X25519)
    lattice = library.mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:_ML_KEM_SEED])
    curve = library.x25519.X25519PrivateKey.from_private_bytes(expanded[_ML_KEM_SEED:])
    public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return library.hpke.MLKEM768X25519PrivateKey(lattice, curve), bytes(public)


def encrypt(plain: bytes, public_key: bytes, info: bytes) -> bytes:
    """Seal to a public key: 1136 bytes more than ``plain``.

    Raises:
        RemoteProtocolError: as `check_available`.
        ValueError: it is no public key.
    """
    check_available()
    library = _library()
    public = library.hpke.MLKEM768X25519PublicKey(
        library.mlkem.MLKEM768PublicKey.from_public_bytes(public_key[:_ML_KEM_KEY]),
        library.x25519.X25519PublicKey.from_public_bytes(public_key[_ML_KEM_KEY:]),
    )
    return bytes(library.suite.encrypt(plain, public, info))


def decrypt(box: bytes, private_key: Any, info: bytes) -> bytes:
    """Undo `encrypt`.

    Args:
        box: as received.
        private_key: of `key_pair`.
        info: as given to `encrypt`.

    Raises:
        ValueError: it does not open.
    """
    library = _library()
    try:
        return bytes(library.suite.decrypt(box, private_key, info))
    except library.invalid as error:
        raise ValueError("the box does not open") from error


class _Library:
    """What is used of `cryptography`; made once."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives import hpke
        from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

        self.hpke: Any = hpke
        self.mlkem: Any = mlkem
        self.x25519: Any = x25519
        self.invalid = InvalidTag
        self.suite: Any = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
        # A build without ML-KEM has the names, and fails when they are used.
        mlkem.MLKEM768PrivateKey.from_seed_bytes(bytes(_ML_KEM_SEED))


@cache
def _library() -> Any:
    # Not at import: a device in other rounds carries nothing of this.
    try:
        return _Library()
    except Exception:  # noqa: BLE001 - an old, broken or crippled library is like none
        return None
