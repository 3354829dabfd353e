"""The coordinator's part of trust metadata: it signs what is current, and cannot change what the owners signed.

Timestamp and snapshot are renewed at half of their lives, by whoever holds their keys, which lie in the coordinator's
identity folder. Their versions follow the clock, so that a coordinator that lost its state goes on above what members
have seen. Everything that is made or handed in is verified as a member would before it is published.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fleetfed.cloud_coordinator.keys import authoring
from fleetfed.cloud_coordinator.keys.authoring import DAY
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.identity import TRUST_DIRECTORY, Identity
from fleetfed.shared.trust.keeper import TrustKeeper
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.tuf import Metadata, Root, Snapshot, Targets, Timestamp
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.trust import MAX_BUNDLE, TrustBundle

_P = TypeVar("_P", Metadata[Snapshot], Metadata[Timestamp])

TIMESTAMP_LIFE: Final = DAY
SNAPSHOT_LIFE: Final = 7 * DAY
_RETRY: Final = 600_000
"""Milliseconds until the next attempt where one failed, and between two looks at a clock that jumped."""


class OnlineTrust:
    """See the module.

    Args:
        state: the coordinator's state folder.
        identity: the coordinator's, with the pinned root.
        folder: its identity folder, where the keys of timestamp and snapshot are.
        verifier: the coordinator's own; gets what is in force.

    Raises:
        ConfigError: a key or the pinned root is damaged.
    """

    def __init__(self, state: Path, identity: Identity, folder: Path, verifier: Verifier) -> None:
        self.keeper = TrustKeeper(state / "trust.bin", identity, verifier)
        self._folder = folder / TRUST_DIRECTORY
        self._begin_with = identity.bundle
        self._parts = _decode(self.keeper.kept or identity.bundle)
        self._due = 0

    @property
    def bundle(self) -> bytes:
        """What is published."""
        return self.keeper.bundle

    def next_deadline(self) -> int:
        """When to call `renew`."""
        return self._due

    def start(self, *, now: int) -> bool:
        """Take up what the identity folder brings, which an operator may have replaced, and sign it.

        Raises:
            RemoteProtocolError: the owners' part is not good, or has expired.
            ConfigError: the keys that the root wants are not here.
        """
        offered, held = _decode(self._begin_with), self._parts
        news = _version(offered.targets) > _version(held.targets) or len(offered.roots) > len(held.roots)
        return self.offer(self._begin_with, now=now) if news else self.renew(now=now)

    def offer(self, data: bytes, *, now: int) -> bool:
        """Take what owners or the enrolment service have signed, sign it as current, and put it in force.

        Roots, targets and the service's word are each taken as far as they are newer: the enrolment service may know
        older targets than we, and the owners know nothing of its word.

        Args:
            data: a `TrustBundle`; its snapshot and timestamp are not looked at.
            now: unix milliseconds.

        Raises:
            RemoteProtocolError: it is not good, and why; nothing has changed.
            ConfigError: the keys that its root wants are not here.
        """
        new, old = _decode(data), self._parts
        if len(new.roots) < len(old.roots):
            new = replace(new, roots=old.roots)
        if new.roots[: len(old.roots)] != old.roots:
            raise tuf.bad("its roots are not those of this fleet")
        newer = bool(new.devices) and (not old.devices or _version(new.devices) >= _version(old.devices))
        if _version(new.targets) < _version(old.targets):
            if not newer:
                raise tuf.bad(f"targets {_version(new.targets)} after {_version(old.targets)}, which is in force")
            directory = {path: data for path, data in new.files.items() if path == files.DIRECTORY}
            new = replace(new, targets=old.targets, files={**old.files, **directory})
        if not newer:
            kept = {path: data for path, data in old.files.items() if path == files.DIRECTORY}
            new = replace(new, devices=old.devices, files={**new.files, **kept})
        return self._sign(new, now, fresh=True)

    def renew(self, *, now: int) -> bool:
        """Sign again what is in force where that is due; return whether anything is news.

        Raises:
            RemoteProtocolError: the owners' part has expired, so nothing can be called current.
            ConfigError: the keys that the root wants are not here.
        """
        return self._sign(self._parts, now, fresh=False)

    def status(self, now: int) -> dict[str, Any]:
        """See `TrustKeeper.status`."""
        return self.keeper.status(now)

    def _sign(self, parts: TrustBundle, now: int, *, fresh: bool) -> bool:
        self._due = now + _RETRY
        root = tuf.parse(Root, parts.roots[-1]).signed
        timestamp_key, snapshot_key = self._key(root, Timestamp.type), self._key(root, Snapshot.type)
        # What a key that is gone has signed says nothing, its version included.
        before = _signed_by(timestamp_key, self._timestamp())
        snapshot_before = _signed_by(snapshot_key, self._snapshot())
        if fresh or snapshot_before is None or _worn(snapshot_before, SNAPSHOT_LIFE, now):
            listed = {tuf.TARGETS_META: parts.targets}
            if parts.devices:
                listed[tuf.DEVICES_META] = parts.devices
            made = authoring.snapshot(_next(snapshot_before, now), now + SNAPSHOT_LIFE, listed)
            tuf.sign(made, snapshot_key)
            snapshot = made.to_bytes()
        elif before is None or _worn(before, TIMESTAMP_LIFE, now):
            snapshot = parts.snapshot
        else:
            self._due = tuf.millis(before.signed.expires) - TIMESTAMP_LIFE // 2
            return False
        stamp = authoring.timestamp(_next(before, now), now + TIMESTAMP_LIFE, snapshot, issued=now)
        tuf.sign(stamp, timestamp_key)
        signed = replace(parts, snapshot=snapshot, timestamp=stamp.to_bytes())
        data = codec.encode(signed)
        if len(data) > MAX_BUNDLE:
            raise tuf.bad(f"{len(data)} bytes are more than {MAX_BUNDLE}")
        self.keeper.take(data, now=now)
        self._parts = signed
        self._due = now + TIMESTAMP_LIFE // 2
        return True

    def _timestamp(self) -> Metadata[Timestamp] | None:
        return tuf.parse(Timestamp, self._parts.timestamp) if self._parts.timestamp else None

    def _snapshot(self) -> Metadata[Snapshot] | None:
        return tuf.parse(Snapshot, self._parts.snapshot) if self._parts.snapshot else None

    def _key(self, root: Root, role: str) -> SigningKey:
        wanted = tuf.keys_of(root, role)
        for path in sorted(self._folder.glob("*.key")):
            key = SigningKey.load(path)
            if key.id in wanted:
                return key
        raise ConfigError(
            f"{self._folder} has no key that the root names for {role}; "
            f"copy it there from the owners' keys/trust/online, as {role}.key"
        )


def _decode(data: bytes) -> TrustBundle:
    return codec.decode(TrustBundle, data, limit=MAX_BUNDLE)


def _version(targets: bytes) -> int:
    return tuf.parse(Targets, targets).signed.version


def _signed_by(key: SigningKey, part: _P | None) -> _P | None:
    return part if part is not None and key.id.hex() in part.signatures else None


def _worn(part: Metadata[Snapshot] | Metadata[Timestamp], life: int, now: int) -> bool:
    """Whether half of its life is over."""
    return tuf.millis(part.signed.expires) - now <= life // 2


def _next(before: Metadata[Snapshot] | Metadata[Timestamp] | None, now: int) -> int:
    return max(before.signed.version + 1 if before is not None else 1, now // 1000)
