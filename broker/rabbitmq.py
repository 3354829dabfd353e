"""A fleet's access list as RabbitMQ's definitions: users without passwords, and what each may do.

RabbitMQ's MQTT plugin publishes every topic through one exchange, ``amq.topic``, with ``/`` as ``.``, and keeps a
session in a queue that is named for the client id. Rights are regular expressions in two layers: on the names of
exchanges and queues, and on topics. The first binds the client id to the certificate's name, since nobody may touch
the queue of another's session; the second is the access list. What is not allowed ends the connection.

The two come in two files. RabbitMQ takes in the first layer before the second, may let clients in meanwhile, and grants
every topic to a user about whose topics it has been told nothing: so it is told about topics first, and a user can do
nothing before the second file.

A user must exist before it connects, so every member has to be listed: there is no "any certified device", and the
patterns for it are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

from fleetfed.broker.acl import Access, Acl, Rule, parse_acl
from fleetfed.broker.render import Inventory, render_acl
from fleetfed.shared.errors import ConfigError

EXCHANGE: Final = "amq.topic"
FOLDER: Final = "definitions"


def render_definitions(inventory: Inventory, *, vhost: str = "/") -> dict[str, str]:
    """Names and texts of the files for the setting ``load_definitions``, which takes in a folder's files by name.

    Raises:
        ConfigError: somebody is listed to be shut out.
    """
    acl = parse_acl(render_acl(inventory))
    users, permissions, topics = [], [], []
    for name, rules in sorted(_named(acl).items()):
        queue = rf"mqtt-subscription-{re.escape(name)}qos[01]"
        both = rf"^({queue}|{re.escape(EXCHANGE)})$"
        users.append({"name": name, "password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256"})
        users[-1]["tags"] = ""
        permissions.append({"user": name, "vhost": vhost, "configure": f"^{queue}$", "write": both, "read": both})
        topics.append(
            {
                "user": name,
                "vhost": vhost,
                "exchange": EXCHANGE,
                "write": _expression(rules, Access.WRITE),
                "read": _expression(rules, Access.READ),
            }
        )
    known: dict[str, Any] = {"users": users, "vhosts": [{"name": vhost}], "topic_permissions": topics}
    files = {"1-topics.json": known, "2-access.json": {"permissions": permissions}}
    return {name: json.dumps(tables, indent=1) + "\n" for name, tables in files.items()}


def _named(acl: Acl) -> dict[str, tuple[Rule, ...]]:
    named = {}
    for name, rules in acl.users.items():
        if name is None:
            raise ConfigError("RabbitMQ has no rules for clients without a name")
        named[name] = rules
    return named


def _expression(rules: Iterable[Rule], access: Access) -> str:
    """One regular expression for everything that ``rules`` grant."""
    if any(rule.access is Access.DENY for rule in rules):
        raise ConfigError("RabbitMQ has no rule that denies: who is shut out has no user at all")
    granted = [rule.topic_filter for rule in rules if rule.access & access and not rule.topic_filter.startswith("$SYS")]
    # An empty expression grants everything that it is asked for.
    return f"^({'|'.join(_translate(each) for each in dict.fromkeys(granted))})$" if granted else "^$"


def _translate(topic_filter: str) -> str:
    levels = topic_filter.split("/")
    rest = levels.pop() if levels[-1] == "#" else None
    # A subscription is checked as it is written, with `*` for `+`: a level may be that, and never `#`.
    text = r"\.".join("[^.#]+" if level == "+" else re.escape(level) for level in levels)
    return text if rest is None else rf"{text}(\..+)?"
