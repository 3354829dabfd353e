"""The files that trust metadata names by hash: TOML, so that whoever signs them can read what they sign.

``policy.toml`` is a `Policy`, ``authorities.toml`` the list of keys that may certify. A key that this program does not
know is refused and not passed over: the owners meant something by it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Final, TypeVar

from fleetfed.shared import config
from fleetfed.shared.config import Length
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.trust.verifier import Authority

POLICY: Final = "policy.toml"
AUTHORITIES: Final = "authorities.toml"
DIRECTORY: Final = "directory"
"""What the enrolment service says of its log (`wire.trust.Directory`), in msgpack."""

_MOST_HASHES: Final = 1000

T = TypeVar("T")
Hex32 = Annotated[str, Length(64, 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: Annotated[str, Length(1, 100)]
    key: Hex32
    roles: Annotated[tuple[Annotated[str, Length(1, 32)], ...], Length(1, 16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Authorities:
    authority: Annotated[tuple[_Entry, ...], Length(1, 64)]


def parse_policy(text: str, *, where: str = POLICY) -> Policy:
    """Read a policy; hashes of cards and models are in hex.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    table = _table(text, where)
    cards = _hashes(table.pop("cards", []), f"{where}: cards", "--card")
    models = _hashes(table.pop("models", []), f"{where}: models", "--model")
    return dataclasses.replace(config.build(Policy, table, where=where), cards=cards, models=models)


def render_policy(policy: Policy) -> str:
    """The file of a policy, every setting in it."""
    plain: dict[str, Any] = {each.name: getattr(policy, each.name) for each in dataclasses.fields(policy)}
    floor = plain.pop("privacy")
    lines = [f"{name} = {_toml(value)}" for name, value in plain.items()]
    if floor is not None:
        lines += ["", "[privacy]"]
        lines += [f"{each.name} = {_toml(getattr(floor, each.name))}" for each in dataclasses.fields(floor)]
    return "\n".join((*lines, ""))


def parse_authorities(text: str, *, where: str = AUTHORITIES) -> tuple[Authority, ...]:
    """Read who may certify whom.

    Raises:
        ConfigError: with the file, the key and what to do.
    """
    listed = config.build(_Authorities, _table(text, where), where=where).authority
    try:
        return tuple(
            Authority(bytes.fromhex(each.key), frozenset(Role[role.upper()] for role in each.roles)) for each in listed
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: {error}") from error


def render_authorities(listed: dict[str, Authority]) -> str:
    """The file of named authorities."""
    lines: list[str] = []
    for name, authority in listed.items():
        roles = _toml([role.name.lower() for role in sorted(authority.roles)])
        lines += ["[[authority]]", f'name = "{name}"', f'key = "{authority.public_key.hex()}"', f"roles = {roles}", ""]
    return "\n".join(lines)


def _hashes(found: Any, where: str, option: str) -> tuple[bytes, ...]:
    if not isinstance(found, list) or not all(isinstance(each, str) and len(each) == 64 for each in found):
        raise ConfigError(f"{where}: expected hashes of 64 hex digits; `fleetfed keys policy set {option}` adds one")
    if len(found) > _MOST_HASHES:
        raise ConfigError(f"{where}: at most {_MOST_HASHES}; leave out what no device needs any more")
    try:
        return tuple(bytes.fromhex(each) for each in found)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _table(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _toml(value: Any) -> str:
    if isinstance(value, bytes):
        return f'"{value.hex()}"'
    if isinstance(value, Enum):
        return f'"{value.value}"'
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return str(value)
