"""What is computed once for all worlds, because it comes out the same: it changes what a run costs and nothing else."""

from __future__ import annotations

import functools
import sqlite3
from typing import Any

import sqlalchemy
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import NullPool


class Engines:
    """In the place of `sqlalchemy.create_engine`: one engine, as every new one would compile all statements again.

    It opens the database that it was last asked for; nobody here opens two at a time.
    """

    def __init__(self) -> None:
        self._path = ""
        # Of all of SQLAlchemy's kinds of pool the one that keeps nothing open.
        self._engine = sqlalchemy.create_engine("sqlite://", creator=self._connect, poolclass=NullPool)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, check_same_thread=False)

    def __call__(self, url: URL, **_: Any) -> Engine:
        """An engine for this file."""
        assert url.database
        self._path = url.database
        return self._engine


@functools.cache
def engines() -> Engines:
    """The only one."""
    return Engines()


class RememberingVerifyKey:
    """In the place of `nacl.signing.VerifyKey`: the same message is verified by every member that it reaches.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def verify(self, data: bytes, signature: bytes) -> None:
        """Verify for real, once.

        Raises:
            BadSignatureError: it is not good.
        """
        if not _good(self._key, bytes(data), bytes(signature)):
            raise BadSignatureError


@functools.lru_cache(maxsize=1 << 14)
def _good(key: bytes, data: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(key).verify(data, signature)
    except (BadSignatureError, ValueError):
        return False
    return True
