"""The topic tree: one definition for publishers, subscribers, both brokers' ACL and the documentation.

Grammar (at most seven slashes, ids ``[a-z0-9_-]{1,48}``)::

    ff1/{fleet}/{site}/{kind}/{id}/{up|dn}/{verb}      one member's own branch below the site that serves it
    ff1/{fleet}/{site}/b/{what}                        what a site tells all of its members; retained
    ff1/{fleet}/{site}/b/blob/{hash}/{index}           one chunk of a content-addressed object; retained

A *site* is served by one node: the site ``_`` by the coordinator, every other site by its gateway. Whoever is
served is a *member* of the site: a device (kind ``d``), a gateway one tier below (``g``), an operator (``o``) or a
helper (``h``), both at ``_`` only. So every tier looks the same, and a tree of any depth needs no other topic.

The identity stands in the topic, where the broker's ACL enforces it; the round stands in the payload, so that
subscriptions never change.

>>> topics = SiteTopics(fleet="demo", site="north")
>>> topics.up(Kind.DEVICE, "d-07", Verb.UPDATE)
'ff1/demo/north/d/d-07/up/update'
>>> parse("ff1/demo/north/d/d-07/up/update")
MemberTopic(fleet='demo', site='north', kind=<Kind.DEVICE: 'd'>, member='d-07', direction=<Direction.UP: 'up'>, \
verb=<Verb.UPDATE: 'update'>)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError

PREFIX: Final = "ff1"
CLOUD_SITE: Final = "_"
"""The site that the coordinator serves."""

_ID: Final = re.compile(r"[a-z0-9_-]{1,48}")
_HASH: Final = re.compile(r"[0-9a-f]{32}")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,4}")


class Kind(StrEnum):
    """What sort of member a branch belongs to."""

    DEVICE = "d"
    GATEWAY = "g"
    OPERATOR = "o"
    HELPER = "h"


class Direction(StrEnum):
    """``up``: the member publishes; ``dn``: the node that serves the site publishes."""

    UP = "up"
    DOWN = "dn"


class Verb(StrEnum):
    """The last level of a member's topic: what is said there."""

    STATE = "state"
    """Retained presence, also the last will."""
    UPDATE = "update"
    """Device: chunks of a signed update."""
    DECLINE = "decline"
    """Device: signed; takes no part in this round, and why."""
    TELEMETRY = "telemetry"
    """Device: unsigned, for people to look at; nothing decides on it."""
    NEED = "need"
    """Any member: a retained chunk that it cannot get; asks its node to publish it again."""
    CENSUS = "census"
    """Gateway: retained; how many devices its subtree has."""
    LINK = "link"
    """Gateway behind a bridge: retained; its site's broker, or that one's will, says ``1`` for up, ``0`` for down."""
    PROPOSE = "propose"
    """Gateway: chunks of a signed list of the updates that it holds."""
    REVEAL = "reveal"
    """Gateway: chunks of a signed partial over exactly the committed set."""
    KEY = "key"
    """Helper: signed, retained; the key that mask seeds are sealed to."""
    MASKS = "masks"
    """Helper: chunks of a signed sum of masks over exactly the committed set."""
    REQUEST = "req"
    """Operator: a signed command."""
    RECEIPT = "receipt"
    """Down: signed; the fate of an update, a proposal or a partial."""
    COMMIT = "commit"
    """Down to a gateway: chunks of the coordinator's signed final set, which outgrows a packet like the proposal."""
    ASK = "ask"
    """Down to a helper: chunks of the coordinator's signed request for the masks of a committed set."""
    RESPONSE = "res"
    """Down to an operator: the signed answer to a command."""


class Broadcast(StrEnum):
    """What a site tells all of its members, retained."""

    NODE = "node"
    """Presence of the node that serves the site, also its last will."""
    MODEL = "model"
    """The coordinator's signed manifest of the current model."""
    PLAN = "plan"
    """The coordinator's signed plan of the round, or its end."""
    COSIGN = "cosign"
    """The gateway's own signed word for the plan, with its key of the round (split mode)."""
    TRUST = "trust"
    """The fleet's trust metadata: root, timestamp, snapshot, targets, policy (each signed for itself)."""
    REVOKED = "revoked"
    """The authority's signed revocation list."""
    STATUS = "status"
    """The coordinator's signed status, for whoever watches (site ``_`` only)."""


@dataclass(frozen=True, slots=True)
class VerbRule:
    """How one verb is used.

    Attributes:
        kinds: which kinds of member have it.
        direction: who publishes.
        qos: MQTT quality of service; 1 where anything depends on arrival.
        retain: whether the broker keeps the last one.
    """

    kinds: tuple[Kind, ...]
    direction: Direction
    qos: int = 1
    retain: bool = False


_DEVICE, _GATEWAY, _OPERATOR, _HELPER = (Kind.DEVICE,), (Kind.GATEWAY,), (Kind.OPERATOR,), (Kind.HELPER,)
_BOTH = (Kind.DEVICE, Kind.GATEWAY)

