"""The owners' part of trust metadata, as a folder: what is in force, what waits for signatures, and the keys at hand.

::

    keys/trust/
      offline/root-1.key … targets-1.key …      one per person: move each to where it is kept, and leave none here
      online/timestamp.key  snapshot.key        for the coordinator's identity folder
      roots/1.json 2.json …                     every root, in order
      targets.json  policy.toml  authorities.toml      in force
      staged/…                                  the next ones, as far as they are signed

Whatever is to change is staged, signed with the keys at hand, and put in force once both thresholds are met. Keys that
are elsewhere sign what `fleetfed.cloud_coordinator.keys.signing` carries to them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from fleetfed.cloud_coordinator.keys import authoring
from fleetfed.cloud_coordinator.keys.authoring import DAY, Signers
from fleetfed.shared.errors import ConfigError, RemoteProtocolError, StorageError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.tuf import Ed25519Key, Metadata, Root, Snapshot, Targets, Timestamp
from fleetfed.shared.trust.verifier import Authority
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.trust import TrustBundle

ROLES: Final = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
OFFLINE: Final = (Root.type, Targets.type)
ROOT_DAYS: Final = 365
TARGETS_DAYS: Final = 90
_NAMED: Final = (files.POLICY, files.AUTHORITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """Who is listed as what: names and public keys."""

    coordinators: Mapping[str, bytes]
    enrollers: Mapping[str, bytes]
    authorities: Mapping[str, Authority]


@dataclass(frozen=True, slots=True)
class Missing:
    """Signatures that something staged still lacks.

    Attributes:
        role: what is staged.
        needs: how many more.
        by: names of the keys that may give them.
    """

    role: str
    needs: int
    by: tuple[str, ...]


class Owners:
    """See the module; `create` makes the folder, the constructor opens it.

    Raises:
        ConfigError: there is none.
        StorageError: it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open()

    def _open(self) -> None:
        directory = self.directory
        numbers = sorted(int(path.stem) for path in (directory / "roots").glob("*.json") if path.stem.isdigit())
        if not numbers:
            raise ConfigError(f"{directory} holds no trust metadata; `fleetfed keys init` makes it with a new fleet")
        if numbers != list(range(1, len(numbers) + 1)):
            raise StorageError(f"{directory}/roots: {numbers}: a version is missing; restore it from a backup")
        self.roots = tuple((directory / "roots" / f"{number}.json").read_bytes() for number in numbers)
        self.root = _parsed(Root, self.roots[-1], directory)
        self.targets = _parsed(Targets, self._read("targets.json"), directory)

    @classmethod
    def create(
        cls,
        directory: Path,
        online: Online,
        *,
        now: int,
        policy: Policy,
        root: tuple[int, int] = (2, 3),
        targets: tuple[int, int] = (2, 3),
        targets_days: int = TARGETS_DAYS,
    ) -> Self:
        """Make keys and first metadata.

        Args:
            directory: must hold none yet.
            online: who is listed.
            now: unix milliseconds.
            policy: the first one.
            root, targets: so many of so many keys sign.
            targets_days: validity of the targets.

        Raises:
            ConfigError: there is metadata already, or a threshold that cannot be met.
        """
        if (directory / "roots").exists():
            raise ConfigError(f"{directory} holds trust metadata already; it is never overwritten")
        for role, (threshold, count) in zip(OFFLINE, (root, targets), strict=True):
            if not 1 <= threshold <= count:
                raise ConfigError(f"{role}: {threshold} of {count} keys cannot sign")
        made = {
            role: [cls._new_key(directory, "offline", f"{role}-{number}") for number in range(1, count + 1)]
            for role, (_, count) in zip(OFFLINE, (root, targets), strict=True)
        }
        made |= {role: [cls._new_key(directory, "online", role)] for role in (Snapshot.type, Timestamp.type)}
        thresholds = {Root.type: root[0], Targets.type: targets[0]}
        signers = {role: Signers(keys=made[role], threshold=thresholds.get(role, 1)) for role in ROLES}
        first = authoring.root(1, now + ROOT_DAYS * DAY, signers)
        tuf.sign(first, *_keys_in(directory).values())
        named = _files(policy, online.authorities)
        word = authoring.targets(
            1,
            now + targets_days * DAY,
            named,
            rounds=_public(online.coordinators),
            devices=_public(online.enrollers),
        )
        wanted = {key.id for key in made[Targets.type]}
        tuf.sign(word, *(key for key in _keys_in(directory).values() if key.id in wanted))
        for path, data in named.items():
            write_atomic(directory / path, data)
        write_atomic(directory / "targets.json", word.to_bytes())
        # Last, because opening begins with it.
        write_atomic(directory / "roots" / "1.json", _only(first, made[Root.type]).to_bytes())
        return cls(directory)

    # --- What is in force ---------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return files.parse_policy(self._read(files.POLICY).decode(), where=str(self.directory / files.POLICY))

    @property
    def online_keys(self) -> list[Path]:
        """The key files for the coordinator."""
        return sorted((self.directory / "online").glob("*.key"))

    @property
    def offline_keys(self) -> list[Path]:
        """Key files that have not been moved away."""
        return sorted((self.directory / "offline").glob("*.key"))

    def bundle(self) -> bytes:
        """The owners' part of a bundle; the coordinator signs the rest."""
        named = {path: self._read(path) for path in self.targets.signed.targets}
        return codec.encode(TrustBundle(roots=self.roots, targets=self._read("targets.json"), files=named))

    # --- What is to change --------------------------------------------------------------------------------------------

    def stage_targets(
        self,
        *,
        now: int,
        policy: Policy | None = None,
        online: Online | None = None,
        days: int = TARGETS_DAYS,
    ) -> None:
        """Stage the next targets: what is given, and for the rest what is staged or in force.

        Args:
            now: unix milliseconds.
            policy: gets the next version number.
            online: who is listed.
            days: validity.
        """
        before = self.staged(Targets) or self.targets
        named = {path: self._staged_or(path) for path in _NAMED}
        if policy is not None:
            policy = replace(policy, version=self.policy.version + 1)
            named[files.POLICY] = files.render_policy(policy).encode()
        if online is not None:
            named[files.AUTHORITIES] = files.render_authorities(dict(online.authorities)).encode()
            rounds, devices = _public(online.coordinators), _public(online.enrollers)
        else:
            rounds = list(tuf.keys_of(before.signed, tuf.ROUNDS).values())
            devices = list(tuf.keys_of(before.signed, tuf.DEVICES).values())
        version = self.targets.signed.version + 1
        word = authoring.targets(version, now + days * DAY, named, rounds=rounds, devices=devices)
        for path, data in named.items():
            write_atomic(self.directory / "staged" / path, data)
        write_atomic(self.directory / "staged" / "targets.json", word.to_bytes())

    def lists(self, online: Online) -> bool:
        """Whether what is staged, or else in force, lists exactly these."""
        word = self.staged(Targets) or self.targets
        ids = [{key.keyid for key in _public(each)} for each in (online.coordinators, online.enrollers)]
        listed = [{key.keyid for key in tuf.keys_of(word.signed, role).values()} for role in (tuf.ROUNDS, tuf.DEVICES)]
        same = self._staged_or(files.AUTHORITIES) == files.render_authorities(dict(online.authorities)).encode()
        return ids == listed and same

    def stage_root(self, *, now: int, rotate: str = "", remove: Sequence[str] = (), days: int = ROOT_DAYS) -> list[str]:
        """Stage the next root; return the names of new keys.

        Args:
            now: unix milliseconds.
            rotate: a role whose keys are replaced; empty to renew the root alone.
            remove: names of the keys to replace; empty for all of the role.
            days: validity.

        Raises:
            ConfigError: no such role or key.
        """
        before = (self.staged(Root) or self.root).signed
        roles, made = {}, []
        for role in ROLES:
            held = list(tuf.keys_of(before, role).values())
            if role == rotate:
                gone = [key for key in held if not remove or key.name in remove]
                if unknown := sorted(set(remove) - {key.name for key in held}):
                    raise ConfigError(f"{role} has no key {unknown[0]!r}; it has {', '.join(k.name for k in held)}")
                new = [self._renamed(key, before.version + 1) for key in gone]
                made += [key.name for key in new]
                held = [key for key in held if key not in gone] + new
            roles[role] = Signers(keys=held, threshold=before.roles[role].threshold)
        if rotate and rotate not in ROLES:
            raise ConfigError(f"{rotate!r} is none of: {', '.join(ROLES)}")
        version = self.root.signed.version + 1
        write_atomic(
            self.directory / "staged" / "root.json", authoring.root(version, now + days * DAY, roles).to_bytes()
        )
        return made

    def staged(self, cls: type[tuf.S]) -> Metadata[tuf.S] | None:
        """What is staged; None for nothing."""
        path = self.directory / "staged" / f"{cls.type}.json"
        return _parsed(cls, path.read_bytes(), self.directory) if path.exists() else None

    def discard(self) -> None:
        """Forget what is staged."""
        shutil.rmtree(self.directory / "staged", ignore_errors=True)

    def sign(self, keys: Sequence[SigningKey] = ()) -> list[Missing]:
        """Sign what is staged with ``keys`` and those in the folder, and put in force what is complete.

        Returns:
            what is still missing.
        """
        at_hand = {key.id: key for key in (*_keys_in(self.directory).values(), *keys)}
        root, word = self.staged(Root), self.staged(Targets)
        if root is not None:
            _sign_rightful(root, (self.root.signed, root.signed), Root.type, list(at_hand.values()))
            write_atomic(self.directory / "staged" / "root.json", root.to_bytes())
        if word is not None:
            by = root.signed if root is not None else self.root.signed
            _sign_rightful(word, (by,), Targets.type, list(at_hand.values()))
            write_atomic(self.directory / "staged" / "targets.json", word.to_bytes())
        missing = self.missing()
        if not missing:
            self._put_in_force()
        return missing

    def missing(self) -> list[Missing]:
        """What staged metadata still lacks."""
        root, word = self.staged(Root), self.staged(Targets)
        found: list[Missing | None] = []
        if root is not None:
            found += [_missing(root, by, Root.type) for by in (self.root.signed, root.signed)]
        if word is not None:
            found.append(_missing(word, root.signed if root is not None else self.root.signed, Targets.type))
        elif root is not None:
            # A root that takes keys away from targets makes those in force void unless others signed them too.
            found.append(_missing(self.targets, root.signed, Targets.type))
        return list(dict.fromkeys(each for each in found if each is not None))

    def _put_in_force(self) -> None:
        root, word = self.staged(Root), self.staged(Targets)
        # Targets first, then the root: whoever opens the folder in between finds targets that both roots stand for, or
        # is told to sign again. What is named comes before what names it.
        if word is not None:
            for path in _NAMED:
                write_atomic(self.directory / path, (self.directory / "staged" / path).read_bytes())
            write_atomic(self.directory / "targets.json", word.to_bytes())
        if root is not None:
            write_atomic(self.directory / "roots" / f"{root.signed.version}.json", root.to_bytes())
        self.discard()
        self._open()

    # --- Small things -------------------------------------------------------------------------------------------------

    @staticmethod
    def _new_key(directory: Path, place: str, name: str) -> Ed25519Key:
        key = SigningKey.generate()
        key.save(directory / place / f"{name}.key")
        return Ed25519Key.of(key.public, name)

    def _renamed(self, key: Ed25519Key, version: int) -> Ed25519Key:
        base = key.name.split(".")[0]
        place = "online" if base in (Snapshot.type, Timestamp.type) else "offline"
        # The old file stays until somebody moves it: the old key has to sign once more.
        return self._new_key(self.directory, place, f"{base}.{version}")

    def _staged_or(self, path: str) -> bytes:
        staged = self.directory / "staged" / path
        return staged.read_bytes() if staged.exists() else self._read(path)

    def _read(self, path: str) -> bytes:
        try:
            return (self.directory / path).read_bytes()
        except OSError as error:
            raise StorageError(f"{self.directory / path}: {error.strerror}; restore it from a backup") from error


