"""What one process trusts, on disk and in force: it begins with its identity folder and goes on with what is published.

A member whose identity has no ``trust/root.json`` belongs to a fleet without trust metadata: its keeper keeps nothing,
and certificates alone decide. Only the others load TUF.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import lean
from fleetfed.shared.trust.identity import TRUST_DIRECTORY, Identity
from fleetfed.shared.trust.verifier import Trust, Verifier
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.codec import Length
from fleetfed.shared.wire.envelope import KeyId, digest
from fleetfed.shared.wire.fields import Bytes32
from fleetfed.shared.wire.trust import MAX_BUNDLE, MAX_ROOT, TrustBundle

if TYPE_CHECKING:
    from fleetfed.shared.trust.metadata import TrustSet

_log = logging.getLogger(__name__)

_DAY: Final = 86_400_000
WARN_BEFORE: Final = {"root": 30 * _DAY, "targets": 14 * _DAY, "devices": 2 * _DAY, "snapshot": _DAY, "timestamp": 0}
"""How long before a role's expiry people are told, in milliseconds; the coordinator renews the last two by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The state file.

    Attributes:
        pinned: digest of the root in the identity folder; with one of another chain this file is void.
        root, bundle: as in `TrustSet`.
    """

    pinned: Bytes32
    root: Annotated[bytes, Length(1, MAX_ROOT)]
    bundle: Annotated[bytes, Length(0, MAX_BUNDLE)] = b""


class TrustKeeper:
    """See the module.

    Args:
        path: the state file; made when there is something to keep.
        identity: names the pinned root, and a bundle to begin with.
        verifier: gets whatever is verified.

    Raises:
        ConfigError: the identity's root is damaged.
    """

    def __init__(self, path: Path, identity: Identity, verifier: Verifier) -> None:
        self._path = path
        self._pinned = digest(identity.root)
        self._verifier = verifier
        self._set = _open(path, identity, self._pinned) if identity.root else None
        self._install()

    @property
    def bundle(self) -> bytes:
        """The last good bundle that says what is current, as it was received; empty for none."""
        return self._set.bundle if self._set is not None and self.trust is not None and self.trust.expires else b""

    @property
    def kept(self) -> bytes:
        """The last good bundle, whether or not it says what is current; empty for none."""
        return self._set.bundle if self._set is not None else b""

    @property
    def trust(self) -> Trust | None:
        """What is in force."""
        return self._set.trust if self._set is not None else None

    @property
    def coordinators(self) -> frozenset[KeyId]:
        """The coordinators' keys; empty where certificates alone decide."""
        return self.trust.coordinators if self.trust is not None else frozenset()

    def take(self, data: bytes, *, now: int) -> bool:
        """Take a bundle; return whether it is news, which then is durable and in force.

        Raises:
            RemoteProtocolError: it is refused, and why.
        """
        trust = self._set
        if trust is None:
            return False
        root = trust.root
        try:
            news = trust.update(data, now=now)
        except RemoteProtocolError:
            if trust.root != root:
                self._save()
            raise
        if news:
            self._save()
        return news

    def clock(self, own: Callable[[], int]) -> Callable[[], int]:
        """A clock that is never behind what was verified: a device may start without knowing the time."""
        return lambda: max(own(), self.trust.issued if self.trust is not None else 0)

    def status(self, now: int) -> dict[str, Any]:
        """For status files: versions, when it expires, and what is wrong with that; empty without metadata."""
        trust = self.trust
        if trust is None:
            return {}
        return {
            "versions": trust.versions,
            "expiries": trust.expiries,
            "policy": trust.policy.version,
            "expires": trust.expires,
            "stale": now >= trust.expires,
            "warnings": warnings(trust, now),
        }

    def _save(self) -> None:
        assert self._set is not None
        kept = _Kept(pinned=self._pinned, root=self._set.root, bundle=self._set.bundle)
        write_atomic(self._path, codec.encode(kept))
        self._install()

    def _install(self) -> None:
        if self._set is not None:
            # Before the first metadata nobody may speak as coordinator: a pinned root is never passed over.
            self._verifier.install(self._set.trust or Trust())


def warnings(trust: Trust, now: int) -> list[str]:
    """What somebody has to do soon, in words; empty if nothing."""
    if not trust.expires:
        return ["nothing says that the trust metadata is current: no timestamp of the coordinator has come yet"]
    return [text for role, at in trust.expiries.items() if (text := _warning(role, at - now))]


def _warning(role: str, left: int) -> str:
    if left > WARN_BEFORE.get(role, 0):
        return ""
    cure = {
        "root": "run `fleetfed keys renew root`",
        "targets": "run `fleetfed keys renew targets`",
        "devices": "run `fleetfed-enroll publish` there, from a timer",
    }.get(role, "is the coordinator running, and does the broker pass on what it says?")
    days = f"expires in {left / _DAY:.1f} days" if left > 0 else f"expired {-left / _DAY:.1f} days ago: no round counts"
    return f"{role} {days}; {cure}"


def _open(path: Path, identity: Identity, pinned: bytes) -> TrustSet:
    lean.load()
    from fleetfed.shared.trust.metadata import TrustSet

    try:
        pinned_set = TrustSet(identity.root)
    except RemoteProtocolError as error:
        raise ConfigError(f"{TRUST_DIRECTORY}/root.json of the identity folder: {error}; issue it again") from error
    kept = _read(path)
    if kept is not None and _same_fleet(kept, identity, pinned):
        try:
            trust = TrustSet(kept.root)
            if kept.bundle:
                trust.load(kept.bundle)
        except RemoteProtocolError as error:
            _log.warning("%s is of no use: %s", path, error)
        else:
            # An identity that was issued again may bring a newer root. The rest of its bundle is not current.
            with contextlib.suppress(RemoteProtocolError):
                trust.update(identity.bundle, now=0)
            if trust.trust is not None:
                return trust
            pinned_set = trust
    if identity.bundle:
        try:
            pinned_set.load(identity.bundle)
        except RemoteProtocolError as error:
            _log.warning("the identity folder's trust metadata is of no use: %s", error)
    return pinned_set


def _same_fleet(kept: _Kept, identity: Identity, pinned: bytes) -> bool:
    """Whether what was kept and what the identity pins are of one chain of roots."""
    return kept.pinned == pinned or identity.root in _roots(kept.bundle) or kept.root in _roots(identity.bundle)


def _roots(bundle: bytes) -> tuple[bytes, ...]:
    try:
        return codec.decode(TrustBundle, bundle, limit=MAX_BUNDLE).roots
    except RemoteProtocolError:
        return ()


def _read(path: Path) -> _Kept | None:
    try:
        return codec.decode(_Kept, path.read_bytes(), limit=MAX_BUNDLE + MAX_ROOT + 1024)
    except FileNotFoundError:
        return None
    except RemoteProtocolError as error:
        _log.warning("%s is of no use: %s", path, error)
        return None
