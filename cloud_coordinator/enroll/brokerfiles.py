"""What brokers have to be told: authorities, TLS revocation lists, access list; and what the offline authority says.

``out/current`` is a link to a folder that never changes: all files are replaced by one rename, and no broker ever reads
an access list of yesterday beside a revocation list of today. A broker's configuration names ``out/current/acl``,
``out/current/ca.pem`` and ``out/current/crl.pem``.

``authority/`` holds what `fleetfed-enroll import` copied from the offline authority's key folder: nothing in it is
secret.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from fleetfed.broker.render import Inventory, Member, load_inventory, render_acl, render_inventory
from fleetfed.cloud_coordinator.enroll.config import BrokerFiles
from fleetfed.cloud_coordinator.enroll.enroller import Enroller
from fleetfed.cloud_coordinator.keys.equip import owners_of
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.cloud_coordinator.keys.pki import Listener, next_update
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import sync_directory, write_atomic
from fleetfed.shared.wire.topics import Kind

_log = logging.getLogger(__name__)

INVENTORY: Final = "inventory.toml"
BUNDLE: Final = "bundle-site.crt"
CRL: Final = "crl-site.pem"
REVOCATIONS: Final = "revocations.bin"
OWNERS: Final = "bundle.bin"
"""The owners' part of the trust metadata."""
CURRENT: Final = "current"
_WARN: Final = timedelta(days=14)
_PATIENCE: Final = 60
"""Seconds that the command of ``reload`` may take."""


def import_authority(keyring: Keyring, directory: Path) -> list[Path]:
    """Copy what the service may know of the key folder; return the files.

    Raises:
        ConfigError: the register has no coordinator or gateway yet.
    """
    tls = keyring.directory / "tls"
    files = {
        INVENTORY: render_inventory(inventory_of(keyring)).encode(),
        BUNDLE: (tls / f"bundle-{Listener.SITE}.crt").read_bytes(),
        CRL: keyring.crl_file().read_bytes(),
    }
    signed = keyring.revocations()
    if signed is not None:
        files[REVOCATIONS] = signed
    owners = owners_of(keyring)
    if owners is not None:
        files[OWNERS] = owners.bundle()
    for name, data in files.items():
        write_atomic(directory / name, data)
    return [directory / name for name in files]


def write_broker_files(enroller: Enroller, settings: BrokerFiles, authority: Path, *, now: int) -> Path:
    """Bring a broker's files up to date, all at once, and make it read them; return their folder.

    Raises:
        ConfigError: what was imported is missing or wrong, or the folder cannot be written.
    """
    try:
        bundle, crl = (authority / BUNDLE).read_bytes(), (authority / CRL).read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; run `fleetfed-enroll import --keys DIR`") from error
    _warn_of_age(authority / CRL, crl, now)
    inventory = _inventory(load_inventory(authority / INVENTORY), enroller, listed=settings.listed)
    files = {
        "ca.pem": bundle + enroller.tls_authority,
        "crl.pem": crl + enroller.crl(now=now),
        "acl": render_acl(inventory).encode(),
    }
    signed = enroller.revocations()
    if signed is not None:
        files[REVOCATIONS] = signed
    try:
        replace_all(settings.out, files)
    except OSError as error:
        raise ConfigError(f"{settings.out}: {error.strerror}") from error
    if settings.reload:
        _reload(settings.reload)
    return settings.out / CURRENT


def replace_all(out: Path, files: Mapping[str, bytes]) -> None:
    """Make ``out/current`` hold exactly these files, by one rename."""
    folder = out / f"v-{secrets.token_hex(8)}"
    for name, data in files.items():
        write_atomic(folder / name, data)
    link = out / f".{CURRENT}.{secrets.token_hex(4)}"
    link.symlink_to(folder.name)
    before = (out / CURRENT).resolve() if (out / CURRENT).is_symlink() else None
    os.replace(link, out / CURRENT)
    sync_directory(out)
    for old in out.glob("v-*"):
        # The last one stays: a broker may be reading it.
        if old not in (folder, before) and old.resolve() not in (folder.resolve(), before):
            shutil.rmtree(old)


def _inventory(base: Inventory, enroller: Enroller, *, listed: bool) -> Inventory:
    members = {name: member for name, member in base.members.items() if listed or member.kind is not Kind.DEVICE}
    denied = []
    for device, _ in enroller.devices():
        if device.id in {*base.members, *base.operators, *base.sites.values()}:
            raise ConfigError(f"{device.id} is enrolled here and a member of the offline authority; revoke one of them")
        if device.revoked:
            denied.append(device.id)
        elif listed and device.site in base.sites:
            members[device.id] = Member(Kind.DEVICE, device.site)
    return dataclasses.replace(base, members=members, denied=tuple(denied))


def _warn_of_age(path: Path, crl: bytes, now: int) -> None:
    try:
        until = next_update(crl)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; run `fleetfed-enroll import --keys DIR`") from error
    if until is not None and until - datetime.fromtimestamp(now / 1000, UTC) < _WARN:
        _log.warning("%s ends on %s, then brokers refuse everybody: run `fleetfed keys crl`, then import", path, until)


def _reload(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.error("the broker still has the old files: %s", error)
        return
    if done.returncode:
        _log.error("the broker may still have the old files: %s exits %d: %s", command[0], done.returncode, done.stderr)