def _parsed(cls: type[tuf.S], data: bytes, directory: Path) -> Metadata[tuf.S]:
    try:
        return tuf.parse(cls, data)
    except RemoteProtocolError as error:
        raise StorageError(f"{directory}: {error}; restore it from a backup") from error


def _public(named: Mapping[str, bytes]) -> list[Ed25519Key]:
    return [Ed25519Key.of(public, name) for name, public in named.items()]


def _files(policy: Policy, authorities: Mapping[str, Authority]) -> dict[str, bytes]:
    return {
        files.POLICY: files.render_policy(policy).encode(),
        files.AUTHORITIES: files.render_authorities(dict(authorities)).encode(),
    }


def _keys_in(directory: Path) -> dict[str, SigningKey]:
    return {path.stem: SigningKey.load(path) for path in sorted((directory / "offline").glob("*.key"))}


def _only(metadata: Metadata[Root], keys: Sequence[Ed25519Key]) -> Metadata[Root]:
    wanted = {key.keyid for key in keys}
    metadata.signatures = {name: each for name, each in metadata.signatures.items() if name in wanted}
    return metadata


def _sign_rightful(metadata: Metadata[tuf.S], by: Sequence[Root], role: str, keys: Sequence[SigningKey]) -> None:
    rightful = {key for root in by for key in tuf.keys_of(root, role)}
    tuf.sign(metadata, *(key for key in keys if key.id in rightful))


def _missing(metadata: Metadata[tuf.S], by: Root, role: str) -> Missing | None:
    result = by.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if result:
        return None
    names = tuple(str(key.unrecognized_fields.get(tuf.NAME, name)) for name, key in result.unsigned.items())
    return Missing(role, result.missing, names)
