"""Access control for a fleet's broker, from its inventory and the one topic definition.

Least privilege: a member writes what stands below its own id and reads what is said to it and to its whole site; the
node that serves a site reads its members, answers them and is the only one to publish the site's broadcasts; an
operator, and a helper, has its own branch at the cloud site. Nobody else sees anything.

A kind of which members are listed gets exact blocks, one per member. A kind without any gets ``pattern`` lines, which
hold for every certificate: then a device need not be listed before it connects, at the price that it may read the
broadcasts of every site on this broker (they are signed, and meant for many) and may speak under its own id at any of
them and as any such kind (its certificate, which receivers check, says which it is).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.mosquitto import render_config
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.wire.topics import CLOUD_SITE, PREFIX, Direction, Kind, SiteTopics, check_id

_MEMBER_KINDS: Final = (Kind.DEVICE, Kind.GATEWAY)
_LISTED_KINDS: Final = (*_MEMBER_KINDS, Kind.HELPER)
"""There are never many helpers, so they get exact blocks always."""
_FILE_MODE: Final = 0o644


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member belongs.

    Attributes:
        kind: device, gateway or helper.
        site: the site that serves it.
    """

    kind: Kind
    site: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Who uses one broker.

    Attributes:
        fleet: the fleet's id.
        sites: every site on this broker, to the id of the node that serves it: a gateway's, or at ``_`` the
            coordinator's.
        operators: ids of those who may send commands; they need ``_`` on this broker.
        members: id to place, as far as known.
        denied: ids that are shut out of everything, whatever pattern would let them in.

    Raises:
        ConfigError: an id is not allowed, or a member's site is not on this broker.
    """

    fleet: str
    sites: Mapping[str, str]
    operators: tuple[str, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)
    denied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_id(self.fleet, "fleet")
            for site, node in self.sites.items():
                check_id(site, "site")
                check_id(node, f"node of site {site}")
            for operator in self.operators:
                check_id(operator, "operator")
            for name in (*self.members, *self.denied):
                check_id(name, "member")
        except LocalProtocolError as error:
            raise ConfigError(str(error)) from error
        if not self.sites:
            raise ConfigError("the inventory has no site")
        if wanted := sorted(set(self.denied) & {*self.members, *self.operators, *self.sites.values()}):
            raise ConfigError(f"{wanted[0]} is denied and a member at once")
        if self.operators and CLOUD_SITE not in self.sites:
            raise ConfigError(f"operators belong to site {CLOUD_SITE!r}, which is not on this broker")
        for name, member in self.members.items():
            if member.site not in self.sites:
                raise ConfigError(f"member {name}: site {member.site!r} is not on this broker")
            if member.kind not in _LISTED_KINDS:
                raise ConfigError(f"member {name}: kind {member.kind!r} is not d, g or h")
            if member.kind is Kind.HELPER and member.site != CLOUD_SITE:
                raise ConfigError(f"member {name}: a helper belongs to site {CLOUD_SITE!r}")


def load_inventory(path: Path) -> Inventory:
    """Read an inventory file.

    ::

        fleet = "demo"
        operators = ["o-alice"]
        [sites]
        _ = "c-main"
        north = "g-north"
        [members]
        g-north = { kind = "g", site = "_" }
        d-01 = { kind = "d", site = "north" }

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return _inventory(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _inventory(table: Mapping[str, Any]) -> Inventory:
    if unknown := table.keys() - {"fleet", "sites", "operators", "members"}:
        raise ConfigError(f"unknown key {sorted(unknown)[0]}; known are fleet, sites, operators, members")
    fleet, sites = table.get("fleet"), table.get("sites")
    operators, members = table.get("operators", []), table.get("members", {})
    if not isinstance(fleet, str):
        raise ConfigError("fleet must be a text")
    if not isinstance(sites, dict) or not all(isinstance(node, str) for node in sites.values()):
        raise ConfigError("sites must be a table of site = node id")
    if not isinstance(operators, list) or not all(isinstance(name, str) for name in operators):
        raise ConfigError("operators must be a list of ids")
    if not isinstance(members, dict):
        raise ConfigError('members must be a table of id = { kind = "d", site = "…" }')
    placed: dict[str, Member] = {}
    for name, place in members.items():
        if not isinstance(place, dict) or place.keys() != {"kind", "site"} or place["kind"] not in set(_LISTED_KINDS):
            raise ConfigError(f'member {name}: give {{ kind = "d", "g" or "h", site = "…" }}')
        placed[name] = Member(Kind(place["kind"]), str(place["site"]))
    return Inventory(fleet=fleet, sites=sites, operators=tuple(operators), members=placed)


def render_inventory(inventory: Inventory) -> str:
    """The text of an inventory file, as `load_inventory` reads it; who is denied is no part of it."""
    # A text is the same in TOML as in JSON.
    lines = [f"fleet = {json.dumps(inventory.fleet)}", f"operators = {json.dumps(list(inventory.operators))}", ""]
    lines += ["[sites]", *(f"{site} = {json.dumps(node)}" for site, node in sorted(inventory.sites.items())), ""]
    lines.append("[members]")
    for name, member in sorted(inventory.members.items()):
        lines.append(f"{name} = {{ kind = {json.dumps(str(member.kind))}, site = {json.dumps(member.site)} }}")
    return "\n".join((*lines, ""))


def render_acl(inventory: Inventory) -> str:
    """The ACL file's text, for Mosquitto and the embedded broker alike."""
    listed = {member.kind for member in inventory.members.values()}
    users: dict[str, list[str]] = {}
    patterns: list[str] = []
    for site, node in sorted(inventory.sites.items()):
        root = SiteTopics(inventory.fleet, site).root
        kinds = (*_LISTED_KINDS, Kind.OPERATOR) if site == CLOUD_SITE else _MEMBER_KINDS
        lines = users.setdefault(node, [])
        for kind in kinds:
            lines.append(f"topic read {root}/{kind}/+/{Direction.UP}/+")
            lines.append(f"topic write {root}/{kind}/+/{Direction.DOWN}/+")
        lines.append(f"topic readwrite {root}/b/#")
        open_kinds = [kind for kind in _MEMBER_KINDS if kind not in listed]
        for kind in open_kinds:
            patterns.append(f"pattern write {root}/{kind}/%u/{Direction.UP}/+")
            patterns.append(f"pattern read {root}/{kind}/%u/{Direction.DOWN}/+")
        if open_kinds:
            patterns.append(f"pattern read {root}/b/#")
    for node in set(inventory.sites.values()):
        users[node].append("topic read $SYS/broker/#")
    for name, member in inventory.members.items():
        users.setdefault(name, []).extend(_member_lines(inventory.fleet, member.site, member.kind, name))
    for name in inventory.operators:
        users.setdefault(name, []).extend(_member_lines(inventory.fleet, CLOUD_SITE, Kind.OPERATOR, name))
    for name in inventory.denied:
        users[name] = [f"topic deny {PREFIX}/{inventory.fleet}/#"]
    blocks = [f"# Who may read and write what in fleet {inventory.fleet}; rendered, do not edit.\n"]
    blocks += ["\n".join((f"user {name}", *lines)) + "\n" for name, lines in sorted(users.items())]
    if patterns:
        blocks.append("\n".join(patterns) + "\n")
    return "\n".join(blocks)


def _member_lines(fleet: str, site: str, kind: Kind, name: str) -> list[str]:
    root = SiteTopics(fleet, site).root
    return [
        f"topic write {root}/{kind}/{name}/{Direction.UP}/+",
        f"topic read {root}/{kind}/{name}/{Direction.DOWN}/+",
        f"topic read {root}/b/#",
    ]


def render(
    inventory: Inventory,
    config: BrokerConfig,
    directory: Path,
    *,
    version: tuple[int, ...] = (2, 0, 11),
    at: Path | None = None,
) -> list[Path]:
    """Write ``acl`` and ``mosquitto.conf`` into ``directory``.

    Args:
        inventory: who uses the broker.
        config: address, TLS files and limits; its ``acl_file`` is replaced by the one written here.
        directory: made if it is missing.
        version: the Mosquitto that will read the configuration (`fleetfed.broker.mosquitto.probe`).
        at: where the broker finds ``directory``, if that is elsewhere: on another machine, or in a container.

    Returns:
        the files written.

    Raises:
        ConfigError: the directory cannot be written.
    """
    if config.port == 0:
        raise ConfigError("give the broker a port: a rendered configuration cannot pick a free one")
    acl, conf = directory / "acl", directory / "mosquitto.conf"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        acl.write_text(render_acl(inventory))
        acl.chmod(_FILE_MODE)
        conf.write_text(render_config(config, version=version, acl_file=(at or directory.absolute()) / acl.name))
        conf.chmod(_FILE_MODE)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error
    return [acl, conf]
