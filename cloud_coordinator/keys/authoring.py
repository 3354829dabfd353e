"""Builds trust metadata, unsigned; `fleetfed.shared.trust.tuf.sign` signs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tuf.api.metadata import DelegatedRole, Delegations

from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.tuf import (
    Ed25519Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.trust import Directory

DAY: Final = 86_400_000
HASHES: Final = ["sha256"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """The keys of a role, and how many of them have to sign."""

    keys: Sequence[Ed25519Key]
    threshold: int = 1


def root(version: int, expires: int, roles: Mapping[str, Signers]) -> Metadata[Root]:
    """A root: who signs what.

    Args:
        version: of the root.
        expires: unix milliseconds, here and below.
        roles: of root, targets, snapshot and timestamp.
    """
    return Metadata(
        Root(
            version=version,
            expires=tuf.moment(expires),
            keys={key.keyid: key for signers in roles.values() for key in signers.keys},
            roles={name: Role([key.keyid for key in each.keys], each.threshold) for name, each in roles.items()},
            consistent_snapshot=False,
        )
    )


def targets(
    version: int,
    expires: int,
    named: Mapping[str, bytes],
    *,
    rounds: Sequence[Ed25519Key],
    devices: Sequence[Ed25519Key],
) -> Metadata[Targets]:
    """The owners' word.

    Args:
        version: of the targets.
        expires: unix milliseconds.
        named: the files that belong to it.
        rounds: the coordinators' keys.
        devices: the enrolment services' keys; none for no such delegation.
    """
    # TUF wants paths of every delegation; nobody fetches a file of `rounds`.
    groups = {tuf.ROUNDS: (rounds, ["rounds/*"])}
    if devices:
        groups[tuf.DEVICES] = (devices, [files.DIRECTORY])
    return Metadata(
        Targets(
            version=version,
            expires=tuf.moment(expires),
            targets={path: TargetFile.from_data(path, data, HASHES) for path, data in named.items()},
            delegations=Delegations(
                {key.keyid: key for keys, _ in groups.values() for key in keys},
                {
                    name: DelegatedRole(name, [key.keyid for key in keys], 1, True, paths=paths)
                    for name, (keys, paths) in groups.items()
                },
            ),
        )
    )


def devices(version: int, expires: int, directory: Directory) -> tuple[Metadata[Targets], bytes]:
    """The enrolment service's word, and the file that it names (`files.DIRECTORY`)."""
    data = codec.encode(directory)
    named = {files.DIRECTORY: TargetFile.from_data(files.DIRECTORY, data, HASHES)}
    return Metadata(Targets(version=version, expires=tuf.moment(expires), targets=named)), data


def snapshot(version: int, expires: int, parts: Mapping[str, bytes]) -> Metadata[Snapshot]:
    """What belongs together: metadata of the type `Targets`, by file name."""
    return Metadata(
        Snapshot(
            version=version,
            expires=tuf.moment(expires),
            meta={
                name: MetaFile.from_data(tuf.parse(Targets, data).signed.version, data, HASHES)
                for name, data in parts.items()
            },
        )
    )


def timestamp(version: int, expires: int, current: bytes, *, issued: int) -> Metadata[Timestamp]:
    """What is current: the bytes of a snapshot."""
    return Metadata(
        Timestamp(
            version=version,
            expires=tuf.moment(expires),
            snapshot_meta=MetaFile.from_data(tuf.parse(Snapshot, current).signed.version, current, HASHES),
            unrecognized_fields={tuf.ISSUED: issued},
        )
    )
