"""Which node of a cluster of brokers to connect to next."""

from __future__ import annotations

import zlib

from fleetfed.shared.mqtt.backoff import STABLE
from fleetfed.shared.mqtt.config import ConnectionConfig, split_address


class Addresses:
    """Goes from node to node, and stays where it works.

    The client's id decides where to begin, so that a fleet spreads over the nodes and a member that restarts finds the
    node that it had. Where one node fails the next is tried at once; a pause comes when all have failed.

    Args:
        config: with all the addresses.

    Attributes:
        config: how to connect now: one host, one port.

    Example::

        link = connect(addresses.config)
        at_once = addresses.failed()        # not reached, or thrown out
        at_once = addresses.lost(seconds)   # a connection ended
    """

    def __init__(self, config: ConnectionConfig) -> None:
        places = [(config.host, config.port), *(split_address(each, config.port) for each in config.others)]
        self._nodes = [config.with_defaults(host=host, port=port) for host, port in places]
        self._at = zlib.crc32(config.client_id.encode()) % len(self._nodes)
        self._failed = 0
        self.config = self._nodes[self._at]

    def failed(self) -> bool:
        """There is no connection at this node; returns whether to try the next one without a pause."""
        self._at = (self._at + 1) % len(self._nodes)
        self.config = self._nodes[self._at]
        self._failed += 1
        if self._failed < len(self._nodes):
            return True
        self._failed = 0
        return False

    def lost(self, seconds: float) -> bool:
        """A connection ended that lasted ``seconds``; returns whether to try the next node without a pause."""
        if seconds >= STABLE:
            self._failed = 0
            return False
        return self.failed()
