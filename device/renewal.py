"""Renews the device's certificates while it runs: at half of their life, in a thread of its own, until it is done.

Rounds never wait for it. A failure is logged and tried again, ever more rarely, up to once in six hours; there is half
of a certificate's life to succeed in.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetfed.device.notes import Notes
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate
from fleetfed.shared.trust.identity import Identity

_log = logging.getLogger(__name__)

_FIRST: Final = 60.0
_RAREST: Final = 6 * 3600.0
_LOOK: Final = 3600.0
"""Seconds between two looks at the clock, which may be put right while we wait."""
_SPREAD: Final = 0.1
"""Part of a certificate's life over which devices that were enrolled together spread."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """There is a new certificate; it is on disk already."""

    identity: Identity


def due(certificate: Certificate) -> int:
    """When to renew a certificate, in unix milliseconds: at half of its life, or a little later, by the device's id."""
    life = certificate.not_after - certificate.not_before
    share = int.from_bytes(hashlib.blake2b(certificate.id.encode(), digest_size=4).digest()) / 2**32
    return certificate.not_before + life // 2 + int(life * _SPREAD * share)


class Renewal:
    """Decides when to ask; `step` does one thing and returns how long to wait.

    Args:
        directory: the identity folder.
        clock: unix milliseconds.
        done: takes what came of it; any thread.
        rng: spreads retries.
        ask: as for `enroll.renew`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], int],
        done: Callable[[Renewed], None],
        rng: random.Random | None = None,
        ask: Callable[[str, bytes], bytes] | None = None,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._done = done
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load, nothing secret
        self._ask = ask
        self._failures = 0

    def step(self) -> float:
        """Renew if it is time; return the seconds until the next step."""
        # Imported late: a device that was issued its certificates never comes here.
        from fleetfed.device import enroll

        try:
            certificate = Identity.load(self._directory).certificate
            now = self._clock()
            if now < due(certificate):
                return min(_LOOK, max(1.0, (due(certificate) - now) / 1000))
            identity = enroll.renew(self._directory, now=now, ask=self._ask)
        except RemoteProtocolError as error:
            what = "enrol it anew" if error.reason in _FINAL else "ask who runs the enrolment service"
            return self._failed(f"refused: {error}; {what}")
        except (enroll.NotReachedError, ConfigError, OSError) as error:
            return self._failed(str(error))
        if identity.certificate.serial == certificate.serial:
            return self._failed("the service gave the old certificate again; is this clock right?")
        self._failures = 0
        _log.info(
            "certificate renewed until %d, serial %d", identity.certificate.not_after, identity.certificate.serial
        )
        self._done(Renewed(identity))
        return _LOOK

    def _failed(self, why: str) -> float:
        bound = min(_RAREST, _FIRST * 2 ** min(self._failures, 16))
        self._failures += 1
        wait = self._rng.uniform(bound / 2, bound)
        _log.warning("certificate not renewed, next attempt in %.0f min: %s", wait / 60, why)
        return wait


_FINAL: Final = frozenset({RejectReason.REVOKED, RejectReason.NOT_ENROLLED, RejectReason.CLONED_KEY})


class RenewalThread:
    """A thread that steps a `Renewal` until it is stopped; none where the identity names no service."""

    def __init__(self, directory: Path, renewal: Renewal) -> None:
        self._renewal = renewal
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if Notes.load(directory).url:
            self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> None:
        """End as soon as no request is on its way; an answer to one is asked for again at the next start."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._renewal.step()):
            pass
