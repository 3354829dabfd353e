"""Access control for a fleet's broker, from its inventory and the one topic definition.

Least privilege: a member writes what stands below its own id and reads what is said to it and to its whole site; the
node that serves a site reads its members, answers them and is the only one to publish the site's broadcasts; an
operator, and a helper, has its own branch at the cloud site. Nobody else sees anything.

A kind of which members are listed gets exact blocks, one per member. A kind without any gets ``pattern`` lines, which
hold for every certificate: then a device need not be listed before it connects, at the price that it may read the
broadcasts of every site on this broker (they are signed, and meant for many) and may speak under its own id at any of
them and as any such kind (its certificate, which receivers check, says which it is).

A site's broker may be *bridged* to the one above. Then its gateway speaks with its own broker alone, and may write and
read there what a member of the upper site does; the bridge, a client of the upper broker with an identity of its own,
has that gateway's rights there and no others.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fleetfed.broker.config import Bridge, BrokerConfig
from fleetfed.broker.mosquitto import render_config
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.wire.topics import (
    CLOUD_SITE,
    PREFIX,
    VERBS,
    Broadcast,
    Direction,
    Kind,
    SiteTopics,
    Verb,
    check_id,
)

_MEMBER_KINDS: Final = (Kind.DEVICE, Kind.GATEWAY)
_LISTED_KINDS: Final = (*_MEMBER_KINDS, Kind.HELPER)
"""There are never many helpers, so they get exact blocks always."""
_FILE_MODE: Final = 0o644
_KEYS: Final = frozenset({"fleet", "sites", "operators", "members", "bridges", "uplinks"})
_CARRIED: Final = (Broadcast.REVOKED, Broadcast.TRUST, Broadcast.MODEL, Broadcast.PLAN, Broadcast.NODE)
"""What a gateway hears from the site above; the status is for those who watch."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member belongs.

    Attributes:
        kind: device, gateway or helper.
        site: the site that serves it.
    """

    kind: Kind
    site: str


@dataclass(frozen=True, slots=True)
class Uplink:
    """Whom a bridge of this broker carries, and where to.

    Attributes:
        node: the gateway that serves a site of this broker.
        site: the site above, of which it is a member.
    """

    node: str
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
        bridges: ids of bridges that come from other brokers, to the gateway, a member here, that each acts for.
        uplinks: ids of this broker's own bridges, to what each carries.

    Raises:
        ConfigError: an id is not allowed, a member's site is not on this broker, or a bridge is for nobody on it.
    """

    fleet: str
    sites: Mapping[str, str]
    operators: tuple[str, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)
    denied: tuple[str, ...] = ()
    bridges: Mapping[str, str] = field(default_factory=dict)
    uplinks: Mapping[str, Uplink] = field(default_factory=dict)

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
            for name in (*self.bridges, *self.uplinks):
                check_id(name, "bridge")
            for uplink in self.uplinks.values():
                check_id(uplink.site, "site")
        except LocalProtocolError as error:
            raise ConfigError(str(error)) from error
        if not self.sites:
            raise ConfigError("the inventory has no site")
        if wanted := sorted(set(self.denied) & {*self.members, *self.operators, *self.sites.values(), *self.bridges}):
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
        self._check_bridges()

    def _check_bridges(self) -> None:
        for name, gateway in self.bridges.items():
            member = self.members.get(gateway)
            if member is None or member.kind is not Kind.GATEWAY:
                raise ConfigError(f"bridge {name}: {gateway} is no gateway and member of a site on this broker")
            if name in self.members or name in self.operators or name in self.sites.values():
                raise ConfigError(f"bridge {name}: it is a member, too; a bridge has an identity of its own")
        for name, uplink in self.uplinks.items():
            if uplink.node not in self.sites.values():
                raise ConfigError(f"bridge {name}: {uplink.node} serves no site of this broker")
            if uplink.site in self.sites:
                raise ConfigError(f"bridge {name}: site {uplink.site!r} is on this broker, so nothing leads there")


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
        [bridges]                                  # from other brokers: who acts for which member
        b-south = "g-south"
        [uplinks]                                  # of this broker: who carries which node to which site
        b-east = { node = "g-east", site = "_" }

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
    if unknown := table.keys() - _KEYS:
        raise ConfigError(f"unknown key {sorted(unknown)[0]}; known are {', '.join(sorted(_KEYS))}")
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
    bridges, uplinks = table.get("bridges", {}), table.get("uplinks", {})
    if not isinstance(bridges, dict) or not all(isinstance(gateway, str) for gateway in bridges.values()):
        raise ConfigError("bridges must be a table of id = gateway's id")
    if not isinstance(uplinks, dict):
        raise ConfigError('uplinks must be a table of id = { node = "…", site = "…" }')
    carried: dict[str, Uplink] = {}
    for name, what in uplinks.items():
        if not isinstance(what, dict) or what.keys() != {"node", "site"}:
            raise ConfigError(f'uplink {name}: give {{ node = "…", site = "…" }}')
        carried[name] = Uplink(str(what["node"]), str(what["site"]))
    return Inventory(
        fleet=fleet, sites=sites, operators=tuple(operators), members=placed, bridges=bridges, uplinks=carried
    )


