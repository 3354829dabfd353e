"""Access control in the format of Mosquitto's ``acl_file``, decided as Mosquitto decides.

::

    topic read $SYS/broker/#             before any user line: for clients without a user name
    user g-north                         the lines below are this user's
    topic readwrite ff1/demo/north/b/#   read, write, readwrite (the default) or deny
    pattern write ff1/demo/+/d/%u/up/+   for every user; %u is the user name, %c the client id

The order of lines decides nothing, except that ``deny`` lines are looked at first: a user's own lines come before
the patterns, and the first line that matches *and grants* ends the search. What no line grants is refused. A
subscription itself is always granted; what it may not see is left out when messages are delivered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Final

from fleetfed.broker.topictree import topic_matches
from fleetfed.shared.errors import ConfigError


class Access(IntFlag):
    """What a line grants; ``DENY`` is no grant at all."""

    DENY = 0
    READ = 1
    WRITE = 2
    READWRITE = 3


_WORDS: Final[dict[str, Access]] = {
    "read": Access.READ,
    "write": Access.WRITE,
    "readwrite": Access.READWRITE,
    "deny": Access.DENY,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One line: what it grants on which topic filter."""

    access: Access
    topic_filter: str


@dataclass(frozen=True, slots=True)
class Acl:
    """Parsed rules.

    Attributes:
        users: a user's own rules, denials first; the key ``None`` is for clients without a user name.
        patterns: rules for everyone, denials first.
    """

    users: Mapping[str | None, tuple[Rule, ...]] = field(default_factory=dict)
    patterns: tuple[Rule, ...] = ()

    def allows(self, access: Access, topic: str, *, username: str | None, client_id: str) -> bool:
        """Decide whether a client may read (be delivered) or write (publish) ``topic``."""
        if access is Access.WRITE and topic.startswith("$SYS"):
            return False
        for rule in self.users.get(username, ()):
            if topic_matches(rule.topic_filter, topic):
                if rule.access is Access.DENY:
                    return False
                if rule.access & access:
                    return True
        # A wildcard in a name would widen every pattern that it is put into.
        if any(mark in name for name in (username or "", client_id) for mark in "+#"):
            return False
        for rule in self.patterns:
            if "%u" in rule.topic_filter and username is None:
                continue
            expanded = _expand(rule.topic_filter, username or "", client_id)
            if topic_matches(expanded, topic):
                if rule.access is Access.DENY:
                    return False
                if rule.access & access:
                    return True
        return False


def _expand(pattern: str, username: str, client_id: str) -> str:
    if "%" not in pattern:
        return pattern
    # One pass, so that a client called "%u" is not expanded again.
    pieces = pattern.replace("%c", "\0c").replace("%u", "\0u").split("\0")
    return pieces[0] + "".join((client_id if piece[0] == "c" else username) + piece[1:] for piece in pieces[1:])


def parse_acl(text: str, name: str = "acl") -> Acl:
    """Parse an ACL file's text.

    Args:
        text: the file's content.
        name: how to call the file in an error.

    Raises:
        ConfigError: a line is not understood; the message has its number.
    """
    users: dict[str | None, list[Rule]] = {}
    patterns: list[Rule] = []
    user: str | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not rest:
            raise ConfigError(f"{name}:{number}: {word!r} needs a value")
        match word:
            case "user":
                user = rest
            case "topic":
                users.setdefault(user, []).append(_parse_rule(rest, f"{name}:{number}"))
            case "pattern":
                patterns.append(_parse_rule(rest, f"{name}:{number}"))
            case _:
                raise ConfigError(f"{name}:{number}: {word!r} is not one of user, topic, pattern")
    return Acl({key: _denials_first(rules) for key, rules in users.items()}, _denials_first(patterns))


def _parse_rule(text: str, where: str) -> Rule:
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if not rest:
        return Rule(Access.READWRITE, word)
    if word not in _WORDS:
        raise ConfigError(f"{where}: {word!r} is not one of {', '.join(_WORDS)}")
    return Rule(_WORDS[word], rest)


def _denials_first(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(sorted(rules, key=lambda rule: rule.access is not Access.DENY))


def load_acl(path: Path) -> Acl:
    """Read an ACL file.

    Raises:
        ConfigError: the file cannot be read or a line is not understood.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"ACL file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"ACL file {path}: not UTF-8 text") from error
    return parse_acl(text, str(path))
