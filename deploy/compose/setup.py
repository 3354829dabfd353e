"""Gives every container of docker-compose.yml its folder: settings, identity, access list, the demo's model and data.

Runs as the one-shot service ``keys``, at every ``up``: identities, passwords and data that are there are kept; settings
and access lists are written again, so that an edited file in ``deploy/compose`` is taken over. The volumes are mounted
below ``/fleet``, one per container, and each container sees its own as ``/etc/fleetfed``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

import numpy as np

from fleetfed.broker.config import Bridge, BrokerConfig
from fleetfed.broker.render import render
from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.keys.equip import follow, make_trust, owners_of
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.pki import Listener
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.wire.topics import CLOUD_SITE

FLEET = "demo"
SITES = ("north", "south")
DEVICES = 3
COMPOSE, ROOT = Path("/compose"), Path("/fleet")
SEEN_AT = Path("/etc/fleetfed")
"""Where a container finds what is its own folder here."""
FLEETFED, MOSQUITTO = 10001, 1883
OTHERS = {"db": 999, "grafana": 472, "keys": 0}
"""The images' accounts."""


def main() -> None:
    """Do what is left to do."""
    keyring = issue(int(time.time() * 1000))
    give(keyring, "coordinator", "coordinator", "coordinator.toml")
    give(keyring, "operator", "operator", "operator.toml")
    broker(keyring, "cloud-broker", CLOUD_SITE)
    for site in SITES:
        broker(keyring, f"{site}-broker", site)
        give(keyring, f"g-{site}", f"{site}-gateway", "gateway.toml")
        for number in range(1, DEVICES + 1):
            give(keyring, f"d-{site}-{number}", f"{site}-device-{number}", "device.toml")
    model_and_data()
    passwords()
    for folder in ROOT.iterdir():
        owner = OTHERS.get(folder.name, MOSQUITTO if "broker" in folder.name else FLEETFED)
        hand_over(folder, owner)


def issue(now: int) -> Keyring:
    """The fleet's keys; members that are missing are made."""
    folder = ROOT / "keys"
    new = not (folder / "fleet.toml").exists()
    keyring = Keyring.create(folder, FLEET, now=now) if new else Keyring.load(folder)
    wanted = [
        NewMember(id="coordinator", role=MemberRole.COORDINATOR),
        NewMember(id="operator", role=MemberRole.OPERATOR),
        NewMember(id="cloud-broker", role=MemberRole.BROKER, hosts=("cloud-broker",), listener=Listener.CLOUD),
    ]
    for site in SITES:
        hosts = ("broker", f"{site}-broker")
        wanted.append(NewMember(id=f"{site}-broker", role=MemberRole.BROKER, hosts=hosts))
        wanted.append(NewMember(id=f"g-{site}", role=MemberRole.GATEWAY, site=site))
        wanted.append(NewMember(id=f"b-{site}", role=MemberRole.BRIDGE, site=site))
        for number in range(1, DEVICES + 1):
            wanted.append(
                NewMember(id=f"d-{site}-{number}", role=MemberRole.DEVICE, site=site, owner=f"owner-{number}")
            )
    known = {member.id for member in keyring.members}
    members = keyring.issue([each for each in wanted if each.id not in known], now=now)
    if owners_of(keyring) is None:
        make_trust(keyring, now=now)
    else:
        follow(keyring, members, now=now)
    keyring.write_crl(now=now)
    print(f"{len(known)} identities were there, {len(members)} are new")
    return keyring


def give(keyring: Keyring, member: str, container: str, settings: str) -> None:
    """A container's identity, once, and its settings."""
    folder = ROOT / container
    if not (folder / "identity").exists():
        copy(keyring.identity_folder(member), folder / "identity")
    shutil.copy(COMPOSE / settings, folder / settings)


def broker(keyring: Keyring, container: str, site: str) -> None:
    """A broker's identity, access list and configuration; a site's is bridged to the cloud's."""
    folder, bridge = ROOT / container, None
    if site != CLOUD_SITE:
        if not (folder / "bridge").exists():
            copy(keyring.identity_folder(f"b-{site}"), folder / "bridge")
        own = SEEN_AT / "bridge" / "tls"
        files = TlsFiles(ca=own / "ca.pem", cert=own / "cert.pem", key=own / "key.pem")
        bridge = Bridge(host="cloud-broker", tls=files, keepalive=10, reconnect_cap=10)
    if not (folder / "identity").exists():
        copy(keyring.identity_folder(container), folder / "identity")
    listener = Listener.CLOUD if site == CLOUD_SITE else Listener.SITE
    shutil.copy(keyring.crl_file(listener), folder / "identity" / "tls" / "crl.pem")
    tls = SEEN_AT / "identity" / "tls"
    config = BrokerConfig(
        host="0.0.0.0",  # noqa: S104  # of the container: nothing is published outside of its networks
        port=8883,
        tls=TlsFiles(ca=tls / "ca.pem", cert=tls / "cert.pem", key=tls / "key.pem", crl=tls / "crl.pem"),
        persistence_dir=Path("/var/lib/fleetfed"),
        bridge=bridge,
    )
    render(inventory_of(keyring, sites=[site]), config, folder, at=SEEN_AT)


def model_and_data() -> None:
    """The first model, and 1797 handwritten digits: a fifth validates, the devices share the rest."""
    coordinator = ROOT / "coordinator"
    for name in ("digits.tflite", "digits.card"):
        shutil.copy(Path(zoo.__file__).with_name(name), coordinator / name)
    with np.load(COMPOSE / "digits.npz") as digits:
        x, y = digits["x"], digits["y"]
    order = np.random.default_rng(0).permutation(len(x))
    held, *parts = np.split(order, np.linspace(len(x) // 5, len(x), len(SITES) * DEVICES + 1).astype(int)[:-1])
    save(coordinator / "validation.npz", x[held], y[held])
    names = [f"{site}-device-{number}" for site in SITES for number in range(1, DEVICES + 1)]
    for name, part in zip(names, parts, strict=True):
        save(ROOT / name / "data.npz", x[part], y[part])


def save(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Write examples unless there are some."""
    if not path.exists():
        np.savez(path, x=x, y=y)


def passwords() -> None:
    """Grafana's password, and PostgreSQL's in the two forms that it and its client read."""
    for folder in ("db", "grafana"):
        path = ROOT / folder / "password"
        if not path.exists():
            path.write_text(secrets.token_urlsafe(32))
    known = (ROOT / "db" / "password").read_text()
    (ROOT / "coordinator" / "pgpass").write_text(f"postgres:5432:fleetfed:fleetfed:{known}\n")


def copy(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all."""
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)


def hand_over(folder: Path, owner: int) -> None:
    """Give a folder to its container's account alone."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner, owner)
        path.chmod(0o700 if path.is_dir() else 0o600)


if __name__ == "__main__":
    main()