def render_inventory(inventory: Inventory) -> str:
    """The text of an inventory file, as `load_inventory` reads it; who is denied is no part of it."""
    # A text is the same in TOML as in JSON.
    lines = [f"fleet = {json.dumps(inventory.fleet)}", f"operators = {json.dumps(list(inventory.operators))}", ""]
    lines += ["[sites]", *(f"{site} = {json.dumps(node)}" for site, node in sorted(inventory.sites.items())), ""]
    lines.append("[members]")
    for name, member in sorted(inventory.members.items()):
        lines.append(f"{name} = {{ kind = {json.dumps(str(member.kind))}, site = {json.dumps(member.site)} }}")
    if inventory.bridges:
        lines += ["", "[bridges]", *(f"{name} = {json.dumps(to)}" for name, to in sorted(inventory.bridges.items()))]
    if inventory.uplinks:
        lines += ["", "[uplinks]"]
    for name, uplink in sorted(inventory.uplinks.items()):
        lines.append(f"{name} = {{ node = {json.dumps(uplink.node)}, site = {json.dumps(uplink.site)} }}")
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
    for name, gateway in inventory.bridges.items():
        site = inventory.members[gateway].site
        users.setdefault(name, []).extend(_member_lines(inventory.fleet, site, Kind.GATEWAY, gateway))
    for uplink in inventory.uplinks.values():
        users[uplink.node].extend(_member_lines(inventory.fleet, uplink.site, Kind.GATEWAY, uplink.node))
    for name in inventory.denied:
        users[name] = [f"topic deny {PREFIX}/{inventory.fleet}/#"]
    blocks = [f"# Who may read and write what in fleet {inventory.fleet}; rendered, do not edit.\n"]
    blocks += ["\n".join((f"user {name}", *lines)) + "\n" for name, lines in sorted(users.items())]
    if patterns:
        blocks.append("\n".join(patterns) + "\n")
    return "\n".join(blocks)


def _member_lines(fleet: str, site: str, kind: Kind, name: str) -> list[str]:
    root = SiteTopics(fleet, site).root
    lines = [
        f"topic write {root}/{kind}/{name}/{Direction.UP}/+",
        f"topic read {root}/{kind}/{name}/{Direction.DOWN}/+",
        f"topic read {root}/b/#",
    ]
    if kind is Kind.GATEWAY:
        # It always listens to what its own broker says of a bridge, and a stricter broker than Mosquitto closes the
        # connection of who listens to what it may not read.
        lines.append(f"topic read {root}/{kind}/{name}/{Direction.UP}/{Verb.LINK}")
    return lines


def _link(fleet: str, uplink: Uplink) -> str:
    return SiteTopics(fleet, uplink.site).up(Kind.GATEWAY, uplink.node, Verb.LINK)


def render_bridge(inventory: Inventory, bridge: Bridge) -> str:
    """The part of Mosquitto's configuration that connects a site's broker to the one above.

    Carried are exactly the topics that the site's gateway says and hears as a member of the site above. Queues and the
    session outlive both brokers; what is lost all the same, the two ends say again once the bridge is back.

    Raises:
        ConfigError: the inventory has no bridge of this broker, or several.
    """
    if len(inventory.uplinks) != 1:
        raise ConfigError(
            f"[bridge] carries one site's gateway, and the inventory has {len(inventory.uplinks)} for this broker: "
            "give --site, and issue the bridge with `fleetfed keys issue NAME --role bridge --site SITE`"
        )
    ((name, uplink),) = inventory.uplinks.items()
    topics = SiteTopics(inventory.fleet, uplink.site)
    mine = [(verb, rule) for verb, rule in VERBS.items() if Kind.GATEWAY in rule.kinds]
    said = [topics.up(Kind.GATEWAY, uplink.node, verb) for verb, rule in mine if rule.direction is Direction.UP]
    heard = [topics.down(Kind.GATEWAY, uplink.node, verb) for verb, rule in mine if rule.direction is Direction.DOWN]
    heard += [topics.broadcast(what) for what in _CARRIED]
    link = _link(inventory.fleet, uplink)
    lines = [
        "",
        f"connection {name}",
        f"address {bridge.host}:{bridge.port}",
        f"bridge_cafile {bridge.tls.ca}",
        f"bridge_certfile {bridge.tls.cert}",
        f"bridge_keyfile {bridge.tls.key}",
        # With the private bit of this version the broker above leaves the retain flag on what it sends live.
        "bridge_protocol_version mqttv311",
        "try_private true",
        f"remote_clientid {name}",
        "cleansession false",
        "local_cleansession false",
        "start_type automatic",
        f"restart_timeout 1 {bridge.reconnect_cap}",
        f"keepalive_interval {bridge.keepalive}",
        # Here and, by the bridge's will, above: who waits for the gateway must learn that the way is broken.
        "notifications true",
        f"notification_topic {link}",
        "bridge_attempt_unsubscribe false",
        # The link itself is said to either broker by its own end: carried, an old word would arrive after a new one.
        *(f"topic {topic} out 1" for topic in said if topic != link),
        *(f"topic {topic} in 1" for topic in heard),
        f"topic {topics.root}/b/blob/# in 1",
    ]
    return "\n".join(lines) + "\n"


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
        ConfigError: the directory cannot be written, or there is nobody for ``[bridge]`` to carry.
    """
    if config.port == 0:
        raise ConfigError("give the broker a port: a rendered configuration cannot pick a free one")
    bridge = "" if config.bridge is None else render_bridge(inventory, config.bridge)
    acl, conf = directory / "acl", directory / "mosquitto.conf"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        acl.write_text(render_acl(inventory))
        acl.chmod(_FILE_MODE)
        text = render_config(config, version=version, acl_file=(at or directory.absolute()) / acl.name)
        conf.write_text(text + bridge)
        conf.chmod(_FILE_MODE)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error
    return [acl, conf]
