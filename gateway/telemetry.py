"""What the devices of the site tell of themselves, kept for whoever looks at it. It decides nothing. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.telemetry import MAX_TELEMETRY, Telemetry


@dataclass(frozen=True, slots=True)
class Told:
    """The last words of a device, and when they came, in unix milliseconds."""

    at: int
    telemetry: Telemetry


class Tales:
    """See the module.

    Args:
        limit: most devices that are remembered.
    """

    def __init__(self, *, limit: int = limits.MAX_COHORT) -> None:
        self._limit = limit
        self._told: dict[str, Told] = {}

    def take(self, device: str, payload: bytes, *, now: int) -> None:
        """Take what a device says.

        Raises:
            RemoteProtocolError: `TOO_LARGE`, `MALFORMED`, or `OVERLOADED` for too many devices.
        """
        telemetry = codec.decode(Telemetry, payload, limit=MAX_TELEMETRY)
        if device not in self._told and len(self._told) >= self._limit:
            raise RemoteProtocolError(RejectReason.OVERLOADED, f"{len(self._told)} devices tell already")
        self._told[device] = Told(now, telemetry)

    def forget(self, device: str) -> None:
        """The device left the site for good."""
        self._told.pop(device, None)

    def __len__(self) -> int:
        return len(self._told)

    def items(self) -> Iterator[tuple[str, Told]]:
        """Devices in the order in which they first told something."""
        return iter(self._told.items())
