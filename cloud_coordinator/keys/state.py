"""Everything that can expire, as rows: what `fleetfed keys status` shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from fleetfed.cloud_coordinator.keys.authoring import DAY
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole
from fleetfed.cloud_coordinator.keys.owners import OFFLINE, Owners
from fleetfed.cloud_coordinator.keys.pki import Listener, next_update
from fleetfed.shared.errors import StorageError
from fleetfed.shared.trust import tuf
from fleetfed.shared.trust.keeper import WARN_BEFORE
from fleetfed.shared.trust.tuf import Root, Targets

_MEMBER_WARNING: Final = 60 * DAY
_CRL_WARNING: Final = 30 * DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One role, or one list that brokers need.

    Attributes:
        role: its name; ``crl-site`` and ``crl-cloud`` are the brokers' revocation lists.
        version: in force; 0 where it has none.
        keys: their names.
        signatures: how many of how many keys sign.
        expires: unix milliseconds.
        days: until then.
        warning: what to do soon; empty for nothing.
    """

    role: str
    version: int
    keys: tuple[str, ...]
    signatures: str
    expires: int
    days: float
    warning: str


def rows(owners: Owners, keyring: Keyring, live: dict[str, Any] | None, *, now: int) -> list[Row]:
    """All roles.

    Args:
        owners: the owners' part.
        keyring: the register of members.
        live: what the coordinator says; None if it was not asked.
        now: unix milliseconds.

    Raises:
        StorageError: a revocation list is missing or damaged.
    """
    found = []
    for cls, part in ((Root, owners.root), (Targets, owners.targets)):
        expires = tuf.millis(part.signed.expires)
        warning = f"fleetfed keys renew {cls.type}" if expires - now <= WARN_BEFORE[cls.type] else ""
        found.append(_row(owners, cls.type, part.signed.version, expires, now, warning))
    if live is not None:
        for role in (tuf.Snapshot.type, tuf.Timestamp.type, tuf.DEVICES):
            if role in live.get("expiries", {}):
                expires = live["expiries"][role]
                warning = "" if expires - now > WARN_BEFORE[role] else "is the coordinator running?"
                found.append(_row(owners, role, live["versions"][role], expires, now, warning))
        behind = [role for role in OFFLINE if live.get("versions", {}).get(role, 0) < _version(owners, role)]
        if behind:
            found = [_told(row, "fleetfed keys publish") if row.role in behind else row for row in found]
    for missing in owners.missing():
        needs = f"fleetfed keys sign: {missing.needs} more of {', '.join(missing.by)}"
        found = [_told(row, needs) if row.role == missing.role else row for row in found]
    for role, delegation in ((MemberRole.COORDINATOR, tuf.ROUNDS), (MemberRole.ENROLLER, tuf.DEVICES)):
        listed = tuf.keys_of(owners.targets.signed, delegation)
        for certificate in keyring.online(role):
            left = certificate.not_after - now
            warning = "issue another, then revoke this one" if left <= _MEMBER_WARNING else ""
            if certificate.key_id not in listed:
                warning = "not listed in targets: fleetfed keys sign"
            found.append(
                Row(
                    role=role.value,
                    version=0,
                    keys=(certificate.id,),
                    signatures="1 of 1",
                    expires=certificate.not_after,
                    days=left / DAY,
                    warning=warning,
                )
            )
    return [*found, *(_crl(keyring, listener, now) for listener in Listener)]


def _crl(keyring: Keyring, listener: Listener, now: int) -> Row:
    path = keyring.crl_file(listener)
    try:
        until = next_update(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: {error}; write it again with `fleetfed keys crl`") from error
    if until is None:
        raise StorageError(f"{path}: no list is in it; write it again with `fleetfed keys crl`")
    expires = round(until.timestamp() * 1000)
    warning = "fleetfed keys crl, then bring it to the brokers" if expires - now <= _CRL_WARNING else ""
    return Row(
        role=f"crl-{listener}",
        version=0,
        keys=(),
        signatures="-",
        expires=expires,
        days=(expires - now) / DAY,
        warning=warning,
    )


def _row(owners: Owners, role: str, version: int, expires: int, now: int, warning: str) -> Row:
    signer = owners.targets.signed if role == tuf.DEVICES else owners.root.signed
    keys = tuple(key.name for key in tuf.keys_of(signer, role).values())
    threshold = owners.root.signed.roles[role].threshold if role in owners.root.signed.roles else 1
    return Row(
        role=role,
        version=version,
        keys=keys,
        signatures=f"{threshold} of {len(keys)}",
        expires=expires,
        days=(expires - now) / DAY,
        warning=warning,
    )


def _version(owners: Owners, role: str) -> int:
    return owners.root.signed.version if role == Root.type else owners.targets.signed.version


def _told(row: Row, what: str) -> Row:
    return replace(row, warning=f"{row.warning}; {what}" if row.warning else what)
