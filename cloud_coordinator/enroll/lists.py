"""Revocation lists that were signed before: the service's own, and the authority's."""

from __future__ import annotations

from pathlib import Path

from fleetfed.shared.errors import ConfigError, RemoteProtocolError, StorageError
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import open_body, parse_head
from fleetfed.shared.wire.messages import Revocations


def list_of(message: bytes) -> Revocations:
    """The list in a message that was verified before.

    Raises:
        StorageError: it is damaged.
    """
    try:
        head = parse_head(message)
        raw = open_body(head.header, memoryview(message)[head.size :])
        return codec.decode(Revocations, raw, limit=len(raw))
    except RemoteProtocolError as error:
        raise StorageError(f"a kept revocation list is damaged: {error}") from error


def verified_list(path: Path, identity: Identity, *, now: int) -> Revocations | None:
    """The authority's revocation list in a file; None where there is no file.

    Raises:
        ConfigError: it is not the authority's.
    """
    try:
        message = path.read_bytes()
    except FileNotFoundError:
        return None
    verifier = identity.verifier()
    try:
        verifier.restore(message, now=now)
    except RemoteProtocolError as error:
        raise ConfigError(f"{path}: {error}; copy it again from the authority's folder") from error
    return verifier.revocations
