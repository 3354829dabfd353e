"""Writes everything that a local fleet needs into one folder: keys, access list, settings, data.

::

    runs/demo/
      keys/                       the fleet's authority and every identity
      broker/                     access list, settings, state
      coordinator/ g-north/ d-01/ settings and state of each role
      operator.toml               for `fleetfed round`, `model` and `fleet`
      logs/                       one log per process
      prometheus.json             with --metrics: where Prometheus finds them
      report.json accuracy.png    what came out of it
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.render import render_acl
from fleetfed.cloud_coordinator.demo.topology import DevicePlace, GatewayPlace, Topology
from fleetfed.cloud_coordinator.keys.equip import make_trust
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.wire.masking import SEALED_BOX

FLEET: Final = "demo"
HOST: Final = "127.0.0.1"
BROKER: Final = "broker"
COORDINATOR: Final = "coordinator"
HELPER: Final = "helper"
OPERATOR: Final = "operator"
WATCHER: Final = "watcher"
"""A second operator: an identity serves one program at a time, and the first is left to the person."""

_MARK: Final = ".fleetfed-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a fleet is to do; every table is written as it is into the settings of the role that it is named for.

    Attributes:
        model: the .tflite, with its card beside it.
        validation: what the coordinator evaluates on; None for nothing.
        data: per device id, its ``[data]`` table.
        rounds: the coordinator's ``[rounds]``.
        tables: further tables of the coordinator's, such as ``clips``.
        gateway: further settings of every gateway.
        device: further settings of every device.
        listens: where who is to answer Prometheus, by id; the broker's is in its own file.
    """

    model: Path
    validation: Path | None
    data: Mapping[str, Mapping[str, Any]]
    rounds: Mapping[str, Any]
    tables: Mapping[str, Any] = field(default_factory=dict)
    gateway: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    listens: Mapping[str, str] = field(default_factory=dict)

    def monitoring(self, name: str) -> dict[str, Any]:
        """The ``[monitoring]`` of one process, in a table; empty where nobody is to look at it."""
        return {"monitoring": {"listen": self.listens[name]}} if name in self.listens else {}


class Folder:
    """The folder of one run, locked for as long as the run lasts.

    Raises:
        ConfigError: it holds something else, or another run is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: TextIO | None = None

    def prepare(self) -> None:
        """Make it, or empty it where an earlier run left its files."""
        mark = self.path / _MARK
        if self.path.exists() and not mark.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} holds something that is no earlier demo's; choose another --dir")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = mark.open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(f"another demo is running in {self.path}; stop it or choose another --dir") from None
        for entry in self.path.iterdir():
            if entry != mark:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def release(self) -> None:
        """Let another run have it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def keys(self) -> Path:
        """The key folder."""
        return self.path / "keys"

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.path / "logs"

    def role(self, name: str) -> Path:
        """The folder of one process."""
        return self.path / name

    def config(self, name: str) -> Path:
        """The settings of one process."""
        kind = {BROKER: "broker", COORDINATOR: "coordinator", HELPER: "helper"}.get(
            name, "gateway" if name.startswith("g-") else "device"
        )
        return self.role(name) / f"{kind}.toml"

    def status(self, name: str) -> dict[str, Any]:
        """What a process last wrote about itself; empty where it has not yet."""
        try:
            value = json.loads((self.role(name) / "state" / "status.json").read_bytes())
        except FileNotFoundError:
            return {}
        return value if isinstance(value, dict) else {}


def make_keys(folder: Folder, topology: Topology, *, now: int, helper: bool = False) -> Keyring:
    """Make the authority, all identities and the trust metadata of a fleet."""
    keyring = Keyring.create(folder.keys, FLEET, now=now)
    members = [
        NewMember(id=BROKER, role=MemberRole.BROKER, hosts=(HOST, "localhost")),
        NewMember(id=COORDINATOR, role=MemberRole.COORDINATOR),
        NewMember(id=OPERATOR, role=MemberRole.OPERATOR),
        NewMember(id=WATCHER, role=MemberRole.OPERATOR),
        *([NewMember(id=HELPER, role=MemberRole.HELPER)] if helper else []),
        *(
            NewMember(id=place.id, role=MemberRole.GATEWAY, site=place.site, upstream=place.upstream)
            for place in topology.gateways
        ),
        *(NewMember(id=place.id, role=MemberRole.DEVICE, site=place.site) for place in topology.devices),
    ]
    keyring.issue(members, now=now)
    make_trust(keyring, now=now)
    return keyring


