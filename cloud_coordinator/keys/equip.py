"""Keeps trust metadata in line with the register of keys, and puts it into identity folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fleetfed.cloud_coordinator.keys.keyring import Keyring, Member, MemberRole
from fleetfed.cloud_coordinator.keys.owners import Missing, Online, Owners
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import tuf
from fleetfed.shared.trust.identity import BUNDLE_FILE, ROOT_FILE, TRUST_DIRECTORY
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.tuf import Snapshot, Timestamp

OFFLINE_AUTHORITY = "authority"


def trust_folder(keyring: Keyring) -> Path:
    """Where the owners' part is."""
    return keyring.directory / "trust"


def owners_of(keyring: Keyring) -> Owners | None:
    """The owners' part of this fleet; None for a fleet that was made without."""
    return Owners(trust_folder(keyring)) if (trust_folder(keyring) / "roots").exists() else None


def online_of(keyring: Keyring) -> Online:
    """Who is listed, from the register."""
    coordinators = {each.id: each.public_key for each in keyring.online(MemberRole.COORDINATOR)}
    enrollers = {each.id: each.public_key for each in keyring.online(MemberRole.ENROLLER)}
    offline, *services = keyring.authorities()
    names = {public: name for name, public in enrollers.items()}
    authorities = {OFFLINE_AUTHORITY: offline} | {names[each.public_key]: each for each in services}
    return Online(coordinators=coordinators, enrollers=enrollers, authorities=authorities)


def make_trust(
    keyring: Keyring,
    *,
    now: int,
    policy: Policy | None = None,
    root: tuple[int, int] = (2, 3),
    targets: tuple[int, int] = (2, 3),
) -> Owners:
    """Make the owners' part for a new fleet, and put it into the identity folders that are there.

    Args:
        keyring: the fleet's.
        now: unix milliseconds.
        policy: the first one; its version becomes at least 1.
        root, targets: so many of so many keys sign.

    Raises:
        ConfigError: there is one already, or a threshold cannot be met.
    """
    first = policy or Policy(version=1)
    owners = Owners.create(trust_folder(keyring), online_of(keyring), now=now, policy=first, root=root, targets=targets)
    equip(keyring, owners, keyring.members)
    return owners


def follow(keyring: Keyring, members: Iterable[Member], *, now: int) -> list[Missing]:
    """After members were certified or revoked: list who is to be listed, and equip the new ones.

    Args:
        keyring: the fleet's.
        members: the new ones.
        now: unix milliseconds.

    Returns:
        signatures that are missing until whoever is online now is listed.
    """
    owners = owners_of(keyring)
    if owners is None:
        return []
    online, missing, new = online_of(keyring), [], list(members)
    if not owners.lists(online):
        owners.stage_targets(now=now, online=online)
        missing = owners.sign()
        if not missing:
            # Everybody else hears of it from the coordinator.
            new += [each for each in keyring.members if each.role is MemberRole.COORDINATOR and each not in new]
    equip(keyring, owners, new)
    return missing


def equip(keyring: Keyring, owners: Owners, members: Iterable[Member]) -> None:
    """Put root and bundle into identity folders, and the online keys into those of coordinators."""
    bundle = owners.bundle()
    for member in members:
        folder = keyring.identity_folder(member.id)
        if member.role.certified is None or not folder.exists() or member.revoked:
            continue
        trust = folder / TRUST_DIRECTORY
        write_atomic(trust / ROOT_FILE, owners.roots[-1])
        write_atomic(trust / BUNDLE_FILE, bundle)
        if member.role is MemberRole.COORDINATOR:
            wanted = {key for role in (Snapshot.type, Timestamp.type) for key in tuf.keys_of(owners.root.signed, role)}
            for path in owners.online_keys:
                if SigningKey.load(path).id in wanted:
                    write_atomic(trust / path.name, path.read_bytes(), mode=0o600)
