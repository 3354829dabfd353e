"""A fleet's access list as NATS users: whoever shows a certificate with a known subject, and what it may do.

NATS maps ``/`` to ``.``, ``+`` to ``*`` and ``#`` to ``>``, and takes the subject of the client's certificate as its
name (``verify_and_map``). It hands out messages of quality 1 under names below ``$MQTT.sub``, to which every client
needs the right. An MQTT client cannot listen there of its own accord, and nobody here may speak anything else.

A user must be in the file before it connects, so every member has to be listed: there is no "any certified device", and
the patterns for it are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from fleetfed.broker.acl import Access, Rule, parse_acl
from fleetfed.broker.render import Inventory, render_acl
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import CLOUD_SITE, Kind

_DELIVERY: Final = "$MQTT.sub.>"
_ROLES: Final = {Kind.DEVICE: "device", Kind.GATEWAY: "gateway", Kind.HELPER: "helper"}


def render_users(inventory: Inventory) -> str:
    """The text of ``users.conf``, for ``authorization { include users.conf }``.

    Raises:
        ConfigError: somebody is listed to be shut out.
    """
    acl, subjects = parse_acl(render_acl(inventory)), _subjects_of_certificates(inventory)
    lines = ["# Who may read and write what; rendered, do not edit.", "users = ["]
    for name, rules in sorted((str(name), rules) for name, rules in acl.users.items() if name is not None):
        if any(rule.access is Access.DENY for rule in rules):
            raise ConfigError("who is shut out has no user at all: the access list must not deny")
        publish, subscribe = _subjects(rules, Access.WRITE), _subjects(rules, Access.READ)
        lines += [
            f'  {{ user = {json.dumps(subjects[name])}, allowed_connection_types = ["MQTT"], permissions = {{',
            f"    publish = {json.dumps(publish)},",
            f"    subscribe = {json.dumps([*subscribe, _DELIVERY])} }} }}",
        ]
    return "\n".join((*lines, "]", ""))


def _subjects_of_certificates(inventory: Inventory) -> dict[str, str]:
    """Everybody's name as NATS knows it: the subject of the certificate (RFC 2253), in which the role stands, too."""
    roles = {name: _ROLES[member.kind] for name, member in inventory.members.items()}
    for site, node in inventory.sites.items():
        roles[node] = "coordinator" if site == CLOUD_SITE else "gateway"
    roles |= dict.fromkeys(inventory.operators, "operator") | dict.fromkeys(inventory.bridges, "bridge")
    return {name: f"CN={name},OU={role},O={inventory.fleet}" for name, role in roles.items()}


def _subjects(rules: Iterable[Rule], access: Access) -> list[str]:
    granted = [rule.topic_filter for rule in rules if rule.access & access and not rule.topic_filter.startswith("$SYS")]
    subjects = []
    for each in dict.fromkeys(granted):
        subject = each.replace("/", ".").replace("+", "*")
        if subject.endswith(".#"):
            # In MQTT `a/#` is also `a` itself.
            subjects.append(subject.removesuffix(".#"))
            subject = subject[:-1] + ">"
        subjects.append(subject)
    return subjects
