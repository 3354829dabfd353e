"""Masks: ChaCha20 (RFC 8439) as a stream of uint64 words, added to or taken from a vector in place.

The stream is libsodium's `randombytes_buf_deterministic`: ChaCha20 with block counter 0 and the nonce
``LibsodiumDRG``, 2^38 bytes at most. The nonce may be constant because every key is used for one stream only. Where
the package `cryptography` is installed its faster implementation gives the same bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from nacl.utils import randombytes_deterministic

from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.secure.kdf import KEY_SIZE

_NONCE: Final = b"\0\0\0\0LibsodiumDRG"
_MOST: Final = 1 << 38
_CHUNK: Final = 1 << 14
"""Words at a time: input, stream and target (128 KiB each) stay in the second-level cache."""
_ZEROS: Final = memoryview(bytes(8 * _CHUNK))


def add_mask(words: Words, key: bytes, *, negate: bool = False) -> None:
    """Add (or subtract) the key's stream to ``words`` in place, modulo 2**64.

    Args:
        words: uint64, any length; changed.
        key: 32 bytes, used for this one stream.
        negate: subtract.

    Raises:
        ValueError: a key of another length (nothing is ever folded to fewer bits), or a vector beyond the stream.
    """
    if len(key) != KEY_SIZE or 8 * words.size > _MOST:
        raise ValueError(f"a key of {len(key)} bytes for {words.size} words")
    combine = np.subtract if negate else np.add
    encryptor = _encryptor(key)
    if encryptor is None:
        stream = np.frombuffer(randombytes_deterministic(8 * words.size, key), dtype="<u8")
        combine(words, stream, out=words)
        return
    buffer = bytearray(8 * min(_CHUNK, words.size))
    stream = np.frombuffer(buffer, dtype="<u8")
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        size = encryptor.update_into(_ZEROS[: 8 * part.size], buffer)
        assert size == 8 * part.size
        combine(part, stream[: part.size], out=part)


def _encryptor(key: bytes) -> Any:
    """A stream of `cryptography`'s, None where it is not installed."""
    ciphers = _library()
    return ciphers.Cipher(ciphers.algorithms.ChaCha20(key, _NONCE), mode=None).encryptor() if ciphers else None


@cache
def _library() -> Any:
    # Not at import: a process that never masks anything should not hold OpenSSL in memory.
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError:
        return None
    return ciphers
