"""The owners of a fleet and their coordinator, who sign trust metadata for real; tests turn them hostile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuf.api.metadata import DelegatedRole, Delegations

from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.tuf import Ed25519Key, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from fleetfed.shared.trust.tuf import Role as TufRole
from fleetfed.shared.trust.verifier import Authority
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.trust import Directory, TrustBundle

DAY = 86_400_000
NOW = 1_800_000_000_000


def key(name: str) -> SigningKey:
    """A key that is the same in every run."""
    return SigningKey.from_seed(name.encode().ljust(32))


def keys(role: str, *, generation: int = 1, count: int = 3) -> list[SigningKey]:
    """Keys of a role."""
    return [key(f"{role}-{generation}-{number}") for number in range(count)]


@dataclass
class Owners:
    """Everybody's keys and what they say now; change a field, then call `root_`, `targets_` or `bundle`."""

    now: int = NOW
    root_keys: list[SigningKey] = field(default_factory=lambda: keys("root"))
    targets_keys: list[SigningKey] = field(default_factory=lambda: keys("targets"))
    timestamp_key: SigningKey = field(default_factory=lambda: key("timestamp"))
    snapshot_key: SigningKey = field(default_factory=lambda: key("snapshot"))
    coordinators: list[bytes] = field(default_factory=lambda: [key("coordinator").public])
    enroller: SigningKey | None = None
    authority: SigningKey = field(default_factory=lambda: key("authority"))
    threshold: int = 2
    policy: Policy = field(default_factory=lambda: Policy(version=1))
    directory: Directory = field(default_factory=Directory)
    roots: list[bytes] = field(default_factory=list)
    versions: dict[str, int] = field(
        default_factory=lambda: {"targets": 1, "snapshot": 1, "timestamp": 1, "devices": 1}
    )
    days: dict[str, int] = field(
        default_factory=lambda: {"root": 365, "targets": 90, "snapshot": 7, "timestamp": 1, "devices": 7}
    )
    extra_meta: dict[str, int] = field(default_factory=dict)
    issued: Any = None
    _root_signers: list[SigningKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root_()

    def root_(self, *, version: int | None = None, signers: list[SigningKey] | None = None, keep: bool = True) -> bytes:
        """The next root, signed by the keys of the one before and its own."""
        roles = {
            "root": self.root_keys,
            "targets": self.targets_keys,
            "snapshot": [self.snapshot_key],
            "timestamp": [self.timestamp_key],
        }
        every = {each.id.hex(): each for group in roles.values() for each in group}
        root = Root(
            version=version or len(self.roots) + 1,
            expires=self._until("root"),
            keys={name: Ed25519Key.of(each.public, name[:4]) for name, each in every.items()},
            roles={
                name: TufRole([each.id.hex() for each in group], min(self.threshold, len(group)))
                for name, group in roles.items()
            },
            consistent_snapshot=False,
        )
        metadata = Metadata(root)
        for signer in signers if signers is not None else {*self._root_signers, *self.root_keys}:
            tuf.sign(metadata, signer)
        data = metadata.to_bytes()
        if keep:
            self.roots.append(data)
            self._root_signers = list(self.root_keys)
        return data

    def bundle(self, **changes: Any) -> bytes:
        """What the coordinator would publish now."""
        return codec.encode(self.parts(**changes))

    def parts(self, *, signers: dict[str, list[SigningKey]] | None = None, **changes: Any) -> TrustBundle:
        """The same, not encoded; ``signers`` stand in for the rightful ones."""
        by = signers or {}
        named = self.files()
        targets = self.targets(named, by.get("targets", self.targets_keys))
        devices = b"" if self.enroller is None else self.devices(by.get("devices", [self.enroller]))
        snapshot = self.snapshot(targets, devices, by.get("snapshot", [self.snapshot_key]))
        parts = {
            "roots": tuple(self.roots),
            "targets": targets,
            "devices": devices,
            "snapshot": snapshot,
            "timestamp": self.timestamp(snapshot, by.get("timestamp", [self.timestamp_key])),
            "files": named if self.enroller is None else {**named, files.DIRECTORY: codec.encode(self.directory)},
        }
        return TrustBundle(**{**parts, **changes})

    def files(self) -> dict[str, bytes]:
        """What targets names."""
        listed = {"authority": Authority(self.authority.public, frozenset(Role))}
        return {
            files.POLICY: files.render_policy(self.policy).encode(),
            files.AUTHORITIES: files.render_authorities(listed).encode(),
        }

    def targets(self, named: dict[str, bytes], signers: list[SigningKey]) -> bytes:
        """The owners' word."""
        groups = {tuf.ROUNDS: self.coordinators}
        if self.enroller is not None:
            groups[tuf.DEVICES] = [self.enroller.public]
        every = [Ed25519Key.of(public, "online") for group in groups.values() for public in group]
        targets = Targets(
            version=self.versions["targets"],
            expires=self._until("targets"),
            targets={path: TargetFile.from_data(path, data, ["sha256"]) for path, data in named.items()},
            delegations=Delegations(
                {each.keyid: each for each in every},
                {
                    name: DelegatedRole(
                        name, [Ed25519Key.of(p, "").keyid for p in group], 1, True, paths=[files.DIRECTORY]
                    )
                    for name, group in groups.items()
                },
            ),
        )
        return _signed(Metadata(targets), signers)

    def devices(self, signers: list[SigningKey]) -> bytes:
        """The enrolment service's word."""
        data = codec.encode(self.directory)
        targets = Targets(
            version=self.versions["devices"],
            expires=self._until("devices"),
            targets={files.DIRECTORY: TargetFile.from_data(files.DIRECTORY, data, ["sha256"])},
        )
        return _signed(Metadata(targets), signers)

    def snapshot(self, targets: bytes, devices: bytes, signers: list[SigningKey]) -> bytes:
        """What belongs together."""
        meta = {tuf.TARGETS_META: MetaFile.from_data(self.versions["targets"], targets, ["sha256"])}
        if devices:
            meta[tuf.DEVICES_META] = MetaFile.from_data(self.versions["devices"], devices, ["sha256"])
        meta |= {name: MetaFile(version) for name, version in self.extra_meta.items()}
        snapshot = Snapshot(version=self.versions["snapshot"], expires=self._until("snapshot"), meta=meta)
        return _signed(Metadata(snapshot), signers)

    def timestamp(self, snapshot: bytes, signers: list[SigningKey]) -> bytes:
        """What is current."""
        timestamp = Timestamp(
            version=self.versions["timestamp"],
            expires=self._until("timestamp"),
            snapshot_meta=MetaFile.from_data(self.versions["snapshot"], snapshot, ["sha256"]),
            unrecognized_fields={tuf.ISSUED: self.now if self.issued is None else self.issued},
        )
        return _signed(Metadata(timestamp), signers)

    def next(self, *names: str) -> None:
        """Count the versions of these up, and of what names them."""
        for name in {*names, "snapshot", "timestamp"}:
            self.versions[name] += 1

    def _until(self, name: str) -> Any:
        return tuf.moment(self.now + self.days[name] * DAY)


def _signed(metadata: Metadata[Any], signers: list[SigningKey]) -> bytes:
    tuf.sign(metadata, *signers)
    return metadata.to_bytes()
