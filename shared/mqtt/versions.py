"""Which version of MQTT a broker speaks: 5 first, 3.1.1 where it does not know 5.

An explicit refusal (CONNACK 0x84, or 0x01 from an old broker) is remembered for the life of the process. Some old
brokers just close the connection instead; since a broker that is going down does that too, the answer is 3.1.1 for the
next attempt only. Otherwise one restart at the wrong moment would cost the reason codes of MQTT 5 until the process
ends.
"""

from __future__ import annotations

from typing import Final

from fleetfed.shared.mqtt.config import ConnectionConfig, Protocol

UNSUPPORTED_VERSION: Final = 0x84

_only_v311: set[tuple[str, int]] = set()


class VersionChoice:
    """The version to try next at one broker.

    Example::

        version5 = choice.version5()
        ...connect...
        choice.connected() | choice.refused(code) | choice.closed() | choice.unreachable()
    """

    def __init__(self, config: ConnectionConfig) -> None:
        self._protocol = config.protocol
        self._broker = (config.host, config.port)
        self._closed_on_v5 = False

    def version5(self) -> bool:
        """Whether the next attempt speaks MQTT 5."""
        if self._protocol is not Protocol.AUTO:
            return self._protocol is Protocol.V5
        return self._broker not in _only_v311 and not self._closed_on_v5

    def connected(self) -> None:
        """The broker accepted."""
        self._closed_on_v5 = False

    def unreachable(self) -> None:
        """There was no connection to ask on."""
        self._closed_on_v5 = False

    def refused(self, code: int) -> bool:
        """The broker refused with the MQTT 5 reason ``code``; returns whether to try 3.1.1 at once."""
        if code == UNSUPPORTED_VERSION and self._protocol is Protocol.AUTO and self._broker not in _only_v311:
            _only_v311.add(self._broker)
            return True
        self._closed_on_v5 = False
        return False

    def closed(self) -> bool:
        """The broker closed instead of answering; returns whether to try 3.1.1 at once."""
        if self._protocol is Protocol.AUTO and self.version5():
            self._closed_on_v5 = True
            return True
        self._closed_on_v5 = False
        return False


def forget() -> None:
    """Try MQTT 5 everywhere again."""
    _only_v311.clear()