VERBS: Final[dict[Verb, VerbRule]] = {
    Verb.STATE: VerbRule((*_BOTH, Kind.HELPER), Direction.UP, retain=True),
    Verb.UPDATE: VerbRule(_DEVICE, Direction.UP),
    Verb.DECLINE: VerbRule(_DEVICE, Direction.UP),
    Verb.TELEMETRY: VerbRule(_DEVICE, Direction.UP, qos=0),
    Verb.NEED: VerbRule(_BOTH, Direction.UP),
    Verb.CENSUS: VerbRule(_GATEWAY, Direction.UP, retain=True),
    Verb.LINK: VerbRule(_GATEWAY, Direction.UP, retain=True),
    Verb.PROPOSE: VerbRule(_GATEWAY, Direction.UP),
    Verb.REVEAL: VerbRule(_GATEWAY, Direction.UP),
    Verb.KEY: VerbRule(_HELPER, Direction.UP, retain=True),
    Verb.MASKS: VerbRule(_HELPER, Direction.UP),
    Verb.REQUEST: VerbRule(_OPERATOR, Direction.UP),
    Verb.RECEIPT: VerbRule((*_BOTH, Kind.HELPER), Direction.DOWN),
    Verb.ASK: VerbRule(_HELPER, Direction.DOWN),
    Verb.COMMIT: VerbRule(_GATEWAY, Direction.DOWN),
    Verb.RESPONSE: VerbRule(_OPERATOR, Direction.DOWN),
}


@dataclass(frozen=True, slots=True)
class MemberTopic:
    """A parsed topic of a member's branch."""

    fleet: str
    site: str
    kind: Kind
    member: str
    direction: Direction
    verb: Verb


@dataclass(frozen=True, slots=True)
class BroadcastTopic:
    """A parsed topic that a site's node publishes to all."""

    fleet: str
    site: str
    what: Broadcast


@dataclass(frozen=True, slots=True)
class BlobTopic:
    """A parsed topic of one chunk: ``digest`` is the first 16 bytes of the object's hash."""

    fleet: str
    site: str
    digest: bytes
    index: int


Topic = MemberTopic | BroadcastTopic | BlobTopic


def check_id(text: str, what: str = "id") -> str:
    """Return ``text`` if it may stand in a topic.

    Raises:
        LocalProtocolError: it is empty, too long, or has other characters than ``a-z 0-9 _ -``.
    """
    if _ID.fullmatch(text) is None:
        raise LocalProtocolError(f"{what} {text!r}: use 1 to 48 of the characters a-z, 0-9, '_' and '-'")
    return text


@dataclass(frozen=True, slots=True)
class SiteTopics:
    """Builds the topics and filters of one site.

    Raises:
        LocalProtocolError: an id is not allowed in a topic.
    """

    fleet: str
    site: str

    def __post_init__(self) -> None:
        check_id(self.fleet, "fleet")
        check_id(self.site, "site")

    @property
    def root(self) -> str:
        """The part that all topics of this site share."""
        return f"{PREFIX}/{self.fleet}/{self.site}"

    def up(self, kind: Kind, member: str, verb: Verb) -> str:
        """The topic on which ``member`` says ``verb``."""
        return self._member(kind, member, Direction.UP, verb)

    def down(self, kind: Kind, member: str, verb: Verb) -> str:
        """The topic on which the site's node says ``verb`` to ``member``."""
        return self._member(kind, member, Direction.DOWN, verb)

    def _member(self, kind: Kind, member: str, direction: Direction, verb: Verb) -> str:
        rule = VERBS[verb]
        if rule.direction is not direction or kind not in rule.kinds:
            raise LocalProtocolError(f"{verb.name} is not said {direction} by kind {kind.name}")
        return f"{self.root}/{kind}/{check_id(member)}/{direction}/{verb}"

    def broadcast(self, what: Broadcast) -> str:
        """The retained topic on which the site's node tells all members ``what``."""
        return f"{self.root}/b/{what}"

    def blob(self, digest: bytes, index: int) -> str:
        """The retained topic of chunk ``index`` of the object whose hash begins with ``digest`` (16 bytes)."""
        return f"{self.root}/b/blob/{digest[:16].hex()}/{index}"

    def all_up(self, kind: Kind, verb: Verb) -> str:
        """The filter with which the site's node hears ``verb`` from all members of ``kind``."""
        return f"{self.root}/{kind}/+/{Direction.UP}/{verb}"

    def all_down(self, kind: Kind, member: str) -> str:
        """The filter with which ``member`` hears all that is said to it alone."""
        return f"{self.root}/{kind}/{check_id(member)}/{Direction.DOWN}/+"


def parse(topic: str) -> Topic:
    """Parse a topic that a message came in on.

    Raises:
        RemoteProtocolError: `RejectReason.MALFORMED` if it is none of the project's.
    """
    match topic.split("/"):
        case [prefix, fleet, site, "b", "blob", digest, index] if (
            prefix == PREFIX and _HASH.fullmatch(digest) and _INDEX.fullmatch(index) and _ids(fleet, site)
        ):
            return BlobTopic(fleet, site, bytes.fromhex(digest), int(index))
        case [prefix, fleet, site, "b", what] if (
            prefix == PREFIX and what in Broadcast.__members__.values() and _ids(fleet, site)
        ):
            return BroadcastTopic(fleet, site, Broadcast(what))
        case [prefix, fleet, site, kind, member, direction, verb] if (
            prefix == PREFIX and verb in VERBS and _ids(fleet, site, member)
        ):
            rule = VERBS[Verb(verb)]
            if direction == rule.direction and kind in rule.kinds:
                return MemberTopic(fleet, site, Kind(kind), member, rule.direction, Verb(verb))
    raise RemoteProtocolError(RejectReason.MALFORMED, f"topic {topic[:300]!r}")


def _ids(*texts: str) -> bool:
    return all(_ID.fullmatch(text) for text in texts)