def write_broker(folder: Folder, keyring: Keyring, *, port: int = 0, listen: str = "") -> BrokerConfig:
    """Write the access list and ``broker.toml``: TLS with client certificates, one list of exact rights per member.

    Args:
        folder: of the fleet.
        keyring: with the broker's identity.
        port: to listen on; 0 picks a free one.
        listen: where the embedded broker is to answer Prometheus; empty for nowhere.
    """
    from fleetfed.cloud_coordinator.cli.broker import broker_tls

    place = folder.role(BROKER)
    place.mkdir()
    acl = place / "acl"
    acl.write_text(render_acl(inventory_of(keyring)))
    tls = broker_tls(keyring.identity_folder(BROKER))
    config = BrokerConfig(host=HOST, port=port, tls=tls, acl_file=acl, persistence_dir=place / "state", sys_interval=0)
    table = {
        "host": HOST,
        "port": port,
        "acl_file": "acl",
        "persistence_dir": "state",
        "sys_interval": 0,
        "tls": {name: str(getattr(tls, name)) for name in ("ca", "cert", "key", "crl")},
        **({"monitoring": {"listen": listen}} if listen else {}),
    }
    (place / "broker.toml").write_text(toml(table))
    return config


def write_roles(
    folder: Folder,
    topology: Topology,
    settings: Settings,
    *,
    port: int,
    others: Sequence[str] = (),
    helper: bool = False,
) -> None:
    """Write the settings of coordinator, gateways, devices and operator, and of a helper if there is one."""
    where = {"host": HOST, "port": port, **({"others": list(others)} if others else {})}
    broker = {**where, "reconnect_cap": 2.0}
    identities = Path("..") / folder.keys.name / "identities"
    coordinator: dict[str, Any] = {
        "identity": str(identities / COORDINATOR),
        "state": "state",
        "autostart": True,
        "broker": broker,
        "model": {"file": str(settings.model.absolute())},
        "rounds": settings.rounds,
        **settings.monitoring(COORDINATOR),
        **settings.tables,
    }
    if settings.validation is not None:
        coordinator["validation"] = {"path": str(settings.validation.absolute())}
    _write(folder, COORDINATOR, coordinator)
    if helper:
        own = {"identity": str(identities / HELPER), "state": "state", "broker": broker, **settings.monitoring(HELPER)}
        _write(folder, HELPER, own | {"suite": settings.rounds.get("suite", SEALED_BOX)})
    for gateway in topology.gateways:
        _write(folder, gateway.id, _gateway(gateway, identities, broker, settings))
    for device in topology.devices:
        _write(folder, device.id, _device(device, identities, broker, settings))
    operator = {"identity": str(folder.keys / "identities" / OPERATOR), "broker": where}
    write_atomic(folder.path / "operator.toml", toml(operator).encode())


def _gateway(place: GatewayPlace, identities: Path, broker: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "identity": str(identities / place.id),
        "state": "state",
        "upstream": {"site": place.upstream},
        "broker": broker,
        **settings.monitoring(place.id),
        **settings.gateway,
    }


def _device(place: DevicePlace, identities: Path, broker: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "identity": str(identities / place.id),
        "state": "state",
        "broker": broker,
        "data": settings.data[place.id],
        **settings.device,
    }


def _write(folder: Folder, name: str, table: Mapping[str, Any]) -> None:
    path = folder.config(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml(table))
    (path.parent / "state").mkdir(exist_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a file that people may read, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def write_targets(folder: Folder, topology: Topology, listens: Mapping[str, str]) -> Path:
    """Write where Prometheus finds whom, as its ``file_sd_configs`` read it; return the file."""
    sites = {place.id: place.site for place in topology.gateways}
    roles = {BROKER: BROKER, COORDINATOR: COORDINATOR, HELPER: HELPER}
    path = folder.path / "prometheus.json"
    write_json(
        path,
        [
            {
                "targets": [listen],
                "labels": {"role": roles.get(name, "gateway"), **({"site": sites[name]} if name in sites else {})},
            }
            for name, listen in listens.items()
        ],
    )
    return path


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def user_if_root() -> str | None:
    """Our user's name where it is root's: Mosquitto would change to another, who cannot read the keys."""
    return pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None


def toml(table: Mapping[str, Any]) -> str:
    """Encode plain values as TOML; the standard library only reads it.

    >>> print(toml({"a": 1, "b": {"c": ["x", True], "d": {"e": 0.5}}}), end="")
    a = 1
    <BLANKLINE>
    [b]
    c = ["x", true]
    <BLANKLINE>
    [b.d]
    e = 0.5
    """
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"[{'.'.join(path)}]"] if path and (values or not table) else []
    lines += [f"{key} = {_value(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            if lines:
                lines.append("")
            lines += _lines(value, (*path, key))
    return lines


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str() | os.PathLike():
            # TOML's basic strings escape as JSON's do, but for DEL, and for what JSON writes as two surrogates.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{type(value).__name__} has no TOML form here")
