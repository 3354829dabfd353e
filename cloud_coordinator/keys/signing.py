"""Carries staged metadata to the keys and their signatures back: one JSON file, for people who sign on other machines.

The file shows all that is signed: the metadata itself and the files that it names. It needs nothing but the file and a
key; whoever brings it back cannot change what it says, only add signatures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator.keys.owners import Missing, Owners
from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.tuf import Metadata, Root, Targets
from fleetfed.shared.wire.trust import MAX_BUNDLE

_LIMIT: Final = 4 * MAX_BUNDLE


def export(owners: Owners, path: Path) -> list[Missing]:
    """Write what is staged to ``path``; return what it lacks.

    Raises:
        ConfigError: nothing is staged.
    """
    root, targets = owners.staged(Root), owners.staged(Targets)
    if root is None and targets is None:
        raise ConfigError("nothing waits for signatures")
    request: dict[str, Any] = {"root": json.loads(owners.roots[-1]), "next": {}, "files": {}}
    for each in (root, targets):
        if each is not None:
            request["next"][each.signed.type] = json.loads(each.to_bytes())
    if targets is not None:
        for name in targets.signed.targets:
            request["files"][name] = (owners.directory / "staged" / name).read_text()
    write_atomic(path, json.dumps(request, indent=1).encode())
    return owners.missing()


def sign_file(path: Path, keys: Sequence[SigningKey]) -> list[str]:
    """Add the signatures of ``keys`` to an exported file, on any machine; return in words what was signed.

    Raises:
        ConfigError: the file is none of `export`, or a key has no say in it.
    """
    request = _read(path)
    before = _part(Root, request["root"], path)
    root, targets = _next(Root, request, path), _next(Targets, request, path)
    if targets is not None:
        for name, target in targets.signed.targets.items():
            try:
                tuf.check_file(target, str(request["files"].get(name, "")).encode(), name)
            except RemoteProtocolError as error:
                raise ConfigError(f"{path}: what it shows is not what would be signed: {error.detail}") from error
    by = root.signed if root is not None else before.signed
    # A new root counts with the keys of the one before and its own, everything else with those of the newest root.
    said = []
    for key in keys:
        done = []
        if root is not None and any(key.id in tuf.keys_of(each, Root.type) for each in (before.signed, root.signed)):
            tuf.sign(root, key)
            done.append(f"root {root.signed.version}, which expires on {root.signed.expires:%Y-%m-%d}")
        if targets is not None and key.id in tuf.keys_of(by, Targets.type):
            tuf.sign(targets, key)
            done.append(f"targets {targets.signed.version}, which expires on {targets.signed.expires:%Y-%m-%d}")
        if not done:
            raise ConfigError(f"{path}: key {key.id.hex()} has no say in any of it; take another key")
        said += done
    for part in (root, targets):
        if part is not None:
            request["next"][part.signed.type] = json.loads(part.to_bytes())
    write_atomic(path, json.dumps(request, indent=1).encode())
    return said


def take_back(owners: Owners, path: Path) -> list[Missing]:
    """Add the signatures in ``path`` to what is staged; return what is still missing.

    Raises:
        ConfigError: the file is none of `export`, or of something else than what is staged now.
    """
    request = _read(path)
    _merge(owners, Root, request, path)
    _merge(owners, Targets, request, path)
    return owners.sign()


def _merge(owners: Owners, cls: type[tuf.S], request: dict[str, Any], path: Path) -> None:
    came, staged = _next(cls, request, path), owners.staged(cls)
    if came is None:
        return
    if staged is None or came.signed_bytes != staged.signed_bytes:
        raise ConfigError(f"{path}: {cls.type} is not what is staged now; export it again and have that signed")
    staged.signatures |= came.signatures
    write_atomic(owners.directory / "staged" / f"{cls.type}.json", staged.to_bytes())


def policy_in(path: Path) -> str:
    """The policy that an exported file asks to sign; empty for none."""
    return str(_read(path)["files"].get(files.POLICY, ""))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT:
            raise ConfigError(f"{path}: larger than {_LIMIT} bytes: not written by `fleetfed keys sign --export`")
        request = json.loads(path.read_text())
        tables = [request[name] for name in ("root", "next", "files")]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not written by `fleetfed keys sign --export`: {error}") from error
    if not all(isinstance(each, dict) for each in tables):
        raise ConfigError(f"{path}: not written by `fleetfed keys sign --export`")
    assert isinstance(request, dict)
    return request


def _next(cls: type[tuf.S], request: dict[str, Any], path: Path) -> Metadata[tuf.S] | None:
    table = request["next"].get(cls.type)
    return None if table is None else _part(cls, table, path)


def _part(cls: type[tuf.S], table: Any, path: Path) -> Metadata[tuf.S]:
    try:
        return tuf.parse(cls, json.dumps(table).encode())
    except RemoteProtocolError as error:
        raise ConfigError(f"{path}: {error.detail}") from error
