"""Masks: ChaCha20 (RFC 8439) as a stream of uint64 words, added to or taken from a vector in place.

The stream is libsodium's `randombytes_buf_deterministic`: ChaCha20 with block counter 0 and the nonce
``LibsodiumDRG``, 2^38 bytes at most. The nonce may be constant because every key is used for one stream only. Where
the package `cryptography` is installed its faster implementation gives the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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
_BATCH: Final = 64
"""Streams that are open at once."""
_ZEROS: Final = memoryview(bytes(8 * _CHUNK))


def add_masks(words: Words, keys: Iterable[bytes], *, negate: bool = False) -> None:
    """Add (or subtract) the streams of all keys to ``words`` in place, modulo 2**64.

    Args:
        words: uint64, any length; changed.
        keys: 32 bytes each, used for this one stream.
        negate: subtract.

    Raises:
        ValueError: a key of another length (nothing is ever folded to fewer bits), or a vector beyond the stream.
    """
    combine = np.subtract if negate else np.add
    rest = iter(keys)
    while batch := list(itertools.islice(rest, _BATCH)):
        for key in batch:
            if len(key) != KEY_SIZE or 8 * words.size > _MOST:
                raise ValueError(f"a key of {len(key)} bytes for {words.size} words")
        if _library() is None:
            for key in batch:
                stream = np.frombuffer(randombytes_deterministic(8 * words.size, key), dtype="<u8")
                combine(words, stream, out=words)
        else:
            _add_batch(words, [_encryptor(key) for key in batch], combine)


def add_mask(words: Words, key: bytes, *, negate: bool = False) -> None:
    """The same for one key."""
    add_masks(words, (key,), negate=negate)


def _add_batch(words: Words, encryptors: list[Any], combine: np.ufunc) -> None:
    # All streams of one piece of the vector before the next piece: it stays in the cache meanwhile.
    buffer = bytearray(8 * min(_CHUNK, words.size))
    stream = np.frombuffer(buffer, dtype="<u8")
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        zeros, masks = _ZEROS[: 8 * part.size], stream[: part.size]
        for encryptor in encryptors:
            size = encryptor.update_into(zeros, buffer)
            assert size == 8 * part.size
            combine(part, masks, out=part)


def _encryptor(key: bytes) -> Any:
    """A stream of `cryptography`'s."""
    ciphers = _library()
    return ciphers.Cipher(ciphers.algorithms.ChaCha20(key, _NONCE), mode=None).encryptor()


@cache
def _library() -> Any:
    # Not at import: a process that never masks anything should not hold OpenSSL in memory.
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError:
        return None
    return ciphers
