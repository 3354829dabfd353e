"""The client's side of TUF (The Update Framework, specification 1.0, section 5), without any I/O.

In this order, with one ``now`` for all of it:

1. *Root.* From the trusted version on each next one, exactly one higher, signed by a threshold of the old *and* of the
   new keys. Only when the chain has ended, the last one's expiry counts.
2. If a key of timestamp or snapshot went with it, what those two said before is forgotten: whoever had the key may have
   pushed their versions as high as they go ("fast-forward").
3. *Timestamp*: signed, not older than the one in force, not expired. The same version again is neither news nor wrong.
4. *Snapshot*: the bytes that the timestamp names; signed, not expired; no file that was listed is gone or older.
5. *Targets*, and the enrolment service's *devices*: what the snapshot names, byte for byte; signed, not expired.
6. *Files*: length, then hash; then they are parsed.

A failure leaves everything as it was, but for a newer root, which counts at once: it may have taken away a stolen key.
The broker is only a mirror. It can withhold, and then the timestamp expires, which `Verifier.check_plan` notices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.tuf import Metadata, Root, Snapshot, Targets, Timestamp, bad
from fleetfed.shared.trust.verifier import Authority, Trust
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.limits import KIB
from fleetfed.shared.wire.trust import MAX_BUNDLE, MAX_ROOT, Directory, TrustBundle

_MAX_DIRECTORY: Final = KIB
_Part = Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]


@dataclass(frozen=True, slots=True)
class _Current:
    """Timestamp and snapshot in force: what the next ones may not go below."""

    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]


class TrustSet:
    """What one member trusts.

    Args:
        root: the root that it was given when it was enrolled, or a later one that it kept.

    Attributes:
        root: the newest trusted root.
        bundle: the last bundle that was taken; empty for none.
        trust: what it says; None before the first. With ``expires`` 0 nothing says that it is current.

    Raises:
        RemoteProtocolError: `BAD_METADATA`: the root is damaged, or not signed by its own keys.
    """

    def __init__(self, root: bytes) -> None:
        self._root = _first_root(root)
        self.root = root
        self.bundle = b""
        self.trust: Trust | None = None
        self._current: _Current | None = None

    def load(self, data: bytes) -> None:
        """Take up a bundle that was kept, or that came with the identity, whether or not it has expired.

        Raises:
            RemoteProtocolError: it is not for the trusted root.
        """
        bundle = _decode(data)
        self._follow(bundle.roots)
        self._take_up(data, bundle)

    def update(self, data: bytes, *, now: int) -> bool:
        """Take a bundle that came in; return whether anything is news.

        Args:
            data: as received.
            now: unix milliseconds.

        Raises:
            RemoteProtocolError: `TOO_LARGE`, `MALFORMED`, `BAD_METADATA` or `STALE_TRUST`; only the root may have
                changed.
        """
        bundle = _decode(data)
        before = self._root.signed.version
        try:
            self._follow(bundle.roots)
            _check_expiry(self._root, "root", now)
            timestamp, old = self._timestamp(bundle), self._current
            same_root = self._root.signed.version == before
            if same_root and old is not None and timestamp.signed.version == old.timestamp.signed.version:
                return False
            current, trust = self._verify(timestamp, bundle, now)
        except RemoteProtocolError:
            if self._root.signed.version != before:
                self._reconsider()
            raise
        self._current, self.trust, self.bundle = current, trust, data
        return True

    # --- Root ---------------------------------------------------------------------------------------------------------

    def _follow(self, roots: tuple[bytes, ...]) -> None:
        """Follow the chain of roots as far as it goes; each step that holds counts."""
        for data in roots[self._root.signed.version :]:
            old, new = self._root, tuf.parse(Root, data)
            if new.signed.version != old.signed.version + 1:
                raise bad(f"root {new.signed.version} after root {old.signed.version}")
            tuf.verify(new, old.signed, Root.type)
            tuf.verify(new, new.signed, Root.type)
            for role in (Timestamp.type, Snapshot.type):
                if tuf.keys_of(old.signed, role).keys() - tuf.keys_of(new.signed, role).keys():
                    self._current = None
            self._root, self.root = new, data

    def _reconsider(self) -> None:
        """The root is newer than what is in force: keep of it what the new root still stands for."""
        if self.bundle:
            try:
                self._take_up(self.bundle, _decode(self.bundle))
                return
            except RemoteProtocolError:
                pass
        self._current = None
        if self.trust is not None:
            self.trust = self.trust.outdated()

    def _take_up(self, data: bytes, bundle: TrustBundle) -> None:
        try:
            self._current, self.trust = self._verify(self._timestamp(bundle), bundle, None)
        except RemoteProtocolError:
            # The coordinator has not signed yet, or its keys were rotated since; the owners' word still holds.
            targets = tuf.parse(Targets, bundle.targets)
            tuf.verify(targets, self._root.signed, Targets.type)
            self._current, self.trust = None, self._trust(bundle, targets, None, None)
        self.bundle = data

    # --- Everything else ----------------------------------------------------------------------------------------------

    def _timestamp(self, bundle: TrustBundle) -> Metadata[Timestamp]:
        """The timestamp, if it is signed and not older than the one in force."""
        old, timestamp = self._current, tuf.parse(Timestamp, bundle.timestamp)
        tuf.verify(timestamp, self._root.signed, Timestamp.type)
        if old is not None:
            _not_older("timestamp", timestamp.signed.version, old.timestamp.signed.version)
            named = timestamp.signed.snapshot_meta.version
            _not_older("timestamp's snapshot", named, old.timestamp.signed.snapshot_meta.version)
        return timestamp

    def _verify(self, timestamp: Metadata[Timestamp], bundle: TrustBundle, now: int | None) -> tuple[_Current, Trust]:
        """Whatever the timestamp leads to; without ``now`` nothing can have expired."""
        root, old = self._root.signed, self._current
        _check_expiry(timestamp, "timestamp", now)
        tuf.check_file(timestamp.signed.snapshot_meta, bundle.snapshot, "snapshot")
        snapshot = tuf.parse(Snapshot, bundle.snapshot)
        tuf.verify(snapshot, root, Snapshot.type)
        _same("snapshot", snapshot.signed.version, timestamp.signed.snapshot_meta.version)
        listed = snapshot.signed.meta
        if old is not None:
            for name, meta in old.snapshot.signed.meta.items():
                if name not in listed:
                    raise bad(f"snapshot {snapshot.signed.version} has lost {name}")
                _not_older(f"snapshot's {name}", listed[name].version, meta.version)
        _check_expiry(snapshot, "snapshot", now)

        targets = self._listed(snapshot, tuf.TARGETS_META, bundle.targets, root, Targets.type, now)
        devices = None
        if tuf.keys_of(targets.signed, tuf.DEVICES) and tuf.DEVICES_META in listed:
            devices = self._listed(snapshot, tuf.DEVICES_META, bundle.devices, targets.signed, tuf.DEVICES, now)
        current = _Current(timestamp, snapshot)
        return current, self._trust(bundle, targets, devices, current)

    def _listed(
        self,
        snapshot: Metadata[Snapshot],
        name: str,
        data: bytes,
        by: Root | Targets,
        role: str,
        now: int | None,
    ) -> Metadata[Targets]:
        """Metadata that the snapshot lists."""
        meta = snapshot.signed.meta.get(name)
        if meta is None:
            raise bad(f"the snapshot does not list {name}")
        tuf.check_file(meta, data, name)
        targets = tuf.parse(Targets, data)
        tuf.verify(targets, by, role)
        _same(name, targets.signed.version, meta.version)
        _check_expiry(targets, role, now)
        return targets

    def _trust(
        self,
        bundle: TrustBundle,
        targets: Metadata[Targets],
        devices: Metadata[Targets] | None,
        current: _Current | None,
    ) -> Trust:
        for path, target in targets.signed.targets.items():
            if path not in bundle.files:
                raise bad(f"{path} is missing")
            tuf.check_file(target, bundle.files[path], path)
        policy, authorities = _parse_files({path: bundle.files[path] for path in targets.signed.targets})
        parts: dict[str, _Part] = {
            Root.type: self._root,
            Targets.type: targets,
        }
        issued = 0
        if current is not None:
            parts |= {Snapshot.type: current.snapshot, Timestamp.type: current.timestamp}
            issued = _issued(current.timestamp)
        if devices is not None:
            parts[tuf.DEVICES] = devices
        expiries = {name: tuf.millis(part.signed.expires) for name, part in parts.items()}
        return Trust(
            policy=policy,
            authorities=authorities,
            coordinators=frozenset(tuf.keys_of(targets.signed, tuf.ROUNDS)),
            directory=_directory(devices, bundle) if devices is not None else None,
            versions={name: part.signed.version for name, part in parts.items()},
            expiries=expiries,
            expires=min(expiries.values()) if current is not None else 0,
            issued=issued,
        )


def _decode(data: bytes) -> TrustBundle:
    return codec.decode(TrustBundle, data, limit=MAX_BUNDLE)


def _first_root(data: bytes) -> Metadata[Root]:
    if len(data) > MAX_ROOT:
        raise RemoteProtocolError(RejectReason.TOO_LARGE, f"a root of {len(data)} bytes, limit {MAX_ROOT}")
    root = tuf.parse(Root, data)
    tuf.verify(root, root.signed, Root.type)
    return root


def _check_expiry(part: _Part, name: str, now: int | None) -> None:
    if now is not None and now >= tuf.millis(part.signed.expires):
        raise RemoteProtocolError(
            RejectReason.STALE_TRUST,
            f"{name} {part.signed.version} has expired on {part.signed.expires:%Y-%m-%d %H:%M}",
        )


def _not_older(what: str, version: int, before: int) -> None:
    if version < before:
        raise bad(f"{what}: version {version} after {before}")


def _same(what: str, version: int, named: int) -> None:
    if version != named:
        raise bad(f"{what}: version {version} where {named} is named")


def _issued(timestamp: Metadata[Timestamp]) -> int:
    """When the timestamp was signed; 0 where it does not say so sensibly."""
    at = timestamp.signed.unrecognized_fields.get(tuf.ISSUED, 0)
    return at if type(at) is int and 0 <= at <= tuf.millis(timestamp.signed.expires) else 0


def _parse_files(named: dict[str, bytes]) -> tuple[Policy, tuple[Authority, ...]]:
    try:
        texts = {path: data.decode() for path, data in named.items() if path in (files.POLICY, files.AUTHORITIES)}
        policy = files.parse_policy(texts[files.POLICY]) if files.POLICY in texts else Policy()
        authorities = files.parse_authorities(texts[files.AUTHORITIES]) if files.AUTHORITIES in texts else ()
    except (ConfigError, UnicodeDecodeError) as error:
        raise bad(str(error)) from error
    return policy, authorities


def _directory(devices: Metadata[Targets], bundle: TrustBundle) -> Directory:
    target, data = devices.signed.targets.get(files.DIRECTORY), bundle.files.get(files.DIRECTORY)
    if target is None or data is None:
        raise bad(f"{files.DIRECTORY} is missing")
    tuf.check_file(target, data, files.DIRECTORY)
    return codec.decode(Directory, data, limit=_MAX_DIRECTORY)
