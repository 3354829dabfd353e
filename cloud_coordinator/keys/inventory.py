"""Who uses a broker, read from the register of keys."""

from __future__ import annotations

from collections.abc import Collection

from fleetfed.broker.render import Inventory, Member, Uplink
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import CLOUD_SITE, Kind


def inventory_of(keyring: Keyring, *, sites: Collection[str] | None = None, list_devices: bool = True) -> Inventory:
    """The members of a broker, less whoever was revoked.

    Args:
        keyring: the register.
        sites: those on this broker; None for all.
        list_devices: whether each device gets its own lines in the access list; without, any certified one may speak.

    Raises:
        ConfigError: a wanted site is served by nobody, or the cloud's by two coordinators.
    """
    live = [member for member in keyring.members if not member.revoked]
    gateways = {member.site: member for member in live if member.role is MemberRole.GATEWAY}
    nodes = {site: member.id for site, member in gateways.items()}
    coordinators = [member.id for member in live if member.role is MemberRole.COORDINATOR]
    if len(coordinators) > 1:
        raise ConfigError(f"{' and '.join(coordinators)} are both coordinators; revoke the one that is not in use")
    if coordinators:
        nodes[CLOUD_SITE] = coordinators[0]
    if sites is not None:
        if missing := sorted(set(sites) - nodes.keys()):
            raise ConfigError(f"site {missing[0]!r} is served by nobody; issue its gateway first")
        nodes = {site: node for site, node in nodes.items() if site in sites}
    members, bridges, uplinks = {}, {}, {}
    for member in live:
        if member.role is MemberRole.BRIDGE and member.site in gateways:
            gateway = gateways[member.site]
            if member.site in nodes and gateway.upstream not in nodes:
                uplinks[member.id] = Uplink(gateway.id, gateway.upstream)
            elif gateway.upstream in nodes and member.site not in nodes:
                bridges[member.id] = gateway.id
        if member.role is MemberRole.GATEWAY and member.upstream in nodes:
            members[member.id] = Member(Kind.GATEWAY, member.upstream)
        elif member.role is MemberRole.DEVICE and list_devices and member.site in nodes:
            members[member.id] = Member(Kind.DEVICE, member.site)
        elif member.role is MemberRole.HELPER and CLOUD_SITE in nodes:
            members[member.id] = Member(Kind.HELPER, CLOUD_SITE)
    return Inventory(
        fleet=keyring.fleet,
        sites=nodes,
        operators=tuple(m.id for m in live if m.role is MemberRole.OPERATOR) if CLOUD_SITE in nodes else (),
        members=members,
        bridges=bridges,
        uplinks=uplinks,
    )
