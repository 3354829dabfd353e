"""The log outside the service: exported, verified against its signed head, and looked through for what should not be.

An export is lines of JSON: the service's fleet and key, each entry in hex, and the signed head::

    {"log": "fleetfed/1", "fleet": "acme", "key": "…"}
    {"entry": "…"}
    {"head": "…"}

Whoever has it needs nothing else to verify it, and an older head is enough to see that nothing was taken back.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.certificates import SERIALS, Certificate, Role
from fleetfed.shared.trust.enrolment import HEAD
from fleetfed.shared.trust.merkle import Tree
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.enrolment import MAX_ENTRY, MAX_HEAD, EntryKind, LogEntry, TreeHead

FORMAT: Final = "fleetfed/1"
_MAX_LINE: Final = 2 * max(MAX_ENTRY, MAX_HEAD) + 100


@dataclass(frozen=True, slots=True)
class Export:
    """An export as it was read; nothing is verified."""

    fleet: str
    key: bytes
    leaves: tuple[bytes, ...]
    head: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """One entry of a verified log, with its certificate."""

    entry: LogEntry
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Log:
    """A verified log."""

    key: bytes
    head: TreeHead
    lines: tuple[Line, ...]


@dataclass(slots=True)
class OwnerFacts:
    """What the log says of one owner."""

    enrolled: int = 0
    renewed: int = 0
    revoked: int = 0
    valid: int = 0
    """Devices with a certificate that is neither revoked nor expired."""


@dataclass(slots=True)
class Audit:
    """What to look at.

    Attributes:
        size: entries.
        owners: by owner.
        growth: devices enrolled, by day (UTC) and owner.
        keys_of_many: keys certified under several ids.
        ids_of_many: ids certified for several keys.
        hardware_of_many: pieces of hardware with several devices that are valid now.
        moved: ids renewed on another piece of hardware than before: copied, or their storage was moved.
        serials_twice: serial numbers given out twice.
    """

    size: int = 0
    owners: dict[str, OwnerFacts] = field(default_factory=dict)
    growth: dict[str, dict[str, int]] = field(default_factory=dict)
    keys_of_many: dict[str, list[str]] = field(default_factory=dict)
    ids_of_many: dict[str, list[str]] = field(default_factory=dict)
    hardware_of_many: dict[str, list[str]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    serials_twice: list[int] = field(default_factory=list)

    @property
    def suspicious(self) -> bool:
        """Whether there is anything that an honest service does not write."""
        return bool(self.keys_of_many or self.ids_of_many or self.hardware_of_many or self.serials_twice)


def export(fleet: str, key: bytes, leaves: Iterable[bytes], head: bytes) -> Iterator[str]:
    """The lines of an export."""
    yield json.dumps({"log": FORMAT, "fleet": fleet, "key": key.hex()})
    for leaf in leaves:
        yield json.dumps({"entry": leaf.hex()})
    yield json.dumps({"head": head.hex()})


def read(path: Path) -> Export:
    """Read an export.

    Raises:
        ConfigError: it is none.
    """
    leaves: list[bytes] = []
    first: dict[str, Any] = {}
    head = b""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE):
                number += 1
                value = json.loads(line)
                if number == 1:
                    if value["log"] != FORMAT:
                        raise ConfigError(f"{path}: format {value['log']!r:.40}, known is {FORMAT!r}")
                    first = {"fleet": str(value["fleet"]), "key": bytes.fromhex(value["key"])}
                elif head:
                    raise ConfigError(f"{path}:{number}: something after the head")
                elif "entry" in value:
                    leaves.append(bytes.fromhex(value["entry"]))
                else:
                    head = bytes.fromhex(value["head"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}:{number}: {error!r}: no line of a log; export it again") from error
    if not first or not head:
        raise ConfigError(f"{path}: it ends without a head; export it again")
    return Export(first["fleet"], first["key"], tuple(leaves), head)


def verify(exported: Export, *, key: bytes | None = None, earlier: Sequence[bytes] = ()) -> Log:
    """Check that the entries are those of the signed head, that each is right, and that nothing was taken back.

    Args:
        exported: what was read.
        key: the service's public key; None: the one that the export names, which the caller has to compare.
        earlier: heads that were seen before.

    Raises:
        ConfigError: it is not so; the message says what.
    """
    key = exported.key if key is None else key
    head = _head(exported.head, key, exported.fleet)
    if head.size != len(exported.leaves):
        raise ConfigError(f"the head speaks of {head.size} entries, the export has {len(exported.leaves)}")
    tree = Tree(exported.leaves)
    if tree.root() != head.root:
        raise ConfigError("the entries are not those that the head was signed for: the log was changed")
    for data in earlier:
        old = _head(data, key, exported.fleet)
        if old.size > head.size or tree.root(old.size) != old.root:
            raise ConfigError(
                f"the log of {old.size} entries that was signed before is not the beginning of this one: "
                "the service has rewritten its past"
            )
    return Log(key, head, tuple(_line(index, leaf, key, head) for index, leaf in enumerate(exported.leaves)))


def _head(data: bytes, key: bytes, fleet: str) -> TreeHead:
    try:
        head = HEAD.open(data, key=key).body
    except RemoteProtocolError as error:
        raise ConfigError(f"the head is not signed by {key.hex()}: {error}") from error
    if head.fleet != fleet:
        raise ConfigError(f"the head is of fleet {head.fleet}, not {fleet}")
    return head


def _line(index: int, leaf: bytes, key: bytes, head: TreeHead) -> Line:
    try:
        entry = codec.decode(LogEntry, leaf, limit=MAX_ENTRY)
        if entry.kind is EntryKind.REVOKED:
            return Line(entry, None)
        certificate = certificates.verify(entry.certificate, key)
    except RemoteProtocolError as error:
        raise ConfigError(f"entry {index}: {error}") from error
    if certificate.role is not Role.DEVICE or certificate.fleet != head.fleet:
        raise ConfigError(f"entry {index}: a certificate for a {certificate.role.name} of {certificate.fleet}")
    return Line(entry, certificate)


def audit(log: Log, *, now: int) -> Audit:
    """Look through a verified log.

    Args:
        log: verified.
        now: unix milliseconds; decides what is valid.
    """
    found = Audit(size=len(log.lines))
    ids: defaultdict[bytes, set[str]] = defaultdict(set)
    keys: defaultdict[str, set[bytes]] = defaultdict(set)
    hardware: dict[str, bytes] = {}
    serials: Counter[int] = Counter()
    newest: dict[str, Certificate] = {}
    device_of: dict[int, str] = {}
    revoked: set[str] = set()
    for line in log.lines:
        entry, certificate = line.entry, line.certificate
        if certificate is None:
            revoked.update(device_of[serial] for serial in entry.serials if serial in device_of)
            continue
        owner = found.owners.setdefault(certificate.owner, OwnerFacts())
        serials[certificate.serial] += 1
        device_of[certificate.serial] = certificate.id
        ids[certificate.public_key].add(certificate.id)
        keys[certificate.id].add(certificate.public_key)
        if entry.kind is EntryKind.ENROLLED:
            owner.enrolled += 1
            day = datetime.fromtimestamp(entry.at / 1000, UTC).date().isoformat()
            growth = found.growth.setdefault(day, {})
            growth[certificate.owner] = growth.get(certificate.owner, 0) + 1
        else:
            owner.renewed += 1
            if hardware.get(certificate.id) != entry.hardware and certificate.id not in found.moved:
                found.moved.append(certificate.id)
        hardware[certificate.id] = entry.hardware
        newest[certificate.id] = certificate
    valid: defaultdict[bytes, list[str]] = defaultdict(list)
    for name, certificate in newest.items():
        owner = found.owners[certificate.owner]
        owner.revoked += name in revoked
        if name not in revoked and certificate.not_after >= now:
            owner.valid += 1
            valid[hardware[name]].append(name)
    found.keys_of_many = {key.hex(): sorted(each) for key, each in ids.items() if len(each) > 1}
    found.ids_of_many = {name: sorted(key.hex() for key in each) for name, each in keys.items() if len(each) > 1}
    found.hardware_of_many = {each.hex(): sorted(names) for each, names in valid.items() if len(names) > 1}
    found.serials_twice = sorted(
        serial for serial, count in serials.items() if count > 1 or serial // SERIALS != min(serials) // SERIALS
    )
    return found
